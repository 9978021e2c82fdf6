// The threshold of the h largest of a row's scores in shared memory, found by a bracket [lo, hi) around the h-th
// largest.
//
// The first guess comes from a sample of the scores. Passes count the scores at or above a pivot and narrow the bracket
// until few candidates are inside. The candidates are then listed, each thread's at positions given by its own counts,
// and one warp narrows the bracket on the list alone. Pivots are interpolated, or bisected where interpolation shrinks
// the bracket too little. Three or four passes are usual. The result does not depend on the course of the search.
#pragma once

#include <cmath>

#include "cuda/criticality_team.cuh"

namespace delfast::cuda {

constexpr uint32_t kPad = 0x80000000;  // padding: below every pivot, as an int and as a float

// Number of words for the candidates of a row, a multiple of 4.
__host__ __device__ constexpr int list_capacity(int length) { return length / 8 < 32 ? 32 : (length / 8 + 3) / 4 * 4; }

// Number of the thread's scores that are at or above a pivot > 0.
template <class Team>
__device__ __forceinline__ uint32_t count_at_least(const uint32_t* scores, int packs, int pivot, const Team& team) {
  const float least = bits_float(uint32_t(pivot));
  float count[4] = {};
  for_packs(scores, packs, team, [&](const uint4& bits) {
    count[0] += bits_float(bits.x) >= least ? 1.0f : 0.0f;
    count[1] += bits_float(bits.y) >= least ? 1.0f : 0.0f;
    count[2] += bits_float(bits.z) >= least ? 1.0f : 0.0f;
    count[3] += bits_float(bits.w) >= least ? 1.0f : 0.0f;
  });
  return uint32_t((count[0] + count[1]) + (count[2] + count[3]));
}

// A guess at the h-th largest, as bits. Each lane takes the maximum of g scores from all parts of the row, with g such
// that the guess is near the median of these maxima, and the warp sorts them.
template <class Team>
__device__ __forceinline__ int guess(const uint32_t* scores, int length, int top, Team& team) {
  const float share = float(top) / float(length);
  int g = int(0.7f / share);
  g = g < 1 ? 1 : g > 16 ? 16 : g;
  // the probability that all g scores are below the h-th largest
  const float below = exp2f(float(g) * log2f(1 - share));
  const float pitch = float(length) / float(g * Team::kThreads);
  uint32_t value = 0;
#pragma unroll 4
  for (int i = 0; i < g; i++) {
    int e = int(float(i * Team::kThreads + team.thread()) * pitch);
    e = e < length ? e : length - 1;
    const uint32_t bits = scores[shared_slot(e)];
    value = bits > value ? bits : value;
  }
#pragma unroll
  for (int size = 2; size <= kWarp; size *= 2) {
#pragma unroll
    for (int apart = size / 2; apart; apart /= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, value, apart);
      const bool ascending = (lane() & size) == 0, lower = (lane() & apart) == 0;
      value = (other < value) == (ascending == lower) ? other : value;
    }
  }
  int index = int(below * float(kWarp));
  index = index < 0 ? 0 : index > kWarp - 1 ? kWarp - 1 : index;
  return int(team.average(__shfl_sync(kAllLanes, value, index)));
}

// Bracket of the h-th largest: at_lo >= h scores are >= lo, and at_hi < h scores are >= hi.
struct Bracket {
  int lo, hi;
  int at_lo, at_hi;
  __device__ __forceinline__ bool found(int top) const { return at_lo == top || hi - lo == 1; }
  __device__ __forceinline__ Threshold threshold(int top) const {
    if (at_lo == top) return {uint32_t(lo), 0, 0};
    return {uint32_t(hi), uint32_t(lo), uint32_t(top - at_hi)};
  }
  // Returns the next pivot, between the ends.
  __device__ __forceinline__ int inside(int top, bool bisect) const {
    const float fraction = bisect ? 0.5f : float(at_lo - top) / float(at_lo - at_hi);
    const int offset = int(float(hi - lo) * fraction);
    return lo + (offset < 1 ? 1 : offset >= hi - lo ? hi - lo - 1 : offset);
  }
};

