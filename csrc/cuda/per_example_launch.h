// Functions shared by the launchers of the per-example sums.
#pragma once

#include <atomic>
#include <cstdint>

#include "cuda/common.cuh"

namespace delfast::cuda {

inline bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % size_t(bytes) == 0;
}

// A property of each device. It is queried once, and queried again if the query failed.
template <class T>
class ByDevice {
 public:
  // query(device, value) stores the current device's value, or returns an error. The error is cleared, so that no later
  // launch reports it, and `otherwise` is returned.
  template <class Query>
  T get(T otherwise, Query query) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    const bool kept = error == cudaSuccess && device < kDevices;
    if (kept && known_[device]) return values_[device];
    T value = otherwise;
    if (error == cudaSuccess) error = query(device, value);
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
