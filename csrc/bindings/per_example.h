// The checks of the per-example ops on every device, and the structs that the kernels read.
#pragma once

#include <limits>

#include "bindings/checks.h"
#include "bindings/versions.h"
#include "delfast/per_example.h"

namespace delfast::bindings {

inline Transform parse_transform(std::string_view name) {
  if (name == "abs") return Transform::abs;
  if (name == "square") return Transform::square;
  DELFAST_CHECK_VALUE(false, "expected transform 'abs' or 'square', got '", name, "'; pass one of these");
}

// Dim 0 outermost, dim 1 innermost. (With one channel or one position, contiguous is the same.)
inline Layout channels_last_layout(const Tensor& t) {
  const int64_t rows = t.size(0), channels = t.size(1), length = rows && t.numel() ? t.numel() / rows : 1;
  return {rows, length, channels == 1 || !t.numel() ? 1 : length / channels};
}

// The operands of per_example_accumulate_, channels-last; copied if they are not.
class PerExampleOperands {
 public:
  PerExampleOperands(const Tensor& sums, const Tensor& inputs, const Tensor& output_grad, const IntList& stride,
                     const IntList& padding, const IntList& dilation, int64_t groups, const std::string& transform)
      : changed_({sums}) {
    check_device(device_of(sums), inputs, "inputs");
    check_device(device_of(sums), output_grad, "output_grad");
    operands.transform = parse_transform(transform);
    operands.inputs_dtype = dtype_of(inputs, "inputs");
    operands.output_grad_dtype = dtype_of(output_grad, "output_grad");
    DELFAST_CHECK_VALUE(type_of(sums) == ScalarType::Float, "expected sums to be float32, got ", type_of(sums),
                        "; pass float32 zeros of the weight's shape");
    operands.shape = checked_shape(sums, inputs, output_grad, stride, padding, dilation, groups);
    if (sums.numel() == 0 || inputs.numel() == 0 || output_grad.numel() == 0) {
      operands.shape = {};  // nothing to add
      return;
    }
    operands.inputs = copies_.read(inputs, channels_last_layout(inputs));
    operands.output_grad = copies_.read(output_grad, channels_last_layout(output_grad));
    operands.sums = static_cast<float*>(copies_.write(sums, channels_last_layout(sums)));
  }

  // Call after the sums are computed.
  void finish() {
    copies_.write_back();
    increment_versions(changed_);
  }

  PerExample operands;

 private:
  static ConvShape checked_shape(const Tensor& sums, const Tensor& inputs, const Tensor& output_grad,
                                 const IntList& stride, const IntList& padding, const IntList& dilation,
                                 int64_t groups) {
    const int64_t dims = inputs.dim() - 2;
    DELFAST_CHECK_VALUE(
        dims >= 1 && dims <= 3 && output_grad.dim() == inputs.dim() && sums.dim() == inputs.dim(),
        "expected inputs (N, C, *in), output_grad (N, M, *out) and sums (M, C / groups, *kernel) of 1 to 3 "
        "spatial dimensions, got ",
        inputs.sizes(), ", ", output_grad.sizes(), " and ", sums.sizes(),
        "; pass the layer's input, its output's gradient and sums like its weight");
    DELFAST_CHECK_VALUE(
        int64_t(stride.size()) == dims && int64_t(padding.size()) == dims && int64_t(dilation.size()) == dims,
        "expected ", dims, " values each of stride, padding and dilation, got ", stride.size(), ", ", padding.size(),
        " and ", dilation.size(), "; pass one for each spatial dimension");
    ConvShape s;
    s.examples = inputs.size(0);
    s.in_channels = inputs.size(1);
    s.out_channels = output_grad.size(1);
    s.groups = groups;
    DELFAST_CHECK_VALUE(groups >= 1 && s.in_channels % groups == 0 && s.out_channels % groups == 0,
                        "expected groups to divide ", s.in_channels, " input and ", s.out_channels,
                        " output channels, got ", groups, "; pass the layer's groups");
    DELFAST_CHECK_VALUE(
        output_grad.size(0) == s.examples && sums.size(0) == s.out_channels && sums.size(1) == s.in_channels / groups,
        "expected output_grad of ", s.examples, " examples and sums (", s.out_channels, ", ", s.in_channels / groups,
        ", *kernel), got output_grad ", output_grad.sizes(), " and sums ", sums.sizes(),
        "; pass the layer's input, its output's gradient and sums like its weight");
    for (int64_t i = 0; i < dims; i++) {
      const int64_t to = 3 - dims + i;
      s.in[to] = inputs.size(2 + i);
      s.out[to] = output_grad.size(2 + i);
      s.kernel[to] = sums.size(2 + i);
      s.stride[to] = stride[i];
      s.padding[to] = padding[i];
      s.dilation[to] = dilation[i];
      DELFAST_CHECK_VALUE(stride[i] >= 1 && padding[i] >= 0 && dilation[i] >= 1,
                          "expected stride and dilation >= 1 and padding >= 0 in dimension ", i, ", got ", stride[i],
                          ", ", dilation[i], " and ", padding[i], "; pass the layer's");
      constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // so that no product of two of them overflows
      DELFAST_CHECK_VALUE(stride[i] <= kMost && padding[i] <= kMost && dilation[i] <= kMost && s.kernel[to] <= kMost,
                          "expected stride, dilation, padding and kernel below 2^31 in dimension ", i, ", got ",
                          stride[i], ", ", dilation[i], ", ", padding[i], " and ", s.kernel[to], "; pass the layer's");
      const __int128 span = __int128(s.in[to]) + 2 * padding[i] - dilation[i] * (s.kernel[to] - 1) - 1;
      const int64_t out = span >= 0 ? int64_t(span / stride[i] + 1) : 0;
      DELFAST_CHECK_VALUE(s.kernel[to] >= 1 && out == s.out[to], "expected output_grad of ", out,
                          " positions in dimension ", i, ", given inputs ", inputs.sizes(), " and sums ", sums.sizes(),
                          ", got ", output_grad.sizes(), "; pass the layer's stride, padding and dilation");
    }
    return s;
  }

