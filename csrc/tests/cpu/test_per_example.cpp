// Per-example sums and channel dots against float64 loops, and bit for bit against the same sums in other parts.
//
// The bound. With u = 2^-24, a float32 operation errs by at most u relative to its result. For one example and one
// element of the weight, let g = sum over T positions of a d, and m the same sum of |a d|.
// - The float32 sum: a product and T additions, each rounded (fused: fewer), so off by e <= (T + 1) u m, up to products
//   of roundings, for which all bounds get a hundredth more. |g| is then exact; g^2 is off by 2 |g| e + e^2 + u g^2.
//   (Where examples are joined, T = 1: in |a| |d| the product is rounded; in a^2 d^2 two squares and the product, each
//   by u g^2, less than the bound allows.)
// - N examples are added to the earlier sum: N u of the result, in which no term is negative.
// A channel dot adds 32 products to a partial sum in float32, and the partial sums in double: 33 u of the sum of |d v|,
// and u for the result.

#include "layers.h"

namespace delfast::test {
namespace {

constexpr double kUnit = 1.01 * 0x1p-24;

int64_t inputs_of(const ConvShape& s) { return s.in[0] * s.in[1] * s.in[2] * s.in_channels; }  // elements of an example
int64_t output_grad_of(const ConvShape& s) { return s.positions() * s.out_channels; }

// The exact result for each transform, and the maximum error of a result.
struct Exact {
  struct Result {
    std::vector<double> sums, bounds;
  };
  Result abs, square;

  Exact(const ConvShape& s, const Array& inputs, const Array& output_grad, const Guarded<float>& before) {
    const int64_t row = s.row(), columns = s.in_channels / s.groups, rows = s.out_channels / s.groups;
    const double T = double(s.positions()), N = double(s.examples);
    std::vector<int64_t> pixels;  // by tap and position: -1 in the padding
    for (int64_t tap = 0; tap < row / columns; tap++)
      for (int64_t t = 0; t < s.positions(); t++) pixels.push_back(source(s, t, tap));
    for (int64_t m = 0; m < s.out_channels; m++)
      for (int64_t i = 0; i < row; i++) {
        const int64_t tap = i / columns, channel = m / rows * columns + i % columns;
        double abs_sum = before[m * row + i], abs_bound = 0, square_sum = abs_sum, square_bound = 0;
        for (int64_t x = 0; x < s.examples; x++) {
          double g = 0, magnitude = 0;
          for (int64_t t = 0; t < s.positions(); t++) {
            const int64_t pixel = pixels[size_t(tap * s.positions() + t)];
            if (pixel < 0) continue;
            const double product = double(inputs.get(x * inputs_of(s) + pixel * s.in_channels + channel)) *
                                   double(output_grad.get(x * output_grad_of(s) + t * s.out_channels + m));
            g += product;
            magnitude += std::fabs(product);
          }
          const double e = (T + 1) * kUnit * magnitude;
          abs_sum += std::fabs(g);
          abs_bound += e;
          square_sum += g * g;
          square_bound += 2 * std::fabs(g) * e + e * e + kUnit * g * g;
        }
        abs.sums.push_back(abs_sum);
        abs.bounds.push_back(abs_bound + N * kUnit * (abs_sum + abs_bound));
        square.sums.push_back(square_sum);
        square.bounds.push_back(square_bound + N * kUnit * (square_sum + square_bound));
      }
  }