// For a warp: narrows the bracket to the end by counting the candidates inside it.
__device__ __forceinline__ void finish(const uint32_t* list, int size, int top, Bracket& b) {
  const int above = b.at_hi;
  bool bisect = false;
#pragma unroll 1
  while (!b.found(top)) {
    const int middle = b.inside(top, bisect), width = b.hi - b.lo;
    uint32_t count = 0;
#pragma unroll 4
    for (int i = lane(); i < size; i += kWarp) count += int(list[i]) >= middle;
    const int at = above + int(__reduce_add_sync(kAllLanes, count));
    if (at >= top) {
      b.lo = middle;
      b.at_lo = at;
    } else {
      b.hi = middle;
      b.at_hi = at;
    }
    bisect = !bisect && b.hi - b.lo > width / 2;
  }
}

// The threshold of the `top` largest of the scores, which are all finite; `largest` is their maximum; 0 < top < length.
// The scores are padded with kPad to whole packs.
template <class Team>
__device__ __forceinline__ Threshold top_threshold(const uint32_t* scores, uint32_t* list, int length, int top,
                                                   uint32_t largest, Team& team) {
  constexpr int T = Team::kThreads;
  const int packs = (length + 3) / 4, capacity = list_capacity(length), limit = int(largest) + 1;
  Bracket b = {0, limit, length, 0};
  // the same counts for this thread's own scores
  int mine_lo = team.thread() < packs ? (packs - team.thread() + T - 1) / T * 4 : 0, mine_hi = 0;
  if ((packs - 1) % T == team.thread()) mine_lo -= packs * 4 - length;
  if (length > capacity) {
    int middle = guess(scores, length, top, team);
    if (middle < 1) middle = 1;
    float step = 0;
    bool bisect = false, first = true;
#pragma unroll 1
    while (!b.found(top) && b.at_lo - b.at_hi > capacity) {
      if (middle <= b.lo || middle >= b.hi) middle = b.lo + (b.hi - b.lo) / 2;
      const int width = b.hi - b.lo;
      const uint32_t mine = count_at_least(scores, packs, middle, team);
      const int count = int(team.sum(mine));
      if (count >= top) {
        b.lo = middle;
        b.at_lo = count;
        mine_lo = int(mine);
      } else {
        b.hi = middle;
        b.at_hi = count;
        mine_hi = int(mine);
      }
      if (b.lo == 0 || b.hi == limit) {
        // a factor of two in the scores changes the count by at least about as much, so aim slightly beyond the target
        const float off = float(count > top ? count - top : top - count) / float(top);
        step = step > 0 ? 4 * step : off * float(1 << 23) + float(1 << 14);
        step = step < float(1 << 30) ? step : float(1 << 30);
        const uint32_t up = uint32_t(b.lo) + uint32_t(step);
        middle = b.lo == 0 ? b.hi - int(step) : int(up < uint32_t(limit) ? up : uint32_t(limit));
        if (first && count >= 2 * top) middle = b.lo + 1;  // many ties?
      } else {
        middle = b.inside(top, bisect);
        bisect = !bisect && b.hi - b.lo > width / 2;
      }
      first = false;
    }
  }
  if (!b.found(top)) {  // list the candidates; every thread has counted its own
    uint32_t* next = list + team.exclusive_scan(uint32_t(mine_lo - mine_hi));
    const uint32_t width = uint32_t(b.hi - b.lo), lo = uint32_t(b.lo);
    for_packs(scores, packs, team, [&](const uint4& bits) {
      if (bits.x - lo < width) *next++ = bits.x;
      if (bits.y - lo < width) *next++ = bits.y;
      if (bits.z - lo < width) *next++ = bits.z;
      if (bits.w - lo < width) *next++ = bits.w;
    });
    team.sync();
    const int size = b.at_lo - b.at_hi;
    if constexpr (Team::kOneWarp) {
      finish(list, size, top, b);
      team.sync();
    } else {
      DELFAST_SHARED(Bracket, shared_bracket);
      if (warp() == 0) {
        finish(list, size, top, b);
        if (lane() == 0) shared_bracket = b;
      }
      team.sync();
      b = shared_bracket;
    }
  }
  return b.threshold(top);
}

}  // namespace delfast::cuda
