// The sum of output gradients times values over the positions, for each example and channel.
//
// Mapping. Contiguous: a team of lanes of a warp takes a row of positions; the team has a lane for each pack of the
// row, up to a warp. Channels-last: a block takes kDotLanes channels of an example; its strands divide the positions,
// and their sums are added.
// Memory. Every operand is read once, by 16-byte loads wherever alignment allows. Only the sums are written.
// Numerics. Products and sums in float32. The order of additions depends only on the shape and on alignment.
#pragma once

#include "cuda/common.cuh"
#include "delfast/cuda_launch.h"

namespace delfast::cuda {

constexpr int kDotLanes = 32;

// ---- the products, or the output gradients alone

template <class OutputGrad, class Value>
struct Products {
  static constexpr int kPack = 16 / int(sizeof(OutputGrad) > sizeof(Value) ? sizeof(OutputGrad) : sizeof(Value));
  const OutputGrad* output_grad;
  const Value* values;

  template <int kCount>
  __device__ __forceinline__ void load(int64_t i, float (&out)[kCount]) const {
    float factors[kCount];
    load_pack(output_grad + i, out);
    load_pack(values + i, factors);
    for (int j = 0; j < kCount; j++) out[j] *= factors[j];
  }
  __device__ __forceinline__ bool aligned() const {
    return pack_offset<kPack>(output_grad) == 0 && pack_offset<kPack>(values) == 0;
  }
};

template <class OutputGrad>
struct Plain {
  static constexpr int kPack = 16 / int(sizeof(OutputGrad));
  const OutputGrad* output_grad;

  template <int kCount>
  __device__ __forceinline__ void load(int64_t i, float (&out)[kCount]) const {
    load_pack(output_grad + i, out);
  }
  __device__ __forceinline__ bool aligned() const { return pack_offset<kPack>(output_grad) == 0; }
};

template <class F>
__device__ __forceinline__ void with_products(const ChannelDot& p, F f) {
  with_dtype(p.output_grad_dtype, [&]<class OutputGrad>(const OutputGrad*) {
    const OutputGrad* const output_grad = static_cast<const OutputGrad*>(p.output_grad);
    if (!p.values) return f(Plain<OutputGrad>{output_grad});
    with_dtype(p.values_dtype, [&]<class Value>(const Value*) {
      f(Products<OutputGrad, Value>{output_grad, static_cast<const Value*>(p.values)});
    });
  });
}

// ---- contiguous

// Returns the sum over the elements of [begin, end) that belong to one member of a team of `lanes`.
template <int kPack, class Source>
__device__ __forceinline__ float row_part(const Source& source, int64_t begin, int64_t end, int member, int lanes) {
  float sum = 0;
#pragma unroll 4
  for (int64_t i = begin + member * kPack; i < end; i += lanes * kPack) {
    float products[kPack];
    source.load(i, products);
    for (int j = 0; j < kPack; j++) sum += products[j];
  }
  return sum;
}

// `lanes`: number of lanes of a team, a power of two.
__global__ void __launch_bounds__(kThreads, 4) channel_dot_rows(const ChannelDot p, int lanes) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + int(threadIdx.x)) / lanes;
  const int member = int(threadIdx.x) % lanes;
  const bool exists = row < p.examples * p.channels;
  const int64_t begin = row * p.positions, end = exists ? begin + p.positions : begin;
  float sum = 0;
  with_products(p, [&]<class Source>(const Source& source) {
    sum = source.aligned() && p.positions % Source::kPack == 0
              ? row_part<Source::kPack>(source, begin, end, member, lanes)
              : row_part<1>(source, begin, end, member, lanes);
  });
  for (int step = 1; step < lanes; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (exists && member == 0) global_store(&p.out[row], sum);
}

// ---- channels-last

// Writes this thread's part of the sums of the block's channels from `channel` on to parts[warp][channel].
template <int kPack, class Source>
__device__ __forceinline__ void add_columns(const ChannelDot& p, const Source& source, int64_t example, int64_t channel,
                                            float (&parts)[kThreads / kWarp][kDotLanes]) {
  constexpr int kPacks = kDotLanes / kPack, kStrands = kThreads / kPacks;
  const int mine = int(threadIdx.x) % kPacks * kPack;
  float sums[kPack] = {};
  if (channel + mine < p.channels) {
    const int64_t first = example * p.positions * p.channels + channel + mine;
#pragma unroll 4
    for (int64_t t = int(threadIdx.x) / kPacks; t < p.positions; t += kStrands) {
      float products[kPack];
      source.load(first + t * p.channels, products);
      for (int j = 0; j < kPack; j++) sums[j] += products[j];
    }
  }
  for (int j = 0; j < kPack; j++) {
    for (int step = kPacks; step < kWarp; step *= 2) sums[j] += __shfl_xor_sync(kAllLanes, sums[j], step);
    if (lane() < kPacks) parts[warp()][mine + j] = sums[j];
  }
}

// An example has `tiles` tiles of kDotLanes channels.
__global__ void __launch_bounds__(kThreads) channel_dot_columns(const ChannelDot p, int64_t tiles) {
  DELFAST_SHARED(float, parts, [kThreads / kWarp][kDotLanes]);
  const int64_t example = blockIdx.x / tiles, channel = blockIdx.x % tiles * kDotLanes;
  with_products(p, [&]<class Source>(const Source& source) {
    if (source.aligned() && p.channels % Source::kPack == 0)
      add_columns<Source::kPack>(p, source, example, channel, parts);
    else
      add_columns<1>(p, source, example, channel, parts);
  });
  __syncthreads();
  const int mine = int(threadIdx.x);
  if (mine >= kDotLanes || channel + mine >= p.channels) return;
  float sum = 0;
  for (int w = 0; w < kThreads / kWarp; w++) sum += parts[w][mine];
  global_store(&p.out[example * p.channels + channel + mine], sum);
}

}  // namespace delfast::cuda
