// Scores of rows in pieces. The rows are interleaved in memory: for each input, the pieces of all rows lie side by
// side.
//
// Mapping. A block takes neighbouring rows, so that the elements it reads for one input are one contiguous stretch.
// Lanes take packs of four along the stretch, then along the next input's.
// - Means and sums: kPieceRows rows, kBlock elements of each at a time. A thread adds one of a row's 16 sums, of two
//   rows. An input whose elements lie in two such chunks is read twice.
// - The top h, the maximum, and means and sums of long pieces: a few whole rows. Warps take the rows in turn; rows
//   longer than kWarpRow are taken by the block, one after another. A stretch fills a sector, unless the rows are so
//   long that too few of them fit into shared memory. The neighbouring blocks then read the rest of the sector from the
//   L2 cache.
// Memory. Scores are computed once and stored in shared memory, row by row. Each thread has kPieceLoads packs in
// flight. If a parameter's stretches do not consist of aligned packs, its elements are read one by one.
// Numerics: criticality_rows.cuh.
#pragma once

#include "cuda/criticality_top.cuh"

namespace delfast::cuda {

constexpr int kPieceLoads = 4, kPieceResident = 6;  // see kTopLoads; no measurement is kept
constexpr int kPieceRows = 16;                      // maximum number of rows of a block
constexpr int kMaxPieceInChunks = kBlock / 8;       // an input in two chunks: at most one in eight
static_assert(kMaxRowInPieces == kBlockRow);

// Words from one row to the next in shared memory: 4 more than a multiple of 8, so that scores of 8 rows are in
// different banks.
__host__ __device__ constexpr int pitch_of_pieces(int words) { return words | 4; }
constexpr int kChunkPitch = pitch_of_pieces(shared_slot(kBlock));

__host__ __device__ constexpr bool in_chunks(const Rows& p) {
  return (p.reduce == Reduce::sum || p.reduce == Reduce::mean) && p.piece <= kMaxPieceInChunks;
}

// Number of whole rows of a block: enough to fill a sector and at least one for each warp, if that many fit.
__host__ __device__ constexpr int whole_rows_in_pieces(int length, int piece, int bytes) {
  int rows = kRowWarps;
  while (rows < kPieceRows && rows * piece * bytes < kSector) rows *= 2;
  while (rows > 1 && rows * length > kBlockRow) rows /= 2;
  return rows;
}
__host__ __device__ constexpr int rows_of_pieces_block(const Rows& p) {
  const bool narrow = p.theta_dtype != Dtype::float32 || p.grad_dtype != Dtype::float32;
  return in_chunks(p) ? kPieceRows : whole_rows_in_pieces(int(p.length), int(p.piece), narrow ? 2 : 4);
}

// Returns true if all stretches consist of aligned packs, including the last block's, which may be shorter.
__device__ __forceinline__ bool in_packs(const Rows& p, int rows_of_block) {
  const auto aligned = [](const void* address, Dtype dtype) {
    return reinterpret_cast<uintptr_t>(address) % (dtype == Dtype::float32 ? 16 : 8) == 0;
  };
  return rows_of_block * p.piece % 4 == 0 && p.rows * p.piece % 4 == 0 && aligned(p.theta, p.theta_dtype) &&
         aligned(p.grad, p.grad_dtype);
}

// A thread's part of a stretch, or of the stretches of several inputs at once if these are short.
struct Share {
  int pack;    // in the stretch
  int first;   // first input
  int inputs;  // number of inputs, every at_once-th
  int at_once;

