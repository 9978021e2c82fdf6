// The threshold by three radix passes, the ties with it, and the bits that depend on both: among the candidates that
// selection_read listed, or over all scores.
//
// Mapping. As many blocks as can be resident loop over tiles; for the candidates, over the list, or over tiles with one
// warp each. For units: a block for each tile, because all elements of a tile weigh the same.
// - count: blocks count digits in shared memory and add them; the last block descends into a digit.
// - mark: counts the ties of each tile; over all scores, also writes the bits of the scores at or above the threshold.
//   The last block finds the tile where the ties end, by sums over segments of tiles, and writes the report.
// - settle: sets the candidates' bits; over all scores, clears the bits of the ties past the end.
// Memory. A pass over all scores reads their operands again, by 16-byte loads. A tile's bits are collected in shared
// memory: a lane ors in the bits of the four neighbours that it reads. Where lanes read single elements (memory that is
// not aligned, or not in logical order: channels-last), a ballot gives a word.
// Numerics. Integers only.
#pragma once

#include "cuda/selection.cuh"

namespace delfast::cuda {

// Weight of an element of a tile.
__device__ __forceinline__ unsigned long long weight_of(const Selection& s, uint32_t tile) {
  return s.units ? static_cast<unsigned long long>(s.sources[global_load_const(&s.owners[tile])].weight) : 1;
}

// ---- count

__device__ __forceinline__ void count_candidates(const Selection& s, const Search& search, RadixPass digit,
                                                 uint32_t digits, uint32_t* bins) {
  constexpr uint32_t kOfBlock = 4096;  // scores of a block, enough that a bin counts several
  const uint32_t listed = global_load(&s.state->listed), wanted = listed / kOfBlock + 1,
                 blocks = wanted < gridDim.x ? wanted : gridDim.x, step = blocks * kThreads;
  if (blockIdx.x >= blocks) return;
#pragma unroll 4
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < listed; i += step)
    count_digit(global_load_const(&s.scores[i]) - search.lo, digit, digits, bins);
}

__device__ __forceinline__ void count_all(const Selection& s, Criterion criterion, RadixPass digit, uint32_t digits,
                                          uint32_t* bins) {
  for (uint32_t number = blockIdx.x; number < s.tiles; number += gridDim.x) {
    const Tile tile = tile_of(s, number);
    int bad = tile.length;  // first element whose score is not finite
    with_scores(tile.operands, criterion, [&](auto score) {
      for_each_score(score, tile.length, [&](int i, uint32_t bits) {
        count_digit(bits, digit, digits, bins);
        if (bits >= kInfinity && i < bad) bad = i;
      });
    });
    if (bad < tile.length) atomicMin(&s.state->nonfinite, static_cast<unsigned long long>(tile.id_of(bad)));
  }
}

// For the last block.
__device__ __forceinline__ void descend_pass(const Selection& s, int pass) {
  DELFAST_SHARED(unsigned long long, bins, [kRadixBins]);
  DELFAST_SHARED(unsigned long long, totals, [kWarp]);
  DELFAST_SHARED(uint32_t, found_one);
  SelectionState* const state = s.state;
  const Search search = search_of(s);
  const int shift = radix_pass(pass, search.width).shift;
  const uint32_t digits = global_load(&state->digits);
  const unsigned long long left = global_load(&state->left) - (pass == 0 ? search.above : 0);
  if (threadIdx.x == 0) found_one = 0;
  descend(state->histogram, left, bins, totals, [&](uint32_t found, unsigned long long above, unsigned long long) {
    global_store(&state->digits, digits | found << shift);
    global_store(&state->left, left - above);
    found_one = 1;
  });
  __syncthreads();
  if (threadIdx.x == 0 && !found_one) global_store(&state->everything, 1u);
}

