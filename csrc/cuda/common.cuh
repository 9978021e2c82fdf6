// What all kernels share: the few words that nvcc and the tests' CUDA-on-CPU header spell differently, access to global
// memory, tables of parameters in a kernel's arguments, block-wide scans, and a parameter's scores.
#pragma once

#include <cstdint>
#include <type_traits>

#include "delfast/params.h"

#ifndef DELFAST_CUDA_ON_CPU  // under it g++ compiles this text, and csrc/tests/cuda_on_cpu defines these words
#include <cuda_runtime.h>
#define DELFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define DELFAST_BODY __device__ __forceinline__  // of kernels that differ by their table's size alone
#define DELFAST_GRID_CONSTANT(...) const __grid_constant__ __VA_ARGS__
#define DELFAST_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define DELFAST_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared_)

// Global memory is read and written through these alone, so that the tests can count what a warp asks for.
template <class T>
__device__ __forceinline__ T global_load(const T* address) {
  return *address;
}
template <class T>
__device__ __forceinline__ T global_load_const(const T* address) {  // of what is not written while the kernel runs
  return __ldg(address);
}
template <class T>
__device__ __forceinline__ void global_store(T* address, T value) {
  *address = value;
}
template <class T>
__device__ __forceinline__ void global_add(T* address, T value) {
  atomicAdd(address, value);
}
#endif

namespace delfast::cuda {

using Error = const char*;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kThreads = 256;  // a block's, unless it says otherwise

__device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp() { return int(threadIdx.x) / kWarp; }

// ---- tables: what a launch works on, in the kernel's arguments

// Bytes of a kernel's arguments: at most 4 KiB, and since CUDA 12.1 at most 32,764 bytes on sm_70 and later (CUDA C++
// Programming Guide, "__global__ function parameters").
constexpr int kSmallTable = 4096, kLargeTable = 32764;
constexpr bool kLargeTables = CUDART_VERSION >= 12010;

template <class Entry, int kBytes_ = kSmallTable>
struct Table {
  static constexpr int kBytes = kBytes_;
  // leaves room for a kernel's other arguments
  static constexpr int kEntries = int((kBytes - 128) / (sizeof(Entry) + sizeof(uint32_t)) - 1);
  int count = 0;
  uint32_t first_block[kEntries + 1] = {};  // of each entry; then how many blocks there are in all
  Entry entries[kEntries] = {};

  uint32_t blocks() const { return first_block[count]; }
};

// The entry that a block works on, this one if no other is named.
template <class Entry, int kBytes>
__device__ __forceinline__ int find_entry(const Table<Entry, kBytes>& table, uint32_t block = blockIdx.x) {
  int low = 0, high = table.count;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= block ? low : high) = middle;
  }
  return low;
}

// Collects entries and calls launch(table) whenever the table is full, and at the end.
template <class Entry, class Launch, int kBytes = kSmallTable>
class Chunks {
 public:
  explicit Chunks(Launch launch) : launch_(launch) {}
  void add(const Entry& entry, int64_t blocks) {
    // a grid has at most 2^31 - 1 blocks
    if (table_.count == Table<Entry, kBytes>::kEntries || int64_t(table_.blocks()) + blocks > INT32_MAX) flush();
    table_.entries[table_.count] = entry;
    table_.first_block[table_.count + 1] = table_.blocks() + uint32_t(blocks);
    table_.count++;
  }
  void flush() {
    if (table_.count) launch_(table_);
    table_.count = 0;
  }

 private:
  Launch launch_;
  Table<Entry, kBytes> table_;
};

inline bool driver_takes_large_tables() {
  int driver = 0;
  return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
}

