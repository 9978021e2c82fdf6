// The k-th largest score over all parameters, and the packed bits of the scores at or above it: what the kernels of all
// stages share. Elements and units (channels) are selected by the same kernels: a unit is an element of its parameter's
// list of scores that weighs as much as it has scalars, an element weighs 1. (Few units: selection_units.cuh.)
//
// Stages; the host asks nothing in between:
//   begin     the sources (parameters) and the owner of every tile are written to the workspace; counters are cleared.
//   sample    of many elements: a bracket that holds the k-th score except by a rare accident (selection_sample.cuh).
//   read      the one reading: the bits of all scores above the bracket, and a list of those inside, the candidates
//             (selection_read.cuh).
//   count x 3, mark, settle   three radix passes, the ties in order, the last bits (selection_passes.cuh): among the
//             candidates if they hold the k-th score. If not (few elements and no sample, units, a bracket that missed,
//             a list that ran over, a score that is not finite), over all scores, read again by each of the stages.
// What one block has to do between two stages, the last block to finish the stage before does (is_last_block).
// Memory. The workspace: the state, then arrays by source, tile and candidate (Selection).
// Numerics. Integers only: the result does not depend on the order of blocks, nor on the sample.
#pragma once

#include "cuda/radix.cuh"
#include "cuda/scores.cuh"

namespace delfast::cuda {

constexpr int64_t kTile = 8192;  // elements; a multiple of 32: tiles do not share bytes of bits, nor warps words
constexpr int kTileWords = int(kTile / 32);
constexpr int kWarps = kThreads / kWarp;
// Blocks of a multiprocessor that the kernels leave room for: half of its warps. Without being told, the compiler aims
// at more and spills.
constexpr int kResident = 4;
constexpr int kTieTiles = kThreads;  // tiles whose ties are summed as one

struct Source {
  Operands operands;
  Layout layout;
  int64_t weight;  // of each
  uint8_t* bits;
  int64_t id, id_per_element;  // what a bad score is reported as: the parameter, or the unit
  uint32_t first_tile;         // of all sources' tiles
};

constexpr unsigned long long kNone = ~0ull;
constexpr int kSampleShift = 15;  // a bin of the sample: scores with the same upper 16 bits; 256 bins are a group
constexpr int kSampleBins = 1 << (31 - kSampleShift), kSampleGroups = kSampleBins / kThreads;
constexpr int kStages = 5;  // that end with a last block: the sample, three passes, mark

struct SelectionState {
  // written by `begin`
  unsigned long long nonfinite;  // the least id with a NaN or infinite score, or kNone
  unsigned long long left;       // of the budget, once what lies above the digits found so far is taken
  unsigned long long above;      // candidates: scores at or above `hi`
  unsigned long long higher;     // mark over all scores: those above the threshold
  unsigned long long rest;       // of the budget, for a part of the unit after the last one
  uint32_t cut_tile;             // where the ties end; past the last tile: all of them are kept
  uint32_t keep;                 // of that tile's ties
  uint32_t lo, hi;               // the bracket: lo <= score < hi
  uint32_t listed;               // candidates
  uint32_t failed;               // there is no bracket, a list ran over, or a score is not finite
  uint32_t digits;               // of the threshold, less `lo`
  uint32_t everything;           // fits in the budget
  // cleared
  alignas(16) uint32_t tickets[kStages + 3];  // rounded up to 16 bytes
  unsigned long long histogram[kRadixBins];
  uint32_t sample_groups[kSampleGroups];
  uint32_t sample[kSampleBins];
};

struct TileRecord {
  uint32_t first, count;  // the tile's candidates
};

struct Selection {
  SelectionState* state;
  Source* sources;
  uint32_t* owners;                    // a tile's source
  uint32_t* ties;                      // of a tile with the threshold
  unsigned long long* segment_weight;  // what they weigh, of kTieTiles tiles
  TileRecord* records;                 // of tiles
  uint32_t* scores;                    // of candidates
  uint16_t* places;                    // of candidates, in their tiles
  unsigned long long budget;
  int64_t* info;  // {nonfinite, positive}; of units {cut_unit, cut_size, nonfinite, selected, positive}
  uint32_t tiles;
  uint32_t capacity;  // candidates
  bool units, cut_last;
};

// A tile, for the threads that work on it.
struct Tile {
  const Source* source;
  Operands operands;  // from its first element on
  uint8_t* bits;      // of its elements
  int64_t begin;      // in its source
  int length;
  bool in_order;  // in memory as logically

