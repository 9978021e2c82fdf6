// Per-example sums by mma.sync, run on the CPU: every tile on layers that its kernel supports, on GPUs of few and many
// blocks, against a loop in double precision. The bits must be the same for every schedule and for every time at which
// asynchronous copies may complete, with no bank conflict and at most two launches. All other layers go to
// per_example_tiles.
#include "cuda/per_example_variants.h"
#include "per_example_problems.h"

namespace delfast::test {
namespace {

// Builds with few instances have these two tiles.
const std::vector<std::string>& variants() {
  static const std::vector<std::string> all = {"64x64", "64x128", "128x128", "64x192"}, few = {"64x64", "64x192"};
  return kFewInstances ? few : all;
}
const std::vector<Dtype>& operands() {
  static const std::vector<Dtype> all = {Dtype::bfloat16, Dtype::float16, Dtype::float32},
                                  few = {Dtype::bfloat16, Dtype::float32};
  return kFewInstances ? few : all;
}

const std::vector<Geometry>& layers() {
  static const std::vector<Geometry> list = {
      {"3x3", conv(3, 24, 40, {4, 4}, {3, 3}, {1, 1}, {1, 1})},
      {"linear, two positions", linear(9, 2, 16, 8)},
      {"1x1, stride 2", conv(3, 64, 136, {9, 7}, {1, 1}, {2, 2}, {0, 0})},
      {"linear, 17 positions", linear(3, 17, 72, 136)},
      {"3x3, stride 2", conv(3, 136, 136, {5, 3}, {3, 3}, {2, 2}, {1, 1})},
      {"1-d, dilated", conv(3, 16, 24, {19}, {5}, {1}, {4}, {3})},
      {"linear, many examples", linear(40, 4, 16, 24)},
      {"3x3, dilated", conv(3, 24, 32, {9, 9}, {3, 3}, {1, 1}, {2, 2}, {2, 2})},
      {"5x5, stride 2", conv(3, 8, 16, {6, 8}, {5, 5}, {2, 2}, {2, 2})},
      {"linear, 16 positions", linear(7, 16, 64, 64)},
      {"1-d, stride 2", conv(5, 8, 16, {33}, {3}, {2}, {1})},
      {"a column of pixels", conv(3, 16, 24, {9, 1}, {3, 3}, {1, 1}, {1, 1})},
      {"strides and dilations that differ", conv(2, 8, 24, {8, 11}, {2, 3}, {1, 3}, {1, 2}, {3, 1})},
      {"more padding than input", conv(2, 8, 8, {2, 2}, {5, 5}, {1, 1}, {4, 4})},
      {"1x1", conv(3, 136, 72, {7, 7}, {1, 1}, {1, 1}, {0, 0})},
      {"1x1 of three dimensions", conv(3, 24, 16, {2, 3, 4}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0})},
      {"linear, 33 positions", linear(3, 33, 200, 136)},
      {"3x3, several stages", conv(5, 72, 72, {7, 7}, {3, 3}, {1, 1}, {1, 1})},
  };
  return list;
}

PerExample arguments(const Problem& problem, float* sums, Transform transform) {
  return {problem.inputs.data(),  problem.output_grad.data(),  sums,
          problem.inputs.dtype(), problem.output_grad.dtype(), transform,
          problem.shape};
}

void check(const Geometry& geometry, const Problem& problem, const std::string& variant, Transform transform,
           int multiprocessors, const std::vector<uint64_t>& seeds) {
  std::vector<float> first;
  cuda_on_cpu::device.number = multiprocessors;
  CHECK(cuda::force_per_example_variant(variant.c_str()));
  for (uint64_t seed : seeds) {
    describe(variant, ", ", geometry.name, ", ", name(problem.inputs.dtype()),
             transform == Transform::abs ? ", abs" : ", square", ", ", multiprocessors, " blocks, seed ", seed);
    cuda_on_cpu::set_seed(seed);
    Guarded<float> sums(int64_t(problem.before.size()));
    std::copy(problem.before.begin(), problem.before.end(), sums.begin());
    const PerExample p = arguments(problem, sums.data(), transform);
    CHECK(cuda::per_example_variant(p, true) == variant);
    Workspace workspace(cuda::per_example_workspace(p, true));
    const uint64_t launches = cuda_on_cpu::device.launches;
    CHECK(cuda::per_example_accumulate(p, true, workspace.get(), kStream) == nullptr);
    CHECK(cuda_on_cpu::device.launches <= launches + 2);
    CHECK_EQUAL(cuda_on_cpu::bank_conflicts.count, uint64_t(0));
    problem.check(transform, sums.data(), first);
  }
}

// With one block all tiles are whole. With more blocks tiles are split, between whole tiles or alone, or into so many
// parts that some blocks have one example and others none.
void every_layer(const std::vector<uint64_t>& seeds, Random& random) {
  const int multiprocessors[] = {1, 4, 2, 7, 3, 13, 5};
  size_t turn = 0;
  for (size_t l = 0; l < layers().size(); l += kFewCases ? 4 : 1)
    for (Dtype dtype : operands()) {
      const Geometry& geometry = layers()[l];
      const Problem problem(geometry.shape, dtype, dtype, true, 0, random);
      for (const std::string& variant : variants()) {
        const Transform transform = turn % 3 == 1 ? Transform::square : Transform::abs;
        check(geometry, problem, variant, transform, multiprocessors[turn++ % std::size(multiprocessors)], seeds);
      }
    }
}

// Random geometries; each layer in one schedule.
void random_layers(const std::vector<uint64_t>& seeds, Random& random) {
  for (int i = 0; i < (kFewCases ? 10 : 100); i++) {
    const Dtype dtype = operands()[size_t(random.below(int64_t(operands().size())))];
    const int64_t pack = dtype == Dtype::float32 ? 4 : 8;
    Geometry geometry = {"", random_layer(random, 2000)};
    ConvShape& s = geometry.shape;
    s.groups = 1;
    s.in_channels = pack * (1 + random.below(6));
    s.out_channels = pack * (1 + random.below(10));
    const std::string layer = text(s), variant = variants()[size_t(random.below(int64_t(variants().size())))];
    geometry.name = layer.c_str();
    const Problem problem(s, dtype, dtype, true, 0, random);
    Guarded<float> sums(int64_t(problem.before.size()));
    CHECK(cuda::force_per_example_variant(variant.c_str()));
    if (cuda::per_example_variant(arguments(problem, sums.data(), Transform::abs), true) == std::string("wmma"))
      continue;
    const Transform transform = random.below(2) ? Transform::abs : Transform::square;
    check(geometry, problem, variant, transform, int(1 + random.below(9)), {seeds[size_t(i) % seeds.size()]});
  }
}

// Every number of blocks gives the sums, with fewer or more examples.
void every_count(const std::vector<uint64_t>& seeds, Random& random) {
  const Geometry geometry = {"split", conv(4, 24, 72, {5, 5}, {3, 3}, {1, 1}, {1, 1})};
  const Problem problem(geometry.shape, Dtype::bfloat16, Dtype::bfloat16, true, 0, random);
  for (int multiprocessors = 1; multiprocessors <= (kFewCases ? 3 : 40); multiprocessors++)
    for (Transform transform : {Transform::abs, Transform::square})
      check(geometry, problem, "64x64", transform, multiprocessors, {seeds[size_t(multiprocessors) % seeds.size()]});
}

// Other kernels compute the layers that these do not support, forced or not.
void what_is_left(Random& random) {
  cuda_on_cpu::device.number = 3;
  CHECK(!cuda::force_per_example_variant("256x256"));
  alignas(16) static float memory[64];
  const auto variant_of = [&](const ConvShape& shape, Dtype inputs, Dtype output_grad, int64_t shift = 0,
                              bool tensor_cores = true) {
    const PerExample p = {memory, memory, memory + shift, inputs, output_grad, Transform::abs, shape};
    return std::string(cuda::per_example_variant(p, tensor_cores));
  };
  const auto bf16 = Dtype::bfloat16, f32 = Dtype::float32;
  const ConvShape usual = conv(3, 64, 64, {6, 5}, {3, 3}, {1, 1}, {1, 1});
  for (const char* forced : {"64x64", "64x192", "measured"}) {
    describe("what is left to other kernels, ", forced);
    CHECK(cuda::force_per_example_variant(forced));
    const bool measured = forced == std::string("measured");
    CHECK(measured ? variant_of(usual, bf16, bf16) != "wmma" : variant_of(usual, bf16, bf16) == forced);
    const ConvShape fours = conv(3, 60, 68, {6, 5}, {3, 3}, {1, 1}, {1, 1});
    CHECK(measured ? variant_of(fours, f32, f32) != "wmma" : variant_of(fours, f32, f32) == forced);
    CHECK(variant_of(fours, bf16, bf16) == "wmma");
    CHECK(variant_of(usual, bf16, bf16, 0, false) == "wmma");
    CHECK(variant_of(usual, bf16, f32) == "wmma");
    CHECK(variant_of(usual, bf16, bf16, 1) == "wmma");
    CHECK(variant_of(conv(3, 18, 24, {6, 5}, {3, 3}, {1, 1}, {1, 1}), f32, f32) == "wmma");
    CHECK(variant_of(conv(3, 32, 32, {6, 5}, {3, 3}, {1, 1}, {1, 1}, {}, 2), bf16, bf16) == "wmma");
    CHECK(variant_of(conv(3, 8, 8, {6, 5}, {3, 3}, {1, 1}, {1, 1}, {}, 8), bf16, bf16) == "wmma");
    CHECK(variant_of(conv(3, 16, 24, {3, 6, 5}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}), bf16, bf16) == "wmma");
    CHECK(variant_of(conv(3, 16, 24, {1, 6, 5}, {1, 3, 3}, {3, 1, 1}, {1, 1, 1}), bf16, bf16) == "wmma");
    CHECK(variant_of(linear(64, 1, 16, 24), bf16, bf16) == "wmma");
    CHECK(variant_of(linear(int64_t(1) << 20, 2048, 16, 24), bf16, bf16) == "wmma");
    CHECK(variant_of(linear(2, 2, 1 << 29, 24), f32, f32) == "wmma");
    CHECK(variant_of(linear(2, 2, 24, 1 << 29), f32, f32) == "wmma");
    CHECK(variant_of(conv(1, 16, 24, {8, 1 << 20}, {3, 3}, {1, 1}, {1, 1}), bf16, bf16) == "wmma");
    CHECK(variant_of(conv(1, 16, 24, {(1 << 29) + 1}, {1}, {1 << 29}, {0}), bf16, bf16) == "wmma");
  }
  CHECK(cuda::force_per_example_variant("wmma"));
  CHECK(variant_of(usual, bf16, bf16) == "wmma");
  CHECK(cuda::force_per_example_variant("measured"));

