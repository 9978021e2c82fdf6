// Small kernels with a bug planted in each, to show that running CUDA on the CPU catches it: `planted_bugs BUG SEED`.
// Exits with 0 if nothing was noticed, which is right for the bug `none` alone. tests/packaging/test_cpp.py says which
// bug is to be noticed by which build.
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "cuda/common.cuh"

namespace {

enum class Bug {
  none,
  missing_syncthreads,
  missing_syncwarp,
  shared_reuse,
  out_of_bounds_static,
  out_of_bounds_dynamic,
  divergent_barrier
};
constexpr const char* kNames[] = {"none",
                                  "missing-syncthreads",
                                  "missing-syncwarp",
                                  "shared-reuse",
                                  "out-of-bounds-static",
                                  "out-of-bounds-dynamic",
                                  "divergent-barrier"};
constexpr int kThreads = 128, kRounds = 4;

// Every thread passes its number to the thread opposite, kRounds times through the same shared memory.
template <Bug bug>
__global__ void exchange_in_block(float* out) {
  DELFAST_SHARED(float, mail, [kThreads]);
  const int me = int(threadIdx.x);
  float sum = 0;
  for (int round = 0; round < kRounds; round++) {
    mail[me] = float(me + round);
    if (bug == Bug::divergent_barrier) {
      if (me < 40) __syncthreads();
    } else if (bug != Bug::missing_syncthreads) {
      __syncthreads();
    }
    sum += mail[kThreads - 1 - me + (bug == Bug::out_of_bounds_static)];
    if (bug != Bug::shared_reuse) __syncthreads();  // before the next round writes
  }
  global_store(&out[me], sum);
}

// The same between the lanes of a warp, through dynamic shared memory.
template <Bug bug>
__global__ void exchange_in_warp(float* out) {
  DELFAST_DYNAMIC_SHARED(float, mail);
  const int me = int(threadIdx.x);
  float sum = 0;
  for (int round = 0; round < kRounds; round++) {
    mail[me] = float(me + round);
    if (bug != Bug::missing_syncwarp) __syncwarp();
    sum += mail[(me ^ 31) + (bug == Bug::out_of_bounds_dynamic ? 1 : 0)];
    __syncwarp();
  }
  global_store(&out[me], sum);
}

template <Bug bug>
bool run() {
  std::vector<float> by_block(kThreads), by_warp(kThreads);
  DELFAST_LAUNCH(exchange_in_block<bug>, 3, kThreads, 0, nullptr, by_block.data());
  DELFAST_LAUNCH(exchange_in_warp<bug>, 3, kThreads, kThreads * sizeof(float), nullptr, by_warp.data());
  bool right = true;
  for (int i = 0; i < kThreads; i++) {
    const float rounds = kRounds * (kRounds - 1) / 2;
    right &= by_block[size_t(i)] == float(kRounds * (kThreads - 1 - i)) + rounds;
    right &= by_warp[size_t(i)] == float(kRounds * (i ^ 31)) + rounds;
  }
  return right;
}

template <size_t... bugs>
bool run_named(const std::string& name, std::index_sequence<bugs...>) {
  bool right = false, known = false;
  ((name == kNames[bugs] ? (known = true, right = run<Bug(bugs)>()) : false), ...);
  if (!known) throw std::invalid_argument("no bug of this name");
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "expected the name of a bug and a seed\n";
    return 2;
  }
  cuda_on_cpu::set_seed(std::strtoull(argv[2], nullptr, 10));
  try {
    const bool right = run_named(argv[1], std::make_index_sequence<std::size(kNames)>());
    std::cout << (right ? "right results\n" : "wrong results\n");
    return right ? 0 : 1;
  } catch (const cuda_on_cpu::KernelError& error) {
    std::cout << error.what() << "\n";
    return 1;
  }
}
