// The threshold of the h largest scores of a long row: one reading counts the scores above its bracket and lists those
// inside. criticality_long.cuh describes all steps.
//
// Mapping. A block takes a segment, a warp a part of it, one chunk at a time. The last block of a row searches the
// list.
// Memory. Each thread has kCountLoads packs of four in flight. A warp collects its candidates in shared memory and
// writes them to the row's list; an atomic addition assigns their places.
// Numerics. Integers only: the result does not depend on the order of the list.
#pragma once

#include "cuda/criticality_long.cuh"
#include "cuda/radix.cuh"

namespace delfast::cuda {

constexpr int kCountWarps = kThreads / kWarp;
constexpr int kCountLoads = 4, kCountResident = 3;  // see kTopLoads; no measurement is kept
constexpr int kChunk = 4 * kCountLoads * kWarp;     // elements that a warp takes at a time
constexpr int kStaged = 2 * kChunk;                 // candidates of a warp in shared memory
static_assert(kSegment % (kCountWarps * kChunk) == 0 && kCountWarps * kStaged >= kRadixBins);

// Bits of up to kChunk scores from `first` on; those beyond `length` are negative. Where packs are not aligned, the
// scores go through `room`, so that the compiler keeps fewer of them in registers.
template <class Score>
__device__ __forceinline__ void load_chunk(const Score& score, int64_t first, int length, uint32_t* room /* [kChunk] */,
                                           int (&bits)[4 * kCountLoads]) {
  if (score.aligned(first) && length >= kChunk) {
    typename Score::Raw raw[kCountLoads];
#pragma unroll
    for (int u = 0; u < kCountLoads; u++) raw[u] = score.load(first + 4 * (u * kWarp + lane()));
#pragma unroll
    for (int u = 0; u < kCountLoads; u++) {
      float x[4];
      score.scores(raw[u], x);
#pragma unroll
      for (int j = 0; j < 4; j++) bits[4 * u + j] = int(float_bits(x[j]));
    }
  } else {
    const Score here = score.from(first + lane());
    uint32_t* const mine = room + lane();
#pragma unroll 8
    for (int e = 0; e < kChunk; e += kWarp) mine[e] = e + lane() < length ? float_bits(here.one(e)) : 0xffffffff;
#pragma unroll
    for (int i = 0; i < 4 * kCountLoads; i++) bits[i] = int(mine[i * kWarp]);
    __syncwarp();  // before other lanes write there
  }
}

// A warp's candidates: collected in shared memory, then written to the row's list.
struct Staged {
  uint32_t* scores;  // [kStaged]
  int count = 0;

