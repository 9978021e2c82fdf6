// Packed bits, read by words.
#pragma once

#include "cuda/common.cuh"

namespace delfast::cuda {

// Returns 32 of the `units` bits, from bit 32 * word on, and zeros past the end. The bits may begin at any byte, and
// padding may follow the last. One load suffices where they begin at a word, as most networks' bits do.
__device__ __forceinline__ uint32_t load_word(const uint8_t* bits, int64_t units, int64_t word) {
  const int64_t left = units - word * 32;
  const uint8_t* const first = bits + word * 4;
  if (left >= 32 && reinterpret_cast<uintptr_t>(first) % 4 == 0)
    return global_load_const(reinterpret_cast<const uint32_t*>(first));
  uint32_t loaded = 0;
  for (int b = 0; b < 4; b++)
    if (left > 8 * b) loaded |= uint32_t(global_load_const(&first[b])) << 8 * b;
  return left >= 32 || left <= 0 ? loaded : loaded & ((1u << left) - 1);
}

}  // namespace delfast::cuda
