// The 16 float32 sums of every kBlock elements, from registers. Used for means of rows and for sums of long rows.
#pragma once

#include "cuda/criticality_long.cuh"

namespace delfast::cuda {

// Packs in flight in a thread, and resident blocks of a multiprocessor, which limit the registers of a thread. On an
// H100, 4 and 10 were slower for large rows (benchmarks/gpu_bandwidth.py times them; these times are not kept).
constexpr int kMeanLoads = 8, kMeanResident = 6;

template <bool kAboveOnly>
__device__ __forceinline__ float counted(float score, uint32_t threshold) {
  return !kAboveOnly || float_bits(score) >= threshold ? score : 0.0f;
}

// Four of the 16 sums of up to kBlock elements from `first`, which is aligned to a pack: sum j adds the elements 16 i +
// 4 * quarter + j in the order of i.
template <bool kAboveOnly, class Score>
__device__ __forceinline__ void add_quarter(const Score& score, int64_t first, int length, int quarter,
                                            uint32_t threshold, float (&sum)[4]) {
  Score here = score.from(first + 4 * quarter);
  int steps = length / 16;  // steps in which all 16 elements exist
#pragma unroll 1
  for (; steps >= kMeanLoads; steps -= kMeanLoads, here = here.from(16 * kMeanLoads)) {
    typename Score::Raw raw[kMeanLoads];
#pragma unroll
    for (int u = 0; u < kMeanLoads; u++) raw[u] = here.load(16 * u);
#pragma unroll
    for (int u = 0; u < kMeanLoads; u++) {
      float x[4];
      score.scores(raw[u], x);
      for (int j = 0; j < 4; j++) sum[j] += counted<kAboveOnly>(x[j], threshold);
    }
  }
  if (steps) {
    typename Score::Raw raw[kMeanLoads - 1] = {};
#pragma unroll
    for (int u = 0; u < kMeanLoads - 1; u++)
      if (u < steps) raw[u] = here.load(16 * u);
#pragma unroll
    for (int u = 0; u < kMeanLoads - 1; u++) {
      float x[4];
      score.scores(raw[u], x);
      for (int j = 0; j < 4; j++) sum[j] += u < steps ? counted<kAboveOnly>(x[j], threshold) : 0.0f;
    }
    here = here.from(16 * steps);
  }
  for (int j = 0; j < 4; j++)
    if (length / 16 * 16 + 4 * quarter + j < length) sum[j] += counted<kAboveOnly>(here.one(j), threshold);
}

// For a block: the sums of `rows` neighbouring rows from element `first` on, in shared memory. Each row is padded to
// whole kBlocks, kGroups in all. With kAboveOnly only scores whose bits are at least the threshold are added.
template <bool kAboveOnly>
__device__ __forceinline__ void sum_rows(const Rows& p, Criterion criterion, int64_t first, int length, int rows,
                                         uint32_t threshold, uint4* partial /* [kGroups * 4] */) {
  const int per_row = blocks_of_row(length);
  with_scores(p.operands(), criterion, [&](auto score) {
    if (score.aligned(first) && (length % 4 == 0 || rows == 1)) {
      const int group = int(threadIdx.x) / 4, row = group / per_row, begin = (group - row * per_row) * kBlock;
      float sum[4] = {};
      if (row < rows)
        add_quarter<kAboveOnly>(score, first + int64_t(row) * length + begin,
                                length - begin < kBlock ? length - begin : kBlock, int(threadIdx.x) % 4, threshold,
                                sum);
      partial[threadIdx.x] = {float_bits(sum[0]), float_bits(sum[1]), float_bits(sum[2]), float_bits(sum[3])};
    } else {  // 16 lanes for each group in turn, so that neighbouring lanes take neighbouring elements
      for (int pair = 0; pair < 4; pair++) {
        const int group = warp() * 8 + 2 * pair + lane() / 16, row = group / per_row;
        const int begin = (group - row * per_row) * kBlock, left = length - begin;
        float total = 0;
        if (row < rows) {
          const auto here = score.from(first + int64_t(row) * length + begin + lane() % 16);
          const int end = (left < kBlock ? left : kBlock) - lane() % 16;
#pragma unroll 8
          for (int e = 0; e < end; e += 16) total += counted<kAboveOnly>(here.one(e), threshold);
        }
        reinterpret_cast<float*>(partial)[group * 16 + lane() % 16] = total;
      }
    }
  });
  __syncthreads();
}

// Copies the sums of a segment from shared memory to the row's sums.
__device__ __forceinline__ void store_sums(const Segment& segment, const uint4* sums, const LongRow& row) {
  uint4* const partial = reinterpret_cast<uint4*>(row.partial()) + segment.begin / kBlock * 4;
  if (int(threadIdx.x) < blocks_of_row(segment.length) * 4) global_store(&partial[threadIdx.x], sums[threadIdx.x]);
}

}  // namespace delfast::cuda
