// Conversion of the per-example sums' operands into the form that the kernels read: float32 without padding, or
// bfloat16 in AmxLayout for AMX.
#include <algorithm>
#include <numeric>

#include "delfast/cpu_dispatch.h"

namespace delfast::cpu {

namespace {

// Packed operands of a block, 16 MiB: they fit in an outer cache, and threads rarely wait for each other.
constexpr int64_t kPackedFloats = 1 << 22;
// For AMX 2 MiB, the size of a second-level cache: every tile reads all of them.
constexpr int64_t kAmxElements = 1 << 20;

int64_t vectors(int64_t elements) { return (elements + 15) / 16; }
int64_t pixels(const ConvShape& s) { return s.in[0] * s.in[1] * s.in[2]; }

// Taps that are neighbours in the kernel read neighbours in memory. Treated as a single tap they fill vectors that few
// channels (3 of an image) would leave mostly empty. The cost is a copy of the input with its padding along the width.
// Padding beyond the kernel's size would be copied for outputs that read nothing else.
bool joins_taps(const ConvShape& s) {
  const int64_t row = s.kernel[2] * s.in_channels;
  return s.groups == 1 && s.dilation[2] == 1 && s.padding[2] < s.kernel[2] &&
         vectors(row) < s.kernel[2] * vectors(s.in_channels);
}

// With a single position, |sum over t of d a| is |d| |a|, and the square of the product is the product of the squares.
// The sum over examples is then a plain product of matrices of transformed values, with examples in place of positions.
bool joins_examples(const ConvShape& s) {
  const bool padded = s.padding[0] || s.padding[1] || s.padding[2];
  return s.taps() == 1 && s.positions() == 1 && pixels(s) == 1 && !padded;
}

// Returns true if the planes of AmxLayout are at most a few times as large as their content: those of a strongly
// dilated kernel are mostly padding.
bool fits_planes(const ConvShape& s) {
  double plane = 1;  // positions, as double: they may exceed the range of an integer
  for (int i = 0; i < 3; i++) plane *= double(s.out[i]) + double((s.kernel[i] - 1) * s.dilation[i]);
  return plane <= 4096 + 16 * double(pixels(s) + s.positions());
}

bool is_depthwise(const ConvShape& s) { return s.groups > 1 && s.in_channels == s.groups; }

const void* advanced(const void* data, Dtype dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * (dtype == Dtype::float32 ? 4 : 2);
}

}  // namespace

AmxLayout::AmxLayout(const ConvShape& s) : used(true) {
  int64_t past = 0;  // one past the last position that has an output
  for (int i = 0; i < 3; i++) {
    phases[i] = std::min(s.kernel[i], s.stride[i] / std::gcd(s.stride[i], s.dilation[i]));
    plane[i] = s.out[i] + (s.kernel[i] - 1) * s.dilation[i] / s.stride[i];
    past = past * plane[i] + s.out[i] - 1;
  }
  past++;
  const int64_t last = source(s, s.taps() - 1).offset;
  zeros = last ? kStep : 0;
  steps = (past + (last > 0) + kStep - 1) / kStep;  // an odd offset moves the output gradients by one position
  pairs = last / 2 + steps * kStep / 2;
  row_blocks = s.groups * vectors(s.out_channels / s.groups);
  column_blocks = s.groups * vectors(s.in_channels / s.groups);
  // an odd number of cache lines; otherwise rows would share few sets of the first-level cache
  output_grad_pitch = zeros + steps * kStep;
  if (output_grad_pitch / kStep % 2 == 0) output_grad_pitch += kStep;
}

AmxLayout::Source AmxLayout::source(const ConvShape& s, int64_t tap) const {
  const int64_t at[3] = {tap / (s.kernel[1] * s.kernel[2]), tap / s.kernel[2] % s.kernel[1], tap % s.kernel[2]};
  Source found{0, 0};
  for (int i = 0; i < 3; i++) {
    found.plane = found.plane * phases[i] + at[i] % phases[i];
    found.offset = found.offset * plane[i] + at[i] * s.dilation[i] / s.stride[i];
  }
  return found;
}

bool PerExamplePlan::packs_inputs() const {
  return whole.inputs_dtype != Dtype::float32 || joins_taps(whole.shape) || joins_examples(whole.shape);
}

bool PerExamplePlan::packs_output_grad() const {
  const bool rearranges = is_depthwise(whole.shape) && whole.shape.out_channels != whole.shape.groups;
  return whole.output_grad_dtype != Dtype::float32 || rearranges || joins_examples(whole.shape);
}

PerExamplePlan::PerExamplePlan(const PerExample& p, Isa isa)
    : whole(p), block_examples(std::max<int64_t>(1, p.shape.examples)) {
  const ConvShape& s = whole.shape;
  const bool both = p.inputs_dtype == Dtype::bfloat16 && p.output_grad_dtype == Dtype::bfloat16;
  if (isa == Isa::amx && both && s.examples && !joins_examples(s) && !is_depthwise(s) && fits_planes(s))
    amx_ = AmxLayout(s);
  int64_t floats = 0;  // packed floats of an example
  if (amx_.used) {
    const int64_t elements = amx_.inputs() + amx_.output_grad();
    block_examples = std::clamp<int64_t>(kAmxElements / elements, 1, block_examples);
    workspace = elements * block_examples / 2;
    return;
  }
  if (packs_inputs()) {
    const int64_t width = s.in[2] + (joins_taps(s) ? 2 * s.padding[2] : 0);
    floats += s.in[0] * s.in[1] * width * s.in_channels;
  }
  if (packs_output_grad()) floats += s.positions() * s.out_channels;
  if (floats) block_examples = std::clamp<int64_t>(kPackedFloats / floats, 1, block_examples);
  workspace = floats * block_examples;
}

PerExampleBlock PerExamplePlan::block(int64_t first_example, float* workspace_floats) const {
  PerExampleBlock b;
  b.sums = whole.sums;
  b.transform = whole.transform;
  b.shape = whole.shape;
  ConvShape& s = b.shape;
  s.examples = std::min(block_examples, s.examples - first_example);
  b.columns = s.in_channels / s.groups;
  const void* inputs = advanced(whole.inputs, whole.inputs_dtype, first_example * pixels(s) * s.in_channels);
  const void* output_grad =
      advanced(whole.output_grad, whole.output_grad_dtype, first_example * s.positions() * s.out_channels);
  b.inputs = static_cast<const float*>(inputs);
  b.output_grad = static_cast<const float*>(output_grad);
  if (amx_.used) {
    b.amx = amx_;
    b.pack_inputs.from = inputs;
    b.pack_inputs.rows = s.examples * amx_.planes();
    b.pack_inputs.length = amx_.inputs() / amx_.planes();
    b.inputs = b.pack_inputs.to = workspace_floats;
    b.pack_output_grad.from = output_grad;
    b.pack_output_grad.rows = s.examples;
    b.pack_output_grad.length = amx_.output_grad();
    b.output_grad = b.pack_output_grad.to = workspace_floats + s.examples * amx_.inputs() / 2;
    return b;
  }

  Packing pack;
  if (joins_examples(s)) pack.transform = b.transform;
  if (packs_inputs()) {
    pack.from = inputs;
    pack.dtype = whole.inputs_dtype;
    pack.to = workspace_floats;
    pack.rows = s.examples * s.in[0] * s.in[1];
    pack.length = s.in[2] * s.in_channels;
    if (joins_taps(s)) {
      pack.before = pack.after = s.padding[2] * s.in_channels;
      b.columns = s.kernel[2] * s.in_channels;
      s.in[2] += 2 * s.padding[2];
      s.padding[2] = 0;
      s.kernel[2] = 1;
    }
    b.inputs = pack.to;
    b.pack_inputs = pack;
    workspace_floats += pack.rows * (pack.before + pack.length + pack.after);
  }
  if (packs_output_grad()) {
    pack.from = output_grad;
    pack.dtype = whole.output_grad_dtype;
    pack.to = workspace_floats;
    pack.rows = s.examples * s.positions();
    pack.length = s.out_channels;
    pack.before = pack.after = 0;
    if (is_depthwise(s)) pack.groups = s.groups;
    b.output_grad = pack.to;
    b.pack_output_grad = pack;
  }
  if (joins_examples(s)) {
    b.transform = Transform::abs;  // the sums are not negative, so abs does not change them
    s.in[2] = s.out[2] = s.examples;
    s.stride[2] = 1;  // from one example to the next, independent of the layer's stride
    s.examples = 1;
  }
  return b;
}

ChannelSumsPlan::ChannelSumsPlan(const ChannelSums& p) {
  constexpr int64_t kWantedUnits = 64;
  blocks = vectors(p.channels);
  const int64_t wanted = blocks ? (kWantedUnits + blocks - 1) / blocks : 1;
  slab_examples = std::max<int64_t>(1, (p.examples + wanted - 1) / wanted);
  slabs = (p.examples + slab_examples - 1) / slab_examples;
}

void add_channel_sums(const ChannelSums& p, const ChannelSumsPlan& plan, const double* workspace) {
  constexpr int64_t kLanes = ChannelSumsPlan::kLanes;
  for (int64_t c = 0; c < p.channels; c++) {
    double weighted = 0, plain = 0;
    for (int64_t slab = 0; slab < plan.slabs; slab++) {
      const double* unit = workspace + (slab * plan.blocks + c / kLanes) * 2 * kLanes + c % kLanes;
      weighted += unit[0];
      plain += unit[kLanes];
    }
    if (p.weighted) p.weighted[c] += float(weighted);
    if (p.plain) p.plain[c] += float(plain);
  }
}

}  // namespace delfast::cpu