__global__ void __launch_bounds__(kThreads, kResident) selection_count(Selection s, Criterion criterion, int pass) {
  SelectionState* const state = s.state;
  if (global_load(&state->everything)) return;
  const Search search = search_of(s);
  const RadixPass digit = radix_pass(pass, search.width);
  if (!digit.width) return;
  const uint32_t digits = global_load(&state->digits);
  DELFAST_SHARED(uint32_t, bins, [kRadixBins]);
  clear_bins(bins);
  if (search.listed)
    count_candidates(s, search, digit, digits, bins);
  else
    count_all(s, criterion, digit, digits, bins);
  // the weight of all tiles of the block: for units it has one tile, and elements weigh 1
  add_bins(bins, weight_of(s, blockIdx.x), state->histogram);
  if (!is_last_block(&state->tickets[1 + pass], gridDim.x)) return;
  descend_pass(s, pass);
}

// ---- bits in logical order

// Calls selected(scores, valid, element) with packs of neighbours and stores the mask that it returns. The bits of
// `valid` mark the elements that belong to the tile. All threads of the block call it equally often, for ascending
// elements.
template <class Scores, class F>
__device__ __forceinline__ void select_packs(const Scores& score, int length, uint32_t* words, F selected) {
  for (int window = 0; window < length; window += kThreads * 4) {
    const int i = window + int(threadIdx.x) * 4;
    uint32_t bits[4] = {}, valid = 0;
    if (i + 4 <= length) {
      valid = 15;
      float values[4];
      Scores::scores(score.load(i), values);
      for (int j = 0; j < 4; j++) bits[j] = float_bits(values[j]);
    } else {
      for (int j = 0; j < 4; j++) {
        if (i + j >= length) continue;
        valid |= 1u << j;
        bits[j] = float_bits(score.one(i + j));
      }
    }
    const uint32_t mask = selected(bits, valid, i);
    if (mask) atomicOr(&words[i / 32], mask << i % 32);
  }
}

template <class Scores, class F>
__device__ __forceinline__ void select_ones(const Scores& score, const Tile& tile, uint32_t* words, F selected) {
  const Layout layout = tile.source->layout;
  for (int window = 0; window < tile.length; window += kThreads) {
    const int i = window + int(threadIdx.x);
    const uint32_t valid = i < tile.length;
    uint32_t bits[1] = {valid ? float_bits(score.one(tile.offset(layout, i))) : 0};
    const uint32_t word = __ballot_sync(kAllLanes, int(selected(bits, valid, i)));
    if (lane() == 0) words[i / 32] = word;
  }
}

// Writes the bits of the tile's elements that `selected` returns.
template <class F>
__device__ __forceinline__ void write_bits(const Tile& tile, Criterion criterion, F selected) {
  DELFAST_SHARED(uint32_t, words, [kTileWords]);
  __syncthreads();  // the bits of an earlier tile may still be in use
  for (int word = int(threadIdx.x); word < kTileWords; word += kThreads) words[word] = 0;
  __syncthreads();
  with_scores(tile.operands, criterion, [&](auto score) {
    if (tile.in_order && score.aligned(0))
      select_packs(score, tile.length, words, selected);
    else
      select_ones(score, tile, words, selected);
  });
  __syncthreads();
  for (int byte = int(threadIdx.x); byte < (tile.length + 7) / 8; byte += kThreads)
    global_store(&tile.bits[byte], reinterpret_cast<const uint8_t*>(words)[byte]);
}

// ---- mark

// For one thread.
__device__ __forceinline__ void keep_ties(const Selection& s, uint32_t tile, uint32_t ties) {
  global_store(&s.ties[tile], ties);
  if (ties) global_add(&s.segment_weight[tile / kTieTiles], ties * weight_of(s, tile));
}

