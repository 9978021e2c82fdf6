// CUDA's keywords, types and built-in variables, as far as the kernels use them, and delfast's own words of
// csrc/cuda/common.cuh that the two compilers spell differently.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda_on_cpu/device.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define threadIdx (cuda_on_cpu::device.thread_index)
#define blockIdx (cuda_on_cpu::device.block_index)
#define blockDim (cuda_on_cpu::device.block)
#define gridDim (cuda_on_cpu::device.grid)

namespace cuda_on_cpu {

// One variable in shared memory: memory of its own, fenced, that is filled with 0xff when a block first comes to it.
template <class T, class /* unique to the declaration */>
CUDA_ON_CPU_NO_TSAN T& shared_variable() {
  struct alignas(64) Room {
    unsigned char value[sizeof(T)], fence[64];
  };
  static Room room;
  static uint64_t block = 0;
  const IgnoreAccesses ignore;
  if (block != device.blocks_run) {
    block = device.blocks_run;
    std::memset(room.value, 0xff, sizeof(T));
    forbid_access(room.fence, sizeof room.fence);
  }
  return reinterpret_cast<T&>(room.value);
}

CUDA_ON_CPU_NO_TSAN inline char* dynamic_shared() { return device.dynamic_shared; }

template <class T>
struct Declared {  // Declared<float[4]>::type is float[4]: a type that a macro cannot write before a name
  using type = T;
};

}  // namespace cuda_on_cpu

#define DELFAST_SHARED(T, name, ...) \
  auto& name = cuda_on_cpu::shared_variable<typename cuda_on_cpu::Declared<T __VA_ARGS__>::type, decltype([] {})>()
#define DELFAST_DYNAMIC_SHARED(T, name) T* const name = reinterpret_cast<T*>(cuda_on_cpu::dynamic_shared())
// Arguments are copied at the launch, as CUDA does.
#define DELFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                          \
  (void(stream), cuda_on_cpu::launch(reinterpret_cast<const void*>(kernel), #kernel, grid, block, shared_bytes, \
                                     cuda_on_cpu::bind_arguments(kernel __VA_OPT__(,) __VA_ARGS__)))

namespace cuda_on_cpu {

template <class... Parameters, class... Arguments>
std::function<void()> bind_arguments(void (*kernel)(Parameters...), const Arguments&... arguments) {
  return [kernel, ... copies = std::remove_cvref_t<Parameters>(arguments)] { kernel(copies...); };
}

}  // namespace cuda_on_cpu

// ---- the little of the runtime that launchers use

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }  // a failed launch has thrown
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  cuda_on_cpu::device.shared_allowed[reinterpret_cast<const void*>(kernel)] = size_t(bytes);
  return cudaSuccess;
}
