// What the launchers of the per-example sums share.
#pragma once

#include <atomic>
#include <cstdint>

#include "cuda/common.cuh"

namespace delfast::cuda {

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % size_t(bytes) == 0;
}

// What is known of each device. Asked once, or again if asking failed.
template <class T>
class ByDevice {
 public:
  // ask(device, value) finds the current device's value, or returns an error, which is cleared so that no later launch
  // is blamed for it; then `otherwise`.
  template <class Ask>
  T get(T otherwise, Ask ask) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    const bool kept = error == cudaSuccess && device < kDevices;
    if (kept && known_[device]) return values_[device];
    T value = otherwise;
    if (error == cudaSuccess) error = ask(device, value);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return otherwise;
    }
    if (kept) {
      values_[device] = value;
      known_[device] = true;
    }
    return value;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<T> values_[kDevices] = {};
  std::atomic<bool> known_[kDevices] = {};
};

}  // namespace delfast::cuda