  __device__ __forceinline__ int64_t id_of(int i) const { return source->id + (begin + i) * source->id_per_element; }
  // Where its logical element i is in memory, from its first element on.
  __device__ __forceinline__ int64_t offset(const Layout& layout, int i) const {
    return layout.offset(begin + i) - begin;
  }
};
__device__ __forceinline__ const void* shifted(const void* values, Dtype dtype, int64_t elements) {
  if (!values) return nullptr;
  return static_cast<const unsigned char*>(values) + elements * (dtype == Dtype::float32 ? 4 : 2);
}
__device__ __forceinline__ Tile tile_of(const Selection& s, uint32_t number) {
  const Source* const p = s.sources + global_load_const(&s.owners[number]);
  const int64_t begin = int64_t(number - p->first_tile) * kTile, rest = p->layout.numel() - begin;
  const Operands& o = p->operands;
  return {p,
          {shifted(o.theta, o.theta_dtype, begin), shifted(o.grad, o.grad_dtype, begin), o.theta_dtype, o.grad_dtype},
          p->bits + begin / 8,
          begin,
          int(rest < kTile ? rest : kTile),
          p->layout.spatial == 1};
}

// Every table of sources is one launch; the first one clears what is to begin with zeros.
template <int kBytes>
__global__ void __launch_bounds__(kThreads) selection_begin(DELFAST_GRID_CONSTANT(Table<Source, kBytes>) table,
                                                            Selection s, uint32_t first_source, bool sampled) {
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
  for (uint32_t i = thread; i < uint32_t(table.count); i += threads) s.sources[first_source + i] = table.entries[i];
  for (uint32_t i = thread; i < table.first_block[table.count]; i += threads) {
    global_store(&s.owners[table.entries[0].first_tile + i], first_source + uint32_t(find_entry(table, i)));
  }
  if (first_source) return;
  const size_t bytes = sampled ? sizeof(SelectionState) : offsetof(SelectionState, sample_groups);
  const uint32_t words = uint32_t((bytes - offsetof(SelectionState, tickets)) / sizeof(uint4));
  uint4* const cleared = reinterpret_cast<uint4*>(s.state->tickets);
  for (uint32_t i = thread; i < words; i += threads) global_store(&cleared[i], uint4{0, 0, 0, 0});
  for (uint32_t i = thread; i * kTieTiles < s.tiles; i += threads) global_store(&s.segment_weight[i], 0ull);
  if (thread) return;
  SelectionState* const state = s.state;
  global_store(&state->nonfinite, kNone);
  global_store(&state->left, s.budget);
  global_store(&state->above, 0ull);
  global_store(&state->higher, 0ull);
  global_store(&state->rest, 0ull);
  global_store(&state->cut_tile, s.tiles);
  global_store(&state->keep, 0u);
  global_store(&state->lo, 0u);
  global_store(&state->hi, 0u);
  global_store(&state->listed, 0u);
  global_store(&state->failed, sampled ? 0u : 1u);
  global_store(&state->digits, 0u);
  global_store(&state->everything, 0u);
}

// Where the threshold is searched: among the candidates, or among all scores.
struct Search {
  bool listed;
  uint32_t lo, width;        // the scores' range
  unsigned long long above;  // it
};
__device__ __forceinline__ Search search_of(const Selection& s) {
  const SelectionState* const state = s.state;
  const uint32_t failed = global_load(&state->failed), listed = global_load(&state->listed),
                 lo = global_load(&state->lo), hi = global_load(&state->hi);
  const unsigned long long above = global_load(&state->above);
  if (!failed && above <= s.budget && s.budget < above + listed) return {true, lo, hi - lo, above};
  return {false, 0, 1u << 31, 0};
}

}  // namespace delfast::cuda
