// Per-example sums: the choice of the kernels for a layer, the number of slabs, and the launches.
//
// The kernels in reading order; each is launched once. For per_example_accumulate:
//
//   kernel                    file                       layers
//   per_example_tiles         per_example.cuh            every layer that the next two do not take
//   per_example_depthwise     per_example.cuh            one input channel for each group
//   per_example_segments      per_example_segments.cuh   with tensor cores: one group, at most two dimensions, channels
//                                                        in whole 16-byte packs, where measured to be the fastest
//   per_example_add_slabs     per_example.cuh            after the first two, if there are several slabs
//   per_example_add_segments  per_example_segments.cuh   after per_example_segments, if tiles are split
//
// For channel_dot and channel_sums:
//
//   channel_dot_rows          channel_dot.cuh            contiguous operands, or a single position
//   channel_dot_columns       channel_dot.cuh            channels-last operands
//   channel_sums_rows         channel_sums.cuh           contiguous operands, or a single position
//   channel_sums_columns      channel_sums.cuh           channels-last operands
//   channel_sums_add          channel_sums.cuh           after the two before, if there are several slabs
//
// Shared code, also in reading order: per_example_multiply.cuh (products of a tile), per_example_stages.cuh and
// per_example_fragments.cuh (parts 1 and 2 of per_example_segments), per_example_variants.h (the choice of a tile),
// per_example_segments.cu (its launchers).
#include <atomic>
#include <cstring>

#include "cuda/channel_dot.cuh"
#include "cuda/channel_sums.cuh"
#include "cuda/per_example.cuh"
#include "cuda/per_example_launch.h"
#include "cuda/per_example_segments.h"
#include "delfast/cuda_launch.h"

namespace delfast::cuda {

namespace {

// Blocks of a launch, if there are examples enough: two to three times the number that an H100 runs at once. Not
// compared with other numbers.
constexpr int64_t kWantedBlocks = 1024;
// Minimum number of positions of a slab: as many multiply-adds for each element of the slab's sums, which is written
// and read once. Not compared with other numbers.
constexpr int64_t kSlabPositions = 256;
constexpr int64_t kMostPositions = 1 << 30;
constexpr int64_t kMostPadded = INT32_MAX;  // positions of a padded dimension: kernels use int
constexpr Error kTooManyBlocks = "expected sums of at most 2^31 tiles, got more; leave that layer out";

bool is_depthwise(const ConvShape& s) { return s.in_channels == s.groups; }

// Numbers of tiles and slabs.
struct Plan {
  int64_t m_tiles, column_tiles, tiles, slab_examples, slabs;

