// Shared by the tests of the emulated CUDA kernels: parameters of awkward sizes, with several in
// one launch, workspaces, and the schedules to try.
#pragma once

#include <cstdlib>

#include "cuda_on_cpu/cuda_on_cpu.h"
#include "delfast/cuda_launch.h"
#include "select.h"

namespace delfast::test {

// Sanitizers are slow. Builds with few instances run every kernel on rows of every length, but not with every budget,
// kind of values and criterion. The same holds for ThreadSanitizer in all builds; it finds a missing barrier with any
// schedule and values.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kFewCases = true;
#else
inline constexpr bool kFewCases = kFewInstances;
#endif

// The schedules that main()'s arguments name: 0 runs threads and blocks in order, others shuffle them.
inline std::vector<uint64_t> seeds(int argc, char** argv) {
  std::vector<uint64_t> list;
  bool numbers = argc > 1;
  for (int i = 1; i < argc; i++) {
    char* end = nullptr;
    list.push_back(std::strtoull(argv[i], &end, 10));
    numbers &= end != argv[i] && !*end;
  }
  if (!numbers) {
    std::cerr << "expected the seeds of the schedules to run, numbers, got " << (argc > 1 ? "others" : "none") << "\n";
    std::exit(2);
  }
  return list;
}

// The last driver that supports only small tables, and one that supports large tables.
inline constexpr int kDrivers[] = {12000, 13000};

// Uninitialized memory with 16-byte alignment, as the launchers give it to a kernel.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_((bytes + 15) / 16 * 16) {
    std::fill(memory_.begin(), memory_.end(), static_cast<unsigned char>(0xff));
  }
  void* get() { return memory_.data(); }

 private:
  Guarded<unsigned char> memory_;
};

inline std::vector<Scored> scored(const Params& params) {
  std::vector<Scored> list;
  for (const auto& param : params) list.push_back(param->scored());
  return list;
}

// Rows of 1, 31, 32, 33, 1000, 4608, 70000 and 10^6 + 3 elements and of the lengths at the limits between kernels, with
// all dtypes, kinds of values and alignments; theta and its gradient are not always aligned alike.
inline Params awkward_params(Criterion criterion, Random& random) {
  Params params;
  const auto add = [&](Layout layout, Dtype theta, Dtype grad) {
    const int64_t n = int64_t(params.size());
    params.push_back(std::make_unique<Scores>(layout, criterion, theta, grad, n % 5, n % 7 == 3 ? n % 5 + 1 : n % 5));
    params.back()->fill(kKinds[n % int64_t(std::size(kKinds))], random);
  };
  for (Dtype theta : kDtypes)
    for (Dtype grad : kDtypes) {
      for (int64_t length : {1, 31, 32, 33}) add({length == 1 ? 37 : 9, length, 1}, theta, grad);
      if (theta != grad && grad != Dtype::float32) continue;
      for (int64_t length : {1000, 4608}) add({2, length, 1}, theta, grad);
    }
  for (Dtype dtype : kDtypes) add({1, 70000, 1}, dtype, dtype);
  for (int64_t length : {1024, 1025, 8192, 8193, 16384, 16385}) add({2, length, 1}, Dtype::bfloat16, Dtype::float32);
  add({1, 1000003, 1}, Dtype::float32, Dtype::float32);
  return params;
}

// Three hundred small parameters, some of them empty: more than fit into a kernel's arguments.
inline Params many_params(Criterion criterion, Random& random) {
  Params params;
  for (int i = 0; i < 300; i++) {
    const Layout layout{random.below(6), i % 3 ? 1 + random.below(70) : 1, 1};
    params.push_back(std::make_unique<Scores>(layout, criterion, random.dtype(), random.dtype(), random.below(8)));
    params.back()->fill(kKinds[i % int64_t(std::size(kKinds))], random);
  }
  return params;
}

constexpr CUstream_st* kStream = nullptr;

}  // namespace delfast::test
