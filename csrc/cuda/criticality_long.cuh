// Rows of more than kBlockRow elements: several blocks each, two readings for the top h, one for all else.
//
// Mapping. A block takes a segment of a row. The last block of a row to be done ends the row's part of the launch.
// - criticality_top takes a sample of each row, which gives the bracket of its h-th largest (criticality_top.cuh).
// - criticality_long_count counts the scores above the bracket and lists those inside; the last block searches these.
// - criticality_long_sum makes the 16 float32 sums of every kBlock elements; the last block adds them up.
// - criticality_mean makes the same sums, of all scores (criticality_mean.cuh), and criticality_long_add adds them up.
//
// Scores equal to an end of the bracket are counted apart: of many equal scores none
// is listed. Where the sample misleads, the last block searches the whole row by itself: slow and right. At five
// standard deviations of a sample of independent scores that does not happen.
// Memory. What the blocks of a row share lies in the workspace. Candidates are first gathered in shared memory.
// Numerics: criticality_rows.cuh. Which block is the last, and the order of the list, do not show in the result.
#pragma once

#include <cmath>

#include "cuda/criticality_rows.cuh"

namespace delfast::cuda {

// ---- what the blocks of a row share, in the workspace

struct LongState {
  uint32_t hi, lo;                       // the bracket, and how many scores are ...
  uint32_t above, at_hi, inside, at_lo;  // ... above hi, equal to it, between hi and lo, equal to lo
  uint32_t largest;
  uint32_t counted, summed;  // how many blocks are done
  Threshold threshold;
  uint32_t unused[4];
};
static_assert(sizeof(LongState) == 64);

// The room of a long row in the workspace, in units of a LongState: the state, 16 float32 sums for every kBlock
// elements (a unit), and the list.
__host__ __device__ constexpr int64_t long_row_units(uint32_t length, uint32_t capacity) {
  return 1 + blocks_of_row(int64_t(length)) + (int64_t(capacity) + 15) / 16;
}

struct LongRow {
  LongState* state;

  __device__ __forceinline__ LongRow(const Rows& p, unsigned char* workspace, int64_t row)
      : state(reinterpret_cast<LongState*>(workspace) + p.room + row * long_row_units(p.length, p.capacity)) {}
  __device__ __forceinline__ float* partial() const { return reinterpret_cast<float*>(state + 1); }
  __device__ __forceinline__ uint32_t* list(const Rows& p) const {
    return reinterpret_cast<uint32_t*>(state + 1 + p.blocks());
  }
  __device__ __forceinline__ void begin(uint32_t hi, uint32_t lo) const {
    for (int i = 0; i < int(sizeof(LongState) / sizeof(uint32_t)); i++)
      global_store(reinterpret_cast<uint32_t*>(state) + i, 0u);
    global_store(&state->hi, hi);
    global_store(&state->lo, lo);
  }
};

struct Segment {
  int64_t row;    // its number
  int64_t begin;  // in the row
  int64_t first;  // element of the parameter
  int length;

  __device__ __forceinline__ Segment(const Rows& p, int64_t block) {
    const uint32_t segments = p.segments();
    row = block / segments;
    begin = (block - row * segments) * kSegment;
    first = row * p.length + begin;
    length = p.length - begin < kSegment ? int(p.length - begin) : kSegment;
  }
};

// ---- the sample

constexpr int kMaxRuns = 2048;
constexpr float kSpread = 5;  // standard deviations between the h-th largest and either end of its bracket

// How many runs of four scores are sampled: one in 64, or kMaxRuns.
__host__ __device__ constexpr int sample_runs(uint32_t length) {
  return length / 64 < kMaxRuns ? int(length / 64) : kMaxRuns;
}

// Which of the sample's largest are the ends of the bracket. Below 1: there is nothing above the bracket; beyond the
// sample's size: there is nothing below it.
struct SampleRanks {
  int hi, lo;
};
__host__ __device__ inline SampleRanks sample_ranks(uint32_t length, uint32_t top, int size) {
  const float share = float(top) / float(length), expected = share * float(size);
  const float spread = kSpread * sqrtf(expected * (1 - share)) + 8;
  return {int(expected - spread), int(expected + spread) + 1};
}

// The first of run u's scores, over 4. Each run lies at random in its own part of the row, so that nothing periodic is
// met or missed.
__host__ __device__ constexpr uint32_t sampled_pack(uint32_t length, int runs, int u) {
  const uint64_t packs = length / 4;
  const uint32_t begin = uint32_t(packs * uint32_t(u) / uint32_t(runs));
  const uint32_t end = uint32_t(packs * uint32_t(u + 1) / uint32_t(runs));
  return begin + (uint32_t(u) * 2654435769u >> 8) % (end - begin);
}

}  // namespace delfast::cuda