  explicit Plan(const ConvShape& s) {
    if (is_depthwise(s)) {
      m_tiles = ceil_div(s.out_channels, kLanes);
      column_tiles = ceil_div(s.row(), kTaps);
      tiles = m_tiles * column_tiles;
    } else {
      m_tiles = ceil_div(s.out_channels / s.groups, kTile);
      column_tiles = ceil_div(s.row(), kTile);
      tiles = s.groups * m_tiles * column_tiles;
    }
    const int64_t wanted = ceil_div(kWantedBlocks, tiles);
    const int64_t by_blocks = ceil_div(s.examples, wanted), by_work = ceil_div(kSlabPositions, s.positions());
    slab_examples = by_blocks > by_work ? by_blocks : by_work;
    slabs = ceil_div(s.examples, slab_examples);
  }
};

int64_t slab_pitch(const ConvShape& s) { return ceil_div(s.out_channels * s.row(), 4) * 4; }

bool is_empty(const ConvShape& s) {
  return !s.examples || !s.out_channels || !s.in_channels || !s.positions() || !s.row();
}

// Returns true if each example has a single position and the examples can become positions of one example, along a
// dimension of size 1.
bool folds(const ConvShape& s) {
  return s.positions() == 1 && s.in[0] == 1 && s.kernel[0] == 1 && s.padding[0] == 0 && s.examples <= kMostPositions &&
         s.examples * s.in[1] * s.in[2] <= kMostPositions && !is_depthwise(s);
}
ConvShape folded(ConvShape s) {
  s.in[0] = s.out[0] = s.examples;
  s.stride[0] = 1;
  s.examples = 1;
  return s;
}

Layer layer_of(const PerExample& p, const ConvShape& s, const Plan& plan, void* workspace) {
  Layer layer = {};
  layer.inputs = p.inputs;
  layer.output_grad = p.output_grad;
  layer.out = plan.slabs > 1 ? static_cast<float*>(workspace) : p.sums;
  layer.slab_pitch = plan.slabs > 1 ? slab_pitch(s) : 0;
  layer.examples = s.examples;
  layer.slab_examples = plan.slab_examples;
  layer.in_channels = s.in_channels;
  layer.out_channels = s.out_channels;
  layer.group_inputs = s.in_channels / s.groups;
  layer.group_outputs = s.out_channels / s.groups;
  layer.row = s.row();
  for (int d = 0; d < 3; d++) {
    layer.in[d] = int(s.in[d]);
    layer.out_size[d] = int(s.out[d]);
    layer.kernel[d] = int(s.kernel[d]);
    layer.stride[d] = int(s.stride[d]);
    layer.padding[d] = int(s.padding[d]);
    layer.dilation[d] = int(s.dilation[d]);
  }
  layer.tiles = uint32_t(plan.tiles);
  layer.m_tiles = uint32_t(plan.m_tiles);
  layer.column_tiles = uint32_t(plan.column_tiles);
  layer.inputs_dtype = p.inputs_dtype;
  layer.output_grad_dtype = p.output_grad_dtype;
  layer.transform = p.transform;
  layer.operand_transform = Transform::none;
  return layer;
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Returns true if every pack of `count` elements of the operands' channels is aligned.
bool aligned_packs(const PerExample& p, int64_t count) {
  return aligned(p.inputs, count * bytes_of(p.inputs_dtype)) &&
         aligned(p.output_grad, count * bytes_of(p.output_grad_dtype));
}

template <class Multiply, int kPack>
void launch_tiles(Layer layer, const Plan& plan, Stream stream) {
  layer.step = layer.position(Loader<Multiply, kPack>::kRows);
  DELFAST_LAUNCH((per_example_tiles<Multiply, kPack>), unsigned(plan.tiles * plan.slabs), kTileThreads, 0, stream,
                 layer);
}
template <class Multiply>
void launch_tiles(const PerExample& p, const Layer& layer, const Plan& plan, Stream stream) {
  constexpr int kPack = 16 / int(sizeof(typename Multiply::Staged));
  const bool by_packs = layer.group_inputs % kPack == 0 && layer.group_outputs % kPack == 0 &&
                        aligned_packs(p, kPack) && aligned(layer.out, 16);
  by_packs ? launch_tiles<Multiply, kPack>(layer, plan, stream) : launch_tiles<Multiply, 1>(layer, plan, stream);
}

template <int kPack>
void launch_depthwise(Layer layer, const Plan& plan, Stream stream) {
  layer.step = layer.position(kThreads / kLanes * kPack);
  DELFAST_LAUNCH(per_example_depthwise<kPack>, unsigned(plan.tiles * plan.slabs), kThreads, 0, stream, layer);
}
void launch_depthwise(const PerExample& p, const Layer& layer, const Plan& plan, Stream stream) {
  const bool by_packs = layer.group_outputs == 1 && layer.in_channels % 4 == 0 && aligned_packs(p, 4);
  by_packs ? launch_depthwise<4>(layer, plan, stream) : launch_depthwise<1>(layer, plan, stream);
}

// ---- the choice between these kernels and per_example_segments

std::atomic<int> forced_variant = -1;  // -1: the fastest in measurements

// The current device's name if the table of variants contains it, otherwise the table's first name.
const char* card() {
  static ByDevice<const char*> known;
  return known.get(kMeasuredLayers[0].card, [](int device, const char*& name) {
    cudaDeviceProp properties;
    const cudaError_t error = cudaGetDeviceProperties(&properties, device);
    if (error == cudaSuccess)
      for (const MeasuredLayer& layer : kMeasuredLayers)
        if (!std::strcmp(layer.card, properties.name)) name = layer.card;
    return error;
  });
}

// Calls f.template operator()<Operand>() with the type that tensor cores multiply: the operands' own, or tf32.
template <class F>
auto with_operand(Dtype dtype, F f) {
  if constexpr (!kFewInstances)
    if (dtype == Dtype::float16) return f.template operator()<__half>();
  return dtype == Dtype::float32 ? f.template operator()<nvcuda::wmma::precision::tf32>()
                                 : f.template operator()<__nv_bfloat16>();
}

// Returns true if per_example_segments computes these sums, and writes its plan.
bool plan_of_segments(const PerExample& p, bool tensor_cores, SegmentsPlan& plan) {
  if (!tensor_cores || p.inputs_dtype != p.output_grad_dtype || is_empty(p.shape) || folds(p.shape)) return false;
  const int forced = forced_variant;
  const Variant variant =
      forced >= 0 ? Variant(forced) : nearest_variant(card(), p.inputs_dtype != Dtype::float32, p.shape);
  if (variant == Variant::wmma) return false;
  return with_operand(p.inputs_dtype, [&]<class Operand>() { return plan_segments<Operand>(p, variant, plan); });
}

}  // namespace

bool force_per_example_variant(const char* name) {
  if (!std::strcmp(name, "measured")) {
    forced_variant = -1;
    return true;
  }
  for (int i = 0; i < kVariants; i++)
    if (!std::strcmp(name, kVariantNames[i])) {
      forced_variant = i;
      return true;
    }
  return false;
}

const char* per_example_variant(const PerExample& p, bool tensor_cores) {
  SegmentsPlan plan;
  return kVariantNames[int(plan_of_segments(p, tensor_cores, plan) ? plan.variant : Variant::wmma)];
}

int64_t per_example_workspace(const PerExample& p, bool tensor_cores) {
  if (is_empty(p.shape)) return 0;
  SegmentsPlan segments;
  if (plan_of_segments(p, tensor_cores, segments)) return segments.workspace;
  const ConvShape s = folds(p.shape) ? folded(p.shape) : p.shape;
  const Plan plan(s);
  return plan.slabs > 1 ? plan.slabs * slab_pitch(s) * int64_t(sizeof(float)) : 0;
}

Error per_example_accumulate(const PerExample& p, bool tensor_cores, void* workspace, Stream stream) {
  if (is_empty(p.shape)) return nullptr;
  const bool fold = folds(p.shape);
  const ConvShape s = fold ? folded(p.shape) : p.shape;
  if (s.positions() > kMostPositions || s.in[0] * s.in[1] * s.in[2] > kMostPositions)
    return "expected examples of at most 2^30 positions, got more; leave that layer out";
  for (int d = 0; d < 3; d++)
    if (s.in[d] + 2 * s.padding[d] > kMostPadded)
      return "expected inputs of at most 2^31 - 1 positions with their padding, got more; leave that layer out";
  SegmentsPlan segments;
  if (plan_of_segments(p, tensor_cores, segments)) {
    with_operand(p.inputs_dtype, [&]<class Operand>() { launch_segments<Operand>(p, segments, workspace, stream); });
    return last_error();
  }
  const Plan plan(s);
  if (plan.tiles * plan.slabs > INT32_MAX) return kTooManyBlocks;
  Layer layer = layer_of(p, s, plan, workspace);
  if (fold) {
    layer.operand_transform = p.transform;
    layer.transform = Transform::abs;  // the terms are not negative, so abs does not change them
  }
  if (is_depthwise(s)) {
    launch_depthwise(p, layer, plan, stream);
  } else if (!tensor_cores) {
    launch_tiles<FusedMultiplyAdd>(p, layer, plan, stream);
  } else if (fold || p.inputs_dtype != p.output_grad_dtype || p.inputs_dtype == Dtype::float32) {
    launch_tiles<TensorCores<nvcuda::wmma::precision::tf32>>(p, layer, plan, stream);
  } else if (p.inputs_dtype == Dtype::bfloat16) {
    launch_tiles<TensorCores<__nv_bfloat16>>(p, layer, plan, stream);
  } else {
    launch_tiles<TensorCores<__half>>(p, layer, plan, stream);
  }

  if (plan.slabs > 1) {
    const int64_t count = s.out_channels * s.row();
    const float* const partial = static_cast<const float*>(workspace);
    if (count % 4 == 0 && aligned(p.sums, 16))
      DELFAST_LAUNCH(per_example_add_slabs<4>, unsigned(ceil_div(count, 4 * kThreads)), kThreads, 0, stream, p.sums,
                     partial, count, layer.slab_pitch, plan.slabs);
    else
      DELFAST_LAUNCH(per_example_add_slabs<1>, unsigned(ceil_div(count, kThreads)), kThreads, 0, stream, p.sums,
                     partial, count, layer.slab_pitch, plan.slabs);
  }
  return last_error();
}

Error channel_dot(const ChannelDot& p, Stream stream) {
  const int64_t rows = p.examples * p.channels;
  if (!rows) return nullptr;
  if (p.channels_last && p.positions > 1) {
    const int64_t tiles = ceil_div(p.channels, kDotLanes);
    if (p.examples * tiles > INT32_MAX) return kTooManyBlocks;
    DELFAST_LAUNCH(channel_dot_columns, unsigned(p.examples * tiles), kThreads, 0, stream, p, tiles);
  } else {
    int lanes = 1;
    while (lanes < kWarp && lanes * 4 < p.positions) lanes *= 2;
    if (ceil_div(rows * lanes, kThreads) > INT32_MAX) return kTooManyBlocks;
    DELFAST_LAUNCH(channel_dot_rows, unsigned(ceil_div(rows * lanes, kThreads)), kThreads, 0, stream, p, lanes);
  }
  return last_error();
}

namespace {

// Number of threads that fills a GPU, and maximum number of slabs: a thread reads their sums one after another.
constexpr int64_t kWantedThreads = kWantedBlocks * kThreads, kMostSlabs = 256;

struct SumsPlan {
  bool columns;     // channels-last
  bool by_example;  // strands divide the examples instead of the positions
  int lanes = 1;    // lanes of a team for a row
  int64_t tiles, slab_examples, slabs;

