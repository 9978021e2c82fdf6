// Written rows by the CUDA kernel, run on the CPU, against a loop over bytes: one weight in a launch, and all weights
// in as many launches as tables hold them, for every schedule of threads and order of blocks.
#include "cases.h"
#include "written.h"

int main(int argc, char** argv) {
  using namespace delfast;
  using namespace delfast::test;
  Random random(5);
  std::vector<WrittenCase> cases = written_cases(random);
  for (uint64_t seed : seeds(argc, argv)) {
    cuda_on_cpu::set_seed(seed);
    for (int driver : kDrivers) {
      cuda_on_cpu::device.driver_version = driver;
      std::vector<WrittenCase> changed = cases;
      std::vector<WrittenRows> all;
      for (WrittenCase& c : changed) all.push_back(c.written());
      describe("all, seed ", seed, ", driver ", driver);
      const uint64_t launches = cuda_on_cpu::device.launches;
      CHECK(cuda::write_rows(all.data(), int64_t(all.size()), kStream) == nullptr);
      CHECK_EQUAL(cuda_on_cpu::device.launches - launches, driver == kDrivers[0] ? uint64_t(2) : uint64_t(1));
      for (size_t i = 0; i < cases.size(); i++)
        CHECK(changed[i].is(cases[i].expected(0, cases[i].outer * cases[i].count)));
    }
    for (size_t i = 0; i < cases.size(); i++) {
      WrittenCase alone = cases[i];
      const auto expected = alone.expected(0, alone.outer * alone.count);
      describe("seed ", seed, ", ", alone.outer, " x ", alone.count, " of ", alone.channels, " pieces of ", alone.bytes,
               " bytes");
      const WrittenRows written = alone.written();
      CHECK(cuda::write_rows(&written, 1, kStream) == nullptr);
      CHECK(alone.is(expected));
    }
  }
  CHECK(cuda::write_rows(nullptr, 0, kStream) == nullptr);
  return report();
}
