// Compiled with -mavx2 -mfma -mf16c.
#include "cpu/vec_avx2.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::cpu::avx2 {
#include "cpu/criticality.inl"
}
