// The gradients of a normalization's weight and bias, or of a bias, summed over the examples: ChannelSums.
//
// Mapping. Contiguous: a team of lanes of a warp takes a channel of a slab of examples. Channels-last: a block takes
// kDotLanes channels of a slab; its strands divide the positions of an example, or the examples if an example has few
// positions. A second kernel adds the slabs in order.
// Memory. Every operand is read once, by 16-byte loads wherever alignment allows. Only the slabs' sums are written.
// Numerics. Sums of an example as in channel_dot. The order of additions depends only on the shape and on alignment.
// The mean is subtracted from every value, which avoids cancellation.
#pragma once

#include "cuda/channel_dot.cuh"

namespace delfast::cuda {

__device__ __forceinline__ float with_transform(float x, Transform transform) {
  return transform == Transform::abs ? fabsf(x) : x * x;
}

// The two sums of one or several channels: of output gradients, and of output gradients times centered values.
template <int kCount>
struct SumPair {
  float weighted[kCount] = {}, plain[kCount] = {};

  // Adds the transform of an example's sums.
  __device__ __forceinline__ void add(const SumPair& example, Transform transform) {
    for (int j = 0; j < kCount; j++) {
      weighted[j] += with_transform(example.weighted[j], transform);
      plain[j] += with_transform(example.plain[j], transform);
    }
  }
};

template <class OutputGrad, class Value>
struct Pairs {
  static constexpr int kPack = 16 / int(sizeof(OutputGrad) > sizeof(Value) ? sizeof(OutputGrad) : sizeof(Value));
  const OutputGrad* output_grad;
  const Value* values;

  template <int kCount>
  __device__ __forceinline__ void add(int64_t i, const float (&mean)[kCount], SumPair<kCount>& sums) const {
    float grad[kCount], value[kCount];
    load_pack(output_grad + i, grad);
    load_pack(values + i, value);
    for (int j = 0; j < kCount; j++) {
      sums.plain[j] += grad[j];
      sums.weighted[j] += grad[j] * (value[j] - mean[j]);
    }
  }
  __device__ __forceinline__ bool aligned() const {
    return pack_offset<kPack>(output_grad) == 0 && pack_offset<kPack>(values) == 0;
  }
};

template <class OutputGrad>
struct Singles {
  static constexpr int kPack = 16 / int(sizeof(OutputGrad));
  const OutputGrad* output_grad;

