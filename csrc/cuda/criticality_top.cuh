// The top h of rows, and their maximum.
//
// Mapping. A warp takes a row of up to kWarpRow elements, a block a row of up to kBlockRow. For a long row a block
// takes a sample, which gives the bracket of its h-th largest (criticality_long.cuh).
// Memory. A row's scores are computed once and stored in shared memory, by coalesced loads of four, with kTopLoads in
// flight in each thread. The search for the threshold (criticality_select.cuh) and the sums read shared memory.
// Numerics: criticality_rows.cuh.
#pragma once

#include "cuda/criticality_long.cuh"
#include "cuda/criticality_select.cuh"

namespace delfast::cuda {

// Packs in flight in a thread, and resident blocks of a multiprocessor, which limit the registers of a thread. On an
// H100, 8 and 5 were about as fast for large networks and slower for small ones (benchmarks/gpu_bandwidth.py times
// them; these times are not kept).
constexpr int kTopLoads = 4, kTopResident = 8;

constexpr uint32_t kWarpRow = 4 * kBlock;

__host__ __device__ constexpr int score_words(int length) { return shared_slot((length + 3) / 4 * 4); }

// Shared memory of a row, in words: its scores, and space for a list or for partial sums.
__host__ __device__ constexpr int row_words(int length) { return score_words(length) + list_capacity(length); }

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Stores the scores of a row in shared memory, padded to whole packs; returns the thread's maximum.
template <class Team, class Score>
__device__ __forceinline__ uint32_t stage(const Score& score, int64_t first, int length, uint32_t* scores,
                                          const Team& team) {
  constexpr int T = Team::kThreads;
  static_assert(kTopLoads % 4 == 0);
  uint32_t largest = 0;
  const int end = (length + 3) / 4 * 4;
  if (score.aligned(first)) {
    const int packs = length / 4;
    Score here = score.from(first + 4 * team.thread());
    uint32_t* at = scores + 4 * team.thread();
#pragma unroll 1
    for (int left = (packs - team.thread() + T - 1) / T; left > 0;
         left -= kTopLoads, here = here.from(4 * T * kTopLoads), at += step_words<Team>(kTopLoads)) {
      typename Score::Raw raw[kTopLoads] = {};
#pragma unroll
      for (int u = 0; u < kTopLoads; u++)
        if (u < left) raw[u] = here.load(4 * T * u);
#pragma unroll
      for (int u = 0; u < kTopLoads; u++) {
        if (u >= left) continue;
        float x[4];
        score.scores(raw[u], x);
        const uint4 bits = {float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
        *reinterpret_cast<uint4*>(at + step_words<Team>(u)) = bits;
        largest = larger(largest, larger(larger(bits.x, bits.y), larger(bits.z, bits.w)));
      }
    }
    const int e = packs * 4 + team.thread();
    if (e < end) {
      const uint32_t bits = e < length ? float_bits(score.one(first + e)) : kPad;
      scores[shared_slot(e)] = bits;
      if (e < length) largest = larger(largest, bits);
    }
  } else {
    // a warp's lanes begin where a line of 32 elements begins
#pragma unroll 4
    for (int e = team.thread() - pack_offset<kWarp>(score.first() + first); e < end; e += T) {
      if (e < 0) continue;
      const uint32_t bits = e < length ? float_bits(score.one(first + e)) : kPad;
      scores[shared_slot(e)] = bits;
      if (e < length) largest = larger(largest, bits);
    }
  }
  return largest;
}

// Stores `runs` runs of four scores from all parts of a long row in shared memory; returns the thread's maximum.
template <class Score>
__device__ __forceinline__ uint32_t stage_sample(const Score& score, int64_t first, uint32_t length, int runs,
                                                 uint32_t* scores) {
  const bool aligned = score.aligned(first);
  uint32_t largest = 0;
#pragma unroll 4
  for (int u = int(threadIdx.x); u < runs; u += kRowThreads) {
    const int64_t at = first + 4 * int64_t(sampled_pack(length, runs, u));
    float x[4];
    if (aligned) {
      score.scores(score.load(at), x);
    } else {
      for (int j = 0; j < 4; j++) x[j] = score.one(at + j);
    }
    const uint4 bits = {float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
    *reinterpret_cast<uint4*>(&scores[shared_slot(4 * u)]) = bits;
    largest = larger(largest, larger(larger(bits.x, bits.y), larger(bits.z, bits.w)));
  }
  return largest;
}

// Float32 sum number `sum` (of the 16 of each block) of the scores at or above the threshold.
__device__ __forceinline__ float partial_sum(const uint32_t* scores, int length, int sum, uint32_t threshold) {
  const int block = sum / 16, begin = block * kBlock + sum % 16;
  const uint32_t* const at = scores + block * (kBlock + 16) + sum % 16;
  float total = 0;
  if (block * kBlock + kBlock <= length) {
#pragma unroll
    for (int i = 0; i < kBlock / 16; i++)
      if (at[16 * i] >= threshold) total += bits_float(at[16 * i]);
  } else {
#pragma unroll 4
    for (int e = begin, i = 0; e < length; e += 16, i += 16)
      if (at[i] >= threshold) total += bits_float(at[i]);
  }
  return total;
}

// The score of a row that the team has staged; `largest` is the thread's maximum.
template <class Team>
__device__ __forceinline__ void score_staged(const Rows& p, int64_t row, uint32_t* scores, uint32_t largest,
                                             Team& team) {
  const int length = int(p.length);
  uint32_t* const list = scores + score_words(length);
  largest = team.max(largest);
  if (p.reduce == Reduce::max || (p.reduce == Reduce::top && largest >= kInfinity)) {
    if (team.thread() == 0) global_store(&p.out[row], bits_float(largest));
    return;
  }
  team.sync();  // for the staged scores
  Threshold threshold = {0, 0, 0};
  if (p.reduce == Reduce::top) threshold = top_threshold(scores, list, length, int(p.top), largest, team);
  const int blocks = blocks_of_row(length);
  double sum = 0;
  if constexpr (Team::kOneWarp) {
    for (int b = 0; b < blocks; b += 2) {
      const float even = partial_sum(scores, length, b * 16 + lane(), threshold.bits);
      const float odd = __shfl_down_sync(kAllLanes, even, 16);
      sum += double(even);
      if (b + 1 < blocks) sum += double(odd);
    }
  } else {
    float* const partial = reinterpret_cast<float*>(list);
    for (int i = int(threadIdx.x); i < blocks * 16; i += kRowThreads)
      partial[i] = partial_sum(scores, length, i, threshold.bits);
    __syncthreads();
    if (warp() != 0) return;
    if (lane() < 16)
      for (int b = 0; b < blocks; b++) sum += double(partial[b * 16 + lane()]);
  }
  sum = add_pairwise(sum);
  if (lane() == 0) global_store(&p.out[row], reduced(p, sum, threshold));
}

template <class Team>
__device__ __forceinline__ void score_row(const Rows& p, Criterion criterion, int64_t row, uint32_t* scores,
                                          uint32_t* room) {
  Team team(room);
  const int length = int(p.length);
  uint32_t largest = 0;
  with_scores(p.operands(), criterion,
              [&](auto score) { largest = stage<Team>(score, row * length, length, scores, team); });
  score_staged(p, row, scores, largest, team);
}

// For a long row: stores the bracket of its h-th largest, two order statistics of a sample, and clears the counts to
// which criticality_long_count adds.
__device__ __forceinline__ void begin_long_row(const Rows& p, Criterion criterion, const LongRow& row, int64_t number,
                                               uint32_t* scores, uint32_t* room) {
  uint32_t hi = 0, lo = 0;  // with these ends nothing is listed
  if (p.reduce == Reduce::top) {
    BlockTeam team(room);
    const int runs = sample_runs(p.length), size = 4 * runs;
    uint32_t largest = 0;
    with_scores(p.operands(), criterion,
                [&](auto score) { largest = stage_sample(score, number * int64_t(p.length), p.length, runs, scores); });
    largest = team.max(largest);
    const SampleRanks ranks = sample_ranks(p.length, p.top, size);
    if (largest < kInfinity) hi = kInfinity;
#pragma unroll 1
    for (int end = 0; end < 2 && largest < kInfinity; end++) {
      const int rank = end ? ranks.lo : ranks.hi;
      if (rank < 1 || rank >= size) continue;
      const Threshold t = top_threshold(scores, scores + score_words(size), size, rank, largest, team);
      (end ? lo : hi) = t.ties ? t.tie : t.bits;
    }
  }
  if (threadIdx.x == 0) row.begin(hi, lo);
}

// Dynamic shared memory: a row for each warp, or one for the block.
DELFAST_BODY void top_rows(const Rows& p, Criterion criterion, int64_t block, unsigned char* workspace) {
  if (p.length == 1) return score_elements(p, criterion, block);
  DELFAST_DYNAMIC_SHARED(uint32_t, shared);
  DELFAST_SHARED(uint32_t, room, [2 * kRowWarps]);
  if (p.is_long()) return begin_long_row(p, criterion, LongRow(p, workspace, block), block, shared, room);
  if (p.length > kWarpRow) return score_row<BlockTeam>(p, criterion, block, shared, room);
  const int64_t row = block * kRowWarps + warp();
  if (row >= p.rows) return;  // the whole warp returns: warps do not wait for one another
  score_row<WarpTeam>(p, criterion, row, shared + warp() * row_words(int(p.length)), room);
}

template <int kBytes>
__global__ void __launch_bounds__(kRowThreads, kTopResident)
    criticality_top(DELFAST_GRID_CONSTANT(Table<Rows, kBytes>) table, Criterion criterion, unsigned char* workspace) {
  const int entry = find_entry(table);
  top_rows(table.entries[entry], criterion, blockIdx.x - table.first_block[entry], workspace);
}

}  // namespace delfast::cuda
