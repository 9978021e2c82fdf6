// Per-example sums on tensor cores by mma.sync, of layers of at most two dimensions and one group whose channels are
// whole 16-byte packs; per_example.cuh has all others.
//
// Mapping. A block works on segments: a tile of output channels by columns (a tap and an input channel), of some
// examples, one after the other. There are as many blocks as the card runs at once; each has an equal share of the
// first tiles' examples, and one after another of the tiles that are left, which are a multiple of the blocks. The
// positions of a segment's examples, each padded to the depth of a product, are one long axis of rows; a stage is
// kDepth rows of it, whatever example they belong to. Memory. Stages go to shared memory by 16-byte asynchronous
// copies, three ahead of the one that is multiplied, over the ends of examples and of segments. Fragments are read from
// there without bank conflicts (Tile::swizzled). Sums stay in registers until a segment's end; those of a split tile's
// segments go to the workspace, and a second kernel adds them. Numerics. Products are exact and added in float32
// (float32 operands rounded to tf32 first), the positions of an example in an order that depends on the shape alone;
// then examples in their order, then segments in theirs. No atomics: the same bits in every run on one kind of card,
// whose number of blocks decides where segments end.
#pragma once

#include "cuda/per_example_fragments.cuh"

namespace delfast::cuda {

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kResident)
    per_example_segments(DELFAST_GRID_CONSTANT(SegmentsLayer) layer, Epilogue epilogue) {
  DELFAST_DYNAMIC_SHARED(unsigned char, memory);
  const ptx::Shared shared = ptx::shared_address(memory);
  Schedule schedule(layer);
  Segment segment;
  if (!schedule.next(layer, segment)) return;
  StageLoader<T> loader(layer);
  const Consumer<T> consumer;
  typename Consumer<T>::Sums gradient, sums = {};
  constexpr int kBuffers = T::kAhead ? 2 : 1;
  Fragments<T> fragments[kBuffers];
  const int steps = layer.padded / T::kStep;  // of an example
  int steps_left = steps, examples_left = segment.end - segment.begin;
  bool fresh = true;

#pragma unroll 1
  for (int s = 0; s < T::kStages - 1; s++) {
    loader.load(shared + s * T::kStageBytes);
    ptx::commit_copies();
  }
  ptx::wait_for_copies<T::kStages - 2>();
  __syncthreads();
  constexpr int kLast = (T::kStages - 1) * T::kStageBytes;
  int read = 0, write = kLast;
  if (T::kAhead) consumer.load(fragments[0], shared, 0);
  for (;;) {
#pragma unroll
    for (int k = 0; k < T::kSteps; k++) {
      if (!T::kAhead) consumer.load(fragments[0], shared + read, k);
      if (k == T::kSteps - 1) {  // the next stage is there for all, and all have read the one before this
        ptx::wait_for_copies<T::kStages - 2>();
        __syncthreads();
        read = read == kLast ? 0 : read + T::kStageBytes;
      }
      if (T::kAhead) consumer.load(fragments[(k + 1) % kBuffers], shared + read, (k + 1) % T::kSteps);
      if (k == 0) {
        loader.load(shared + write);
        ptx::commit_copies();
        write = write == kLast ? 0 : write + T::kStageBytes;
      }
      if (examples_left > 0) {  // 0: rows after the segment's last example
        Consumer<T>::round(fragments[k % kBuffers]);
        Consumer<T>::multiply(gradient, fragments[k % kBuffers], fresh);
        fresh = --steps_left == 0;
        if (fresh) {
          Consumer<T>::end_example(epilogue, sums, gradient);
          steps_left = steps;
          examples_left--;
        }
      }
    }
    if (examples_left == 0) {  // a segment begins with a stage
      consumer.put(layer, segment, sums);
      if (!schedule.next(layer, segment)) break;
      examples_left = segment.end - segment.begin;
    }
  }
}

// Adds the segments of every split tile to the sums, in the order of their examples: 4 columns a thread.
template <int kM, int kN>
__global__ void __launch_bounds__(kThreads) per_example_add_segments(DELFAST_GRID_CONSTANT(SegmentsLayer) layer) {
  constexpr int kBlocksPerTile = kM * kN / 4 / kThreads;
  static_assert(kM * kN % (4 * kThreads) == 0);
  const int tile = int(blockIdx.x) / kBlocksPerTile;
  const int at = (int(blockIdx.x) % kBlocksPerTile * kThreads + int(threadIdx.x)) * 4;
  // block b has the units from units * b / blocks on
  const int64_t units = int64_t(layer.split_tiles) * layer.examples, tile_begin = int64_t(tile) * layer.examples;
  const int first = int(((tile_begin + 1) * layer.split_blocks - 1) / units),
            last = int(((tile_begin + layer.examples) * layer.split_blocks - 1) / units);
  if (first == last) return;  // that block has added all to the sums
  const int column_tile = tile / layer.m_tiles;
  const int channel = (tile - column_tile * layer.m_tiles) * kM + at / kN, column = column_tile * kN + at % kN;
  if (channel >= layer.out_channels || column >= layer.row) return;
  float total[4] = {};
#pragma unroll 4
  for (int block = first; block <= last; block++) {
    float values[4];
    load_pack(layer.partial + int64_t(block + tile) * (kM * kN) + at, values);
#pragma unroll
    for (int i = 0; i < 4; i++) total[i] += values[i];
  }
  float* const sums = layer.sums + int64_t(channel) * layer.row + column;
  float out[4];
  load_pack<true>(sums, out);
#pragma unroll
  for (int i = 0; i < 4; i++) out[i] += total[i];
  store_pack(sums, out);
}

}  // namespace delfast::cuda
