// The radix search for the score T such that all scores above T weigh at most a budget, and all scores at or above T
// weigh more. It searches the 31 bits of a non-negative float in three passes of 11, 10 and 10 bits, as on the CPU. In
// each pass, blocks count digits in shared memory and add their counts to a histogram in global memory (integers, so
// that the order of additions does not matter); one block then descends into a digit.
#pragma once

#include "cuda/common.cuh"

namespace delfast::cuda {

constexpr int kRadixPasses = 3;
constexpr int kRadixBins = 2048;

struct RadixPass {
  int shift, width;  // the digit is bits [shift, shift + width)
};
__host__ __device__ constexpr RadixPass radix_pass(int pass) {
  return pass == 0 ? RadixPass{20, 11} : pass == 1 ? RadixPass{10, 10} : RadixPass{0, 10};
}

// The pass if all scores lie in [lo, lo + width) and are counted as differences from lo: 11 bits each, the last pass
// fewer. Its width is 0 if no bits are left to find.
__device__ __forceinline__ RadixPass radix_pass(int pass, uint32_t width) {
  int bits = 0;
  while (bits < 31 && (width - 1) >> bits) bits++;
  const int above = bits - 11 * pass, shift = above - 11;
  if (above <= 0) return {0, 0};
  return {shift > 0 ? shift : 0, shift > 0 ? 11 : above};
}

// Clears a block's bins; no barrier is needed before count_digit.
__device__ __forceinline__ void clear_bins(uint32_t* bins) {
  for (int bin = int(threadIdx.x); bin < kRadixBins; bin += int(blockDim.x)) bins[bin] = 0;
  __syncthreads();
}

// threshold: the digits found in earlier passes, in place. Scores with other digits are not counted.
__device__ __forceinline__ void count_digit(uint32_t bits, RadixPass pass, uint32_t threshold, uint32_t* bins) {
  const int above = pass.shift + pass.width;
  if (bits >> above == threshold >> above) atomicAdd(&bins[bits >> pass.shift & ((1u << pass.width) - 1)], 1u);
}

template <class Count>
__device__ __forceinline__ void add_bins(const uint32_t* bins, Count weight, Count* histogram) {
  __syncthreads();
  for (int bin = int(threadIdx.x); bin < kRadixBins; bin += int(blockDim.x))
    if (bins[bin]) global_add(&histogram[bin], bins[bin] * weight);
}

// Finds the highest digit at which the sum of the block's bins from the top exceeds `left`, and calls found(digit, the
// sum above it, its own count) in one thread. No thread calls it if the sum of all bins is within `left`. For blocks of
// up to kRadixBins threads, a power of two; `totals` is shared memory for 32 elements.
template <int kBlock, class Count, class F>
__device__ __forceinline__ void find_digit(const Count* bins, Count left, Count* totals, F found) {
  __syncthreads();
  constexpr int kBins = kRadixBins / kBlock;
  const int top = kRadixBins - 1 - int(threadIdx.x) * kBins;  // this thread's bins are [top - kBins + 1, top]
  Count sum = 0;
  for (int i = 0; i < kBins; i++) sum += bins[top - i];
  Count total;
  Count above = block_exclusive_scan(sum, totals, total);
  if (above > left || above + sum <= left) return;
  for (int i = 0; i < kBins; i++) {
    if (above + bins[top - i] > left) return found(uint32_t(top - i), above, bins[top - i]);
    above += bins[top - i];
  }
}

// find_digit for a histogram in global memory, which is cleared for the next pass, by a block of kThreads. Shared
// memory: `bins` of kRadixBins, `totals` of 32.
template <class Count, class F>
__device__ __forceinline__ void descend(Count* histogram, Count left, Count* bins, Count* totals, F found) {
  for (int bin = int(threadIdx.x); bin < kRadixBins; bin += kThreads) {
    bins[bin] = global_load(&histogram[bin]);
    global_store(&histogram[bin], Count(0));
  }
  find_digit<kThreads>(bins, left, totals, found);
}

}  // namespace delfast::cuda