 private:
  // The pixel that the tap reads at position t, or -1 in the padding.
  static int64_t source(const ConvShape& s, int64_t t, int64_t tap) {
    const int64_t position[3] = {t / (s.out[1] * s.out[2]), t / s.out[2] % s.out[1], t % s.out[2]};
    const int64_t at[3] = {tap / (s.kernel[1] * s.kernel[2]), tap / s.kernel[2] % s.kernel[1], tap % s.kernel[2]};
    int64_t pixel = 0;
    for (int i = 0; i < 3; i++) {
      const int64_t p = position[i] * s.stride[i] + at[i] * s.dilation[i] - s.padding[i];
      if (p < 0 || p >= s.in[i]) return -1;
      pixel = pixel * s.in[i] + p;
    }
    return pixel;
  }
};

int64_t blocks = 0;  // number of blocks run until now

// Runs the kernels in the parts into which `cut` divides each range, the last part first.
template <class Cut>
void run(cpu::Isa isa, const PerExample& p, Cut cut) {
  const cpu::PerExampleKernels& kernels = cpu::per_example(isa);
  const cpu::PerExamplePlan plan(p, isa);
  Guarded<float> workspace(plan.workspace);
  const auto in_parts = [&](int64_t count, auto f) {
    const int64_t middle = cut(count);
    f(middle, count);
    f(0, middle);
  };
  for (int64_t first = 0; first < p.shape.examples; first += plan.block_examples, blocks++) {
    const cpu::PerExampleBlock block = plan.block(first, workspace.data());
    for (const cpu::Packing* packing : {&block.pack_inputs, &block.pack_output_grad})
      in_parts(packing->rows, [&](int64_t begin, int64_t end) { kernels.pack(block, *packing, begin, end); });
    in_parts(kernels.tiles(block), [&](int64_t begin, int64_t end) { kernels.accumulate(block, begin, end); });
  }
}

void check_sums(cpu::Isa isa, const ConvShape& shape, Dtype inputs_dtype, Dtype output_grad_dtype, Random& random,
                int64_t shift = 0) {
  Array inputs(inputs_dtype, shape.examples * inputs_of(shape), shift);
  Array output_grad(output_grad_dtype, shape.examples * output_grad_of(shape), shift);
  fill(inputs, Kind::ordinary, random);
  fill(output_grad, Kind::ordinary, random);
  Guarded<float> before(shape.out_channels * shape.row(), shift);
  for (float& sum : before) sum = random.unit();
  const Exact both(shape, inputs, output_grad, before);
  for (Transform transform : {Transform::abs, Transform::square}) {
    describe(text(shape), ", ", name(transform), ", inputs ", name(inputs_dtype), ", output_grad ",
             name(output_grad_dtype));
    const Exact::Result& exact = transform == Transform::abs ? both.abs : both.square;
    Guarded<float> whole(before), split(before);
    const auto operands = [&](Guarded<float>& sums) {
      return PerExample{inputs.data(),     output_grad.data(), sums.data(), inputs_dtype,
                        output_grad_dtype, transform,          shape};
    };
    run(isa, operands(whole), [](int64_t) { return int64_t(0); });
    run(isa, operands(split), [&](int64_t count) { return random.below(count + 1); });
    for (int64_t i = 0; i < whole.size(); i++) {
      CHECK_NEAR(whole[i], exact.sums[size_t(i)], exact.bounds[size_t(i)]);
      CHECK_SAME(split[i], whole[i]);
    }
  }
}

struct Dim {
  int64_t in, kernel, stride = 1, padding = 0, dilation = 1;
};

ConvShape conv(int64_t examples, int64_t in_channels, int64_t out_channels, int64_t groups, std::vector<Dim> dims) {
  ConvShape s;
  s.examples = examples;
  s.in_channels = in_channels;
  s.out_channels = out_channels;
  s.groups = groups;
  for (size_t i = 3 - dims.size(); i < 3; i++) {
    const Dim& d = dims[i + dims.size() - 3];
    s.in[i] = d.in;
    s.kernel[i] = d.kernel;
    s.stride[i] = d.stride;
    s.padding[i] = d.padding;
    s.dilation[i] = d.dilation;
    s.out[i] = (d.in + 2 * d.padding - d.dilation * (d.kernel - 1) - 1) / d.stride + 1;
  }
  return s;
}

// Sizes around every size of a tile, and around every limit between ways to read operands.
void linear_layers(cpu::Isa isa, Random& random) {
  for (int64_t in : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 48, 65})
    for (int64_t out : {1, 2, 3, 4, 5, 6, 7, 11, 13, 14, 15, 27, 29, 43}) {
      if (kFewInstances && out > 7) break;  // tiles of at most 3 rows
      for (int64_t positions : {1, 3}) check_sums(isa, conv(3, in, out, 1, {{positions, 1}}), {}, {}, random);
    }
}

const std::vector<ConvShape>& layers() {
  static const std::vector<ConvShape> list = {
      conv(0, 3, 4, 1, {{5, 3}}),
      conv(1, 1, 1, 1, {{1, 1}}),
      conv(9, 20, 11, 1, {{1, 1}}),                                     // examples joined
      conv(9, 12, 6, 3, {{1, 1}, {1, 1}}),                              // in groups
      conv(9, 20, 20, 20, {{1, 1}}),                                    // depthwise
      conv(3, 5, 6, 1, {{1, 1, 1, 1}}),                                 // one pixel, but three positions
      conv(2, 5, 6, 1, {{1, 1, 3, 1}}),                                 // one position, in the padding
      conv(2, 3, 15, 1, {{6, 3, 1, 1}, {7, 3, 1, 1}}),                  // taps joined
      conv(2, 3, 4, 1, {{9, 7, 2, 3}, {8, 7, 2, 3}}),                   // a stem
      conv(2, 1, 5, 1, {{6, 5}, {6, 5}}),                               // one channel
      conv(2, 24, 9, 1, {{5, 3, 1, 1}, {4, 3, 1, 1}}),                  // taps joined, with a tail
      conv(2, 3, 5, 1, {{8, 3, 1, 2, 2}, {8, 3, 1, 2, 2}}),             // too far apart to be joined
      conv(3, 32, 14, 1, {{4, 3, 1, 1}, {4, 3, 1, 1}}),                 // whole tiles
      conv(2, 37, 17, 1, {{5, 3, 2, 1}, {7, 2, 1, 0}}),                 // no whole tile
      conv(2, 17, 16, 1, {{7, 1, 2}, {6, 1, 2}}),                       // a downsampling 1 x 1
      conv(2, 16, 3, 1, {{2, 3, 1, 2}, {1, 5, 1, 4}}),                  // more padding than input
      conv(2, 16, 3, 1, {{3, 2, 1, 4, 5}}),                             // taps that read padding only
      conv(2, 4, 6, 2, {{4, 2, 1, 1}, {5, 3, 2, 0}, {3, 2, 1, 1, 2}}),  // three dimensions, in groups
      conv(2, 3, 6, 1, {{4, 2, 1, 1}, {5, 3, 2, 0}, {6, 2, 1, 1}}),     // three dimensions, joined
      conv(2, 48, 32, 4, {{5, 3, 1, 1}}),                               // groups
      conv(2, 6, 2, 2, {{5, 3, 1, 1}}),                                 // one output channel a group
      conv(2, 16, 16, 16, {{5, 3, 1, 1}, {5, 3, 1, 1}}),                // depthwise
      conv(2, 83, 83, 83, {{5, 3, 2, 1}, {4, 2, 1, 1, 2}}),             // with a tail
      conv(2, 37, 111, 37, {{5, 3, 1, 1}, {3, 3, 1, 1}}),               // with a multiplier
      conv(2, 130, 130, 130, {{3, 2}, {2, 1}, {2, 2}}),                 // three dimensions
  };
  return list;
}

void all_layers(cpu::Isa isa, Random& random) {
  for (const ConvShape& shape : layers())
    for (Dtype inputs : kDtypes)
      for (Dtype output_grad : kDtypes)
        for (int64_t shift : {0, 1}) check_sums(isa, shape, inputs, output_grad, random, shift);
}

// Random geometries: joining, padding and skipping memory do not change the result.
void random_layers(cpu::Isa isa, Random& random) {
  for (int i = 0; i < (kFewInstances ? 150 : 600); i++)
    check_sums(isa, random_layer(random, 100000), random.dtype(), random.dtype(), random, random.below(2));
}

// Several passes over the tiles, and several blocks of packed operands.
void many_examples(cpu::Isa isa, Random& random) {
  const auto check = [&](const ConvShape& shape, Dtype inputs, Dtype output_grad, int64_t blocks_each) {
    const int64_t before = blocks;
    check_sums(isa, shape, inputs, output_grad, random);
    CHECK_EQUAL(blocks - before, 4 * blocks_each);  // each transform twice
  };
  check(conv(5, 32, 3, 1, {{40, 2}, {41, 2}}), Dtype::float32, Dtype::float32, 1);
  check(conv(5, 16, 2, 1, {{410, 1}, {256, 1}}), Dtype::bfloat16, Dtype::float32, 3);
  check(conv(3, 16, 32, 16, {{200, 1}, {256, 1}}), kSecondHalf, Dtype::bfloat16, 3);
  check(conv(1100, 4000, 2, 1, {{1, 1}}), Dtype::float32, Dtype::bfloat16, 2);
  // AMX: 2 blocks of columns and 2 of rows take 33,280 elements of each operand for an example; a block of examples has
  // 2^20
  check(conv(9, 20, 20, 1, {{65, 1}, {32, 1}}), Dtype::bfloat16, Dtype::bfloat16, isa == cpu::Isa::amx ? 2 : 1);
  check(conv(140, 4000, 32000, 4000, {{1, 1}}), Dtype::float32, Dtype::float32, 2);
}

void check_dots(cpu::Isa isa, ChannelDot p, bool with_values, Random& random, int64_t shift) {
  const int64_t rows = p.examples * p.channels;
  Array output_grad(p.output_grad_dtype, rows * p.positions, shift), values(p.values_dtype, rows * p.positions, shift);
  fill(output_grad, Kind::ordinary, random);
  fill(values, Kind::ordinary, random);
  describe("channel_dot of ", p.examples, " x ", p.channels, " x ", p.positions,
           p.channels_last ? ", channels-last" : "", with_values ? ", values " : ", no values, ", name(p.values_dtype),
           ", output_grad ", name(p.output_grad_dtype));
  p.output_grad = output_grad.data();
  p.values = with_values ? values.data() : nullptr;
  Guarded<float> whole(rows), split(rows);
  const auto kernel = cpu::per_example(isa).channel_dot;
  p.out = whole.data();
  kernel(p, 0, rows);
  p.out = split.data();
  const int64_t cut = random.below(rows + 1);
  kernel(p, cut, rows);
  kernel(p, 0, cut);
  for (int64_t row = 0; row < rows; row++) {
    double sum = 0, magnitude = 0;
    for (int64_t t = 0; t < p.positions; t++) {
      const int64_t x = row / p.channels, c = row % p.channels;
      const int64_t at = p.channels_last ? (x * p.positions + t) * p.channels + c : row * p.positions + t;
      const double product = double(output_grad.get(at)) * (with_values ? double(values.get(at)) : 1.0);
      sum += product;
      magnitude += std::fabs(product);
    }
    CHECK_NEAR(whole[row], sum, 33 * kUnit * magnitude + kUnit * std::fabs(sum));
    CHECK_SAME(split[row], whole[row]);
  }
}

void channel_dots(cpu::Isa isa, Random& random) {
  for (int64_t channels : {1, 5, 16, 17, 33, 64})
    for (int64_t positions : {0, 1, 2, 15, 16, 17, 31, 32, 33, 100, 513, 1200})
      for (bool channels_last : {false, true})
        for (Dtype output_grad : kDtypes)
          for (Dtype values : kDtypes)
            for (bool with_values : {false, true}) {
              if (!with_values && values != Dtype::float32) continue;
              ChannelDot p;
              p.examples = channels > 33 ? 2 : 3;
              p.channels = channels;
              p.positions = positions;
              p.channels_last = channels_last;
              p.output_grad_dtype = output_grad;
              p.values_dtype = values;
              check_dots(isa, p, with_values, random, positions % 2);
            }
}

// Each example has the error of a channel dot, with one more subtraction and the factor's roundings. The examples are
// added in double, and the result is added to the earlier sum.
void check_channel_sums(cpu::Isa isa, ChannelSums p, int kind, Random& random, int64_t shift) {
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
  for (Transform transform : {Transform::abs, Transform::square}) {
    p.transform = transform;
    describe("channel_sums of ", p.examples, " x ", p.channels, " x ", p.positions,
             p.channels_last ? ", channels-last, " : ", ", name(transform), with_values ? ", values " : ", no values, ",
             name(p.values_dtype), with_statistics ? " with statistics" : "", ", output_grad ",
             name(p.output_grad_dtype));
    const auto run = [&](Guarded<float>& sums, bool in_parts) {
      p.weighted = with_values ? sums.data() : nullptr;
      p.plain = sums.data() + p.channels;
      const cpu::ChannelSumsPlan plan(p);
      std::vector<double> workspace(size_t(plan.workspace()), std::nan(""));
      const int64_t cut = in_parts ? random.below(plan.units() + 1) : 0;
      cpu::per_example(isa).channel_sums(p, plan, workspace.data(), cut, plan.units());
      cpu::per_example(isa).channel_sums(p, plan, workspace.data(), 0, cut);
      cpu::add_channel_sums(p, plan, workspace.data());
    };
    Guarded<float> whole(before), split(before);
    run(whole, false);
    run(split, true);
    for (int64_t i = 0; i < 2 * p.channels; i++) {
      const int64_t c = i % p.channels;
      const bool weighted = i < p.channels;
      CHECK_SAME(split[i], whole[i]);
      if (weighted && !with_values) {
        CHECK_SAME(whole[i], before[i]);
        continue;
      }
      double sum = 0, bound = 0;
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
        const double e = 35 * kUnit * magnitude * scale;
        g *= scale;
        sum += transform == Transform::abs ? std::fabs(g) : g * g;
        bound += transform == Transform::abs ? e : e * (2 * std::fabs(g) + e);
      }
      CHECK_NEAR(whole[i], double(before[i]) + sum, bound + 2 * kUnit * (double(before[i]) + sum + bound));
    }
  }
}

void channel_sums(cpu::Isa isa, Random& random) {
  for (int64_t channels : {1, 5, 16, 33, 64})
    for (int64_t positions : {1, 2, 15, 16, 33, 513})
      for (bool channels_last : {false, true})
        for (Dtype output_grad : kDtypes)
          for (Dtype values : kDtypes)
            for (int kind = 0; kind < 3; kind++) {  // no values, values, values with statistics
              if (!kind && values != Dtype::float32) continue;
              ChannelSums p;
              p.examples = positions < 16 ? 70 : 3;  // several slabs of several examples
              p.channels = channels;
              p.positions = positions;
              p.channels_last = channels_last;
              p.output_grad_dtype = output_grad;
              p.values_dtype = values;
              check_channel_sums(isa, p, kind, random, positions % 2);
            }
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast::test;
  const delfast::cpu::Isa isa = isa_argument(argc, argv);
  Random random(5);
  linear_layers(isa, random);
  all_layers(isa, random);
  random_layers(isa, random);
  many_examples(isa, random);
  channel_dots(isa, random);
  channel_sums(isa, random);
  return report();
}