// Calls for_entries(add), which calls add(entry, blocks) for each of at most `count` entries in order, and
// launch(table) for every full table and the last one. One table holds the entries of most networks: they are small
// if these fit, else large, where toolkit and driver have large ones.
template <class Entry, class ForEntries, class Launch>
void launch_tables(int64_t count, ForEntries for_entries, Launch launch) {
  const auto fill = [&]<int kBytes>(std::integral_constant<int, kBytes>) {
    Chunks<Entry, Launch, kBytes> chunks(launch);
    for_entries([&](const Entry& entry, int64_t blocks) { chunks.add(entry, blocks); });
    chunks.flush();
  };
  if constexpr (kLargeTables)
    if (count > Table<Entry>::kEntries && driver_takes_large_tables())
      return fill(std::integral_constant<int, kLargeTable>());
  fill(std::integral_constant<int, kSmallTable>());
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Error last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// ---- sums in the order of the threads

template <class T>
__device__ __forceinline__ T warp_inclusive_scan(T value) {
  for (int step = 1; step < kWarp; step *= 2) {
    const T below = __shfl_up_sync(kAllLanes, value, step);
    if (lane() >= step) value += below;
  }
  return value;
}

// The sum of `value` over the threads before this one, and over all of them. For whole blocks of whole warps;
// `totals` is shared memory, not to be used for anything else before the next __syncthreads.
template <class T>
__device__ __forceinline__ T block_exclusive_scan(T value, T* totals /* [32] */, T& total) {
  const T inclusive = warp_inclusive_scan(value);
  const int warps = int(blockDim.x) / kWarp;
  __syncthreads();  // whoever still reads the totals of an earlier call
  if (lane() == kWarp - 1) totals[warp()] = inclusive;
  __syncthreads();
  T before = 0;
  total = 0;
  for (int w = 0; w < warps; w++) {
    const T sum = totals[w];
    if (w < warp()) before += sum;
    total += sum;
  }
  return before + inclusive - value;
}

// Whether this block is the last of `blocks` to come here; then it sees what the others have written before. `done` has
// to be 0 at first.
__device__ __forceinline__ bool is_last_block(uint32_t* done, uint32_t blocks) {
  DELFAST_SHARED(bool, last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(done, 1u) + 1 == blocks;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// ---- packs: as many neighbours as make 16 bytes of the wider dtype, read by one instruction

template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// kWritten: the kernel writes to this memory too.
template <bool kWritten = false, int kCount, class T>
__device__ __forceinline__ void load_pack(const T* address, float (&out)[kCount]) {
  using Word = typename WordOf<kCount* int(sizeof(T))>::type;
  const Word* const at = reinterpret_cast<const Word*>(address);
  const Word word = kWritten ? global_load(at) : global_load_const(at);
  T values[kCount];
  memcpy(values, &word, sizeof word);
  for (int i = 0; i < kCount; i++) out[i] = to_float(values[i]);
}
template <class T>
__device__ __forceinline__ float load_one(const T* address) {
  float out[1];
  load_pack(address, out);
  return out[0];
}
// Rounds to T.
template <int kCount, class T>
__device__ __forceinline__ void store_pack(T* address, const float (&values)[kCount]) {
  using Word = typename WordOf<kCount* int(sizeof(T))>::type;
  T rounded[kCount];
  for (int i = 0; i < kCount; i++) assign(rounded[i], values[i]);
  Word word;
  memcpy(&word, rounded, sizeof word);
  global_store(reinterpret_cast<Word*>(address), word);
}

// How many elements past the start of a pack `address` lies.
template <int kCount, class T>
__device__ __forceinline__ int pack_offset(const T* address) {
  return int(reinterpret_cast<uintptr_t>(address) / sizeof(T) % kCount);
}

constexpr int kSector = 32;  // bytes

template <class T>
__device__ __forceinline__ int sector_offset(const T* address) {
  return pack_offset<kSector / sizeof(T)>(address);
}

// Calls f with a null pointer of the dtype's type.
template <class F>
__device__ __forceinline__ void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(static_cast<const float*>(nullptr));
    case Dtype::bfloat16:
      return f(static_cast<const bfloat16*>(nullptr));
    case Dtype::float16:
      if constexpr (kFewInstances)
        __trap();
      else
        return f(static_cast<const float16*>(nullptr));
  }
}

}  // namespace delfast::cuda
