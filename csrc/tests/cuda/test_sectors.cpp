// Number of 32-byte sectors that the kernels' warps request on ResNet-18's parameters (CIFAR stem), against the
// minimum: every sector that a launch accesses, moved once in each direction. It bounds the used bandwidth without a
// GPU. Prints the table that is kept in benchmarks/results/sectors.md.
#include <cstdio>
#include <map>
#include <memory>

#include "check.h"
#include "delfast/cuda_launch.h"
#include "delfast/mask_plan.h"

namespace delfast::test {
namespace {

using Results = std::map<std::string, cuda_on_cpu::SectorCounter::Result>;

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// float32 memory, `shift` elements past a multiple of 256 bytes, as torch's allocator gives them.
class Memory {
 public:
  Memory(int64_t count, int shift) : shift_(shift) {
    memory_.reset(static_cast<float*>(std::aligned_alloc(256, size_t((count + shift) * 4 + 255) / 256 * 256)));
    for (int64_t i = 0; i < count; i++) data()[i] = float((i * 2654435761u % 1000003) + 1) * 1e-6f;
  }
  float* data() { return memory_.get() + shift_; }

 private:
  int shift_;
  std::unique_ptr<float, Free> memory_;
};

std::vector<Layout> resnet18() {
  std::vector<Layout> list;
  const auto conv = [&](int64_t out, int64_t in, int64_t kernel) {
    list.push_back({out, in * kernel * kernel, 1});
    list.push_back({out, 1, 1});  // BatchNorm's weight
    list.push_back({out, 1, 1});  // and bias
  };
  conv(64, 3, 3);
  int64_t in = 64;
  for (int64_t out : {64, 128, 256, 512}) {
    for (int block = 0; block < 2; block++) {
      conv(out, in, 3);
      conv(out, out, 3);
      if (in != out) conv(out, in, 1);
      in = out;
    }
  }
  list.push_back({10, 512, 1});
  list.push_back({10, 1, 1});
  return list;
}

struct Model {
  std::vector<Layout> layouts;
  std::vector<Memory> theta, grad;
  std::vector<Scored> scored;
  std::vector<int64_t> top;
  int64_t numel = 0;

