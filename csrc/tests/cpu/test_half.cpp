// float16 and bfloat16: every bit pattern and every rounding boundary, against definitions by ldexp and by a search for
// the nearest value in double precision; then the kernels' vector conversions against half.h.
#include <limits>

#include "inputs.h"

namespace delfast::test {
namespace {

struct Format {
  Dtype dtype;
  int mantissa_bits, bias;
  uint16_t infinity;  // its bits; larger magnitudes are NaNs
};
constexpr Format kFloat16 = {Dtype::float16, 10, 15, 0x7c00};
constexpr Format kBfloat16 = {Dtype::bfloat16, 7, 127, 0x7f80};

// The finite value of a non-negative bit pattern. For infinity's pattern: the next power of two. Numbers from half way
// to it on round to infinity.
double definition(const Format& format, int magnitude) {
  const int exponent = magnitude >> format.mantissa_bits, mantissa = magnitude & ((1 << format.mantissa_bits) - 1);
  const int leading = exponent ? 1 << format.mantissa_bits : 0;
  return std::ldexp(leading + mantissa, std::max(exponent, 1) - format.bias - format.mantissa_bits);
}

template <class T>
void every_pattern(const Format& format) {
  for (int bits = 0; bits < 1 << 16; bits++) {
    describe(name(format.dtype), " 0x", std::hex, bits);
    const int magnitude = bits & 0x7fff;
    const float x = to_float(T{uint16_t(bits)});
    CHECK_EQUAL(std::signbit(x), bits >= 0x8000);
    T back;
    assign(back, x);
    if (magnitude > format.infinity) {
      CHECK(std::isnan(x));
      CHECK((back.bits & 0x7fff) > format.infinity);
      continue;
    }
    CHECK_EQUAL(std::fabs(double(x)),
                magnitude == format.infinity ? std::numeric_limits<double>::infinity() : definition(format, magnitude));
    CHECK_EQUAL(int(back.bits), bits);
  }
}

// Floats around every rounding boundary, and random floats.
std::vector<float> rounding_inputs(const Format& format, Random& random) {
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> inputs = {0.0f, std::numeric_limits<float>::max(), infinity};
  for (int magnitude = 0; magnitude < format.infinity; magnitude++) {
    const double below = definition(format, magnitude), above = definition(format, magnitude + 1);
    const float middle = float(below + (above - below) / 2);  // exact: it needs one bit more than the format has
    for (float x : {float(below), middle, std::nextafterf(middle, 0), std::nextafterf(middle, infinity)})
      inputs.push_back(x);
  }
  for (int i = 0; i < 100000; i++) inputs.push_back(bits_float(random.bits() & 0x7fffffff));  // includes NaNs
  const size_t count = inputs.size();
  for (size_t i = 0; i < count; i++) inputs.push_back(-inputs[i]);
  return inputs;
}

template <class T>
void rounding(const Format& format, const std::vector<float>& inputs) {
  std::vector<double> values;
  for (int magnitude = 0; magnitude <= format.infinity; magnitude++) values.push_back(definition(format, magnitude));
  for (float x : inputs) {
    describe("to ", name(format.dtype));
    T rounded;
    assign(rounded, x);
    const int magnitude = rounded.bits & 0x7fff;
    if (std::isnan(x)) {
      CHECK(magnitude > format.infinity);
      continue;
    }
    const double wanted = std::fabs(double(x));
    const int above = int(std::lower_bound(values.begin(), values.end(), wanted) - values.begin());
    int nearest = above;  // the first value that is at least `wanted`
    if (above > format.infinity) {
      nearest = format.infinity;
    } else if (above > 0) {
      const double up = values[size_t(above)] - wanted, down = wanted - values[size_t(above) - 1];
      if (down < up || (down == up && above % 2)) nearest = above - 1;
    }
    CHECK_EQUAL(magnitude, nearest);
    CHECK_EQUAL(rounded.bits >= 0x8000, std::signbit(x));
  }
}

// A kernel that only loads: |theta| of rows of one element. It also starts at element 1, so that every group of 16
// changes.
void kernel_loads(cpu::Isa isa, Dtype dtype) {
  constexpr int64_t kPatterns = 1 << 16;
  Array theta(dtype, kPatterns);
  for (int64_t i = 0; i < kPatterns; i++) theta.set_bits(i, uint32_t(i));
  const Scored scored = {theta.data(), nullptr, dtype, Dtype::float32, {kPatterns, 1, 1}};
  for (int64_t begin : {0, 1}) {
    Guarded<float> out(kPatterns);
    cpu::criticality(isa).score_rows(scored, Criterion::weight, Aggregate::max, 1, out.data(), begin, kPatterns);
    for (int64_t i = begin; i < kPatterns; i++) {
      describe("kernel loads ", name(dtype), " 0x", std::hex, i);
      CHECK_EQUAL(float_bits(out[i]), float_bits(theta.get(i)) & 0x7fffffff);
    }
  }
}

// A kernel that only stores: reset from float32, a whole row and all elements.
void kernel_stores(cpu::Isa isa, Dtype dtype, const std::vector<float>& inputs) {
  const int64_t count = int64_t(inputs.size());
  Guarded<float> source(count);
  std::copy(inputs.begin(), inputs.end(), source.begin());
  for (bool by_row : {true, false}) {
    const int64_t bit_count = by_row ? 1 : count;
    Guarded<uint8_t> bits((bit_count + 7) / 8);
    std::fill(bits.begin(), bits.end(), uint8_t(0xff));
    Array param(dtype, count);
    Updated u;
    u.param = param.data();
    u.source = source.data();
    u.param_dtype = dtype;
    u.layout = {1, count, 1};
    u.bits = bits.data();
    u.by_row = by_row;
    cpu::masked_update(isa).reset(u, 0, bit_count, 0);
    describe("kernel stores ", name(dtype), by_row ? ", by row" : ", by element");
    for (int64_t i = 0; i < count; i++) CHECK_EQUAL(param.bits(i), param.rounded_bits(source[i]));
  }
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast;
  using namespace delfast::test;
  const cpu::Isa isa = isa_argument(argc, argv);
  Random random(1);
  const std::vector<float> to_float16 = rounding_inputs(kFloat16, random);
  const std::vector<float> to_bfloat16 = rounding_inputs(kBfloat16, random);
  every_pattern<float16>(kFloat16);
  every_pattern<bfloat16>(kBfloat16);
  rounding<float16>(kFloat16, to_float16);
  rounding<bfloat16>(kBfloat16, to_bfloat16);
  kernel_loads(isa, Dtype::bfloat16);
  kernel_stores(isa, Dtype::bfloat16, to_bfloat16);
  if (!kFewInstances) {
    kernel_loads(isa, Dtype::float16);
    kernel_stores(isa, Dtype::float16, to_float16);
  }
  return report();
}