__device__ __forceinline__ void mark_candidates(const Selection& s, uint32_t threshold) {
  const uint32_t step = gridDim.x * kWarps;
  for (uint32_t tile = blockIdx.x * kWarps + uint32_t(warp()); tile < s.tiles; tile += step) {
    const TileRecord record = s.records[tile];
    uint32_t ties = 0;
    for (uint32_t i = uint32_t(lane()); i < record.count; i += kWarp)
      ties += global_load_const(&s.scores[record.first + i]) == threshold;
    ties = __reduce_add_sync(kAllLanes, ties);
    if (lane() == 0) keep_ties(s, tile, ties);
  }
}

__device__ __forceinline__ void mark_all(const Selection& s, Criterion criterion, uint32_t threshold) {
  DELFAST_SHARED(uint32_t, tied);
  DELFAST_SHARED(uint32_t, higher);
  for (uint32_t number = blockIdx.x; number < s.tiles; number += gridDim.x) {
    if (threadIdx.x == 0) tied = higher = 0;
    uint32_t equal = 0, above = 0;
    write_bits(tile_of(s, number), criterion, [&](const auto& bits, uint32_t valid, int) {
      uint32_t mask = 0;
      for (int j = 0; j < int(sizeof(bits) / 4); j++) {
        mask |= uint32_t(bits[j] >= threshold) << j;
        equal += (valid >> j & 1) && bits[j] == threshold;
        above += (valid >> j & 1) && bits[j] > threshold;
      }
      return mask & valid;
    });
    equal = __reduce_add_sync(kAllLanes, equal);
    above = __reduce_add_sync(kAllLanes, above);
    if (lane() == 0 && equal) atomicAdd(&tied, equal);
    if (lane() == 0 && above) atomicAdd(&higher, above);
    __syncthreads();
    if (threadIdx.x) continue;
    keep_ties(s, number, tied);
    if (higher) atomicAdd(&s.state->higher, static_cast<unsigned long long>(higher));
  }
}

// For the last block: finds the tile where the ties end and the number of its ties within the budget, and calls
// found(tile, ties, rest) in one thread. No thread calls it if all ties fit.
template <class F>
__device__ __forceinline__ void find_last_ties(const Selection& s, unsigned long long left, F found) {
  DELFAST_SHARED(unsigned long long, totals, [kWarp]);
  DELFAST_SHARED(unsigned long long, before_segment);
  DELFAST_SHARED(uint32_t, segment);
  if (threadIdx.x == 0) segment = UINT32_MAX;
  unsigned long long running = 0, total;
  for (uint32_t first = 0; first * kTieTiles < s.tiles; first += kThreads) {
    const uint32_t i = first + threadIdx.x;
    const unsigned long long mine = i * kTieTiles < s.tiles ? global_load(&s.segment_weight[i]) : 0;
    const unsigned long long before = running + block_exclusive_scan(mine, totals, total);
    if (before <= left && left < before + mine) {
      segment = i;
      before_segment = before;
    }
    running += total;
  }
  __syncthreads();
  if (segment == UINT32_MAX) return;
  const uint32_t tile = segment * kTieTiles + threadIdx.x;
  const unsigned long long weight = tile < s.tiles ? weight_of(s, tile) : 0,
                           mine = tile < s.tiles ? global_load(&s.ties[tile]) * weight : 0;
  const unsigned long long before = before_segment + block_exclusive_scan(mine, totals, total);
  if (before <= left && left < before + mine) found(tile, (left - before) / weight, (left - before) % weight);
}

// The end of the ties: the tile that contains it, the number of its ties to keep, and whether the next unit is cut.
struct LastTies {
  uint32_t tile, keep, cuts;
};

// For the last block: writes the end of the ties to the state and returns it in `last`, which is shared memory.
__device__ __forceinline__ void place_ties(const Selection& s, bool all_kept, LastTies& last) {
  if (threadIdx.x == 0) last = {s.tiles, 0, 0};
  if (!all_kept)
    find_last_ties(s, global_load(&s.state->left),
                   [&](uint32_t tile, unsigned long long ties, unsigned long long rest) {
                     last = {tile, uint32_t(ties), s.cut_last && rest};
                     global_store(&s.state->cut_tile, tile);
                     global_store(&s.state->keep, uint32_t(ties));
                     global_store(&s.state->rest, rest);
                   });
  __syncthreads();
}

