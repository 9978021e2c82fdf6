// The sums of long rows, by segments, and the rows' scores.
//
// Mapping. A block takes a segment, like criticality_mean, and writes its sums to the workspace. The last block of a
// row adds them. After criticality_mean, which counts no finished blocks, a separate launch (criticality_long_add) adds
// them.
// Memory. Operands are read once; 16 sums of every kBlock elements are written to the workspace and read again.
// Numerics: criticality_rows.cuh.
#pragma once

#include "cuda/criticality_sum.cuh"

namespace delfast::cuda {

// Exponent of the score's lowest set bit: a finite score is a multiple of 2 to this power, and of no higher power of
// two.
__device__ __forceinline__ int unit_of(float score) {
  const uint32_t bits = float_bits(score), exponent = bits >> 23;
  if (bits == 0) return 500;  // 0 is a multiple of every power of two
  return int(exponent ? exponent : 1) - 150 + __ffs(int((bits & 0x7fffff) | (exponent ? 0x800000 : 0))) - 1;
}
__device__ __forceinline__ double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// For a block of kRowThreads: the score of a row from its float32 sums. The definition adds them in order, by 16 chains
// of additions in double, which would take longer than the reading. If all sums are multiples of some 2^u and their
// total is at most 2^(52 + u), every partial sum is exact in any order, and all threads add. Otherwise 16 threads add
// in order.
__device__ __forceinline__ void add_sums(const Rows& p, const LongRow& row, int64_t number) {
  DELFAST_SHARED(double, totals, [kRowThreads]);
  DELFAST_SHARED(int, units, [kRowThreads]);
  DELFAST_SHARED(float, fetched, [4 * kRowThreads]);
  DELFAST_SHARED(bool, exact);
  const int64_t count = p.blocks() * 16;
  double sum = 0;
  int unit = 500;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kRowThreads) {
    const float x = global_load(&row.partial()[i]);
    const int u = unit_of(x);
    sum += double(x);
    unit = u < unit ? u : unit;
  }
  totals[threadIdx.x] = sum;
  units[threadIdx.x] = unit;
  __syncthreads();
  if (warp() == 0) {
    sum = 0;
    for (int t = lane() % 16; t < kRowThreads; t += 16) {
      sum += totals[t];
      unit = units[t] < unit ? units[t] : unit;
    }
    const bool all = __ballot_sync(kAllLanes, sum <= power_of_two(52 + unit)) == kAllLanes;
    if (lane() == 0) exact = all;
  }
  __syncthreads();
  if (!exact) {
    sum = 0;
    for (int64_t begin = 0; begin < count; begin += 4 * kRowThreads) {
      const int here = int(count - begin < 4 * kRowThreads ? count - begin : 4 * kRowThreads);
      for (int i = int(threadIdx.x); i < here; i += kRowThreads) fetched[i] = global_load(&row.partial()[begin + i]);
      __syncthreads();
      if (threadIdx.x < 16)
        for (int i = int(threadIdx.x); i < here; i += 16) sum += double(fetched[i]);
      __syncthreads();
    }
  }
  if (warp() != 0) return;
  sum = add_pairwise(sum);
  const LongState& state = *row.state;
  const Threshold threshold = p.reduce == Reduce::top
                                  ? Threshold{0, global_load(&state.threshold.tie), global_load(&state.threshold.ties)}
                                  : Threshold{0, 0, 0};
  if (threadIdx.x == 0) global_store(&p.out[number], reduced(p, sum, threshold));
}

// Rows of Reduce::top, and rows of Reduce::mean in the same launch.
DELFAST_BODY void sum_segment(const Rows& p, Criterion criterion, int64_t block, unsigned char* workspace) {
  const Segment segment(p, block);
  const LongRow row(p, workspace, segment.row);
  // the largest score is not finite: already stored
  if (p.reduce == Reduce::top && global_load(&row.state->largest) >= kInfinity) return;
  DELFAST_SHARED(uint4, sums, [kGroups * 4]);
  sum_rows<true>(p, criterion, segment.first, segment.length, 1, global_load(&row.state->threshold.bits), sums);
  store_sums(segment, sums, row);
  if (is_last_block(&row.state->summed, p.segments())) add_sums(p, row, segment.row);
}

template <int kBytes>
__global__ void __launch_bounds__(kRowThreads, kMeanResident)
    criticality_long_sum(DELFAST_GRID_CONSTANT(Table<Rows, kBytes>) table, Criterion criterion,
                         unsigned char* workspace) {
  const int entry = find_entry(table);
  sum_segment(table.entries[entry], criterion, blockIdx.x - table.first_block[entry], workspace);
}

// One block for each row.
template <int kBytes>
__global__ void __launch_bounds__(kRowThreads)
    criticality_long_add(DELFAST_GRID_CONSTANT(Table<Rows, kBytes>) table, unsigned char* workspace) {
  const int entry = find_entry(table);
  const Rows& p = table.entries[entry];
  const int64_t number = blockIdx.x - table.first_block[entry];
  add_sums(p, LongRow(p, workspace, number), number);
}

}  // namespace delfast::cuda
