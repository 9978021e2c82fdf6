// Per-example sums by mma.sync, part 1: a block's work, and the copies of its operands to shared memory.
#pragma once

#include "cuda/ptx.cuh"
#include "delfast/per_example.h"

namespace delfast::cuda {

// A layer of at most two dimensions and one group: PerExample as these kernels read it. per_example_segments.cu checks
// that all counts fit in an int.
struct SegmentsLayer {
  const char* output_grad;
  const char* inputs;
  float* sums;
  float* partial;  // tiles of the segments that do not have all of their tile's examples
  int out_channels, in_channels, row;
  int examples, positions, padded;  // padded: positions, rounded up to a product's depth
  int in_height, in_width, in_size;
  int kernel_width, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int out_width;
  uint32_t out_width_magic;  // ceil(2^31 / out_width)
  int m_tiles, tiles;        // tiles: m_tiles of output channels, then the next columns
  int split_tiles;           // number of leading tiles whose examples are divided evenly ...
  int split_blocks;          // ... among this number of blocks; each gets at least one example
};

struct Segment {
  int tile, begin, end;  // examples
};

// Index of the block's first example among the split tiles' examples, counted tile by tile.
__device__ __forceinline__ int first_unit(const SegmentsLayer& p, int block) {
  return int(int64_t(p.split_tiles) * p.examples * block / p.split_blocks);
}

// The segments of a block: its share of the split tiles, then whole tiles.
class Schedule {
 public:
  __device__ __forceinline__ explicit Schedule(const SegmentsLayer& p) : unit_(0), unit_end_(0) {
    if (int(blockIdx.x) < p.split_blocks) {
      unit_ = first_unit(p, int(blockIdx.x));
      unit_end_ = first_unit(p, int(blockIdx.x) + 1);
    }
    tile_ = p.split_tiles + int(blockIdx.x);
  }
  __device__ __forceinline__ bool next(const SegmentsLayer& p, Segment& s) {
    if (unit_ < unit_end_) {
      s.tile = unit_ / p.examples;
      s.begin = unit_ - s.tile * p.examples;
      const int left = unit_end_ - unit_;
      s.end = s.begin + left < p.examples ? s.begin + left : p.examples;
      unit_ += s.end - s.begin;
      return true;
    }
    if (tile_ >= p.tiles) return false;
    s = {tile_, 0, p.examples};
    tile_ += int(gridDim.x);
    return true;
  }

 private:
  int unit_, unit_end_, tile_;
};

// The shape of a block's work. Operand: __nv_bfloat16, __half, or tf32 for float32. A tile has kM output channels and
// kN columns (a tap and an input channel). A warp multiplies kWarpM output channels by 32 columns. kDirect: the source
// of a position is the position itself.
template <class Operand_, int kM_, int kN_, int kWarpM_, bool kDirect_>
struct Tile {
  using Operand = Operand_;
  static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = 32;
  static constexpr bool kDirect = kDirect_, kTf32 = std::is_same_v<Operand, nvcuda::wmma::precision::tf32>;
  static constexpr int kBytes = kTf32 ? 4 : 2, kPack = 16 / kBytes;  // bytes of a channel, channels of a copy
  // positions of a product, of a stage
  static constexpr int kStep = kTf32 ? 8 : 16, kSteps = 2, kDepth = kSteps * kStep;
  static constexpr int kStages = 4;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static constexpr int kWarpsM = kM / kWarpM, kWarpsN = kN / kWarpN, kThreads = kWarp * kWarpsM * kWarpsN;
  // resident blocks, limited by registers
  static constexpr int kResident = kThreads <= 64 ? 4 : kThreads <= 128 ? 2 : 1;
  // True: a warp reads fragments one step before their use. False: other warps hide the latency.
  static constexpr bool kAhead = kWarpM == 64;

