// The choice of the instruction set: DELFAST_FORCE_ISA (set here to the argument), then force_isa().
#include <cstdlib>
#include <string>

#include "inputs.h"

int main(int argc, char** argv) {
  using namespace delfast;
  using namespace delfast::test;
  const std::string wanted = argc == 2 ? argv[1] : "";
  setenv("DELFAST_FORCE_ISA", wanted.c_str(), 1);  // before the first call, which reads it

  CHECK_EQUAL(std::size(cpu::kIsaNames), size_t(4));
  CHECK_EQUAL(std::string(cpu::kIsaNames[int(cpu::Isa::scalar)]), std::string("scalar"));
  CHECK_EQUAL(std::string(cpu::kIsaNames[int(cpu::Isa::avx2)]), std::string("avx2"));
  CHECK_EQUAL(std::string(cpu::kIsaNames[int(cpu::Isa::avx512)]), std::string("avx512"));
  CHECK_EQUAL(std::string(cpu::kIsaNames[int(cpu::Isa::amx)]), std::string("amx"));

  CHECK(cpu::isa_supported(cpu::Isa::scalar));
  for (int i = 1; i < 4; i++)  // no CPU has only the wider instruction set
    CHECK(cpu::isa_supported(cpu::Isa(i - 1)) || !cpu::isa_supported(cpu::Isa(i)));
  cpu::Isa best = cpu::Isa::scalar;
  bool honoured = false;
  for (int i = 0; i < 4; i++) {
    if (!cpu::isa_supported(cpu::Isa(i))) continue;
    best = cpu::Isa(i);
    honoured |= wanted == cpu::kIsaNames[i];
  }
  describe("DELFAST_FORCE_ISA=", wanted);
  CHECK_EQUAL(cpu::isa_request_problem() == nullptr, honoured);
  CHECK_EQUAL(std::string(cpu::kIsaNames[int(cpu::isa())]), honoured ? wanted : cpu::kIsaNames[int(best)]);

  for (int i = 0; i < 4; i++) {
    const cpu::Isa before = cpu::isa(), isa = cpu::Isa(i);
    describe("force_isa ", cpu::kIsaNames[i]);
    CHECK_EQUAL(cpu::force_isa(cpu::kIsaNames[i]), cpu::isa_supported(isa));
    CHECK_EQUAL(cpu::isa(), cpu::isa_supported(isa) ? isa : before);
    for (const char* unknown : {"", "AVX2", "avx", "avx5122", "sse9", "scalar "}) {
      const cpu::Isa kept = cpu::isa();
      CHECK(!cpu::force_isa(unknown));
      CHECK_EQUAL(cpu::isa(), kept);
    }
    if (!cpu::isa_supported(isa)) continue;
    CHECK(cpu::criticality(isa).score_rows);
    CHECK(cpu::selection(isa).histogram && cpu::selection(isa).mark && cpu::selection(isa).clear_ties);
    CHECK(cpu::masked_update(isa).reset && cpu::masked_update(isa).sgd && cpu::masked_update(isa).adamw);
    CHECK(cpu::per_example(isa).pack && cpu::per_example(isa).tiles && cpu::per_example(isa).accumulate);
    CHECK(cpu::per_example(isa).channel_dot && cpu::per_example(isa).channel_sums);
    for (int other = 0; other < i; other++) {  // each has kernels of its own; amx only for the per-example sums
      const bool same = isa == cpu::Isa::amx && cpu::Isa(other) == cpu::Isa::avx512;
      CHECK_EQUAL(cpu::criticality(isa).score_rows == cpu::criticality(cpu::Isa(other)).score_rows, same);
      CHECK(cpu::per_example(isa).accumulate != cpu::per_example(cpu::Isa(other)).accumulate);
    }
  }
  return report();
}
