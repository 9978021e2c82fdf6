// The k-th largest score over all parameters, and the packed bits of the scores at or above it: definitions shared by
// the kernels of all stages. The same kernels select elements and units (channels). A unit is an element of its
// parameter's list of scores and weighs as much as it has scalars; an element weighs 1. selection_units.cuh selects few
// units.
//
// Mapping. Stages in the order of their launches; the host does not wait in between:
// - begin: writes the sources (parameters) and the owner of every tile to the workspace and clears the counters.
// - sample, for many elements: a bracket that almost always contains the k-th score (selection_sample.cuh).
// - read, for many elements: the only full reading, which writes the bits of all scores above the bracket and lists
//   those inside, the candidates (selection_read.cuh).
// - count x 3, mark, settle: three radix passes, the ties in order, the last bits (selection_passes.cuh). They read the
//   candidates if these contain the k-th score. Otherwise (few elements and no sample, units, a bracket that missed, a
//   full list, a score that is not finite) each of them reads all scores again.
// Work for a single block between two stages is done by the last block that finishes the first of the two
// (is_last_block).
// Memory. The workspace: the state, then arrays by source, tile and candidate (Selection).
// Numerics. Integers only: the result depends neither on the order of blocks nor on the sample.
#pragma once

#include "cuda/radix.cuh"
#include "cuda/scores.cuh"
#include "delfast/selection.h"

namespace delfast::cuda {

constexpr int64_t kTile = 8192;  // elements; a multiple of 32, so that tiles share no bytes of bits and warps no words
constexpr int kTileWords = int(kTile / 32);
constexpr int kWarps = kThreads / kWarp;
// Resident blocks of a multiprocessor: half of its warps. Without this limit the compiler targets more blocks and
// spills registers.
constexpr int kResident = 4;
constexpr int kTieTiles = kThreads;  // tiles whose ties are summed as one

struct Source {
  Operands operands;
  Layout layout;
  int64_t weight;  // weight of an element
  uint8_t* bits;
  int64_t id, id_per_element;  // reported for a score that is not finite: the parameter, or the unit
  uint32_t first_tile;         // over all sources
};

constexpr unsigned long long kNone = ~0ull;
constexpr int kSampleShift = 15;  // a bin of the sample: scores with the same upper 16 bits; 256 bins are a group
constexpr int kSampleBins = 1 << (31 - kSampleShift), kSampleGroups = kSampleBins / kThreads;
constexpr int kStages = 5;  // stages that end with a last block: the sample, three passes, mark

struct SelectionState {
  // written by `begin`
  unsigned long long nonfinite;  // the least id with a NaN or infinite score, or kNone
  unsigned long long left;       // rest of the budget after all scores above the digits found so far
  unsigned long long above;      // candidates: number of scores at or above `hi`
  unsigned long long higher;     // mark over all scores: number above the threshold
  unsigned long long rest;       // rest of the budget, for a part of the unit after the last one
  uint32_t cut_tile;             // tile where the ties end; past the last tile: all are kept
  uint32_t keep;                 // number of that tile's ties to keep
  uint32_t lo, hi;               // the bracket: lo <= score < hi
  uint32_t listed;               // number of candidates
  uint32_t failed;               // no bracket, a full list, or a score that is not finite
  uint32_t digits;               // digits of the threshold found so far, less `lo`
  uint32_t everything;           // all scores fit in the budget
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
  uint32_t* owners;                    // source of a tile
  uint32_t* ties;                      // number of ties of a tile with the threshold
  unsigned long long* segment_weight;  // weight of the ties of kTieTiles tiles
  TileRecord* records;                 // one for each tile
  uint32_t* scores;                    // scores of the candidates
  uint16_t* places;                    // places of the candidates in their tiles
  unsigned long long budget;
  ElementsInfo* elements;  // null for units
  UnitsInfo* units;        // null for elements
  uint32_t tiles;
  uint32_t capacity;  // candidates
  bool cut_last;
};

// A tile, for the threads that work on it.
struct Tile {
  const Source* source;
  Operands operands;  // from its first element on
  uint8_t* bits;      // bits of its elements
  int64_t begin;      // in its source
  int length;
  bool in_order;  // memory order is logical order

  __device__ __forceinline__ int64_t id_of(int i) const { return source->id + (begin + i) * source->id_per_element; }
  // Offset in memory of the tile's logical element i, from the tile's first element.
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

// One launch for each table of sources; the first launch clears the counters.
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

// The scores among which the threshold is searched: the candidates, or all scores.
struct Search {
  bool listed;
  uint32_t lo, width;        // range of the scores
  unsigned long long above;  // number of scores above the range
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