  template <int kCount>
  __device__ __forceinline__ void add(int64_t i, const float (&)[kCount], SumPair<kCount>& sums) const {
    float grad[kCount];
    load_pack(output_grad + i, grad);
    for (int j = 0; j < kCount; j++) sums.plain[j] += grad[j];
  }
  __device__ __forceinline__ bool aligned() const { return pack_offset<kPack>(output_grad) == 0; }
};

template <class F>
__device__ __forceinline__ void with_pairs(const ChannelSums& p, F f) {
  with_dtype(p.output_grad_dtype, [&]<class OutputGrad>(const OutputGrad*) {
    const OutputGrad* const output_grad = static_cast<const OutputGrad*>(p.output_grad);
    if (!p.values) return f(Singles<OutputGrad>{output_grad});
    with_dtype(p.values_dtype, [&]<class Value>(const Value*) {
      f(Pairs<OutputGrad, Value>{output_grad, static_cast<const Value*>(p.values)});
    });
  });
}

template <int kCount>
__device__ __forceinline__ void load_means(const ChannelSums& p, int64_t channel, float (&mean)[kCount]) {
  for (int j = 0; j < kCount; j++) mean[j] = p.mean ? global_load_const(p.mean + channel + j) : 0.0f;
}

// Stores the sums of a slab: adds them to the result if there is one slab, otherwise writes parts[slab][weighted,
// plain][channel]. The factor 1 / sqrt(variance + eps) is the same for all examples, so its transform is applied once
// to the sum over the examples.
__device__ __forceinline__ void store_sums(const ChannelSums& p, float* parts, int64_t slab, int64_t channel,
                                           float weighted, float plain) {
  if (p.variance) {
    const float scale = 1.0f / sqrtf(global_load_const(p.variance + channel) + float(p.eps));
    weighted *= with_transform(scale, p.transform);
  }
  if (parts) {
    float* const to = parts + slab * 2 * p.channels + channel;
    if (p.weighted) global_store(to, weighted);
    if (p.plain) global_store(to + p.channels, plain);
    return;
  }
  if (p.weighted) global_store(p.weighted + channel, global_load(p.weighted + channel) + weighted);
  if (p.plain) global_store(p.plain + channel, global_load(p.plain + channel) + plain);
}

// ---- contiguous

// `lanes`: number of lanes of a team, a power of two.
__global__ void __launch_bounds__(kThreads)
    channel_sums_rows(const ChannelSums p, float* parts, int64_t slabs, int64_t slab_examples, int lanes) {
  const int64_t team = (int64_t(blockIdx.x) * kThreads + int(threadIdx.x)) / lanes;
  const int member = int(threadIdx.x) % lanes;
  const int64_t slab = team / p.channels, channel = team % p.channels;
  const bool exists = slab < slabs;
  const int64_t first = slab * slab_examples;
  const int64_t end = p.examples < first + slab_examples ? p.examples : first + slab_examples;
  float mean[1] = {};
  if (exists) load_means(p, channel, mean);
  SumPair<1> totals;
  with_pairs(p, [&]<class Source>(const Source& source) {
    constexpr int kPack = Source::kPack;
    const bool by_packs = source.aligned() && p.positions % kPack == 0;
    float means[kPack];
    for (int j = 0; j < kPack; j++) means[j] = mean[0];
    // the same number of steps for every team: all lanes of a warp shuffle
    for (int64_t step = 0; step < slab_examples; step++) {
      const int64_t x = first + step;
      const bool adds = exists && x < end;
      const int64_t begin = adds ? (x * p.channels + channel) * p.positions : 0;
      const int64_t stop = adds ? begin + p.positions : 0;
      SumPair<1> sums;
      if (by_packs) {
        SumPair<kPack> packs;
#pragma unroll 2
        for (int64_t i = begin + member * kPack; i < stop; i += lanes * kPack) source.add(i, means, packs);
        for (int j = 0; j < kPack; j++) {
          sums.weighted[0] += packs.weighted[j];
          sums.plain[0] += packs.plain[j];
        }
      } else {
        for (int64_t i = begin + member; i < stop; i += lanes) source.add(i, mean, sums);
      }
      for (int other = 1; other < lanes; other *= 2) {
        sums.weighted[0] += __shfl_xor_sync(kAllLanes, sums.weighted[0], other);
        sums.plain[0] += __shfl_xor_sync(kAllLanes, sums.plain[0], other);
      }
      if (adds) totals.add(sums, p.transform);
    }
  });
  if (exists && member == 0) store_sums(p, parts, slab, channel, totals.weighted[0], totals.plain[0]);
}

// ---- channels-last

constexpr int kSumWarps = kThreads / kWarp;

// Adds the strands' sums of a block. Afterwards all threads can read the sums in total[which][channel].
template <int kPack>
__device__ __forceinline__ void reduce_strands(SumPair<kPack>& sums, float (&parts)[2][kSumWarps][kDotLanes],
                                               float (&total)[2][kDotLanes]) {
  constexpr int kPacks = kDotLanes / kPack;
  const int mine = int(threadIdx.x) % kPacks * kPack;
  for (int j = 0; j < kPack; j++) {
    for (int step = kPacks; step < kWarp; step *= 2) {
      sums.weighted[j] += __shfl_xor_sync(kAllLanes, sums.weighted[j], step);
      sums.plain[j] += __shfl_xor_sync(kAllLanes, sums.plain[j], step);
    }
    if (lane() < kPacks) {
      parts[0][warp()][mine + j] = sums.weighted[j];
      parts[1][warp()][mine + j] = sums.plain[j];
    }
  }
  __syncthreads();
  if (int(threadIdx.x) < 2 * kDotLanes) {
    const int which = int(threadIdx.x) / kDotLanes, channel = int(threadIdx.x) % kDotLanes;
    float sum = 0;
    for (int w = 0; w < kSumWarps; w++) sum += parts[which][w][channel];
    total[which][channel] = sum;
  }
  __syncthreads();
}

// Computes the sums of the examples [first, end) of the block's channels from `channel` on, in total[which][channel].
template <bool kByExample, int kPack, class Source>
__device__ __forceinline__ void add_slab(const ChannelSums& p, const Source& source, int64_t first, int64_t end,
                                         int64_t channel, float (&parts)[2][kSumWarps][kDotLanes],
                                         float (&total)[2][kDotLanes]) {
  constexpr int kPacks = kDotLanes / kPack, kStrands = kThreads / kPacks;
  const int mine = int(threadIdx.x) % kPacks * kPack, strand = int(threadIdx.x) / kPacks;
  const bool exists = channel + mine < p.channels;
  float mean[kPack] = {};
  if (exists) load_means(p, channel + mine, mean);
  const int64_t size = p.positions * p.channels;
  if constexpr (kByExample) {
    SumPair<kPack> totals;
    for (int64_t x = first + strand; exists && x < end; x += kStrands) {
      SumPair<kPack> sums;
#pragma unroll 1
      for (int64_t t = 0; t < p.positions; t++) source.add(x * size + t * p.channels + channel + mine, mean, sums);
      totals.add(sums, p.transform);
    }
    reduce_strands(totals, parts, total);
  } else {
    float all = 0;  // one sum of one channel, in the first threads
    const int which = int(threadIdx.x) / kDotLanes, own = int(threadIdx.x) % kDotLanes;
    for (int64_t x = first; x < end; x++) {
      SumPair<kPack> sums;
#pragma unroll 2
      for (int64_t t = strand; exists && t < p.positions; t += kStrands)
        source.add(x * size + t * p.channels + channel + mine, mean, sums);
      reduce_strands(sums, parts, total);
      if (which < 2) all += with_transform(total[which][own], p.transform);
    }
    __syncthreads();  // until all have read the sums of the previous example
    if (which < 2) total[which][own] = all;
    __syncthreads();
  }
}

// A slab has `tiles` tiles of kDotLanes channels. kByExample: strands divide the examples instead of the positions.
template <bool kByExample>
__global__ void __launch_bounds__(kThreads, 4)
    channel_sums_columns(const ChannelSums p, float* parts, int64_t tiles, int64_t slab_examples) {
  DELFAST_SHARED(float, shared, [2][kSumWarps][kDotLanes]);
  DELFAST_SHARED(float, total, [2][kDotLanes]);
  const int64_t slab = blockIdx.x / tiles, channel = blockIdx.x % tiles * kDotLanes;
  const int64_t first = slab * slab_examples;
  const int64_t end = p.examples < first + slab_examples ? p.examples : first + slab_examples;
  with_pairs(p, [&]<class Source>(const Source& source) {
    if (source.aligned() && p.channels % Source::kPack == 0)
      add_slab<kByExample, Source::kPack>(p, source, first, end, channel, shared, total);
    else
      add_slab<kByExample, 1>(p, source, first, end, channel, shared, total);
  });
  const int own = int(threadIdx.x);
  if (own < kDotLanes && channel + own < p.channels)
    store_sums(p, parts, slab, channel + own, total[0][own], total[1][own]);
}

// ---- slabs, in their order

__global__ void __launch_bounds__(kThreads) channel_sums_add(const ChannelSums p, const float* parts, int64_t slabs) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + int(threadIdx.x);
  float* const to = i < p.channels ? p.weighted : p.plain;
  if (i >= 2 * p.channels || !to) return;
  float sum = 0;
  for (int64_t slab = 0; slab < slabs; slab++) sum += global_load(parts + slab * 2 * p.channels + i);
  const int64_t channel = i % p.channels;
  global_store(to + channel, global_load(to + channel) + sum);
}

}  // namespace delfast::cuda
