// The reading of all scores that writes the bits of those above the bracket and lists those inside, the candidates.
//
// Mapping. A block takes a tile. A thread has the raw words of kRound packs of four elements in flight; eight lanes
// combine their packs' bits into a word. Where theta or its gradient is not aligned to four elements, or not in logical
// order (channels-last), lanes take one element each, and a ballot gives a word, or the end of one word and the start
// of the next.
// Memory. Every score's operands are read once. The tile's bits and candidates are collected in shared memory, which
// has room for one candidate in eight elements; the bracket holds at most one in fifty. All tiles' candidates share one
// list, in any order of tiles; a tile's record holds its place in the list.
// Numerics. Integers only.
#pragma once

#include "cuda/selection.cuh"

namespace delfast::cuda {

constexpr int kTileList = int(kTile / 8);

struct Candidates {  // for a tile, in shared memory
  uint32_t* scores;
  uint16_t* places;
  uint32_t* count;

  __device__ __forceinline__ void add(uint32_t bits, int place) const {
    const uint32_t at = atomicAdd(count, 1u);
    if (at >= uint32_t(kTileList)) return;
    scores[at] = bits;
    places[at] = uint16_t(place);
  }
};

struct Reading {
  uint32_t above = 0;    // number of scores at or above the bracket
  uint32_t largest = 0;  // largest score
};

template <class Scores>
__device__ __forceinline__ void read_packs(const Scores& score, int length, uint32_t lo, uint32_t hi, uint32_t* words,
                                           const Candidates& candidates, Reading& found) {
  constexpr int kRound = 4;
  const uint32_t width = hi - lo;
  const int packs = length / 4;
#pragma unroll 1
  for (int first = 0; first < packs; first += kRound * kThreads) {
    typename Scores::Raw raw[kRound] = {};
    const int mine = first + int(threadIdx.x);
    const Scores at = score.from(4 * mine);
#pragma unroll
    for (int u = 0; u < kRound; u++)
      if (mine + u * kThreads < packs) raw[u] = at.load(4 * kThreads * u);
#pragma unroll
    for (int u = 0; u < kRound; u++) {
      const int pack = mine + u * kThreads;
      const bool valid = pack < packs;
      float scores[4];
      Scores::scores(raw[u], scores);
      uint32_t bits[4], mask = 0;
      bool any = false;
      for (int j = 0; j < 4; j++) {
        bits[j] = float_bits(scores[j]);
        found.largest = bits[j] > found.largest ? bits[j] : found.largest;  // zeros where there is no pack
        mask |= uint32_t(bits[j] >= hi) << j;
        any |= bits[j] - lo < width;
      }
      mask = valid ? mask : 0;
      if (any && valid)
        for (int j = 0; j < 4; j++)
          if (bits[j] - lo < width) candidates.add(bits[j], 4 * pack + j);
      uint32_t word = mask << 4 * (lane() % 8);
      word |= __shfl_xor_sync(kAllLanes, word, 1);
      word |= __shfl_xor_sync(kAllLanes, word, 2);
      word |= __shfl_xor_sync(kAllLanes, word, 4);
      if (lane() % 8 == 0 && valid) {
        words[pack / 8] = word;
        found.above += uint32_t(__popc(word));
      }
    }
  }
  __syncthreads();  // the last word may be extended by another warp
  if (int(threadIdx.x) >= length - 4 * packs) return;
  const int place = 4 * packs + int(threadIdx.x);
  const uint32_t bits = float_bits(score.one(place));
  found.largest = bits > found.largest ? bits : found.largest;
  if (bits >= hi) {
    atomicOr(&words[place / 32], 1u << place % 32);
    found.above++;
  }
  if (bits - lo < width) candidates.add(bits, place);
}

// A warp's requests begin at sectors where the tile is in order. Its ballot then contains the end of one word and the
// start of the next.
template <class Scores>
__device__ __forceinline__ void read_ones(const Scores& score, const Tile& tile, uint32_t lo, uint32_t hi,
                                          uint32_t* words, const Candidates& candidates, Reading& found) {
  const Layout layout = tile.source->layout;
  const int lead = tile.in_order ? sector_offset(score.first()) : 0;
#pragma unroll 4
  for (int window = -lead; window < tile.length; window += kThreads) {
    const int place = window + int(threadIdx.x);
    const bool valid = uint32_t(place) < uint32_t(tile.length);
    const uint32_t bits = valid ? float_bits(score.one(tile.offset(layout, place))) : 0;
    const uint32_t word = __ballot_sync(kAllLanes, valid && bits >= hi);
    found.largest = bits > found.largest ? bits : found.largest;
    if (valid && bits - lo < hi - lo) candidates.add(bits, place);
    if (lane() == 0 && word) {
      const int own = (place + lead) / 32;
      if (word >> lead) atomicOr(&words[own], word >> lead);
      if (lead && word << (32 - lead)) atomicOr(&words[own - 1], word << (32 - lead));
      found.above += uint32_t(__popc(word));
    }
  }
}

// Copies the tile's bits from shared memory to the result.
__device__ __forceinline__ void store_words(const uint32_t* words, const Tile& tile) {
  if (tile.length % 32 == 0 && reinterpret_cast<uintptr_t>(tile.bits) % sizeof(uint32_t) == 0) {
    for (int word = int(threadIdx.x); word < tile.length / 32; word += kThreads)
      global_store(reinterpret_cast<uint32_t*>(tile.bits) + word, words[word]);
  } else {
    for (int byte = int(threadIdx.x); byte < (tile.length + 7) / 8; byte += kThreads)
      global_store(&tile.bits[byte], reinterpret_cast<const uint8_t*>(words)[byte]);
  }
}

__global__ void __launch_bounds__(kThreads, kResident) selection_read(Selection s, Criterion criterion) {
  DELFAST_SHARED(uint32_t, words, [kTileWords]);
  DELFAST_SHARED(uint32_t, scores, [kTileList]);
  DELFAST_SHARED(uint16_t, places, [kTileList]);
  DELFAST_SHARED(uint32_t, listed);
  DELFAST_SHARED(uint32_t, above);
  DELFAST_SHARED(uint32_t, first);
  SelectionState* const state = s.state;
  const Tile tile = tile_of(s, blockIdx.x);
  const uint32_t lo = global_load(&state->lo), hi = global_load(&state->hi);
  for (int word = int(threadIdx.x); word < kTileWords; word += kThreads) words[word] = 0;
  if (threadIdx.x == 0) listed = above = 0;
  __syncthreads();
  Reading found;
  const Candidates candidates{scores, places, &listed};
  with_scores(tile.operands, criterion, [&](auto score) {
    if (tile.in_order && score.aligned(0))
      read_packs(score, tile.length, lo, hi, words, candidates, found);
    else
      read_ones(score, tile, lo, hi, words, candidates, found);
  });
  if (found.largest >= kInfinity) global_store(&state->failed, 1u);
  const uint32_t mine = __reduce_add_sync(kAllLanes, found.above);
  if (lane() == 0 && mine) atomicAdd(&above, mine);
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t count = listed, begin = 0;
    bool fits = count <= uint32_t(kTileList);
    if (fits && count) {
      begin = atomicAdd(&state->listed, count);
      fits = begin <= s.capacity && s.capacity - begin >= count;
    }
    if (!fits) {
      global_store(&state->failed, 1u);
      count = 0;
    }
    listed = count;
    first = begin;
    global_store(&s.records[blockIdx.x], TileRecord{begin, count});
    if (above) atomicAdd(&state->above, static_cast<unsigned long long>(above));
  }
  __syncthreads();
  store_words(words, tile);
  for (uint32_t i = threadIdx.x; i < listed; i += kThreads) {
    global_store(&s.scores[first + i], scores[i]);
    global_store(&s.places[first + i], places[i]);
  }
}

}  // namespace delfast::cuda
