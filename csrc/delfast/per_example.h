// Plain structs that describe the per-example sums: pointers, 64-bit sizes, no framework.
#pragma once

#include <cstdint>

#include "delfast/params.h"

namespace delfast {

// The transform of each example's gradient g before it is added to the sums: |g| or g^2. `none` is for operands alone,
// which kernels transform in place of g where it is their product.
enum class Transform : int8_t { none, abs, square };

// A convolution of one, two or three dimensions: depth, height, width. A missing dimension has size 1 (and padding 0).
// For each example, `inputs` is in[0] x in[1] x in[2] x in_channels and `output_grad` is out[0] x out[1] x out[2] x
// out_channels, channels-last and contiguous. A linear layer on (N, T, features) is a convolution with in = out = {1,
// 1, T} and kernel 1.
struct ConvShape {
  int64_t examples = 0;
  int64_t in_channels = 0, out_channels = 0, groups = 1;  // channels of all groups
  int64_t in[3] = {1, 1, 1}, out[3] = {1, 1, 1}, kernel[3] = {1, 1, 1};
  int64_t stride[3] = {1, 1, 1}, padding[3] = {0, 0, 0}, dilation[3] = {1, 1, 1};

  DELFAST_INLINE int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  DELFAST_INLINE int64_t positions() const { return out[0] * out[1] * out[2]; }
  DELFAST_INLINE int64_t row() const { return taps() * (in_channels / groups); }  // elements of a row of the sums
};

// sums[m][tap][c] += sum over x of transform(sum over t of output_grad[x][t][m] * inputs[x][source of t and tap][c]),
// with c counting within m's group: the memory of a channels-last weight. Float32 sums; a source in the padding counts
// as 0.
struct PerExample {
  const void* inputs = nullptr;
  const void* output_grad = nullptr;
  float* sums = nullptr;
  Dtype inputs_dtype = Dtype::float32, output_grad_dtype = Dtype::float32;
  Transform transform = Transform::abs;
  ConvShape shape;
};

// out[x][c] = sum over positions of output_grad * values, or of output_grad alone if `values` is null, in float32. Both
// are in memory as [examples][channels][positions], or channels-last as [examples][positions][channels].
struct ChannelDot {
  const void* output_grad = nullptr;
  const void* values = nullptr;
  float* out = nullptr;
  Dtype output_grad_dtype = Dtype::float32, values_dtype = Dtype::float32;
  int64_t examples = 0, channels = 0, positions = 0;
  bool channels_last = false;
};

// The gradients of a normalization's weight and bias, or of a bias, summed over the examples:
// plain[c] += sum over x of transform(sum over positions of output_grad), and
// weighted[c] += sum over x of transform(sum over positions of output_grad * (values - mean[c]) / sqrt(variance[c] +
// eps)). `values` is null if only `plain` is needed, `plain` if only `weighted`. Without statistics, both of them null,
// values are not centered or scaled. Memory as in ChannelDot.
struct ChannelSums {
  const void* output_grad = nullptr;
  const void* values = nullptr;
  const float* mean = nullptr;
  const float* variance = nullptr;
  float* weighted = nullptr;
  float* plain = nullptr;
  double eps = 0;
  Dtype output_grad_dtype = Dtype::float32, values_dtype = Dtype::float32;
  Transform transform = Transform::abs;
  bool channels_last = false;
  int64_t examples = 0, channels = 0, positions = 0;
};

}  // namespace delfast
