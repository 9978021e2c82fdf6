// Compiled with -mavx2 -mfma -mf16c.
#include <type_traits>
#include <utility>

#include "cpu/vec_avx2.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::cpu::avx2 {
constexpr int kTileRows = kFewInstances ? 3 : 6, kTileVecs = 1;
#include "cpu/per_example.inl"
}  // namespace delfast::cpu::avx2
