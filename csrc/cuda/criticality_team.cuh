// The threads that share a row in shared memory, and the order in which they read its scores.
#pragma once

#include "cuda/criticality_rows.cuh"

namespace delfast::cuda {

// Shared memory has 16 words of padding after every kBlock scores, so that the 32 sums of two blocks, which a warp adds
// side by side, are in 32 banks.
__host__ __device__ constexpr int shared_slot(int element) {
  return element + int(uint32_t(element) / uint32_t(kBlock)) * 16;
}

// A warp that shares a row: sums over its threads, with one barrier each.
struct WarpTeam {
  static constexpr int kThreads = kWarp;
  static constexpr int kStep = 4 * kWarp, kFourSteps = kBlock + 16;  // words between a thread's packs
  static constexpr bool kOneWarp = true;
  __device__ __forceinline__ explicit WarpTeam(uint32_t*) {}
  __device__ __forceinline__ int thread() const { return lane(); }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ uint32_t sum(uint32_t x) { return __reduce_add_sync(kAllLanes, x); }
  __device__ __forceinline__ uint32_t max(uint32_t x) { return __reduce_max_sync(kAllLanes, x); }
  __device__ __forceinline__ uint32_t exclusive_scan(uint32_t x) { return warp_inclusive_scan(x) - x; }
  __device__ __forceinline__ uint32_t average(uint32_t x) { return x; }  // over the warps
};
struct BlockTeam {
  static constexpr int kThreads = kRowThreads;
  static constexpr int kStep = kBlock + 16, kFourSteps = 4 * kStep;
  static constexpr bool kOneWarp = false;
  uint32_t* room;  // 2 x kRowWarps words of shared memory, used in turns
  int turn = 0;
  __device__ __forceinline__ explicit BlockTeam(uint32_t* room) : room(room) {}
  __device__ __forceinline__ int thread() const { return int(threadIdx.x); }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  // Gives every thread one word of each warp.
  __device__ __forceinline__ const uint32_t* share(uint32_t x, int from_lane) {
    uint32_t* const words = room + turn * kRowWarps;
    turn ^= 1;
    if (lane() == from_lane) words[warp()] = x;
    __syncthreads();
    return words;
  }
  __device__ __forceinline__ uint32_t sum(uint32_t x) {
    const uint32_t* const words = share(__reduce_add_sync(kAllLanes, x), 0);
    uint32_t total = 0;
    for (int w = 0; w < kRowWarps; w++) total += words[w];
    return total;
  }
  __device__ __forceinline__ uint32_t max(uint32_t x) {
    const uint32_t* const words = share(__reduce_max_sync(kAllLanes, x), 0);
    uint32_t most = 0;
    for (int w = 0; w < kRowWarps; w++) most = words[w] > most ? words[w] : most;
    return most;
  }
  __device__ __forceinline__ uint32_t exclusive_scan(uint32_t x) {
    const uint32_t inclusive = warp_inclusive_scan(x);
    const uint32_t* const words = share(inclusive, kWarp - 1);
    uint32_t before = 0;
    for (int w = 0; w < kRowWarps; w++) before += w < warp() ? words[w] : 0;
    return before + inclusive - x;
  }
  __device__ __forceinline__ uint32_t average(uint32_t x) {
    const uint32_t* const words = share(x, 0);
    uint32_t total = 0;
    for (int w = 0; w < kRowWarps; w++) total += words[w] / kRowWarps;
    return total;
  }
};

static_assert(4 * kWarp * 4 == kBlock && 4 * kRowThreads == kBlock);  // the steps consist of these

template <class Team>
__host__ __device__ constexpr int step_words(int step) {
  return step / 4 * Team::kFourSteps + step % 4 * Team::kStep;
}

// Calls f(four scores) for each of the thread's packs. The row has `packs` packs.
template <class Team, class F>
__device__ __forceinline__ void for_packs(const uint32_t* scores, int packs, const Team& team, F f) {
  const uint32_t* at = scores + 4 * team.thread();
  int left = (packs - team.thread() + Team::kThreads - 1) / Team::kThreads;
#pragma unroll 1
  for (; left >= 4; left -= 4, at += Team::kFourSteps) {
    uint4 bits[4];
#pragma unroll
    for (int u = 0; u < 4; u++) bits[u] = *reinterpret_cast<const uint4*>(at + u * Team::kStep);
#pragma unroll
    for (int u = 0; u < 4; u++) f(bits[u]);
  }
#pragma unroll 1
  for (; left > 0; left--, at += Team::kStep) f(*reinterpret_cast<const uint4*>(at));
}

}  // namespace delfast::cuda
