// Shared by all kernels: the constructs that nvcc and the tests' CUDA-on-CPU header spell differently, access to global
// memory, tables of parameters in a kernel's arguments, block-wide scans, and packs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "delfast/params.h"

#ifndef DELFAST_CUDA_ON_CPU  // compiled by g++: csrc/tests/cuda_on_cpu defines these names
#include <cuda_runtime.h>
#define DELFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define DELFAST_BODY __device__ __forceinline__  // body of kernels that differ only by their table's size
#define DELFAST_GRID_CONSTANT(...) const __grid_constant__ __VA_ARGS__
#define DELFAST_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define DELFAST_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared_)

// All access to global memory goes through these functions, so that the tests can count the sectors a warp requests.
template <class T>
__device__ __forceinline__ T global_load(const T* address) {
  return *address;
}
template <class T>
__device__ __forceinline__ T global_load_const(const T* address) {  // for memory that no kernel writes meanwhile
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
constexpr int kThreads = 256;  // threads of a block, unless a kernel defines its own number

__device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp() { return int(threadIdx.x) / kWarp; }

// ---- tables: the entries that a launch works on, in the kernel's arguments

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
  uint32_t first_block[kEntries + 1] = {};  // first block of each entry; [count]: number of all blocks
  Entry entries[kEntries] = {};

  uint32_t blocks() const { return first_block[count]; }
};

// Returns the entry that a block works on; by default the calling block.
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
// launch(table) for every full table and the last one. One small table holds the entries of most networks. A list that
// does not fit into one goes into large tables, where toolkit and driver support them.
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

// Returns the sum of `value` over the threads before this one, and in `total` the sum over all threads. For whole
// blocks of whole warps. `totals` is shared memory that must not be reused before the next __syncthreads.
template <class T>
__device__ __forceinline__ T block_exclusive_scan(T value, T* totals /* [32] */, T& total) {
  const T inclusive = warp_inclusive_scan(value);
  const int warps = int(blockDim.x) / kWarp;
  __syncthreads();  // the totals of an earlier call may still be in use
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

// Returns true in the last of `blocks` blocks that calls it. This block then reads what the others wrote before their
// call. `done` must start at 0.
__device__ __forceinline__ bool is_last_block(uint32_t* done, uint32_t blocks) {
  DELFAST_SHARED(bool, last);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(done, 1u) + 1 == blocks;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// ---- packs: neighbouring elements that fill 16 bytes in the wider dtype, read by one instruction

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

// kWritten: the kernel also writes to this memory.
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

// Number of elements between the start of a pack and `address`.
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
