// Rows of more than kBlockRow elements: several blocks for each row, two readings for the top h, one reading otherwise.
//
// Mapping. A block takes a segment of a row. The last block of a row to finish completes the row's part of the launch.
// Kernels in the order of their launches:
// - criticality_top samples each row, which gives the bracket of its h-th largest score (criticality_top.cuh).
// - criticality_long_count counts the scores above the bracket and lists those inside. The last block searches the list
//   (criticality_long_top.cuh).
// - criticality_long_sum computes the 16 float32 sums of every kBlock elements. The last block adds them
//   (criticality_long_sum.cuh).
// For means and sums of whole rows instead:
// - criticality_mean computes the same sums of all scores (criticality_mean.cuh).
// - criticality_long_add adds them (criticality_long_sum.cuh).
// Scores equal to an end of the bracket are counted separately and not listed, so that many equal scores do not fill
// the list. If the bracket misses the h-th largest, the last block searches the whole row: slower, with the same
// result. With independent scores this does not happen at five standard deviations (kSpread).
// Memory. State, sums and list of a row are in the workspace. Candidates are collected in shared memory before they are
// written to the list.
// Numerics: criticality_rows.cuh. The result depends neither on which block is the last nor on the order of the list.
#pragma once

#include <cmath>

#include "cuda/criticality_rows.cuh"

namespace delfast::cuda {

// ---- memory in the workspace that the blocks of a row share

struct LongState {
  uint32_t hi, lo;                       // the bracket; the counts below are of the scores ...
  uint32_t above, at_hi, inside, at_lo;  // ... above hi, equal to it, between hi and lo, equal to lo
  uint32_t largest;
  uint32_t counted, summed;  // number of blocks that are done
  Threshold threshold;
  uint32_t unused[4];
};
static_assert(sizeof(LongState) == 64);

// Size of a long row's part of the workspace, in units of a LongState: the state, 16 float32 sums for every kBlock
// elements (one unit), and the list.
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
  int64_t row;    // number of the row in the parameter
  int64_t begin;  // element of the row
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

// Number of sampled runs of four scores: one run in 64, at most kMaxRuns.
__host__ __device__ constexpr int sample_runs(uint32_t length) {
  return length / 64 < kMaxRuns ? int(length / 64) : kMaxRuns;
}

// Ranks, in the sorted sample, of the two ends of the bracket. hi below 1: no score is above the bracket.
// lo at or beyond the sample's size: no score is below it.
struct SampleRanks {
  int hi, lo;
};
__host__ __device__ inline SampleRanks sample_ranks(uint32_t length, uint32_t top, int size) {
  const float share = float(top) / float(length), expected = share * float(size);
  const float spread = kSpread * sqrtf(expected * (1 - share)) + 8;
  return {int(expected - spread), int(expected + spread) + 1};
}

// First score of run u, divided by 4. Each run lies at random in its own part of the row, so that a periodic row is
// sampled without bias.
__host__ __device__ constexpr uint32_t sampled_pack(uint32_t length, int runs, int u) {
  const uint64_t packs = length / 4;
  const uint32_t begin = uint32_t(packs * uint32_t(u) / uint32_t(runs));
  const uint32_t end = uint32_t(packs * uint32_t(u + 1) / uint32_t(runs));
  return begin + (uint32_t(u) * 2654435769u >> 8) % (end - begin);
}

}  // namespace delfast::cuda
