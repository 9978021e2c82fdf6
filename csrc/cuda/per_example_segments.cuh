// Per-example sums on tensor cores by mma.sync, for layers of at most two dimensions and one group whose channels are
// whole 16-byte packs. per_example.cuh has the kernels for all other layers. Parts of this kernel, in reading order:
// per_example_stages.cuh (a block's work and copies), per_example_fragments.cuh (products and sums), and the kernel
// itself below.
//
// Mapping. A block works on segments one after another. A segment is a tile of output channels by columns (a tap and an
// input channel), of some examples. As many blocks are launched as the GPU runs at once. Each block takes an equal
// share of the examples of the first tiles, and then whole tiles; the number of whole tiles is a multiple of the number
// of blocks. The positions of a segment's examples, each padded to the depth of a product, form one long axis of rows.
// A stage is kDepth rows of this axis and may cross examples.
// Memory. Stages are copied to shared memory by 16-byte asynchronous copies, three stages ahead of the multiplication,
// across the ends of examples and segments. Fragments are read from there without bank conflicts (Tile::swizzled). Sums
// stay in registers until the end of a segment. A split tile's segments write their sums to the workspace, and a second
// kernel adds them.
// Numerics. Products are exact and added in float32 (float32 operands are rounded to tf32 before that): the positions
// of an example in an order that depends only on the shape, then the examples in order, then the segments in order. No
// atomics: every run gives the same bits on one kind of GPU, whose number of blocks determines where segments end.
#pragma once

#include "cuda/per_example_fragments.cuh"

namespace delfast::cuda {

template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kResident)
    per_example_segments(DELFAST_GRID_CONSTANT(SegmentsLayer) layer, Transform transform) {
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
  const int steps = layer.padded / T::kStep;  // steps of an example
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
      if (k == T::kSteps - 1) {  // the next stage has arrived for all threads, and all have read the one before this
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
          Consumer<T>::end_example(transform, sums, gradient);
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

// Adds the segments of every split tile to the sums, in the order of their examples; each thread adds 4 columns.
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
  if (first == last) return;  // the same block has added all examples to the sums
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
