// Rows of many compact layers written into their weights.
//
// Mapping. A block takes a tile of kWrittenTile words of one weight's rows; neighbouring threads take neighbouring
// words.
// Memory. A word is as wide as the alignment of rows, weight and pieces allows, up to 16 bytes. Every word is read once
// and written once; the index of its row comes from the cache.
// Numerics. Bytes are copied.
#pragma once

#include "cuda/common.cuh"
#include "delfast/cuda_launch.h"

namespace delfast::cuda {

constexpr int kWrittenTile = 2048;

struct Written {
  void* weight;
  const void* rows;
  const int64_t* index;
  int64_t words;  // in a piece
  int64_t count, channels;
  int64_t total;  // words in all rows
  int word_size;  // bytes: 1, 2, 4, 8 or 16
};

template <class Word, class Int>
__device__ __forceinline__ void write_words(const Written& w, int64_t begin) {
  const Word* const rows = static_cast<const Word*>(w.rows);
  Word* const weight = static_cast<Word*>(w.weight);
  const Int words = Int(w.words), count = Int(w.count);
  const int64_t end = begin + kWrittenTile < w.total ? begin + kWrittenTile : w.total;
  for (int64_t i = begin + int64_t(threadIdx.x); i < end; i += kThreads) {
    const Int piece = Int(i) / words, o = piece / count;
    const int64_t row = global_load_const(&w.index[piece - o * count]);
    if (row < 0 || row >= w.channels) __trap();
    const int64_t at = (int64_t(o) * w.channels + row) * w.words + int64_t(Int(i) - piece * words);
    global_store(&weight[at], global_load_const(&rows[i]));
  }
}

template <class Word>
__device__ __forceinline__ void write_words_of(const Written& w, int64_t begin) {
  if (w.total <= UINT32_MAX)  // divisions of 32 bits are several times as fast
    write_words<Word, uint32_t>(w, begin);
  else
    write_words<Word, uint64_t>(w, begin);
}

template <int kBytes>
__global__ void __launch_bounds__(kThreads) write_rows_words(DELFAST_GRID_CONSTANT(Table<Written, kBytes>) table) {
  const int entry = find_entry(table);
  const Written& w = table.entries[entry];
  const int64_t begin = int64_t(blockIdx.x - table.first_block[entry]) * kWrittenTile;
  switch (w.word_size) {
    case 16:
      return write_words_of<uint4>(w, begin);
    case 8:
      return write_words_of<uint2>(w, begin);
    case 4:
      return write_words_of<uint32_t>(w, begin);
    case 2:
      return write_words_of<uint16_t>(w, begin);
    default:
      return write_words_of<uint8_t>(w, begin);
  }
}

}  // namespace delfast::cuda