  // A stage is kDepth rows of 16-byte chunks of output gradients, then kDepth rows of chunks of inputs. In one pass
  // each thread copies one chunk.
  static constexpr int kOutputGradChunks = kM / kPack, kInputChunks = kN / kPack;
  static constexpr int kOutputGradPitch = (kOutputGradChunks + 7) / 8 * 128, kInputPitch = (kInputChunks + 7) / 8 * 128;
  static constexpr int kOutputGradRows = kThreads / kOutputGradChunks,
                       kInputRows = kThreads / kInputChunks;  // rows of a pass
  static constexpr int kOutputGradPasses = (kDepth + kOutputGradRows - 1) / kOutputGradRows,
                       kInputPasses = (kDepth + kInputRows - 1) / kInputRows;
  static constexpr int kOutputGradBytes = kDepth * kOutputGradPitch,
                       kStageBytes = kOutputGradBytes + kDepth * kInputPitch;
  static constexpr int kShared = kStages * kStageBytes;
  static_assert(kM % kWarpM == 0 && kN % kWarpN == 0 && kThreads % kOutputGradChunks == 0 &&
                kThreads % kInputChunks == 0);

  // Offset of a chunk in its row, in bytes, such that the eight lanes that read at the same time use different banks.
  // ldmatrix reads eight rows of a chunk; tf32 reads two neighbouring chunks of four rows.
  static constexpr int kPeriod = kTf32 ? 4 : 8;
  static __device__ __forceinline__ int swizzled(int row, int chunk) {
    return (chunk ^ (kTf32 ? (row & 3) << 1 : row & 7)) * 16;
  }
};

// Copies a block's stages in order, across the ends of examples and segments.
template <class T>
class StageLoader {
 public:
  __device__ __forceinline__ explicit StageLoader(const SegmentsLayer& layer)
      : p(layer),
        schedule_(layer),
        start_(0),
        index_(0),
        image_(0),
        end_(0),
        output_grad_(nullptr),
        inputs_(nullptr),
        output_grad_end_(0),
        input_end_(0),
        tap_y_(0),
        tap_x_(0),
        output_grad_to_(output_grad_row() * T::kOutputGradPitch + T::swizzled(output_grad_row(), output_grad_chunk())),
        input_to_(T::kOutputGradBytes + input_row() * T::kInputPitch + T::swizzled(input_row(), input_chunk())) {
    begin_segment();
  }

  // Issues the copies of the next stage, if there is one.
  __device__ __forceinline__ void load(ptx::Shared stage) {
    if (index_ >= end_) return;
    // All addresses are computed first: for the compiler, a copy may change any memory.
    const int padding = p.padded - p.positions;
    const int output_grad_pitch = p.out_channels * T::kBytes, input_pitch = p.in_channels * T::kBytes;
    const char *output_grad_from[T::kOutputGradPasses], *input_from[T::kInputPasses];
    bool output_grad_exists[T::kOutputGradPasses], input_exists[T::kInputPasses];
#pragma unroll
    for (int i = 0; i < T::kOutputGradPasses; i++) {
      const Row row = row_of(output_grad_row() + i * T::kOutputGradRows, padding);
      output_grad_exists[i] = row.position < p.positions && row.index < output_grad_end_;
      output_grad_from[i] = output_grad_ + int64_t(row.index) * output_grad_pitch;
    }
#pragma unroll
    for (int i = 0; i < T::kInputPasses; i++) {
      const Row row = row_of(input_row() + i * T::kInputRows, padding);
      input_exists[i] = row.position < p.positions && row.index < input_end_;
      int source = row.index;
      if (!T::kDirect) {
        const int y = int(__umulhi(2u * unsigned(row.position), p.out_width_magic));
        const int x = row.position - y * p.out_width;
        const int in_y = y * p.stride_y + tap_y_, in_x = x * p.stride_x + tap_x_;
        input_exists[i] &= unsigned(in_y) < unsigned(p.in_height) && unsigned(in_x) < unsigned(p.in_width);
        // unsigned: the address of a source that does not exist may overflow
        source = int(unsigned(in_y) * unsigned(p.in_width) + unsigned(in_x) +
                     unsigned(row.next ? image_ + p.in_size : image_));
      }
      input_from[i] = inputs_ + int64_t(source) * input_pitch;
    }
#pragma unroll
    for (int i = 0; i < T::kOutputGradPasses; i++) {
      const int row = output_grad_row() + i * T::kOutputGradRows;
      if (T::kDepth % T::kOutputGradRows != 0 && row >= T::kDepth) break;
      ptx::copy_async(stage + (T::kOutputGradRows % T::kPeriod == 0
                                   ? output_grad_to_ + i * (T::kOutputGradRows * T::kOutputGradPitch)
                                   : row * T::kOutputGradPitch + T::swizzled(row, output_grad_chunk())),
                      output_grad_from[i], output_grad_exists[i]);
    }
#pragma unroll
    for (int i = 0; i < T::kInputPasses; i++) {
      const int row = input_row() + i * T::kInputRows;
      if (T::kDepth % T::kInputRows != 0 && row >= T::kDepth) break;
      ptx::copy_async(stage + (T::kInputRows % T::kPeriod == 0
                                   ? input_to_ + i * (T::kInputRows * T::kInputPitch)
                                   : T::kOutputGradBytes + row * T::kInputPitch + T::swizzled(row, input_chunk())),
                      input_from[i], input_exists[i]);
    }
    start_ += T::kDepth;
    index_ += T::kDepth;
    while (start_ >= p.padded) {
      start_ -= p.padded;
      index_ -= padding;
      image_ += p.in_size;
    }
    if (index_ >= end_) begin_segment();
  }

