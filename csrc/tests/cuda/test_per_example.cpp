// Per-example sums by the CUDA kernels, run on the CPU, against a loop in double precision: within the error bound of
// their arithmetic, and with the same bits for every schedule of threads and order of blocks.
#include <limits>

#include "per_example_problems.h"

namespace delfast::test {
namespace {

const std::vector<Geometry>& geometries() {
  static const std::vector<Geometry> list = {
      {"3x3", conv(3, 16, 24, {6, 5}, {3, 3}, {1, 1}, {1, 1})},
      {"stem", conv(2, 3, 10, {9, 8}, {7, 7}, {2, 2}, {3, 3})},
      {"1x1, two tiles each way", conv(2, 72, 68, {5, 5}, {1, 1}, {2, 2}, {0, 0})},
      {"1-d, dilated", conv(2, 4, 8, {19}, {5}, {1}, {4}, {3})},
      {"3-d", conv(2, 4, 8, {3, 4, 5}, {2, 3, 2}, {1, 2, 1}, {1, 0, 1}, {1, 1, 2})},
      {"groups of 4 and 6 channels", conv(2, 8, 12, {4, 5}, {3, 3}, {1, 1}, {1, 1}, {2, 1}, 2)},
      {"groups of 8 channels", conv(2, 32, 32, {4, 4}, {3, 3}, {2, 1}, {1, 1}, {}, 4)},
      {"more padding than input", conv(2, 4, 4, {2, 2}, {5, 5}, {1, 1}, {2, 2})},
      {"kernel strides past the input", conv(2, 8, 4, {7, 5}, {2, 2}, {3, 3}, {0, 0})},
      {"depthwise", conv(3, 20, 20, {5, 6}, {3, 3}, {1, 1}, {1, 1}, {}, 20)},
      {"depthwise, two tiles, 25 taps", conv(2, 40, 40, {9, 7}, {5, 5}, {2, 2}, {2, 2}, {}, 40)},
      {"depthwise, two outputs each", conv(2, 6, 12, {6, 4}, {3, 2}, {1, 2}, {1, 0}, {2, 1}, 6)},
      {"one input channel", conv(2, 1, 5, {6, 6}, {3, 3}, {1, 1}, {1, 1})},
      {"depthwise, slabs", conv(9, 8, 8, {8, 8}, {3, 3}, {1, 1}, {1, 1}, {}, 8)},
      {"linear", linear(5, 7, 24, 40)},
      {"linear, 16 positions", linear(3, 16, 8, 8)},
      {"linear, 33 positions", linear(2, 33, 8, 16)},
      {"linear, slabs", linear(9, 64, 8, 4)},
      {"linear, slabs of odd size", linear(7, 100, 3, 5)},
      {"linear, one position", linear(37, 1, 40, 12)},
      {"one position, all of the input", conv(19, 5, 7, {3, 2}, {3, 2}, {1, 1}, {0, 0})},
      {"one position, padding", conv(19, 4, 8, {2, 2}, {3, 3}, {2, 2}, {1, 1})},
      {"one position, 3-d", conv(3, 4, 4, {2, 2, 2}, {2, 2, 2}, {1, 1, 1}, {0, 0, 0})},
      {"depthwise, one position", conv(5, 8, 8, {3, 3}, {3, 3}, {1, 1}, {0, 0}, {}, 8)},
  };
  return list;
}

void check(const std::string& what, const Problem& problem, int64_t shift, const std::vector<uint64_t>& seeds) {
  for (Transform transform : {Transform::abs, Transform::square}) {
    std::vector<float> first;
    for (uint64_t seed : seeds) {
      describe(what, ", inputs ", name(problem.inputs.dtype()), ", output_grad ", name(problem.output_grad.dtype()),
               problem.tensor_cores ? ", tensor cores" : "", transform == Transform::abs ? ", abs" : ", square",
               ", shift ", shift, ", seed ", seed);
      cuda_on_cpu::set_seed(seed);
      Guarded<float> sums(int64_t(problem.before.size()), shift);
      std::copy(problem.before.begin(), problem.before.end(), sums.begin());
      const PerExample p = {problem.inputs.data(),  problem.output_grad.data(),  sums.data(),
                            problem.inputs.dtype(), problem.output_grad.dtype(), transform,
                            problem.shape};
      Workspace workspace(cuda::per_example_workspace(p, problem.tensor_cores));
      CHECK(cuda::per_example_accumulate(p, problem.tensor_cores, workspace.get(), kStream) == nullptr);
      problem.check(transform, sums.data(), first);
    }
  }
}

struct Operands {
  Dtype inputs, output_grad;
  bool tensor_cores;
};
constexpr Operands kOperands[] = {
    {Dtype::float32, Dtype::float32, false},  {Dtype::bfloat16, Dtype::bfloat16, false},
#ifndef DELFAST_FEW_INSTANCES
    {Dtype::float16, Dtype::float16, false},
#endif
    {Dtype::float32, Dtype::bfloat16, false}, {kSecondHalf, Dtype::float32, false},
    {Dtype::float32, Dtype::float32, true},   {Dtype::bfloat16, Dtype::bfloat16, true},
#ifndef DELFAST_FEW_INSTANCES
    {Dtype::float16, Dtype::float16, true},
#endif
    {Dtype::bfloat16, Dtype::float32, true},
};

void every_geometry(const std::vector<uint64_t>& seeds, Random& random) {
  for (size_t g = 0; g < geometries().size(); g += kFewCases ? 3 : 1)
    for (const Operands& o : kOperands) {
      const Geometry& geometry = geometries()[g];
      check(geometry.name, Problem(geometry.shape, o.inputs, o.output_grad, o.tensor_cores, 0, random), 0, seeds);
    }
}

// Random geometries, in memory of any alignment; each layer in one schedule.
void random_layers(const std::vector<uint64_t>& seeds, Random& random) {
  for (int i = 0; i < (kFewCases ? 20 : 300); i++) {
    const Operands& o = kOperands[random.below(int64_t(std::size(kOperands)))];
    const int64_t shift = random.below(2);
    const ConvShape shape = random_layer(random, 20000);
    check(text(shape), Problem(shape, o.inputs, o.output_grad, o.tensor_cores, shift, random), shift,
          {seeds[size_t(i) % seeds.size()]});
  }
}

// Memory that is not aligned to 16 bytes.
void unaligned(const std::vector<uint64_t>& seeds, Random& random) {
  for (size_t g : {0, 9, 17, 19})
    for (const Operands& o : kOperands) {
      const Geometry& geometry = geometries()[g];
      check(geometry.name, Problem(geometry.shape, o.inputs, o.output_grad, o.tensor_cores, 1, random), 1,
            {seeds.back()});
    }
}

// No sum changes, and no pointer is read.
void nothing_to_add() {
  const ConvShape shapes[] = {conv(0, 4, 4, {3, 3}, {3, 3}, {1, 1}, {1, 1}), linear(3, 0, 4, 4), linear(3, 2, 4, 0),
                              linear(3, 2, 0, 4)};
  for (const ConvShape& shape : shapes) {
    describe("nothing to add");
    PerExample p;
    p.shape = shape;
    CHECK_EQUAL(cuda::per_example_workspace(p, false), int64_t(0));
    CHECK(cuda::per_example_accumulate(p, false, nullptr, kStream) == nullptr);
  }
  describe("too many positions");
  PerExample p;
  p.shape = linear(1, (int64_t(1) << 30) + 1, 4, 4);
  CHECK(cuda::per_example_accumulate(p, false, nullptr, kStream) != nullptr);
  ChannelDot dot;
  dot.examples = int64_t(1) << 31;
  dot.channels = dot.positions = 2;
  dot.channels_last = true;
  CHECK(cuda::channel_dot(dot, kStream) != nullptr);
}

// A NaN or an infinity changes the sums of its channel, and no others.
void nonfinite(Random& random) {
  for (float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
    for (size_t g : {0, 9, 19})
      for (const Operands& o : kOperands) {
        const Geometry& geometry = geometries()[g];
        Problem problem(geometry.shape, o.inputs, o.output_grad, o.tensor_cores, 0, random);
        problem.output_grad.set(problem.shape.positions() / 2 * problem.shape.out_channels + 1, bad);
        Guarded<float> sums(int64_t(problem.before.size()));
        std::fill(sums.begin(), sums.end(), 0.0f);
        const PerExample p = {problem.inputs.data(),  problem.output_grad.data(),  sums.data(),
                              problem.inputs.dtype(), problem.output_grad.dtype(), Transform::abs,
                              problem.shape};
        Workspace workspace(cuda::per_example_workspace(p, o.tensor_cores));
        CHECK(cuda::per_example_accumulate(p, o.tensor_cores, workspace.get(), kStream) == nullptr);
        describe("not finite, ", geometry.name, ", inputs ", name(o.inputs), o.tensor_cores ? ", tensor cores" : "");
        const int64_t row = problem.shape.row();
        for (int64_t i = 0; i < sums.size(); i++)
          if (i / row != 1) CHECK(std::isfinite(sums[i]));
        CHECK(!std::isfinite(sums[row + row / 2]));
      }
}

// ---- channel_dot

void check_dot(int64_t examples, int64_t channels, int64_t positions, Dtype output_grad_dtype,
               const Dtype* values_dtype, bool channels_last, int64_t shift, const std::vector<uint64_t>& seeds,
               Random& random) {
  const int64_t count = examples * channels * positions;
  Array output_grad(output_grad_dtype, count, shift),
      values(values_dtype ? *values_dtype : Dtype::float32, count, shift);
  fill(output_grad, Kind::ordinary, random);
  fill(values, Kind::ordinary, random);
  std::vector<float> first;
  for (uint64_t seed : seeds) {
    describe("channel_dot of ", examples, " x ", channels, " x ", positions, channels_last ? ", channels-last" : "",
             ", output_grad ", name(output_grad_dtype), ", values ", values_dtype ? name(*values_dtype) : "none",
             ", shift ", shift, ", seed ", seed);
    cuda_on_cpu::set_seed(seed);
    Guarded<float> out(examples * channels, shift);
    const ChannelDot p = {output_grad.data(), values_dtype ? values.data() : nullptr,
                          out.data(),         output_grad_dtype,
                          values.dtype(),     examples,
                          channels,           positions,
                          channels_last};
    CHECK(cuda::channel_dot(p, kStream) == nullptr);
    if (!first.empty()) {
      CHECK(std::equal(first.begin(), first.end(), out.begin(), same));
      continue;
    }
    first.assign(out.begin(), out.end());
    for (int64_t i = 0; i < examples * channels; i++) {
      double sum = 0, magnitude = 0;
      for (int64_t t = 0; t < positions; t++) {
        const int64_t at = channels_last ? (i / channels * positions + t) * channels + i % channels : i * positions + t;
        const double product = double(output_grad.get(at)) * (values_dtype ? double(values.get(at)) : 1);
        sum += product;
        magnitude += std::fabs(product);
      }
      const double terms = double(positions + 1) * 0x1p-24;  // products are rounded too
      CHECK_NEAR(double(out[i]), sum, terms / (1 - terms) * magnitude);
    }
  }
}

void channel_dots(const std::vector<uint64_t>& seeds, Random& random) {
  for (bool channels_last : {false, true}) {
    for (Dtype output_grad : kDtypes) {
      for (Dtype values : kDtypes) check_dot(2, 40, 49, output_grad, &values, channels_last, 0, seeds, random);
      check_dot(2, 40, 64, output_grad, nullptr, channels_last, 0, seeds, random);
      check_dot(2, 8, 64, output_grad, &output_grad, channels_last, 1, seeds, random);
    }
    const int64_t shapes[][3] = {{1, 1, 1},   {300, 7, 1},  {3, 5, 2}, {3, 33, 3}, {5, 10, 4},
                                 {2, 64, 16}, {1, 3, 5000}, {0, 4, 4}, {4, 0, 4},  {3, 4, 0}};
    for (const auto& shape : shapes)
      check_dot(shape[0], shape[1], shape[2], Dtype::float32, &kDtypes[0], channels_last, 0, seeds, random);
  }
}

// ---- channel_sums: the bounds of a channel dot, with one more subtraction and the factor's roundings

void check_channel_sums(ChannelSums p, int kind, int64_t shift, const std::vector<uint64_t>& seeds, Random& random) {
  const int64_t count = p.examples * p.channels * p.positions;
  const bool with_values = kind > 0, with_statistics = kind > 1;
  Array output_grad(p.output_grad_dtype, count, shift), values(p.values_dtype, count, shift);
  fill(output_grad, Kind::ordinary, random);
  fill(values, Kind::ordinary, random);
  Guarded<float> mean(p.channels), variance(p.channels), before(2 * p.channels);
  for (float& m : mean) m = random.unit();
  for (float& v : variance) v = 0.1f + random.unit();
  for (float& sum : before) sum = random.unit();
  p.output_grad = output_grad.data();
  p.values = with_values ? values.data() : nullptr;
  p.mean = with_statistics ? mean.data() : nullptr;
  p.variance = with_statistics ? variance.data() : nullptr;
  p.eps = 1e-5;
  std::vector<float> first;
  for (uint64_t seed : seeds) {
    describe("channel_sums of ", p.examples, " x ", p.channels, " x ", p.positions,
             p.channels_last ? ", channels-last, " : ", ", name(p.transform), ", output_grad ",
             name(p.output_grad_dtype), with_values ? ", values " : ", no values, ", name(p.values_dtype),
             with_statistics ? " with statistics" : "", ", shift ", shift, ", seed ", seed);
    cuda_on_cpu::set_seed(seed);
    Guarded<float> sums(before);
    p.weighted = with_values ? sums.data() : nullptr;
    p.plain = sums.data() + p.channels;
    Workspace workspace(cuda::channel_sums_workspace(p));
    CHECK(cuda::channel_sums(p, workspace.get(), kStream) == nullptr);
    if (!first.empty()) {
      CHECK(std::equal(first.begin(), first.end(), sums.begin(), same));
      continue;
    }
    first.assign(sums.begin(), sums.end());
    for (int64_t i = 0; i < 2 * p.channels; i++) {
      const int64_t c = i % p.channels;
      const bool weighted = i < p.channels;
      if (weighted && !with_values) {
        CHECK(same(sums[i], before[i]));
        continue;
      }
      const double terms = double(p.positions + 6) * 0x1p-24, gamma = terms / (1 - terms);
      double sum = double(before[i]), bound = 0;
      for (int64_t x = 0; x < p.examples; x++) {
        double g = 0, magnitude = 0;
        for (int64_t t = 0; t < p.positions; t++) {
          const int64_t at =
              p.channels_last ? (x * p.positions + t) * p.channels + c : (x * p.channels + c) * p.positions + t;
          const double value = weighted ? double(values.get(at)) - (with_statistics ? double(mean[c]) : 0) : 1;
          g += double(output_grad.get(at)) * value;
          magnitude += std::fabs(double(output_grad.get(at)) * value);
        }
        const double scale = weighted && with_statistics ? 1 / std::sqrt(double(variance[c]) + p.eps) : 1;
        const double e = gamma * magnitude * scale;
        g *= scale;
        sum += p.transform == Transform::abs ? std::fabs(g) : g * g;
        bound += p.transform == Transform::abs ? e : e * (2 * std::fabs(g) + e) + 0x1p-24 * g * g;
      }
      CHECK_NEAR(double(sums[i]), sum, bound + double(p.examples + 2) * 0x1p-24 * (sum + bound));
    }
  }
}

void channel_sums(const std::vector<uint64_t>& seeds, Random& random) {
  for (bool channels_last : {false, true})
    for (Transform transform : {Transform::abs, Transform::square}) {
      const auto check = [&](int64_t examples, int64_t channels, int64_t positions, Dtype output_grad, Dtype values,
                             int kind, int64_t shift) {
        ChannelSums p;
        p.output_grad_dtype = output_grad;
        p.values_dtype = values;
        p.transform = transform;
        p.channels_last = channels_last;
        p.examples = examples;
        p.channels = channels;
        p.positions = positions;
        check_channel_sums(p, kind, shift, seeds, random);
      };
      for (Dtype output_grad : kDtypes)
        for (Dtype values : kDtypes)
          for (int kind : {1, 2}) check(3, 40, 49, output_grad, values, kind, 0);
      // one slab and several, positions and examples divided, teams of 1 to 32 lanes, unaligned memory
      const int64_t shapes[][3] = {{1, 1, 1}, {300, 7, 1}, {70, 33, 3}, {5, 10, 4},  {2, 64, 16},
                                   {0, 4, 4}, {3, 8, 64},  {2, 3, 900}, {600, 2, 5}, {300, 4, 40}};
      for (const auto& shape : shapes)
        for (int kind : {0, 2})
          for (int64_t shift : {0, 1}) check(shape[0], shape[1], shape[2], Dtype::float32, Dtype::float32, kind, shift);
    }
}

// ---- properties that the sums do not show

// Inputs of 2^32 elements in memory that is allocated on access: the first and the last position of each example are
// used.
void far_apart(Random& random) {
  const int64_t channels = 64, positions = int64_t(1) << 25, examples = 2;
  const size_t bytes = size_t(examples * positions * channels) * sizeof(bfloat16);
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  describe("inputs of 2^32 elements");
  CHECK(memory != MAP_FAILED);
  if (memory == MAP_FAILED) return;
  bfloat16* const inputs = static_cast<bfloat16*>(memory);
  for (int64_t groups : {int64_t(1), channels})
    for (bool tensor_cores : {false, true}) {
      const ConvShape shape = conv(examples, channels, channels, {positions}, {1}, {positions - 1}, {0}, {}, groups);
      const ConvShape near = conv(examples, channels, channels, {2}, {1}, {1}, {0}, {}, groups);
      const Problem problem(near, Dtype::bfloat16, Dtype::bfloat16, tensor_cores, 0, random);
      for (int64_t x = 0; x < examples; x++)
        for (int64_t t = 0; t < 2; t++)
          for (int64_t c = 0; c < channels; c++)
            inputs[(x * positions + t * (positions - 1)) * channels + c].bits =
                uint16_t(problem.inputs.bits((x * 2 + t) * channels + c));
      std::vector<float> sums[2];
      for (bool far : {false, true}) {
        Guarded<float> result(int64_t(problem.before.size()));
        std::fill(result.begin(), result.end(), 0.0f);
        const PerExample p = {far ? memory : problem.inputs.data(),
                              problem.output_grad.data(),
                              result.data(),
                              Dtype::bfloat16,
                              Dtype::bfloat16,
                              Transform::abs,
                              far ? shape : near};
        Workspace workspace(cuda::per_example_workspace(p, tensor_cores));
        CHECK(cuda::per_example_accumulate(p, tensor_cores, workspace.get(), kStream) == nullptr);
        sums[far].assign(result.begin(), result.end());
      }
      describe("inputs of 2^32 elements, ", groups, " groups", tensor_cores ? ", tensor cores" : "");
      CHECK(sums[0] == sums[1]);
    }
  munmap(memory, bytes);
}

// Slabs are written and read, but their number does not depend on the number of examples.
void bounded_workspace() {
  describe("workspace");
  const auto bytes = [](const ConvShape& shape, bool tensor_cores) {
    PerExample p;
    p.shape = shape;
    return cuda::per_example_workspace(p, tensor_cores);
  };
  for (bool tensor_cores : {false, true})
    for (int64_t examples : {10, 1000, 1000000}) {
      CHECK(bytes(conv(examples, 64, 64, {32, 32}, {3, 3}, {1, 1}, {1, 1}), tensor_cores) <= 18 << 20);
      CHECK(bytes(conv(examples, 512, 512, {4, 4}, {3, 3}, {1, 1}, {1, 1}), tensor_cores) <= 20 << 20);
      CHECK(bytes(conv(examples, 96, 96, {8, 8}, {7, 7}, {1, 1}, {3, 3}, {}, 96), tensor_cores) <= 2 << 20);
      CHECK_EQUAL(bytes(linear(examples, 1, 4096, 1000), tensor_cores), int64_t(0));
    }
}

// With a single tile and a single tap, no sector is requested twice.
void coalesced(Random& random) {
  cuda_on_cpu::set_seed(0);
  // twice: number of sectors whose halves are read or written separately
  const auto check_sectors = [&](const char* kernel, uint64_t twice, auto run) {
    cuda_on_cpu::sectors.start();
    run();
    const auto result = cuda_on_cpu::sectors.stop().at(kernel);
    CHECK(result.loads.asked > 0);
    CHECK_EQUAL(result.loads.asked, result.loads.least + twice);
    if (std::string(kernel) != "channel_dot_rows")  // a lane of each team writes its sums
      CHECK_EQUAL(result.stores.asked, result.stores.least + twice);
  };
  cuda_on_cpu::device.number = 1;  // so that one block has all examples
  for (const Operands& o : kOperands)
    for (int64_t groups : {1, 64}) {
      const Problem problem(conv(2, 64, 64, {64}, {1}, {1}, {0}, {}, groups), o.inputs, o.output_grad, o.tensor_cores,
                            0, random);
      Guarded<float> sums(int64_t(problem.before.size()));
      std::fill(sums.begin(), sums.end(), 0.0f);
      const PerExample p = {problem.inputs.data(),  problem.output_grad.data(),  sums.data(),
                            problem.inputs.dtype(), problem.output_grad.dtype(), Transform::abs,
                            problem.shape};
      describe("sectors, ", name(o.inputs), " and ", name(o.output_grad), ", ", groups, " groups");
      const bool segments = o.tensor_cores && o.inputs == o.output_grad;
      const char* const kernel = segments ? "per_example_segments" : "per_example_tiles";
      const bool halves = segments && groups == 1 && o.inputs == Dtype::float32;  // a lane has 4 of 8 neighbours
      check_sectors(groups == 1 ? kernel : "per_example_depthwise", halves ? 64 * 64 * 4 / 32 : 0,
                    [&] { cuda::per_example_accumulate(p, o.tensor_cores, nullptr, kStream); });
    }
  for (bool channels_last : {false, true})
    for (Dtype dtype : kDtypes) {
      Array output_grad(dtype, 2 * 64 * 64), values(dtype, 2 * 64 * 64);
      fill(output_grad, Kind::ordinary, random);
      fill(values, Kind::ordinary, random);
      Guarded<float> out(2 * 64);
      const ChannelDot p = {output_grad.data(), values.data(), out.data(), dtype, dtype, 2, 64, 64, channels_last};
      describe("sectors, channel_dot, ", name(dtype), channels_last ? ", channels-last" : "");
      check_sectors(channels_last ? "channel_dot_columns" : "channel_dot_rows", 0,
                    [&] { cuda::channel_dot(p, kStream); });
    }
}

// Rounding operands to tf32 changes the result, which shows that tensor cores were used.
void paths_differ(Random& random) {
  const ConvShape& shape = geometries()[0].shape;
  const Problem problem(shape, Dtype::float32, Dtype::float32, false, 0, random);
  std::vector<float> sums[2];
  for (bool tensor_cores : {false, true}) {
    Guarded<float> result(int64_t(problem.before.size()));
    std::fill(result.begin(), result.end(), 0.0f);
    const PerExample p = {problem.inputs.data(),
                          problem.output_grad.data(),
                          result.data(),
                          Dtype::float32,
                          Dtype::float32,
                          Transform::abs,
                          shape};
    Workspace workspace(cuda::per_example_workspace(p, tensor_cores));
    CHECK(cuda::per_example_accumulate(p, tensor_cores, workspace.get(), kStream) == nullptr);
    sums[tensor_cores].assign(result.begin(), result.end());
  }
  describe("tensor cores and not");
  CHECK(sums[0] != sums[1]);
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast::test;
  const std::vector<uint64_t> list = seeds(argc, argv);
  Random random(8);
  every_geometry(list, random);
  random_layers(list, random);
  unaligned(list, random);
  nothing_to_add();
  nonfinite(random);
  channel_dots(list, random);
  channel_sums(list, random);
  far_apart(random);
  bounded_workspace();
  coalesced(random);
  paths_differ(random);
  return report();
}
