// The PTX instructions that kernels use by their own names: copies from global to shared memory that do not pass
// through registers, and matrix products of a warp whose operands lie in shared memory. PTX ISA, "cp.async",
// "ldmatrix", "mma". Under the tests' CUDA-on-CPU headers csrc/tests/cuda_on_cpu/{async_copies,matrix}.h define them.
#pragma once

#include "cuda/common.cuh"

#ifndef DELFAST_CUDA_ON_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>  // the type that stands for tf32

namespace ptx {

using Shared = uint32_t;  // an address in shared memory

__device__ __forceinline__ Shared shared_address(const void* address) {
  return uint32_t(__cvta_generic_to_shared(address));
}

// Copies 16 bytes, or writes 16 zero bytes and reads nothing if !exists. This thread may read them after it has waited
// for its group of copies, other threads after a barrier after that.
__device__ __forceinline__ void copy_async(Shared to, const void* from, bool exists) {
  const int bytes = exists ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// The copies since the last commit become a group, which may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most kPending of this thread's groups are incomplete, the latest.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, transposed: lane 8 i + j gives the address of row j of matrix i, and gets in
// word i the elements [2 (lane % 4)] and [2 (lane % 4) + 1] of matrix i's column lane / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&words)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_16_bytes(uint32_t (&words)[4], Shared from) {
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

// d = a b + c: 16 x 8 float32, of operands of 16 bits (16 deep) or tf32 (8 deep). tf32's last 13 bits are ignored.
template <class Operand>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         const float (&c)[4]) {
#define DELFAST_MMA(shape_and_types)                                                                                \
  asm volatile("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"   \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), \
                 "f"(c[3]))
  if constexpr (std::is_same_v<Operand, __nv_bfloat16>) {
    DELFAST_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (std::is_same_v<Operand, __half>) {
    DELFAST_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    static_assert(std::is_same_v<Operand, nvcuda::wmma::precision::tf32>);
    DELFAST_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef DELFAST_MMA
}

}  // namespace ptx
#endif

namespace delfast::cuda {

// Rounds a float32 to tf32 in its first 19 bits; the other 13 are arbitrary. To nearest, ties away from zero, as
// cvt.rna.tf32.f32 does, which is slower. The addition carries the largest floats to infinity and would carry NaNs
// whose mantissa is all ones to zero. The signed maximum preserves positive NaNs, the unsigned maximum negative NaNs.
// The addition must be unsigned: a signed addition may not overflow, so the compiler would drop the maximum, as it
// drops that of __viaddmax_s32 below sm_90. Signaling NaNs with a payload below 2^12, which no arithmetic yields,
// become infinities.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  const uint32_t rounded = uint32_t(max(int(bits + 0x1000u), int(bits)));
  return rounded > bits ? rounded : bits;
}

}  // namespace delfast::cuda
