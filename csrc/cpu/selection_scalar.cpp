// Compiled with the build's baseline instruction set.
#include "cpu/vec_scalar.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::cpu::scalar {
#include "cpu/selection.inl"
}