  // rows after an example's last do not change the result, with any content
  const Problem problem(usual, bf16, bf16, true, 0, random);
  std::vector<float> sums[2];
  for (bool forced : {false, true}) {
    CHECK(cuda::force_per_example_variant(forced ? "64x64" : "wmma"));
    Guarded<float> result(int64_t(problem.before.size()));
    std::fill(result.begin(), result.end(), 0.0f);
    const PerExample p = arguments(problem, result.data(), Transform::abs);
    Workspace workspace(cuda::per_example_workspace(p, true));
    CHECK(cuda::per_example_accumulate(p, true, workspace.get(), kStream) == nullptr);
    sums[forced].assign(result.begin(), result.end());
  }
  describe("the same layer by both kernels");
  for (size_t i = 0; i < sums[0].size(); i++) CHECK_NEAR(double(sums[0][i]), double(sums[1][i]), 1e-4);
}

// A measured layer gets its fastest variant, on its GPU and on a GPU that is not in the table.
void nearest() {
  using cuda::nearest_variant;
  for (const cuda::MeasuredLayer& m : cuda::kMeasuredLayers) {
    const ConvShape shape = m.direct ? linear(64, m.positions, m.columns, m.out_channels)
                                     : conv(64, m.columns, m.out_channels, {2 * m.positions}, {1}, {2}, {0});
    describe("nearest to ", m.out_channels, " x ", m.columns, " x ", m.positions, ", ", m.card);
    CHECK(nearest_variant(m.card, m.halves, shape) == m.fastest);
    if (!std::strcmp(m.card, cuda::kMeasuredLayers[0].card))
      CHECK(nearest_variant("unknown", m.halves, shape) == m.fastest);
    ConvShape close = shape;
    close.examples = 3;
    close.out_channels += 1;
    CHECK(nearest_variant(m.card, m.halves, close) == m.fastest);
  }
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast::test;
  std::vector<uint64_t> list = seeds(argc, argv);
  if (!kFewCases && list.size() < 3) list = {0, 1, 2};  // late, eager and mixed completion of copies
  Random random(9);
  every_layer(list, random);
  random_layers(list, random);
  every_count(list, random);
  what_is_left(random);
  nearest();
  return report();
}