  __device__ __forceinline__ uint32_t* room() const { return scores + count; }  // memory for a chunk
  // Adds the scores between lo and hi.
  __device__ __forceinline__ void add(const int (&bits)[4 * kCountLoads], int lo, int hi, const Rows& p,
                                      const LongRow& row) {
    int mine = 0;
#pragma unroll
    for (int i = 0; i < 4 * kCountLoads; i++) mine += bits[i] > lo && bits[i] < hi;
    const int inclusive = warp_inclusive_scan(mine);
    uint32_t* next = scores + count + inclusive - mine;
#pragma unroll
    for (int i = 0; i < 4 * kCountLoads; i++)
      if (bits[i] > lo && bits[i] < hi) *next++ = uint32_t(bits[i]);
    count += __shfl_sync(kAllLanes, inclusive, kWarp - 1);
    if (count > kStaged - kChunk) flush(p, row);
  }
  // Candidates beyond the capacity are counted and not written.
  __device__ __forceinline__ void flush(const Rows& p, const LongRow& row) {
    uint32_t at = 0;
    if (lane() == 0 && count) at = atomicAdd(&row.state->inside, uint32_t(count));
    at = __shfl_sync(kAllLanes, at, 0);
    __syncwarp();
    for (uint32_t i = at + uint32_t(lane()), s = uint32_t(lane()); s < uint32_t(count) && i < p.capacity;
         i += kWarp, s += kWarp)
      global_store(&row.list(p)[i], scores[s]);
    __syncwarp();
    count = 0;
  }
};

// ---- the end of the search

// For a block of kThreads: the threshold of the `left` + 1 largest keys. for_each(f) calls f(key) for every key of
// `width` bits, distributed over the threads. Digits of up to 11 bits, the highest first.
template <class ForEach>
__device__ __forceinline__ Threshold search_keys(ForEach for_each, int width, uint32_t left, uint32_t* bins) {
  DELFAST_SHARED(uint32_t, totals, [kWarp]);
  DELFAST_SHARED(uint32_t, found, [3]);
  constexpr int kDigit = 11;
  static_assert(kRadixBins == 1 << kDigit);
  uint32_t key = 0, equal = 0;
#pragma unroll 1
  for (int above = width; above > 0;) {  // the bits from `above` on are found
    const int shift = above > kDigit ? above - kDigit : 0;
    clear_bins(bins);
    for_each([&](uint32_t k) { count_digit(k, {shift, above - shift}, key, bins); });
    find_digit<kThreads>(bins, left, totals, [&](uint32_t digit, uint32_t higher, uint32_t count) {
      found[0] = digit;
      found[1] = higher;
      found[2] = count;
    });
    __syncthreads();
    key |= found[0] << shift;
    left -= found[1];
    equal = found[2];
    above = shift;
  }
  // left + 1 of the keys equal to `key` belong to the top
  if (left + 1 == equal) return {key, 0, 0};
  return {key + 1, key, left + 1};
}

// For a block of kThreads, after all scores of the row are counted.
__device__ __forceinline__ Threshold long_threshold(const Rows& p, Criterion criterion, const LongRow& row,
                                                    int64_t number, uint32_t* bins) {
  const LongState& state = *row.state;
  const uint32_t hi = global_load(&state.hi), lo = global_load(&state.lo);
  const uint32_t inside = global_load(&state.inside);
  const int64_t above_hi = global_load(&state.above), from_hi = above_hi + global_load(&state.at_hi);
  const int64_t above_lo = from_hi + inside, from_lo = above_lo + global_load(&state.at_lo), top = p.top;
  const auto tied = [&](uint32_t score, int64_t above, int64_t from) -> Threshold {
    if (top == from) return {score, 0, 0};
    return {score + 1, score, uint32_t(top - above)};
  };
  if (above_hi < top && top <= from_hi) return tied(hi, above_hi, from_hi);
  if (above_lo < top && top <= from_lo) return tied(lo, above_lo, from_lo);
  const bool listed = from_hi < top && top <= above_lo && inside <= p.capacity;
  const uint32_t base = listed ? lo + 1 : 0;
  int width = listed ? 1 : 31;  // at least one pass, which counts the ties
  while (listed && (hi - base - 1) >> width) width++;
  const auto for_each = [&](auto f) {
    if (listed) {
#pragma unroll 4
      for (uint32_t i = threadIdx.x; i < inside; i += kThreads) f(global_load(&row.list(p)[i]) - base);
      return;
    }
    with_scores(p.operands(), criterion, [&](auto score) {
      const auto here = score.from(number * p.length);
#pragma unroll 4
      for (int64_t e = threadIdx.x; e < p.length; e += kThreads) f(float_bits(here.one(e)));
    });
  };
  Threshold t = search_keys(for_each, width, uint32_t(listed ? top - from_hi : top) - 1, bins);
  t.bits += base;
  t.tie += t.ties ? base : 0;
  return t;
}

// Rows of Reduce::max, whose score it stores, and of Reduce::top, whose threshold it stores.
DELFAST_BODY void count_segment(const Rows& p, Criterion criterion, int64_t block, unsigned char* workspace) {
  const Segment segment(p, block);
  const LongRow row(p, workspace, segment.row);
  DELFAST_SHARED(uint32_t, staged, [kCountWarps * kStaged]);
  DELFAST_SHARED(uint32_t, counts, [4]);
  if (threadIdx.x < 4) counts[threadIdx.x] = 0;
  __syncthreads();

  const int hi = int(global_load(&row.state->hi)), lo = int(global_load(&row.state->lo));
  Staged candidates = {staged + warp() * kStaged};
  constexpr int kPart = kSegment / kCountWarps;  // elements of a warp
  static_assert(kPart < 1 << 16);                // so that two counts fit in a word
  uint32_t above = 0, ends = 0;
  int largest = 0;
  with_scores(p.operands(), criterion, [&](auto score) {
#pragma unroll 1
    for (int e = warp() * kPart; e < (warp() + 1) * kPart && e < segment.length; e += kChunk) {
      int bits[4 * kCountLoads];
      load_chunk(score, segment.first + e, segment.length - e, candidates.room(), bits);
#pragma unroll
      for (int i = 0; i < 4 * kCountLoads; i++) {
        above += bits[i] > hi;
        ends += bits[i] == hi ? 1 << 16 : bits[i] == lo;
        largest = bits[i] > largest ? bits[i] : largest;
      }
      candidates.add(bits, lo, hi, p, row);
    }
  });
  candidates.flush(p, row);
  above = __reduce_add_sync(kAllLanes, above);
  ends = __reduce_add_sync(kAllLanes, ends);
  largest = int(__reduce_max_sync(kAllLanes, uint32_t(largest)));
  if (lane() == 0) {
    atomicAdd(&counts[0], above);
    atomicAdd(&counts[1], ends >> 16);
    atomicAdd(&counts[2], ends & 0xffff);
    atomicMax(&counts[3], uint32_t(largest));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    global_add(&row.state->above, counts[0]);
    global_add(&row.state->at_hi, counts[1]);
    global_add(&row.state->at_lo, counts[2]);
    atomicMax(&row.state->largest, counts[3]);
  }

  if (!is_last_block(&row.state->counted, p.segments())) return;
  const uint32_t most = global_load(&row.state->largest);
  if (p.reduce == Reduce::max || most >= kInfinity) {
    if (threadIdx.x == 0) global_store(&p.out[segment.row], bits_float(most));
    return;
  }
  const Threshold threshold = long_threshold(p, criterion, row, segment.row, staged);
  if (threadIdx.x == 0) {
    global_store(&row.state->threshold.bits, threshold.bits);
    global_store(&row.state->threshold.tie, threshold.tie);
    global_store(&row.state->threshold.ties, threshold.ties);
  }
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads, kCountResident)
    criticality_long_count(DELFAST_GRID_CONSTANT(Table<Rows, kBytes>) table, Criterion criterion,
                           unsigned char* workspace) {
  const int entry = find_entry(table);
  count_segment(table.entries[entry], criterion, blockIdx.x - table.first_block[entry], workspace);
}

}  // namespace delfast::cuda
