// Barriers, warp operations, atomics and bit tricks.
#pragma once

#include <atomic>
#include <bit>

#include "cuda_on_cpu/language.h"

inline void __syncthreads(cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  cuda_on_cpu::block_barrier(place);
}
inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  cuda_on_cpu::warp_operation("__syncwarp", mask, 0, 0, place, true, [](cuda_on_cpu::Thread*, unsigned) {});
}
#define __trap() cuda_on_cpu::fail_here("__trap", cuda_on_cpu::Place::current())

namespace cuda_on_cpu {

CUDA_ON_CPU_NO_TSAN inline int lane_number() { return device.current % kWarp; }

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, const Place& place) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_operation(name, mask, bits, source, place, false, [](Thread* warp, unsigned lanes) {
    for (int l = 0; l < kWarp; l++) {
      if (!(lanes >> l & 1)) continue;
      if (lanes >> warp[l].source & 1)
        warp[l].result = warp[warp[l].source].value;
      else
        report_failure("a shuffle from lane " + std::to_string(warp[l].source) +
                       ", which is not in the mask: " + describe_thread(device.current / kWarp * kWarp + l));
    }
  });
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// result = fold over the lanes of the mask, the same for all of them.
template <class Fold>
uint64_t vote(const char* name, unsigned mask, uint64_t value, const Place& place, uint64_t start, Fold fold) {
  return warp_operation(name, mask, value, 0, place, false, [&](Thread* warp, unsigned lanes) {
    uint64_t result = start;
    for (int l = 0; l < kWarp; l++)
      if (lanes >> l & 1) result = fold(result, warp[l].value, l);
    for (int l = 0; l < kWarp; l++)
      if (lanes >> l & 1) warp[l].result = result;
  });
}

template <class T, class F>
T atomically(T* address, F change) {
  std::atomic_ref<T> atomic(*address);
  T old = atomic.load(std::memory_order_relaxed);
  while (!atomic.compare_exchange_weak(old, change(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace cuda_on_cpu

// Lanes that a shuffle would read beyond their segment of `width` read themselves.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  const int base = cuda_on_cpu::lane_number() & ~(width - 1);
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, base + (source & (width - 1)), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  const int lane = cuda_on_cpu::lane_number(), end = (lane & ~(width - 1)) + width, source = lane ^ bits;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, source < end ? source : lane, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  const int lane = cuda_on_cpu::lane_number(), end = (lane & ~(width - 1)) + width, source = lane + int(delta);
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, source < end ? source : lane, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  const int lane = cuda_on_cpu::lane_number(), base = lane & ~(width - 1), source = lane - int(delta);
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, source >= base ? source : lane, place);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  return unsigned(cuda_on_cpu::vote("__ballot_sync", mask, predicate != 0, place, 0,
                                    [](uint64_t all, uint64_t one, int lane) { return all | one << lane; }));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value,
                                  cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  return unsigned(cuda_on_cpu::vote("__reduce_add_sync", mask, value, place, 0,
                                    [](uint64_t all, uint64_t one, int) -> uint64_t { return all + one; }));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value,
                                  cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  return unsigned(cuda_on_cpu::vote("__reduce_max_sync", mask, value, place, 0,
                                    [](uint64_t all, uint64_t one, int) { return std::max(all, one); }));
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return cuda_on_cpu::atomically(address, [=](T old) { return T(old + value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return cuda_on_cpu::atomically(address, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return cuda_on_cpu::atomically(address, [=](T old) { return std::min(old, value); });
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
