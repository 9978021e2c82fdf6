// Launchers of per_example_segments: the choice of layers, and the distribution of tiles over the GPU's blocks.
#include "cuda/per_example_launch.h"
#include "cuda/per_example_segments.cuh"
#include "cuda/per_example_segments.h"

namespace delfast::cuda {

namespace {

// Calls f with a null pointer of the variant's tile type. Builds with few instances have one tile for each control
// flow: two shapes of tiles, one of them also for direct layers.
template <class Operand, class F>
auto with_tile(Variant variant, bool direct, F f) {
  const auto with_direct = [&]<int kM, int kN, int kWarpM, bool kEither = true>() {
    if constexpr (kEither)
      if (direct) return f(static_cast<Tile<Operand, kM, kN, kWarpM, true>*>(nullptr));
    return f(static_cast<Tile<Operand, kM, kN, kWarpM, false>*>(nullptr));
  };
  if (variant == Variant::tile_64x192) return with_direct.template operator()<64, 192, 32, !kFewInstances>();
  if constexpr (!kFewInstances) {
    if (variant == Variant::tile_64x128) return with_direct.template operator()<64, 128, 64>();
    if (variant == Variant::tile_128x128) return with_direct.template operator()<128, 128, 64>();
  }
  return with_direct.template operator()<64, 64, 64>();
}

// Returns the number of blocks of the kernel that the current device runs at once; 0 if it cannot run the kernel.
template <class T>
int resident_blocks() {
  static ByDevice<int> known;
  return known.get(0, [](int device, int& resident) {
    const auto kernel = per_example_segments<T>;
    int multiprocessors = 0, blocks = 0;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kShared);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, T::kThreads, T::kShared);
    resident = blocks * multiprocessors;
    return error;
  });
}

// Describes the layer, with a single dimension as columns of height. Returns false if the layer has more than two
// dimensions, or if counts do not fit.
template <bool kDirect, int kStep>
bool describe_layer(const PerExample& x, SegmentsLayer& p) {
  constexpr int64_t kMost = INT32_MAX - 4096;  // the last stage may extend beyond the last example
  const ConvShape& s = x.shape;
  const auto is_missing = [&](int d) { return s.in[d] == 1 && s.out[d] == 1 && s.kernel[d] == 1 && s.padding[d] == 0; };
  if (!kDirect && !is_missing(0)) return false;
  const int y = is_missing(1) ? 2 : 1, x_or_none = is_missing(1) ? -1 : 2;
  const auto along_x = [&](const int64_t (&values)[3], int none) { return x_or_none < 0 ? none : int(values[2]); };
  const int64_t in_size = s.in[0] * s.in[1] * s.in[2], out_width = along_x(s.out, 1);
  if ((s.examples + 1) * s.positions() >= kMost || (s.examples + 1) * in_size >= kMost) return false;
  if (!kDirect) {
    // the division by out_width is exact for positions below 2^31 / out_width; rows after an example's last position
    // count as positions here
    if ((s.positions() + kStep) * out_width >= kMost) return false;
    if ((s.out[y] + kStep) * s.stride[y] + s.kernel[y] * s.dilation[y] + s.padding[y] >= kMost) return false;
  }
  p = {};
  p.output_grad = static_cast<const char*>(x.output_grad);
  p.inputs = static_cast<const char*>(x.inputs);
  p.sums = x.sums;
  p.out_channels = int(s.out_channels), p.in_channels = int(s.in_channels), p.row = int(s.row());
  p.examples = int(s.examples), p.positions = int(s.positions());
  p.padded = int(ceil_div(s.positions(), kStep) * kStep);
  p.in_height = int(s.in[y]), p.in_width = along_x(s.in, 1), p.in_size = int(in_size);
  p.kernel_width = along_x(s.kernel, 1);
  p.stride_y = int(s.stride[y]), p.stride_x = along_x(s.stride, 1);
  p.padding_y = int(s.padding[y]), p.padding_x = along_x(s.padding, 0);
  p.dilation_y = int(s.dilation[y]), p.dilation_x = along_x(s.dilation, 1);
  p.out_width = int(out_width);
  p.out_width_magic = uint32_t(ceil_div(int64_t(1) << 31, out_width));
  return true;
}

template <class T>
bool plan_tiles(const PerExample& x, SegmentsPlan& plan) {
  const ConvShape& s = x.shape;
  if (s.groups != 1 || s.in_channels % T::kPack || s.out_channels % T::kPack) return false;
  if (!aligned(x.output_grad, 16) || !aligned(x.inputs, 16) || !aligned(x.sums, 16)) return false;
  SegmentsLayer& p = plan.layer;
  const int64_t m_tiles = ceil_div(s.out_channels, T::kM), tiles = m_tiles * ceil_div(s.row(), T::kN);
  constexpr int64_t kMostRow = INT32_MAX / T::kBytes;  // channels of a position, whose bytes are counted in an int
  if (s.row() > kMostRow || s.out_channels > kMostRow || tiles > INT32_MAX / 2) return false;  // in_channels <= row
  if (!describe_layer<T::kDirect, T::kStep>(x, p)) return false;
  const int64_t resident = resident_blocks<T>();
  if (!resident) return false;
  p.m_tiles = int(m_tiles), p.tiles = int(tiles);
  const int64_t whole = tiles / resident * resident, units = (tiles - whole) * s.examples;
  if (units > INT32_MAX) return false;
  p.split_tiles = int(tiles - whole);
  p.split_blocks = int(units < resident ? units : resident);
  plan.blocks = whole ? int(resident) : p.split_blocks;
  plan.workspace = units ? int64_t(p.split_blocks + p.split_tiles) * T::kM * T::kN * int64_t(sizeof(float)) : 0;
  return true;
}

}  // namespace

template <class Operand>
bool plan_segments(const PerExample& p, Variant variant, SegmentsPlan& plan) {
  plan.variant = variant;
  return with_tile<Operand>(variant, is_direct(p.shape), [&]<class T>(T*) { return plan_tiles<T>(p, plan); });
}

template <class Operand>
void launch_segments(const PerExample& p, const SegmentsPlan& plan, void* workspace, Stream stream) {
  SegmentsLayer layer = plan.layer;
  layer.partial = static_cast<float*>(workspace);
  with_tile<Operand>(plan.variant, is_direct(p.shape), [&]<class T>(T*) {
    DELFAST_LAUNCH(per_example_segments<T>, unsigned(plan.blocks), T::kThreads, T::kShared, stream, layer, p.transform);
    if (layer.split_tiles)
      DELFAST_LAUNCH((per_example_add_segments<T::kM, T::kN>),
                     unsigned(layer.split_tiles * (T::kM * T::kN / 4 / kThreads)), kThreads, 0, stream, layer);
  });
}

#define DELFAST_INSTANTIATE(Operand)                                               \
  template bool plan_segments<Operand>(const PerExample&, Variant, SegmentsPlan&); \
  template void launch_segments<Operand>(const PerExample&, const SegmentsPlan&, void*, Stream)
DELFAST_INSTANTIATE(__nv_bfloat16);
DELFAST_INSTANTIATE(nvcuda::wmma::precision::tf32);
#ifndef DELFAST_FEW_INSTANCES
DELFAST_INSTANTIATE(__half);
#endif

}  // namespace delfast::cuda
