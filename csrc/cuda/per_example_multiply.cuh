// The product of one tile of an example's gradient, its accumulation, and its addition to the running sums: in float32
// by every thread separately, or by a warp's tensor cores.
//
// Mapping. Both multiply kStep positions at a time.
// Memory. Both read the same stage in shared memory. It is position-major like global memory, so that contiguous
// elements stay contiguous. The gradient of the current example and the sums over the examples are in registers: 32 +
// 32 of each thread.
// Numerics. Described at each of the two classes.
#pragma once

#include <type_traits>

#include "cuda/common.cuh"
#include "delfast/per_example.h"

#ifndef DELFAST_CUDA_ON_CPU
#include <mma.h>
#endif

namespace delfast::cuda {

constexpr int kTile = 64;  // output channels of a block, and columns (a tap and an input channel)
constexpr int kTileThreads = 128;
constexpr int kDepth = 16;  // positions of a stage
// The pitch moves each row of 64 words by 8 banks, so that an operand of the tensor cores, 8 x 4 elements, is in 32
// banks.
constexpr int kPitch = kTile + 8;

template <class Staged>
struct alignas(32) Stage {
  Staged output_grad[kDepth][kPitch];
  Staged inputs[kDepth][kPitch];
};

__device__ __forceinline__ float add_example(Transform transform, float sum, float gradient) {
  return transform == Transform::abs ? sum + fabsf(gradient) : fmaf(gradient, gradient, sum);
}

__device__ __forceinline__ float4 load_shared(const float* four) { return *reinterpret_cast<const float4*>(four); }

// Mapping. A thread takes 4 + 4 rows, 32 apart, by 4 columns; a warp 32 rows by 32 columns. The warp reads 16 + 16 + 32
// floats for 1024 products.
// Numerics. A fused multiply-add adds each product without rounding it; -fmad=false does not split it.
class FusedMultiplyAdd {
 public:
  using Staged = float;
  static constexpr int kStep = 8, kResident = 3;  // resident blocks: with more, registers would spill

  static __device__ __forceinline__ float staged(float value) { return value; }

  __device__ __forceinline__ void multiply(const Stage<float>& stage, int from) {
#pragma unroll
    for (int k = from; k < from + kStep; k++) {
      const float4 low = load_shared(&stage.output_grad[k][row()]),
                   high = load_shared(&stage.output_grad[k][row() + 32]),
                   right = load_shared(&stage.inputs[k][column()]);
      const float left[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        gradient_[i][0] = fmaf(left[i], right.x, gradient_[i][0]);
        gradient_[i][1] = fmaf(left[i], right.y, gradient_[i][1]);
        gradient_[i][2] = fmaf(left[i], right.z, gradient_[i][2]);
        gradient_[i][3] = fmaf(left[i], right.w, gradient_[i][3]);
      }
    }
  }
  __device__ __forceinline__ void end_example(Transform transform) {
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        sums_[i][j] = add_example(transform, sums_[i][j], gradient_[i][j]);
        gradient_[i][j] = 0;
      }
  }
  __device__ __forceinline__ void store(float (&tile)[kTile][kPitch]) const {
#pragma unroll
    for (int i = 0; i < 8; i++)
      *reinterpret_cast<float4*>(&tile[row() + i % 4 + i / 4 * 32][column()]) =
          float4{sums_[i][0], sums_[i][1], sums_[i][2], sums_[i][3]};
  }

 private:
  static __device__ __forceinline__ int row() { return lane() / 8 * 4 + warp() / 2 * 16; }
  static __device__ __forceinline__ int column() { return lane() % 8 * 4 + warp() % 2 * 32; }

  float gradient_[8][4] = {}, sums_[8][4] = {};
};

// Mapping. A warp takes 32 x 32 elements, as 2 x 2 fragments. The code relies only on two fragments of one type holding
// the same elements at the same places.
// Numerics. Operands are tf32 (float32 rounded to 11 significant bits, to nearest), __half or __nv_bfloat16. Products
// are exact and added in float32.
template <class Operand>
class TensorCores {
  static constexpr bool kTf32 = std::is_same_v<Operand, nvcuda::wmma::precision::tf32>;

 public:
  using Staged = std::conditional_t<kTf32, float, Operand>;
  static constexpr int kStep = kTf32 ? 8 : 16, kResident = kTf32 ? 3 : 4;

  static __device__ __forceinline__ float staged(float value) { return nvcuda::wmma::__float_to_tf32(value); }

  __device__ __forceinline__ TensorCores() {
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++) {
        nvcuda::wmma::fill_fragment(gradient_[i][j], 0.0f);
        nvcuda::wmma::fill_fragment(sums_[i][j], 0.0f);
      }
  }
  __device__ __forceinline__ void multiply(const Stage<Staged>& stage, int from) {
    using namespace nvcuda::wmma;
    fragment<matrix_a, 16, 16, kStep, Operand, col_major> left[2];
    fragment<matrix_b, 16, 16, kStep, Operand, row_major> right[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      load_matrix_sync(left[i], &stage.output_grad[from][row() + 16 * i], kPitch);
      load_matrix_sync(right[i], &stage.inputs[from][column() + 16 * i], kPitch);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) mma_sync(gradient_[i][j], left[i], right[j], gradient_[i][j]);
  }
  __device__ __forceinline__ void end_example(Transform transform) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int e = 0; e < Sums::num_elements; e++) {
          sums_[i][j].x[e] = add_example(transform, sums_[i][j].x[e], gradient_[i][j].x[e]);
          gradient_[i][j].x[e] = 0;
        }
  }
  __device__ __forceinline__ void store(float (&tile)[kTile][kPitch]) const {
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++)
        nvcuda::wmma::store_matrix_sync(&tile[row() + 16 * i][column() + 16 * j], sums_[i][j], kPitch,
                                        nvcuda::wmma::mem_row_major);
  }

 private:
  static __device__ __forceinline__ int row() { return warp() / 2 * 32; }
  static __device__ __forceinline__ int column() { return warp() % 2 * 32; }

  using Sums = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, kStep, float>;
  Sums gradient_[2][2], sums_[2][2];
};

}  // namespace delfast::cuda
