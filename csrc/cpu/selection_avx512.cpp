// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl.
#include "cpu/vec_avx512.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::cpu::avx512 {
#include "cpu/selection.inl"
}
