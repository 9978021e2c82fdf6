// A bracket of scores around the k-th one of many elements, from a sample.
//
// Mapping. A warp takes `runs` runs of 32 elements of a tile, one at a random place in each of `runs` parts, and counts
// the scores' upper bits. Neighbours often share them, so all lanes with the first lane's bits are counted by one
// addition. The last block finds the bins of the bracket's ends: first the groups of 256 bins, then the bins.
// Memory. Less than one thirtieth of the elements is read. Counts are in global memory; those of groups are first added
// in shared memory.
// Numerics. The bracket extends 8 standard deviations of an independent sample to both sides, because runs of 32
// neighbours are worth fewer than 32 independent elements. If it misses, the passes read all scores again.
#pragma once

#include <cmath>

#include "cuda/selection.cuh"

namespace delfast::cuda {

__device__ __forceinline__ uint32_t scramble(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// For the last block. An end lies in the bin with before <= target < before + count, counted from the highest score
// down.
__device__ __forceinline__ void find_bracket(const Selection& s, double share) {
  static_assert(kSampleGroups == kThreads && kSampleBins == kSampleGroups * kThreads);
  DELFAST_SHARED(uint32_t, totals, [kWarp]);
  DELFAST_SHARED(uint32_t, groups, [2]);
  DELFAST_SHARED(uint32_t, starts, [2]);
  const uint32_t from_top = kThreads - 1 - threadIdx.x;
  const uint32_t count = global_load(&s.state->sample_groups[from_top]);
  uint32_t total;
  const uint32_t before = block_exclusive_scan(count, totals, total);
  const double target = share * double(total), margin = 8 * sqrt(target * (1 - share)) + 16;
  const bool wanted[2] = {target + margin <= total, target - margin >= 0};
  const uint32_t targets[2] = {wanted[0] ? uint32_t(target + margin) - 1 : 0,
                               wanted[1] ? uint32_t(target - margin) : 0};
  for (int end = 0; end < 2; end++) {
    if (before > targets[end] || targets[end] >= before + count) continue;
    groups[end] = from_top;
    starts[end] = before;
  }
  if (!wanted[1] && threadIdx.x == 0) global_store(&s.state->hi, 1u << 31);
  __syncthreads();
  for (int end = 0; end < 2; end++) {
    if (!wanted[end]) continue;
    const uint32_t bin = groups[end] * kThreads + from_top, mine = global_load(&s.state->sample[bin]);
    uint32_t all;
    const uint32_t first = starts[end] + block_exclusive_scan(mine, totals, all);
    if (first <= targets[end] && targets[end] < first + mine)
      global_store(end ? &s.state->hi : &s.state->lo, (bin + uint32_t(end)) << kSampleShift);
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    selection_sample(Selection s, Criterion criterion, int runs, double share /* of all elements: the budget */) {
  DELFAST_SHARED(uint32_t, groups, [kSampleGroups]);
  for (int group = int(threadIdx.x); group < kSampleGroups; group += kThreads) groups[group] = 0;
  __syncthreads();
  const uint32_t number = blockIdx.x * kWarps + uint32_t(warp());
  if (number < s.tiles) {
    const Tile tile = tile_of(s, number);
    const uint32_t part = uint32_t(kTile) / uint32_t(runs);
    with_scores(tile.operands, criterion, [&](auto score) {
#pragma unroll 4
      for (int run = 0; run < runs; run++) {
        const uint32_t random = scramble(number * uint32_t(runs) + uint32_t(run));
        const int i = int(uint32_t(run) * part + random % (part / kWarp) * kWarp) + lane();
        const bool valid = i < tile.length;
        const uint32_t bin = valid ? float_bits(score.one(i)) >> kSampleShift : 0;
        const uint32_t all = __ballot_sync(kAllLanes, valid);
        if (!all) continue;
        const int first = __ffs(int(all)) - 1;
        const uint32_t common = __shfl_sync(kAllLanes, bin, first);
        const uint32_t same = __ballot_sync(kAllLanes, valid && bin == common);
        const bool other = valid && bin != common;
        if (other || lane() == first) {
          const uint32_t many = other ? 1u : uint32_t(__popc(same));
          global_add(&s.state->sample[bin], many);
          atomicAdd(&groups[bin / kThreads], many);
        }
      }
    });
  }
  __syncthreads();
  for (int group = int(threadIdx.x); group < kSampleGroups; group += kThreads)
    if (groups[group]) global_add(&s.state->sample_groups[group], groups[group]);
  if (is_last_block(&s.state->tickets[0], gridDim.x)) find_bracket(s, share);
}

}  // namespace delfast::cuda