// For one thread. `nothing`: some score is not finite.
__device__ __forceinline__ void report_elements(const Selection& s, bool everything, bool nothing, uint32_t threshold) {
  const SelectionState& state = *s.state;
  // the elements above the threshold have used the budget down to `left`, unless everything fits
  const uint64_t above = everything ? global_load(&state.higher) : s.budget - global_load(&state.left);
  global_store(&s.elements->nonfinite, nothing ? int64_t(global_load(&state.nonfinite)) : int64_t(-1));
  global_store(&s.elements->positive, nothing ? 0 : threshold ? int64_t(s.budget) : int64_t(above));
}

// For the last block. selection_settle writes the unit that is cut.
__device__ __forceinline__ void report_units(const Selection& s, bool nothing, uint32_t threshold,
                                             const LastTies& last) {
  DELFAST_SHARED(unsigned long long, totals, [kWarp]);
  unsigned long long ties = 0, total;
  for (uint32_t tile = threadIdx.x; tile < last.tile; tile += kThreads) ties += global_load(&s.ties[tile]);
  block_exclusive_scan(ties, totals, total);
  if (threadIdx.x) return;
  const int64_t above = int64_t(global_load(&s.state->higher)), selected = above + int64_t(total) + last.keep;
  global_store(&s.units->cut_unit, int64_t(-1));
  global_store(&s.units->cut_size, int64_t(0));
  global_store(&s.units->nonfinite, nothing ? int64_t(global_load(&s.state->nonfinite)) : int64_t(-1));
  global_store(&s.units->selected, nothing ? 0 : selected);
  global_store(&s.units->positive, nothing ? 0 : threshold ? selected + last.cuts : above);
}

// For the last block.
__device__ __forceinline__ void finish_mark(const Selection& s, const Search& search, uint32_t threshold) {
  DELFAST_SHARED(LastTies, last);
  const bool everything = global_load(&s.state->everything),
             nothing = !search.listed && global_load(&s.state->nonfinite) != kNone;
  place_ties(s, everything || nothing, last);
  if (s.units)
    report_units(s, nothing, threshold, last);
  else if (threadIdx.x == 0)
    report_elements(s, everything, nothing, threshold);
}

__device__ __forceinline__ uint32_t threshold_of(const Selection& s, const Search& search) {
  if (search.listed) return search.lo + global_load(&s.state->digits);
  if (global_load(&s.state->nonfinite) != kNone) return UINT32_MAX;  // nothing is selected
  return global_load(&s.state->everything) ? 0 : global_load(&s.state->digits);
}

__global__ void __launch_bounds__(kThreads, kResident) selection_mark(Selection s, Criterion criterion) {
  const Search search = search_of(s);
  const uint32_t threshold = threshold_of(s, search);
  if (search.listed)
    mark_candidates(s, threshold);
  else
    mark_all(s, criterion, threshold);
  if (is_last_block(&s.state->tickets[kStages - 1], gridDim.x)) finish_mark(s, search, threshold);
}

// ---- settle

// For a warp: keeps the first `keep` of the bits of a tile.
__device__ __forceinline__ void keep_first(uint32_t* words, uint32_t keep) {
  constexpr int kMine = kTileWords / kWarp;
  uint32_t count = 0;
  for (int i = 0; i < kMine; i++) count += uint32_t(__popc(words[lane() * kMine + i]));
  uint32_t before = warp_inclusive_scan(count) - count;
  for (int i = 0; i < kMine; i++) {
    uint32_t& word = words[lane() * kMine + i];
    uint32_t kept = 0;
    for (uint32_t rest = word; rest && before < keep; rest &= rest - 1, before++) kept |= rest & (~rest + 1);
    word = kept;
  }
}