  Model(std::vector<Layout> shapes, int theta_shift, int grad_shift) : layouts(std::move(shapes)) {
    for (const Layout& layout : layouts) {
      theta.emplace_back(layout.numel(), theta_shift);
      grad.emplace_back(layout.numel(), grad_shift);
      scored.push_back({theta.back().data(), grad.back().data(), Dtype::float32, Dtype::float32, layout});
      top.push_back(std::max<int64_t>(1, layout.length / 10));
      numel += layout.numel();
    }
  }
  int64_t count() const { return int64_t(layouts.size()); }
};

void print(const char* what, const char* kernel, const cuda_on_cpu::SectorCounter::Result& r) {
  std::printf("| %s | `%s` | %llu | %llu | %.3f |\n", what, kernel,
              static_cast<unsigned long long>(r.loads.asked + r.stores.asked),
              static_cast<unsigned long long>(r.loads.least + r.stores.least), r.ratio());
}

// Prints every kernel of a family, and the family if it has several kernels; checks the family's ratio.
double report_family(const char* what, const std::string& family, const Results& results) {
  cuda_on_cpu::SectorCounter::Result sum;
  int kernels = 0;
  for (const auto& [name, r] : results) {
    if (name.rfind(family, 0) != 0) continue;
    kernels++;
    print(what, name.c_str(), r);
    sum.loads.asked += r.loads.asked;
    sum.loads.least += r.loads.least;
    sum.stores.asked += r.stores.asked;
    sum.stores.least += r.stores.least;
  }
  CHECK(kernels > 0);
  if (kernels > 1) print(what, (family + "*").c_str(), sum);
  return sum.ratio();
}

Results score(Model& model, Aggregate aggregate = Aggregate::topk_mean) {
  std::vector<float> out(20000);
  std::vector<uint4> workspace(
      size_t(cuda::criticality_workspace(model.scored.data(), model.top.data(), model.count(), aggregate)) / 16 + 1);
  cuda_on_cpu::sectors.start();
  CHECK(!cuda::criticality(model.scored.data(), model.top.data(), model.count(), Criterion::weighted_grad, aggregate,
                           out.data(), workspace.data(), nullptr));
  return cuda_on_cpu::sectors.stop();
}

Results select(Model& model) {
  std::vector<uint8_t> bits(size_t(model.numel / 8 + model.count()));
  std::vector<uint4> workspace(size_t(cuda::select_elements_workspace(model.scored.data(), model.count())) / 16 + 1);
  ElementsInfo info;
  cuda_on_cpu::sectors.start();
  CHECK(!cuda::select_elements(model.scored.data(), model.count(), Criterion::weighted_grad, model.numel * 3 / 10,
                               bits.data(), &info, workspace.data(), nullptr));
  CHECK_EQUAL(info.nonfinite, int64_t(-1));
  CHECK_EQUAL(info.positive, model.numel * 3 / 10);
  return cuda_on_cpu::sectors.stop();
}

enum class Update { reset, sgd, adamw };

// Every third row, or element, is masked.
Results update(Model& model, Update kind, bool by_row) {
  std::vector<std::vector<uint8_t>> bits;
  std::vector<Updated> params;
  const int states = kind == Update::adamw ? 2 : 1;
  int64_t entries = 0;  // values of the state
  for (size_t p = 0; p < model.layouts.size(); p++) {
    const Layout& layout = model.layouts[p];
    const int64_t units = by_row ? layout.rows : layout.numel();
    bits.emplace_back(size_t((units + 7) / 8));
    for (int64_t i = 0; i < units; i += 3) bits.back()[size_t(i / 8)] |= uint8_t(1u << i % 8);
    entries += padded_state((units + 2) / 3 * (by_row ? layout.length : 1) * states);
    Updated u;
    u.param = model.theta[p].data();
    u.source = model.grad[p].data();
    u.layout = layout;
    u.bits = bits.back().data();
    u.by_row = by_row;
    params.push_back(u);
  }
  Memory state(entries, 0);
  std::vector<float> steps(params.size());
  const MaskPlanShape shape(params.data(), model.count());
  std::vector<uint4> plan(size_t(shape.bytes()) / 16 + 1);
  std::vector<uint4> of_plan(size_t(cuda::mask_plan_workspace(params.data(), model.count())) / 16 + 1);
  CHECK(!cuda::mask_plan(params.data(), model.count(), plan.data(), of_plan.data(), nullptr));
  std::vector<uint4> workspace(size_t(cuda::masked_update_workspace(model.count())) / 16 + 1);
  const cuda::StepInputs inputs = {state.data(), entries, steps.data(), nullptr, nullptr};
  cuda_on_cpu::sectors.start();
  const char* error = kind == Update::reset
                          ? cuda::masked_reset(params.data(), model.count(), plan.data(), workspace.data(), nullptr)
                      : kind == Update::sgd
                          ? cuda::masked_sgd(params.data(), model.count(), inputs, {0.1, 0.9, 0, 0, false, false},
                                             plan.data(), workspace.data(), nullptr)
                          : cuda::masked_adamw(params.data(), model.count(), inputs, {1e-3, 0.9, 0.999, 1e-8, 0, false},
                                               plan.data(), workspace.data(), nullptr);
  CHECK(!error);
  return cuda_on_cpu::sectors.stop();
}

void check_model(const char* what, int theta_shift, int grad_shift, double bound) {
  Model model(resnet18(), theta_shift, grad_shift);
  CHECK_EQUAL(model.numel, int64_t(11173962));
  describe(what, ", criticality");
  CHECK(report_family(what, "criticality", score(model)) <= bound);
  const Results selected = select(model);
  describe(what, ", selection_read");
  CHECK(report_family(what, "selection_read", selected) <= bound);
  uint64_t asked = 0;
  for (const auto& [name, r] : selected) asked += r.loads.asked + r.stores.asked;
  const double readings = double(asked) / (double(model.numel) * 8 / 32);
  std::printf("| %s | `selection_*`, times one reading | | | %.3f |\n", what, readings);
  CHECK(readings < 2);  // with the sample, its counts, the candidates and the bits: no second reading
  const std::pair<Update, const char*> updates[] = {
      {Update::reset, "reset"}, {Update::sgd, "SGD with momentum"}, {Update::adamw, "AdamW"}};
  for (const auto& [kind, name] : updates)
    for (bool by_row : {true, false}) {
      const std::string title = std::string(what) + ", " + name + (by_row ? ", rows" : ", elements");
      describe(title);
      const double ratio = report_family(title.c_str(), "masked_update", update(model, kind, by_row));
      CHECK(ratio <= bound);
    }
}

// Rows in pieces: GPT-2's two projections, outputs innermost, and transposed convolutions.
void report_pieces() {
  struct Case {
    const char* what;
    Layout layout;
    int64_t piece;
    double top_bound, mean_bound;
  };
  const Case cases[] = {
      {"768 to 3072, outputs innermost", {3072, 768, 1}, 1, 1.02, 1.02},
      // four rows of 3072 fit in a block, which is half a sector; two of 8192, the longest that are read in place
      {"3072 to 768, outputs innermost", {768, 3072, 1}, 1, 2.02, 1.02},
      {"8192 to 256, outputs innermost", {256, 8192, 1}, 1, 4.02, 1.02},
      {"256 to 128, transposed 4 x 4", {128, 4096, 1}, 16, 1.02, 1.02},
      // stretches of 4.5 sectors, and of 18; an input may be in two of a mean's chunks
      {"256 to 128, transposed 3 x 3", {128, 2304, 1}, 9, 1.2, 1.1},
      {"8 experts, 512 to 256", {256, 4096, 1}, 512, 1.02, 1.02},
      // element by element, from any place in a sector: a warp requests five sectors instead of four, or six where a
      // stretch ends
      {"64 to 33, transposed 3 x 3", {33, 576, 1}, 9, 1.5, 1.4},
  };
  for (const Case& c : cases)
    for (Aggregate aggregate : {Aggregate::topk_mean, Aggregate::mean}) {
      Model model({c.layout}, 0, 0);
      model.scored[0].piece = c.piece;
      const bool mean = aggregate == Aggregate::mean;
      const std::string title = std::string(c.what) + (mean ? ", mean" : ", top tenth");
      describe(title);
      CHECK(report_family(title.c_str(), "criticality", score(model, aggregate)) <=
            (mean ? c.mean_bound : c.top_bound));
    }
}

}  // namespace
}  // namespace delfast::test

