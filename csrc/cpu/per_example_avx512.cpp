// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl.
#include <type_traits>
#include <utility>

#include "cpu/vec_avx512.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::cpu::avx512 {
constexpr int kTileRows = kFewInstances ? 3 : 14, kTileVecs = 2;
#include "cpu/per_example.inl"
}  // namespace delfast::cpu::avx512
