// Masked updates by the CUDA kernels, run on the CPU, against the scalar CPU kernels: equal to the bit, for every
// schedule of threads and order of blocks. What the CPU kernels compute is checked in test_masked_update.cpp.
#include <cmath>

#include "cases.h"

namespace delfast::test {
namespace {

enum class Masked { nothing, everything, some, ends };

struct Param {
  Layout layout;
  Array values, source;
  Guarded<uint8_t> bits;
  bool by_row;
  int64_t entries = 0;  // masked

  Param(Layout layout, bool by_row, Dtype dtype, Dtype source_dtype, Masked masked, int64_t shift, int64_t source_shift,
        Random& random)
      : layout(layout),
        values(dtype, layout.numel(), shift),
        source(source_dtype, layout.numel(), source_shift),
        bits(((by_row ? layout.rows : layout.numel()) + 7) / 8),
        by_row(by_row) {
    for (int64_t i = 0; i < layout.numel(); i++) {
      values.set(i, random.value());
      source.set(i, random.value());
    }
    std::fill(bits.begin(), bits.end(), uint8_t(0));
    const int64_t units = by_row ? layout.rows : layout.numel();
    for (int64_t i = 0; i < units; i++) {
      const bool set = masked == Masked::everything || (masked == Masked::some && random.below(3) == 0) ||
                       (masked == Masked::ends && (i == 0 || i == units - 1));
      bits[i / 8] |= uint8_t(set << i % 8);
      entries += set * (by_row ? layout.length : 1);
    }
  }
  Updated updated() {
    Updated u;
    u.param = values.data();
    u.source = source.data();
    u.param_dtype = values.dtype();
    u.source_dtype = source.dtype();
    u.layout = layout;
    u.bits = bits.data();
    u.by_row = by_row;
    return u;
  }
};
using List = std::vector<Param>;

List awkward_list(Random& random) {
  List list;
  const auto add = [&](Layout layout, bool by_row, Dtype dtype, Dtype source, Masked masked) {
    const int64_t n = int64_t(list.size());
    list.emplace_back(layout, by_row, dtype, source, masked, n % 5, n % 7 == 3 ? n % 5 + 1 : n % 5, random);
  };
  int n = 0;  // so that each length meets each kind of mask
  for (Dtype dtype : kDtypes)
    for (Dtype source : kDtypes) {
      for (bool by_row : {true, false})
        for (int64_t length : {1, 31, 32, 33, 1000, 4608})
          add({length == 1 ? 37 : length < 1000 ? 9 : 3, length, 1}, by_row, dtype, source, Masked(n++ % 4));
      n++;
    }
  for (Dtype dtype : kDtypes)
    for (bool by_row : {true, false})
      add({3, 70000, 1}, by_row, dtype, Dtype::float32, by_row ? Masked::ends : Masked::some);
  add({20000, 3, 1}, true, Dtype::float32, Dtype::float32, Masked::some);  // rows in several counted stretches
  const int64_t many = kFewCases ? 65539 : 1000003;                        // elements of more than one tile
  add({1, many, 1}, true, Dtype::float32, Dtype::float32, Masked::everything);
  add({1, many, 1}, false, Dtype::bfloat16, Dtype::float32, Masked::some);
  for (Layout layout : {Layout{5, 63, 9}, Layout{3, 2, 2}, Layout{37, 1899, 9}})
    for (bool by_row : {true, false}) add(layout, by_row, Dtype::float32, kSecondHalf, Masked::some);
  return list;
}

List many(Random& random) {
  List list;
  for (int i = 0; i < 300; i++)
    list.emplace_back(Layout{random.below(9), 1 + random.below(70), 1}, i % 2 == 0, random.dtype(), random.dtype(),
                      Masked(random.below(4)), random.below(8), random.below(8), random);
  return list;
}

struct Update {
  const char* name;
  int states;
  cuda::SgdOptions sgd{};
  cuda::AdamWOptions adamw{};
};
const Update kUpdates[] = {
    // AdamW's rates are floats, so that one from the device is the same
    {"reset", 0},
    {"SGD", 0, {0.1, 0, 0, 5e-4, false, true}},
    {"SGD with momentum", 1, {0.015, 0.9, 0.3, 5e-4, false, false}},
    {"SGD with Nesterov momentum", 1, {0.015, 0.9, 0, 0, true, false}},
    {"AdamW", 2, {}, {0x1p-10, 0.9, 0.999, 1e-8, 0.01, false}},
    {"AdamW, to maximize", 2, {}, {0x1p-10, 0.5, 0.9, 1e-3, 0, true}},
};

// The documented step on the CPU. `state` is flat, as for the op.
void step_on_cpu(List& list, const Update& update, float* state, float* steps, double grad_scale) {
  const auto& kernels = cpu::masked_update(cpu::Isa::scalar);
  for (size_t i = 0; i < list.size(); i++) {
    Updated u = list[i].updated();
    for (int s = 0; s < update.states; s++, state += list[i].entries) u.state[s] = state;
    const int64_t end = list[i].by_row ? u.layout.rows : u.layout.numel();
    const double taken = steps[i];
    const auto [lr, momentum, dampening, weight_decay, nesterov, maximize] = update.sgd;
    const float unscale = float(1 / grad_scale) * (maximize || update.adamw.maximize ? -1.0f : 1.0f);
    // elements go by chunks, as from the binding
    const int64_t chunk = list[i].by_row ? std::max<int64_t>(end, 1) : cpu::kChunk;
    int64_t rank = 0;
    for (int64_t begin = 0; begin < end; begin += chunk) {
      const int64_t stop = std::min(end, begin + chunk);
      if (update.states == 2) {
        const auto& a = update.adamw;
        kernels.adamw(u,
                      {float(a.beta1), float(1 - a.beta1), float(a.beta2), float(1 - a.beta2), float(a.eps),
                       float(a.lr / (1 - std::pow(a.beta1, taken + 1))),
                       float(std::sqrt(1 - std::pow(a.beta2, taken + 1))), float(1 - a.lr * a.weight_decay), unscale},
                      begin, stop, rank);
      } else if (std::string(update.name) == "reset") {
        kernels.reset(u, begin, stop, rank);
      } else {
        kernels.sgd(
            u, {float(lr), float(momentum), float(1 - dampening), float(weight_decay), unscale, nesterov, taken == 0},
            begin, stop, rank);
      }
      for (int64_t b = begin; b < stop; b++) rank += u.bits[b / 8] >> b % 8 & 1;
    }
    steps[i] += 1;
  }
}

bool same_memory(const Array& a, const Array& b) {
  return !std::memcmp(a.data(), b.data(), size_t(a.size() * size_of(a.dtype())));
}

void check(const List& list, const Update& update, const std::vector<uint64_t>& seeds, const std::string& what,
           Random& random) {
  int64_t state_numel = 0;
  for (const Param& p : list) state_numel += update.states * p.entries;
  const int64_t count = int64_t(list.size());
  Guarded<float> state(state_numel, random.below(4)), steps(count);
  for (float& x : state) x = std::fabs(random.value());
  for (float& x : steps) x = float(random.below(3));
  Guarded<float> grad_scale(1);
  grad_scale[0] = 512;

  List expected = list;
  Guarded<float> expected_state = state, expected_steps = steps;
  step_on_cpu(expected, update, expected_state.data(), expected_steps.data(), 512);

  enum class Skip { no, zero, yes };
  for (uint64_t seed : seeds)
    for (Skip skip : {Skip::no, Skip::zero, Skip::yes}) {
      if (update.states == 0 && std::string(update.name) == "reset" && skip != Skip::no) continue;
      if (skip != Skip::no && seed != seeds.back()) continue;
      if (skip == Skip::zero && kFewCases) continue;
      describe(what, ", ", update.name, ", seed ", seed, ", found_inf ", int(skip));
      cuda_on_cpu::set_seed(seed);
      List changed = list;
      Guarded<float> changed_state = state, changed_steps = steps, found_inf(1);
      found_inf[0] = skip == Skip::yes;
      std::vector<Updated> params;
      for (Param& p : changed) params.push_back(p.updated());
      Workspace workspace(cuda::masked_update_workspace(params.data(), count));
      cuda::StepInputs inputs = {changed_state.data(), state_numel, changed_steps.data(), grad_scale.data(),
                                 skip == Skip::no ? nullptr : found_inf.data()};
      cuda::SgdOptions sgd = update.sgd;
      cuda::AdamWOptions adamw = update.adamw;
      Guarded<float> lr(1);
      if (skip == Skip::zero) {  // the rate from the device, and none among the options
        lr[0] = float(update.states == 2 ? adamw.lr : sgd.lr);
        inputs.lr = lr.data();
        sgd.lr = adamw.lr = std::nan("");
      }
      const char* error = update.states == 2
                              ? cuda::masked_adamw(params.data(), count, inputs, adamw, workspace.get(), kStream)
                          : std::string(update.name) == "reset"
                              ? cuda::masked_reset(params.data(), count, kStream)
                              : cuda::masked_sgd(params.data(), count, inputs, sgd, workspace.get(), kStream);
      CHECK(error == nullptr);
      const bool moved = skip != Skip::yes;
      for (size_t i = 0; i < list.size(); i++) {
        describe(what, ", ", update.name, ", seed ", seed, ", found_inf ", int(skip), ", parameter ", i, ", ",
                 list[i].by_row ? "rows of " : "elements of ", list[i].layout.length, ", ",
                 name(list[i].values.dtype()), " from ", name(list[i].source.dtype()));
        CHECK(same_memory(changed[i].values, moved ? expected[i].values : list[i].values));
      }
      describe(what, ", ", update.name, ", seed ", seed, ", found_inf ", int(skip), ", state and steps");
      const auto same = [](Guarded<float>& a, Guarded<float>& b) { return std::equal(a.begin(), a.end(), b.begin()); };
      CHECK(same(changed_state, moved ? expected_state : state));
      if (std::string(update.name) != "reset") CHECK(same(changed_steps, moved ? expected_steps : steps));
    }
}

// The number of masked entries is known on the device alone; a state that does not fit it must stop there.
void state_of_another_mask(Random& random) {
  List list;
  list.emplace_back(Layout{9, 33, 1}, true, Dtype::float32, Dtype::float32, Masked::some, 0, 0, random);
  const List before = list;
  std::vector<Updated> params = {list[0].updated()};
  Guarded<float> state(list[0].entries + 1), steps(1);
  steps[0] = 0;
  Workspace workspace(cuda::masked_update_workspace(params.data(), 1));
  describe("a state of another mask");
  bool trapped = false;
  try {
    cuda::masked_sgd(params.data(), 1, {state.data(), state.size(), steps.data(), nullptr, nullptr}, kUpdates[2].sgd,
                     workspace.get(), kStream);
  } catch (const std::exception&) {
    trapped = true;
  }
  CHECK(trapped);
  CHECK(same_memory(list[0].values, before[0].values));
  CHECK_EQUAL(steps[0], 0.0f);
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast::test;
  const std::vector<uint64_t> list = seeds(argc, argv);
  Random random(7);
  const List awkward = awkward_list(random), three_hundred = many(random);
  for (const Update& update : kUpdates) {
    check(awkward, update, list, "awkward", random);
    check(three_hundred, update, list, "300 parameters", random);
    check({}, update, list, "no parameters", random);
  }
  state_of_another_mask(random);
  return report();
}
