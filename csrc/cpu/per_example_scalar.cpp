// Compiled with the build's baseline instruction set.
#include <type_traits>
#include <utility>

#include "cpu/vec_scalar.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::cpu::scalar {
constexpr int kTileRows = kFewInstances ? 3 : 4, kTileVecs = 1;
#include "cpu/per_example.inl"
}  // namespace delfast::cpu::scalar