  Copies copies_;
  TensorList changed_;
};

// The operands of channel_dot in the layout of the output gradients; values are copied if their layout differs.
class ChannelDotOperands {
 public:
  ChannelDotOperands(const Tensor& output_grad, const OptionalTensor& values) {
    DELFAST_CHECK_VALUE(output_grad.dim() >= 2, "expected output_grad (N, C, *positions), got ", output_grad.sizes(),
                        "; pass the gradient of a layer's output");
    dot.output_grad_dtype = dtype_of(output_grad, "output_grad");
    if (values) {
      check_device(device_of(output_grad), *values, "values");
      DELFAST_CHECK_VALUE(values->sizes().equals(output_grad.sizes()), "expected values of shape ", output_grad.sizes(),
                          " like output_grad, got ", values->sizes(), "; pass what the gradient is of");
      dot.values_dtype = dtype_of(*values, "values");
    }
    dot.examples = output_grad.size(0);
    dot.channels = output_grad.size(1);
    if (output_grad.numel() == 0) return;
    const Layout layout = usable_layout(output_grad);
    dot.positions = layout.length / dot.channels;
    dot.channels_last = layout.spatial != 1;
    dot.output_grad = copies_.read(output_grad, layout);
    if (values) dot.values = copies_.read(*values, layout);
  }

  ChannelDot dot;  // without `out`

 private:
  Copies copies_;
};

// The operands of channel_sums_ in the layout of the output gradients; values are copied if their layout differs.
class ChannelSumsOperands {
 public:
  ChannelSumsOperands(const TensorList& written, const Tensor& output_grad, const OptionalTensor& values,
                      const OptionalTensor& mean, const OptionalTensor& variance, double eps,
                      const std::string& transform)
      : changed_(written) {
    DELFAST_CHECK_VALUE(!written.empty() && written.size() <= (values ? 2 : 1),
                        "expected one tensor of sums, or two with values, got ", written.size(),
                        "; pass those of the weight and the bias");
    DELFAST_CHECK_VALUE(mean.has_value() == variance.has_value() && (values || !mean),
                        "expected mean and variance together and with values; pass both or neither");
    const Device device = device_of(written[0]);
    check_devices(device, written, "sums");
    check_device(device, output_grad, "output_grad");
    if (values) check_device(device, *values, "values");
    if (mean) check_device(device, *mean, "mean");
    if (variance) check_device(device, *variance, "variance");
    DELFAST_CHECK_VALUE(output_grad.dim() >= 2, "expected output_grad (N, C, *positions), got ", output_grad.sizes(),
                        "; pass the gradient of a layer's output");
    operands.transform = parse_transform(transform);
    operands.output_grad_dtype = dtype_of(output_grad, "output_grad");
    operands.examples = output_grad.size(0);
    operands.channels = output_grad.size(1);
    operands.eps = eps;
    for (size_t i = 0; i < written.size(); i++) {
      DELFAST_CHECK_VALUE(type_of(written[i]) == ScalarType::Float, "expected sums #", i, " to be float32, got ",
                          type_of(written[i]), "; pass float32 zeros");
      DELFAST_CHECK_VALUE(written[i].numel() == operands.channels, "expected sums #", i, " of ", operands.channels,
                          " channels, got ", written[i].sizes(), "; pass zeros of the parameter's shape");
    }
    if (values) {
      DELFAST_CHECK_VALUE(values->sizes().equals(output_grad.sizes()), "expected values of shape ", output_grad.sizes(),
                          " like output_grad, got ", values->sizes(), "; pass what the gradient is of");
      operands.values_dtype = dtype_of(*values, "values");
    }
    if (mean) {
      operands.mean = statistic(*mean, "mean");
      operands.variance = statistic(*variance, "variance");
    }
    for (const Tensor& sums : written) {
      float* const to = static_cast<float*>(copies_.write(sums, contiguous(sums)));
      (values && &sums == &written.front() ? operands.weighted : operands.plain) = to;
    }
    if (output_grad.numel() == 0) return;
    const Layout layout = usable_layout(output_grad);
    operands.positions = layout.length / operands.channels;
    operands.channels_last = layout.spatial != 1;
    operands.output_grad = copies_.read(output_grad, layout);
    if (values) operands.values = copies_.read(*values, layout);
  }

  // Call after the sums are computed.
  void finish() {
    copies_.write_back();
    increment_versions(changed_);
  }

  ChannelSums operands;

 private:
  static Layout contiguous(const Tensor& t) {
    return t.dim() > 1 && t.numel() ? Layout{t.size(0), t.numel() / t.size(0), 1} : Layout{t.numel(), 1, 1};
  }
  const float* statistic(const Tensor& t, const char* role) {
    DELFAST_CHECK_VALUE(t.dim() == 1 && t.numel() == operands.channels, "expected ", role, " of ", operands.channels,
                        " channels, got ", t.sizes(), "; pass the layer's");
    dtype_of(t, role);
    return statistics_.emplace_back(torch::stable::contiguous(torch::stable::to(t, ScalarType::Float)))
        .const_data_ptr<float>();
  }

  Copies copies_;
  TensorList statistics_;
  TensorList changed_;
};

}  // namespace delfast::bindings
