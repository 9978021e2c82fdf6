// A layer's operands, and the sums of its examples by a loop in double precision with the bounds of a kernel's error.
//
// The bounds. u = 2^-24 is float32's unit roundoff. A sum of T terms in any order rounds each term at most T times:
// relative to the sum A of the terms' magnitudes the error of one example's gradient g is at most gamma(T) = T u / (1 -
// T u) (Higham, Accuracy and Stability of Numerical Algorithms, 3.1 and 4.2; products are not rounded). Tensor cores
// may truncate instead of rounding, so their bound uses 2 u. A float32 operand is rounded to tf32, an error of 2^-11.
// g^2 is off by at most e (2 |g| + e), and the sum over n examples takes n + 2 more additions.
#pragma once

#include "cases.h"
#include "layers.h"

namespace delfast::test {

struct Geometry {
  const char* name;
  ConvShape shape;
};

// in, kernel, stride, padding and dilation are those of the last dimensions.
inline ConvShape conv(int64_t examples, int64_t in_channels, int64_t out_channels, std::vector<int64_t> in,
                      std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation = {}, int64_t groups = 1) {
  ConvShape s;
  s.examples = examples;
  s.in_channels = in_channels;
  s.out_channels = out_channels;
  s.groups = groups;
  for (size_t i = 0; i < in.size(); i++) {
    const size_t d = 3 - in.size() + i;
    s.in[d] = in[i];
    s.kernel[d] = kernel[i];
    s.stride[d] = stride[i];
    s.padding[d] = padding[i];
    s.dilation[d] = dilation.empty() ? 1 : dilation[i];
    s.out[d] = (s.in[d] + 2 * s.padding[d] - s.dilation[d] * (s.kernel[d] - 1) - 1) / s.stride[d] + 1;
  }
  return s;
}
inline ConvShape linear(int64_t examples, int64_t positions, int64_t in_channels, int64_t out_channels) {
  return conv(examples, in_channels, out_channels, {positions}, {1}, {1}, {0});
}

// A layer's operands, and by definition the sums and their bounds for both transforms.
struct Problem {
  ConvShape shape;
  Array inputs, output_grad;
  std::vector<float> before;  // the sums before the call
  std::vector<double> sums[2], gradient_errors[2];
  bool tensor_cores;

  Problem(const ConvShape& s, Dtype inputs_dtype, Dtype output_grad_dtype, bool tensor_cores, int64_t shift,
          Random& random)
      : shape(s),
        inputs(inputs_dtype, s.examples * s.in[0] * s.in[1] * s.in[2] * s.in_channels, shift),
        output_grad(output_grad_dtype, s.examples * s.positions() * s.out_channels, shift),
        tensor_cores(tensor_cores) {
    fill(inputs, Kind::ordinary, random);
    fill(output_grad, Kind::ordinary, random);
    before.resize(size_t(s.out_channels * s.row()));
    for (float& sum : before) sum = random.unit();
    for (auto* list : {&sums[0], &sums[1], &gradient_errors[0], &gradient_errors[1]}) list->resize(before.size());
    for (int64_t i = 0; i < int64_t(before.size()); i++) define(i);
  }

  double unit() const { return tensor_cores ? 0x1p-23 : 0x1p-24; }

  // Checks a kernel's sums: the first time against the bounds, later for the same bits as `first`.
  void check(Transform transform, const float* computed, std::vector<float>& first) const {
    if (!first.empty()) {
      CHECK(std::equal(first.begin(), first.end(), computed, same));
      return;
    }
    first.assign(computed, computed + before.size());
    const double additions = double(shape.examples + 2) * unit();
    for (size_t i = 0; i < first.size(); i++) {
      const bool square = transform == Transform::square;
      const double expected = double(before[i]) + sums[square][i], error = gradient_errors[square][i];
      CHECK_NEAR(double(first[i]), expected, error + additions / (1 - additions) * (expected + error));
    }
  }

  // Computes element i of the sums.
  void define(int64_t i) {
    const ConvShape& s = shape;
    const int64_t m = i / s.row(), tap = i % s.row() / (s.in_channels / s.groups);
    const int64_t channel =
        m / (s.out_channels / s.groups) * (s.in_channels / s.groups) + i % (s.in_channels / s.groups);
    const int64_t taps[3] = {tap / s.kernel[2] / s.kernel[1], tap / s.kernel[2] % s.kernel[1], tap % s.kernel[2]};
    const bool folded = s.positions() == 1;  // then the squares are rounded
    double operand_error = 0;
    for (Dtype dtype : {inputs.dtype(), output_grad.dtype()})
      if (tensor_cores && (dtype == Dtype::float32 || folded)) operand_error += 0x1p-11 * (1 + 0x1p-11);
    const double terms = double(s.positions()) * unit(), gamma = terms / (1 - terms);
    for (int64_t x = 0; x < s.examples; x++) {
      double gradient = 0, magnitude = 0;
      for (int64_t t = 0; t < s.positions(); t++) {
        const int64_t at[3] = {t / s.out[2] / s.out[1], t / s.out[2] % s.out[1], t % s.out[2]};
        int64_t source = x;
        bool inside = true;
        for (int d = 0; d < 3; d++) {
          const int64_t coordinate = at[d] * s.stride[d] + taps[d] * s.dilation[d] - s.padding[d];
          inside &= coordinate >= 0 && coordinate < s.in[d];
          source = source * s.in[d] + coordinate;
        }
        if (!inside) continue;
        const double product = double(output_grad.get((x * s.positions() + t) * s.out_channels + m)) *
                               double(inputs.get(source * s.in_channels + channel));
        gradient += product;
        magnitude += std::fabs(product);
      }
      const double error = (gamma + operand_error) * (1 + gamma) * magnitude;
      sums[0][size_t(i)] += std::fabs(gradient);
      sums[1][size_t(i)] += gradient * gradient;
      gradient_errors[0][size_t(i)] += error;
      gradient_errors[1][size_t(i)] += error * (2 * std::fabs(gradient) + error);
    }
  }
};

}  // namespace delfast::test
