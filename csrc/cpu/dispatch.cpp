// The instruction set in use: detected once from the CPU and the operating system, or forced.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "delfast/cpu_dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace delfast::cpu {

namespace {

#if defined(__x86_64__)
// Requests permission for tiles: Linux gives their 8 KiB of state only to processes that request it.
bool allow_tiles() {
#if defined(__linux__)
  constexpr unsigned kTile = 1 << 24, kTileBfloat16 = 1 << 22;  // bits of edx: Intel SDM volume 2A, CPUID, leaf 7
  constexpr int kRequest = 0x1023, kTileData = 18;              // ARCH_REQ_XCOMP_PERM: linux, arch/x86/xstate.rst
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return edx & kTile && edx & kTileBfloat16 && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

// __builtin_cpu_supports checks cpuid and, through XCR0, that the operating system saves the wide registers.
bool cpu_has(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::amx: {
      static const bool allowed = cpu_has(Isa::avx512) && allow_tiles();
      return allowed;
    }
  }
  return false;
}
#else
bool cpu_has(Isa isa) { return isa == Isa::scalar; }
#endif

Isa best() {
  Isa found = Isa::scalar;
  for (Isa isa : kIsas)
    if (cpu_has(isa)) found = isa;
  return found;
}

bool parse(const char* name, Isa* isa) {
  for (Isa known : kIsas)
    if (!std::strcmp(name, kIsaNames[int(known)])) {
      *isa = known;
      return true;
    }
  return false;
}

struct Choice {
  std::atomic<Isa> isa{best()};
  const char* problem = nullptr;
  Choice() {
    const char* wanted = std::getenv("DELFAST_FORCE_ISA");
    Isa forced;
    if (!wanted || !*wanted) return;
    if (!parse(wanted, &forced))
      problem = "expected DELFAST_FORCE_ISA to be scalar, avx2, avx512 or amx; set one of these or unset it";
    else if (!cpu_has(forced))
      problem = "DELFAST_FORCE_ISA names an instruction set that this CPU does not have; choose another or unset it";
    else
      isa = forced;
  }
};

Choice& choice() {
  static Choice chosen;
  return chosen;
}

}  // namespace

bool isa_supported(Isa isa) { return cpu_has(isa); }
Isa isa() { return choice().isa.load(std::memory_order_relaxed); }
const char* isa_request_problem() { return choice().problem; }

bool force_isa(const char* name) {
  Isa isa;
  if (!parse(name, &isa) || !cpu_has(isa)) return false;
  choice().isa = isa;
  return true;
}

#if defined(__x86_64__)
#define DELFAST_TABLE(Family, function, table)             \
  namespace scalar {                                       \
  extern const Family table;                               \
  }                                                        \
  namespace avx2 {                                         \
  extern const Family table;                               \
  }                                                        \
  namespace avx512 {                                       \
  extern const Family table;                               \
  }                                                        \
  const Family& function(Isa isa) {                        \
    if (isa >= Isa::avx512) return avx512::table;          \
    return isa == Isa::avx2 ? avx2::table : scalar::table; \
  }
#else
#define DELFAST_TABLE(Family, function, table) \
  namespace scalar {                           \
  extern const Family table;                   \
  }                                            \
  const Family& function(Isa) { return scalar::table; }
#endif

DELFAST_TABLE(CriticalityKernels, criticality, kCriticality)
DELFAST_TABLE(SelectionKernels, selection, kSelection)
DELFAST_TABLE(MaskedUpdateKernels, masked_update, kMaskedUpdate)
DELFAST_TABLE(PerExampleKernels, per_example_of, kPerExample)

#if defined(__x86_64__)
namespace amx {
extern const PerExampleKernels kPerExample;
}
const PerExampleKernels& per_example(Isa isa) { return isa == Isa::amx ? amx::kPerExample : per_example_of(isa); }
#else
const PerExampleKernels& per_example(Isa isa) { return per_example_of(isa); }
#endif

}  // namespace delfast::cpu