 private:
  static __device__ __forceinline__ int output_grad_chunk() { return int(threadIdx.x) % T::kOutputGradChunks; }
  static __device__ __forceinline__ int input_chunk() { return int(threadIdx.x) % T::kInputChunks; }
  static __device__ __forceinline__ int output_grad_row() { return int(threadIdx.x) / T::kOutputGradChunks; }
  static __device__ __forceinline__ int input_row() { return int(threadIdx.x) / T::kInputChunks; }

  struct Row {
    int position, index;  // in its example; over all examples
    bool next;            // true if it belongs to the next example
  };
  // Row `row` of the next stage. An example has at least kDepth - kStep rows. Therefore no row belongs to the example
  // after the next, except rows beyond the segment's last example.
  __device__ __forceinline__ Row row_of(int row, int padding) const {
    Row r = {start_ + row, index_ + row, false};
    r.next = r.position >= p.padded;
    if (r.next) r.position -= p.padded, r.index -= padding;
    return r;
  }

  __device__ __forceinline__ void begin_segment() {
    Segment segment;
    if (!schedule_.next(p, segment)) return;  // keeps index_ >= end_
    start_ = 0;
    index_ = segment.begin * p.positions;
    end_ = segment.end * p.positions;
    image_ = segment.begin * p.in_size;
    const int column_tile = segment.tile / p.m_tiles;
    const int m = (segment.tile - column_tile * p.m_tiles) * T::kM + output_grad_chunk() * T::kPack;
    const int column = column_tile * T::kN + input_chunk() * T::kPack;
    const int tap = column < p.row ? column / p.in_channels : 0;
    output_grad_ = p.output_grad + int64_t(m) * T::kBytes;
    inputs_ = p.inputs + int64_t(column - tap * p.in_channels) * T::kBytes;
    output_grad_end_ = m < p.out_channels ? end_ : 0;
    input_end_ = column < p.row ? end_ : 0;
    if (!T::kDirect) {
      const int y = tap / p.kernel_width, x = tap - y * p.kernel_width;
      tap_y_ = y * p.dilation_y - p.padding_y;
      tap_x_ = x * p.dilation_x - p.padding_x;
    }
  }

  const SegmentsLayer& p;
  Schedule schedule_;
  // first row of the next stage: its position in the example, its position over all examples, its example's input
  int start_, index_, image_;
  int end_;                            // end of the segment, counted like index_
  const char *output_grad_, *inputs_;  // this thread's channels of row 0 and of input 0
  int output_grad_end_, input_end_;    // end_, or 0 if the channels do not exist
  int tap_y_, tap_x_;                  // source of position 0
  int output_grad_to_, input_to_;      // destination in a stage of this thread's first row
};

}  // namespace delfast::cuda