  explicit SumsPlan(const ChannelSums& p) {
    columns = p.channels_last && p.positions > 1;
    by_example = p.positions < kWarp;
    while (lanes < kWarp && lanes * 4 < p.positions) lanes *= 2;
    tiles = ceil_div(p.channels, kDotLanes);
    const int64_t threads = columns ? tiles * kThreads : p.channels * lanes;  // threads of a slab
    int64_t wanted = threads ? ceil_div(kWantedThreads, threads) : 1;
    if (columns && by_example) wanted = wanted < ceil_div(p.examples, kWarp) ? wanted : ceil_div(p.examples, kWarp);
    wanted = wanted < kMostSlabs ? wanted : kMostSlabs;
    slab_examples = p.examples > wanted ? ceil_div(p.examples, wanted) : 1;
    slabs = ceil_div(p.examples, slab_examples);
  }
};

}  // namespace

int64_t channel_sums_workspace(const ChannelSums& p) {
  const SumsPlan plan(p);
  return plan.slabs > 1 ? plan.slabs * 2 * p.channels * int64_t(sizeof(float)) : 0;
}

Error channel_sums(const ChannelSums& p, void* workspace, Stream stream) {
  if (!p.examples || !p.channels || !p.positions) return nullptr;
  const SumsPlan plan(p);
  float* const parts = plan.slabs > 1 ? static_cast<float*>(workspace) : nullptr;
  const int64_t blocks =
      plan.columns ? plan.tiles * plan.slabs : ceil_div(p.channels * plan.slabs * plan.lanes, kThreads);
  if (blocks > INT32_MAX || 2 * p.channels / kThreads >= INT32_MAX) return kTooManyBlocks;
  if (plan.columns && plan.by_example)
    DELFAST_LAUNCH(channel_sums_columns<true>, unsigned(blocks), kThreads, 0, stream, p, parts, plan.tiles,
                   plan.slab_examples);
  else if (plan.columns)
    DELFAST_LAUNCH(channel_sums_columns<false>, unsigned(blocks), kThreads, 0, stream, p, parts, plan.tiles,
                   plan.slab_examples);
  else
    DELFAST_LAUNCH(channel_sums_rows, unsigned(blocks), kThreads, 0, stream, p, parts, plan.slabs, plan.slab_examples,
                   plan.lanes);
  if (parts)
    DELFAST_LAUNCH(channel_sums_add, unsigned(ceil_div(2 * p.channels, kThreads)), kThreads, 0, stream, p, parts,
                   plan.slabs);
  return last_error();
}

}  // namespace delfast::cuda
