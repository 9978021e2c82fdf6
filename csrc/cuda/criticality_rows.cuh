// Channel scores: definitions shared by the kernels for short and long rows.
//
// Numerics. Equal to the CPU kernels' results bit for bit. A sum keeps 16 interleaved partial sums in float32 for
// kBlock elements, then adds them to 16 partial sums in double, which are added pairwise at the end. An element's
// alignment decides which thread loads it, but not which partial sum it is added to.
#pragma once

#include "cuda/scores.cuh"

namespace delfast::cuda {

constexpr int kBlock = 512;          // elements that 16 float32 sums cover
constexpr int kBlockRow = 1 << 14;   // elements of the longest row that one block scores; a longer row is "long"
constexpr int kSegment = kBlockRow;  // elements of a long row that one block reads
constexpr int kElementTile = 2048;   // elements of a block, for rows of one element

constexpr int kRowThreads = 128;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kGroups = kRowThreads / 4;  // groups of four lanes, one for each kBlock elements
static_assert(kGroups * kBlock == kBlockRow);

template <class Int>
__host__ __device__ constexpr Int blocks_of_row(Int length) {
  return (length + kBlock - 1) / kBlock;
}

enum class Reduce : int8_t { sum, mean, max, top };

// The rows of one parameter.
struct Rows {
  const void* theta;
  const void* grad;
  float* out;  // score of the first row
  int64_t rows;
  uint32_t length, top;     // top in (1, length) for Reduce::top
  uint32_t room, capacity;  // for long rows: see criticality_long.cuh
  uint32_t piece;           // for rows in pieces, else 0: see Scored
  Dtype theta_dtype, grad_dtype;
  Reduce reduce;

  __device__ __forceinline__ Operands operands() const { return {theta, grad, theta_dtype, grad_dtype}; }
  __host__ __device__ __forceinline__ bool is_long() const { return length > kBlockRow; }
  __host__ __device__ __forceinline__ uint32_t segments() const { return (length - 1) / kSegment + 1; }
  __host__ __device__ __forceinline__ int64_t blocks() const { return blocks_of_row(int64_t(length)); }
};

// The scores that are counted: those with bits of at least `bits`, and `ties` more scores equal to `tie`.
struct Threshold {
  uint32_t bits, tie, ties;
};

// Returns the sum of 16 lanes' double sums, in the first lane of each 16.
__device__ __forceinline__ double add_pairwise(double sum) {
  for (int width = 8; width; width /= 2) sum += __shfl_down_sync(kAllLanes, sum, width, 16);
  return sum;
}

__device__ __forceinline__ float reduced(const Rows& p, double sum, const Threshold& t) {
  switch (p.reduce) {
    case Reduce::mean:
      return float(sum / double(p.length));
    case Reduce::top:
      return float((sum + double(t.ties) * double(bits_float(t.tie))) / double(p.top));
    default:
      return float(sum);
  }
}

// Rows of one element: every aggregate of a row is that element.
__device__ __forceinline__ void score_elements(const Rows& p, Criterion criterion, int64_t block) {
  const int64_t begin = block * kElementTile, end = begin + kElementTile < p.rows ? begin + kElementTile : p.rows;
  with_scores(p.operands(), criterion, [&](auto score) {
#pragma unroll 4
    for (int64_t i = begin + int64_t(threadIdx.x); i < end; i += kRowThreads) global_store(&p.out[i], score.one(i));
  });
}

}  // namespace delfast::cuda
