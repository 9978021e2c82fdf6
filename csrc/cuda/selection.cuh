// The k-th largest score over all parameters, and the packed bits of the scores at or above it. Elements and units
// (channels) are selected by the same kernels: a unit is an element of its parameter's list of scores that weighs as
// much as it has scalars, an element weighs 1.
//
// Mapping. A block takes a tile of kTile elements of one parameter in every pass. Three passes count digits
// (radix.cuh), each followed by one block that descends; then the bits of all scores >= T are written and the ties with
// T counted per tile, one block adds up the tiles' ties in order, and the tiles whose ties are not all within the
// budget are done again. The host is not asked in between: what a pass finds, the next one reads in SelectionState.
// Memory. |theta g| is computed again in each of the four readings, by 16-byte loads; only the answer is written. A
// tile's bits are gathered in shared memory: a lane ors in those of the four or eight neighbours that it reads; where
// lanes read one element each (memory not aligned, or not in logical order: channels-last), a ballot makes a word.
// Numerics. Integers only: the result does not depend on the order of blocks.
#pragma once

#include "cuda/radix.cuh"

namespace delfast::cuda {

constexpr int64_t kTile = 8192;  // a multiple of 32: tiles do not share bytes of bits, nor warps words

struct Candidates {
  Operands operands;
  Layout layout;
  int64_t weight;  // of each
  uint8_t* bits;
  int64_t first_tile;          // of all parameters' tiles
  int64_t id, id_per_element;  // what a bad score is reported as: the parameter, or the unit
};

struct SelectionState {
  unsigned long long histogram[kRadixBins];
  unsigned long long left;       // of the budget, once what lies above the digits found so far is taken
  unsigned long long nonfinite;  // the least id with a NaN or infinite score, or kNone
  uint32_t threshold;            // the digits found so far
  uint32_t everything;           // fits in the budget
};
constexpr unsigned long long kNone = ~0ull;

struct Tile {
  int64_t begin, end;
};
__device__ __forceinline__ Tile tile_of(const Candidates& p, uint32_t block) {
  const int64_t begin = int64_t(block) * kTile, numel = p.layout.numel();
  return {begin, begin + kTile < numel ? begin + kTile : numel};
}

__global__ void __launch_bounds__(kThreads) selection_begin(SelectionState* state, int64_t budget) {
  for (int bin = int(threadIdx.x); bin < kRadixBins; bin += kThreads) global_store(&state->histogram[bin], 0ull);
  if (threadIdx.x) return;
  global_store(&state->left, static_cast<unsigned long long>(budget));
  global_store(&state->nonfinite, kNone);
  global_store(&state->threshold, 0u);
  global_store(&state->everything, 0u);
}

__global__ void __launch_bounds__(kThreads) selection_count(const __grid_constant__ Table<Candidates> table,
                                                            Criterion criterion, SelectionState* state, int pass) {
  if (global_load(&state->everything)) return;
  const int entry = find_entry(table);
  const Candidates& p = table.entries[entry];
  const Tile tile = tile_of(p, blockIdx.x - table.first_block[entry]);
  const uint32_t threshold = global_load(&state->threshold);
  DELFAST_SHARED(uint32_t, bins, [kRadixBins]);
  clear_bins(bins);
  with_score(p.operands, criterion, [&](auto score) {
    for_each_score(score, tile.begin, tile.end, int(threadIdx.x), kThreads, [&](int64_t i, uint32_t bits) {
      count_digit(bits, radix_pass(pass), threshold, bins);
      if (pass == 0 && bits >= 0x7f800000)
        atomicMin(&state->nonfinite, static_cast<unsigned long long>(p.id + i * p.id_per_element));
    });
  });
  add_bins(bins, static_cast<unsigned long long>(p.weight), state->histogram);
}

__global__ void __launch_bounds__(kThreads) selection_descend(SelectionState* state, int pass) {
  DELFAST_SHARED(unsigned long long, bins, [kRadixBins]);
  DELFAST_SHARED(unsigned long long, totals, [kWarp]);
  DELFAST_SHARED(uint32_t, found_one);
  if (threadIdx.x == 0) found_one = 0;
  const unsigned long long left = global_load(&state->left);
  const uint32_t digits = global_load(&state->threshold);
  __syncthreads();
  descend(state->histogram, left, bins, totals, [&](uint32_t digit, unsigned long long above, unsigned long long) {
    global_store(&state->threshold, digits | digit << radix_pass(pass).shift);
    global_store(&state->left, left - above);
    found_one = 1;
  });
  __syncthreads();
  if (threadIdx.x == 0 && pass == 0 && !found_one) global_store(&state->everything, 1u);
}

// ---- bits in logical order

constexpr int kTileWords = int(kTile / 32);

// Calls selected(scores, valid, element) with packs of neighbours, of which the bits of `valid` say which belong to the
// tile, and keeps the mask that it returns. All threads of the block call it equally often, for ascending elements.
template <class Score, class F>
__device__ __forceinline__ void select_packs(const Score& score, Tile tile, uint32_t* words, F selected) {
  constexpr int kPack = Score::kPack;
  for (int64_t window = tile.begin - score.offset(); window < tile.end; window += kThreads * kPack) {
    const int64_t i = window + int64_t(threadIdx.x) * kPack;
    uint32_t bits[kPack] = {}, valid = 0;
    if (i >= tile.begin && i + kPack <= tile.end) {
      valid = (1u << kPack) - 1;
      score.pack(i, bits);
    } else {
      for (int j = 0; j < kPack; j++) {
        if (i + j < tile.begin || i + j >= tile.end) continue;
        valid |= 1u << j;
        bits[j] = score.one(i + j);
      }
    }
    const uint32_t mask = selected(bits, valid, i);
    if (!mask) continue;
    const int skipped = i < tile.begin ? int(tile.begin - i) : 0, first = int(i + skipped - tile.begin);
    const uint64_t placed = uint64_t(mask >> skipped) << first % 32;
    atomicOr(&words[first / 32], uint32_t(placed));
    if (placed >> 32) atomicOr(&words[first / 32 + 1], uint32_t(placed >> 32));
  }
}

template <class Score, class F>
__device__ __forceinline__ void select_ones(const Score& score, const Layout& layout, Tile tile, uint32_t* words,
                                            F selected) {
  for (int64_t window = tile.begin; window < tile.end; window += kThreads) {
    const int64_t i = window + int64_t(threadIdx.x);
    const uint32_t valid = i < tile.end;
    uint32_t bits[1] = {valid ? score.one(layout.offset(i)) : 0};
    const uint32_t word = __ballot_sync(kAllLanes, int(selected(bits, valid, i)));
    if (lane() == 0) words[(i - tile.begin) / 32] = word;
  }
}

// Writes the bits of the tile's elements that `selected` says.
template <class F>
__device__ __forceinline__ void write_bits(const Candidates& p, Criterion criterion, Tile tile, F selected) {
  DELFAST_SHARED(uint32_t, words, [kTileWords]);
  for (int word = int(threadIdx.x); word < kTileWords; word += kThreads) words[word] = 0;
  __syncthreads();
  with_score(p.operands, criterion, [&](auto score) {
    if (p.layout.spatial == 1 && score.offset() >= 0)
      select_packs(score, tile, words, selected);
    else
      select_ones(score, p.layout, tile, words, selected);
  });
  __syncthreads();
  const int bytes = int((tile.end - tile.begin + 7) / 8);
  uint8_t* const out = p.bits + tile.begin / 8;
  for (int byte = int(threadIdx.x); byte < bytes; byte += kThreads)
    global_store(&out[byte], reinterpret_cast<const uint8_t*>(words)[byte]);
}

// Writes the bits of scores >= T (none if a score is not finite), and how much the tile's ties with T weigh.
__global__ void __launch_bounds__(kThreads)
    selection_mark(const __grid_constant__ Table<Candidates> table, Criterion criterion, const SelectionState* state,
                   unsigned long long* ties) {
  const int entry = find_entry(table);
  const Candidates& p = table.entries[entry];
  const uint32_t block = blockIdx.x - table.first_block[entry];
  const bool nothing = global_load(&state->nonfinite) != kNone;
  const uint32_t threshold = nothing                           ? UINT32_MAX
                             : global_load(&state->everything) ? 0
                                                               : global_load(&state->threshold);
  DELFAST_SHARED(uint32_t, tied);
  if (threadIdx.x == 0) tied = 0;
  __syncthreads();
  uint32_t count = 0;
  write_bits(p, criterion, tile_of(p, block), [&](const auto& bits, uint32_t valid, int64_t) {
    uint32_t mask = 0;
    for (int j = 0; j < int(sizeof(bits) / 4); j++) {
      mask |= uint32_t(bits[j] >= threshold) << j;
      count += (valid >> j & 1) && bits[j] == threshold;
    }
    return mask & valid;
  });
  count = __reduce_add_sync(kAllLanes, count);
  if (lane() == 0 && count) atomicAdd(&tied, count);
  __syncthreads();
  if (threadIdx.x == 0) global_store(&ties[p.first_tile + block], tied * static_cast<unsigned long long>(p.weight));
}

// One block: turns the tiles' ties into sums over the tiles before, ties[tiles] included, and reports.
__global__ void __launch_bounds__(kThreads)
    selection_place_ties(const SelectionState* state, unsigned long long* ties, int64_t tiles, int64_t* nonfinite,
                         int64_t* cut /* two, or null */) {
  DELFAST_SHARED(unsigned long long, totals, [kWarp]);
  unsigned long long before = 0;
  for (int64_t begin = 0; begin < tiles; begin += kThreads) {
    const int64_t i = begin + int64_t(threadIdx.x);
    const unsigned long long mine = i < tiles ? global_load(&ties[i]) : 0;
    unsigned long long total;
    const unsigned long long sum = before + block_exclusive_scan(mine, totals, total);
    if (i < tiles) global_store(&ties[i], sum);
    before += total;
  }
  if (threadIdx.x) return;
  global_store(&ties[tiles], before);
  const unsigned long long bad = global_load(&state->nonfinite);
  global_store(nonfinite, bad == kNone ? int64_t(-1) : int64_t(bad));
  if (!cut) return;
  global_store(&cut[0], int64_t(-1));
  global_store(&cut[1], int64_t(0));
}

// Takes back the ties that are not within the budget: of a tile that lies past it all, of the one where it ends the
// last ones. There the next unit may be cut: cut = {unit, how much of it is left of the budget}.
__global__ void __launch_bounds__(kThreads)
    selection_settle(const __grid_constant__ Table<Candidates> table, Criterion criterion, const SelectionState* state,
                     const unsigned long long* ties, int64_t* cut) {
  const int entry = find_entry(table);
  const Candidates& p = table.entries[entry];
  const uint32_t block = blockIdx.x - table.first_block[entry];
  const unsigned long long left = global_load(&state->left), before = global_load(&ties[p.first_tile + block]),
                           after = global_load(&ties[p.first_tile + block + 1]);
  if (after <= left || before == after || global_load(&state->everything) || global_load(&state->nonfinite) != kNone)
    return;
  const bool ends_here = before <= left;
  const unsigned long long weight = static_cast<unsigned long long>(p.weight);
  const uint32_t keep = ends_here ? uint32_t((left - before) / weight) : 0;
  const unsigned long long rest = ends_here ? (left - before) % weight : 0;
  const uint32_t threshold = global_load(&state->threshold);
  DELFAST_SHARED(uint32_t, totals, [kWarp]);
  uint32_t rank = 0;  // of a window's first tie
  write_bits(p, criterion, tile_of(p, block), [&](const auto& bits, uint32_t valid, int64_t i) {
    uint32_t mask = 0, mine = 0, total;
    for (int j = 0; j < int(sizeof(bits) / 4); j++) mine += (valid >> j & 1) && bits[j] == threshold;
    uint32_t tie = rank + block_exclusive_scan(mine, totals, total);
    for (int j = 0; j < int(sizeof(bits) / 4); j++) {
      if (!(valid >> j & 1)) continue;
      const bool tied = bits[j] == threshold;
      mask |= uint32_t(bits[j] > threshold || (tied && tie < keep)) << j;
      if (cut && rest && tied && tie == keep) {
        global_store(&cut[0], p.id + (i + j) * p.id_per_element);
        global_store(&cut[1], int64_t(rest));
      }
      tie += tied;
    }
    rank += total;
    return mask;
  });
}

}  // namespace delfast::cuda