// Sets the bits of the candidates above the threshold, and of the first ties.
__device__ __forceinline__ void settle_candidates(const Selection& s, uint32_t threshold, uint32_t cut_tile,
                                                  uint32_t keep) {
  DELFAST_SHARED(uint32_t, room, [kWarps][kTileWords]);
  uint32_t* const words = room[warp()];
  const uint32_t step = gridDim.x * kWarps;
  for (uint32_t number = blockIdx.x * kWarps + uint32_t(warp()); number < s.tiles; number += step) {
    const TileRecord record = s.records[number];
    if (!record.count) continue;
    for (int word = lane(); word < kTileWords; word += kWarp) words[word] = 0;
    __syncwarp();
    const auto set = [&](auto selected) {
      for (uint32_t i = uint32_t(lane()); i < record.count; i += kWarp) {
        const uint32_t place = global_load_const(&s.places[record.first + i]);
        if (selected(global_load_const(&s.scores[record.first + i]))) atomicOr(&words[place / 32], 1u << place % 32);
      }
      __syncwarp();
    };
    if (number <= cut_tile) set([=](uint32_t bits) { return bits == threshold; });
    if (number == cut_tile) {
      keep_first(words, keep);
      __syncwarp();
    }
    set([=](uint32_t bits) { return bits > threshold; });
    uint8_t* const out = tile_of(s, number).bits;
    for (int word = lane(); word < kTileWords; word += kWarp)
      for (int byte = 0; byte < 4; byte++) {
        const uint8_t more = uint8_t(words[word] >> 8 * byte);
        uint8_t* const at = out + 4 * word + byte;
        if (more) global_store(at, uint8_t(global_load(at) | more));
      }
    __syncwarp();
  }
}

// Clears the bits of the ties past the last one. The next unit there may be cut: writes the unit and the number of its
// scalars within the budget to UnitsInfo.
__device__ __forceinline__ void settle_all(const Selection& s, Criterion criterion, uint32_t threshold,
                                           uint32_t cut_tile) {
  DELFAST_SHARED(uint32_t, totals, [kWarp]);
  for (uint32_t number = blockIdx.x; number < s.tiles; number += gridDim.x) {
    if (number < cut_tile || !global_load(&s.ties[number])) continue;
    const uint32_t keep = number == cut_tile ? global_load(&s.state->keep) : 0;
    const unsigned long long rest = number == cut_tile && s.cut_last ? global_load(&s.state->rest) : 0;
    const Tile tile = tile_of(s, number);
    uint32_t rank = 0;  // rank of a window's first tie
    write_bits(tile, criterion, [&](const auto& bits, uint32_t valid, int i) {
      uint32_t mask = 0, mine = 0, total;
      for (int j = 0; j < int(sizeof(bits) / 4); j++) mine += (valid >> j & 1) && bits[j] == threshold;
      uint32_t tie = rank + block_exclusive_scan(mine, totals, total);
      for (int j = 0; j < int(sizeof(bits) / 4); j++) {
        if (!(valid >> j & 1)) continue;
        const bool tied = bits[j] == threshold;
        mask |= uint32_t(bits[j] > threshold || (tied && tie < keep)) << j;
        if (rest && tied && tie == keep) {
          global_store(&s.units->cut_unit, tile.id_of(i + j));
          global_store(&s.units->cut_size, int64_t(rest));
        }
        tie += tied;
      }
      rank += total;
      return mask;
    });
  }
}

__global__ void __launch_bounds__(kThreads, kResident) selection_settle(Selection s, Criterion criterion) {
  const Search search = search_of(s);
  const uint32_t cut_tile = global_load(&s.state->cut_tile);
  if (search.listed)
    settle_candidates(s, threshold_of(s, search), cut_tile, global_load(&s.state->keep));
  else if (cut_tile < s.tiles)
    settle_all(s, criterion, global_load(&s.state->digits), cut_tile);
}

}  // namespace delfast::cuda