int main() {
  using namespace delfast::test;
  std::printf(
      "# Sectors that the CUDA kernels request\n\n"
      "Written by `build/kernels/tests/release/cuda/test_sectors > benchmarks/results/sectors.md`. The kernels run on "
      "the CPU; "
      "32-byte\n"
      "sectors are counted as a warp's instructions would request them. \"Least\": every sector that a launch touches, "
      "once.\n"
      "ResNet-18 with 10 classes and the CIFAR stem, float32. In \"shifted\" all parameters and gradients begin one "
      "element\n"
      "past an aligned address, in \"apart\" the parameters alone do. A third of the rows, or elements, is updated.\n"
      "Below are weights whose outputs lie along another dimension, read where they are, and long rows.\n\n"
      "| | kernel | sectors requested | least | ratio |\n|---|---|---|---|---|\n");
  check_model("aligned", 0, 0, 1.10);
  check_model("shifted", 1, 1, 1.25);
  check_model("apart", 1, 0, 1.25);
  report_pieces();
  {
    // too long for shared memory: sampled, then read for the threshold and for the sum
    Model model({{40, 25088, 1}}, 0, 0);
    const Results results = score(model);
    describe("rows of 25088");
    CHECK(report_family("rows of 25088", "criticality", results) <= 1.10);
    uint64_t asked = 0;
    for (const auto& [name, r] : results) asked += r.loads.asked + r.stores.asked;
    const double once = double(model.numel) * 8 / 32;
    std::printf(
        "\nRows of 25088 elements do not fit in a block's shared memory: a sample gives the bracket of a row's h-th\n"
        "largest, one reading lists what lies inside, one more sums: %.2f times the sectors of one reading in all.\n",
        double(asked) / once);
    CHECK(double(asked) / once < 2.5);
  }
  if (failures) report();
  return failures ? 1 : 0;
}