  // For elements [begin, end) of the rows; packs from `from` on.
  __device__ __forceinline__ Share(int packs, int from, int piece, int begin, int end) {
    at_once = packs < kRowThreads ? kRowThreads / packs : 1;
    const int mine = packs < kRowThreads ? int(threadIdx.x) / packs : 0;
    pack = from + int(threadIdx.x) - mine * packs;
    first = begin / piece + mine;
    inputs = mine < at_once && pack < packs ? ((end - 1) / piece - first + at_once) / at_once : 0;
  }
};

// Stages the scores of elements [begin, end) of some rows in shared memory. The rows lie side by side from element `at`
// on; the next input's are `apart` elements later. A pack is kWidth elements.
template <int kWidth, class Score>
__device__ __forceinline__ void stage_share(const Score& score, const Share& share, int piece, int64_t at,
                                            int64_t apart, int begin, int end, uint32_t* scores, int pitch) {
  int row_at[kWidth], element[kWidth];
  for (int j = 0; j < kWidth; j++) {
    const int side = share.pack * kWidth + j, row = side / piece;
    row_at[j] = row * pitch;
    element[j] = share.first * piece + side - row * piece - begin;
  }
  Score here = score.from(at + share.first * apart + share.pack * kWidth);
#pragma unroll 1
  for (int left = share.inputs; left > 0; left -= kPieceLoads) {
    std::conditional_t<kWidth == 4, typename Score::Raw, float> raw[kPieceLoads] = {};
#pragma unroll
    for (int u = 0; u < kPieceLoads; u++, here = here.from(share.at_once * apart)) {
      if (u >= left) continue;
      if constexpr (kWidth == 4)
        raw[u] = here.load(0);
      else
        raw[u] = here.one(0);
    }
#pragma unroll
    for (int u = 0; u < kPieceLoads; u++) {
      if (u >= left) continue;
      float x[kWidth];
      if constexpr (kWidth == 4)
        score.scores(raw[u], x);
      else
        x[0] = raw[u];
      for (int j = 0; j < kWidth; j++) {
        if (uint32_t(element[j]) < uint32_t(end - begin))
          scores[row_at[j] + shared_slot(element[j])] = float_bits(x[j]);
        element[j] += share.at_once * piece;
      }
    }
  }
}

// Scores of several rows of `length` elements, staged and padded. A warp takes every fourth row, a block every row.
template <class Team>
__device__ __forceinline__ void score_whole_rows(const Rows& p, int64_t first_row, int rows, uint32_t* scores,
                                                 int pitch, uint32_t* room) {
  Team team(room);
#pragma unroll 1
  for (int row = Team::kOneWarp ? warp() : 0; row < rows; row += Team::kOneWarp ? kRowWarps : 1) {
    int largest = 0;  // the padding is negative
    const auto take = [&](uint32_t bits) { largest = int(bits) > largest ? int(bits) : largest; };
    for_packs(scores + row * pitch, (int(p.length) + 3) / 4, team, [&](const uint4& bits) {
      take(bits.x);
      take(bits.y);
      take(bits.z);
      take(bits.w);
    });
    score_staged(p, first_row + row, scores + row * pitch, uint32_t(largest), team);
  }
}

// Dynamic shared memory: words_of_pieces.
DELFAST_BODY void score_pieces(const Rows& p, Criterion criterion, int64_t block) {
  DELFAST_DYNAMIC_SHARED(uint32_t, scores);
  DELFAST_SHARED(uint32_t, room, [2 * kRowWarps]);
  constexpr int kSums = kPieceRows * 16 / kRowThreads;  // sums of a thread
  const bool chunks = in_chunks(p);
  const int length = int(p.length), most = rows_of_pieces_block(p);
  const int pitch = chunks ? kChunkPitch : pitch_of_pieces(row_words(length));
  const int64_t first_row = block * most;
  const int rows = p.rows - first_row < most ? int(p.rows - first_row) : most;
  const bool wide = in_packs(p, most);
  const int piece = int(p.piece), packs = rows * piece / (wide ? 4 : 1);
  double sum[kSums] = {};
#pragma unroll 1
  for (int begin = 0; begin < length; begin += kBlock) {
    const int end = chunks && length - begin > kBlock ? begin + kBlock : length;
#pragma unroll 1
    for (int from = 0; from < packs; from += kRowThreads) {
      const Share share(packs, from, piece, begin, end);
      const int64_t at = first_row * piece, apart = p.rows * piece;
      with_scores(p.operands(), criterion, [&](auto score) {
        if (wide)
          stage_share<4>(score, share, piece, at, apart, begin, end, scores, pitch);
        else
          stage_share<1>(score, share, piece, at, apart, begin, end, scores, pitch);
      });
    }
    if (!chunks) break;
    __syncthreads();
    for (int i = 0; i < kSums; i++) {
      const int row = (i * kRowThreads + int(threadIdx.x)) / 16;
      if (row < rows) sum[i] += double(partial_sum(scores + row * pitch, end - begin, lane() % 16, 0));
    }
    __syncthreads();
  }
  if (chunks) {
    for (int i = 0; i < kSums; i++) {
      const int row = (i * kRowThreads + int(threadIdx.x)) / 16;
      const double total = add_pairwise(sum[i]);
      if (lane() % 16 == 0 && row < rows) global_store(&p.out[first_row + row], reduced(p, total, {0, 0, 0}));
    }
    return;
  }
  const int row = int(threadIdx.x) / 4, e = length + int(threadIdx.x) % 4;
  if (row < rows && e < (length + 3) / 4 * 4) scores[row * pitch + shared_slot(e)] = kPad;
  __syncthreads();
  if (length <= int(kWarpRow)) return score_whole_rows<WarpTeam>(p, first_row, rows, scores, pitch, room);
  score_whole_rows<BlockTeam>(p, first_row, rows, scores, pitch, room);
}

template <int kBytes>
__global__ void __launch_bounds__(kRowThreads, kPieceResident)
    criticality_pieces(DELFAST_GRID_CONSTANT(Table<Rows, kBytes>) table, Criterion criterion) {
  const int entry = find_entry(table);
  score_pieces(table.entries[entry], criterion, blockIdx.x - table.first_block[entry]);
}

}  // namespace delfast::cuda
