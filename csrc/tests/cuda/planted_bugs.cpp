// Small kernels with a bug planted in each, to show that running CUDA on the CPU detects it: `planted_bugs BUG SEED`.
// Exits with 0 if nothing was detected, which is right only for the bug `none`. tests/packaging/test_cpp.py lists the
// builds that must detect each bug.
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "cuda/ptx.cuh"

namespace {

enum class Bug {
  none,
  missing_syncthreads,
  missing_syncwarp,
  shared_reuse,
  out_of_bounds_static,
  out_of_bounds_dynamic,
  divergent_barrier,
  missing_wait,
  missing_barrier_after_wait,
  wrong_swizzle,
  stale_accumulator
};
constexpr const char* kNames[] = {"none",
                                  "missing-syncthreads",
                                  "missing-syncwarp",
                                  "shared-reuse",
                                  "out-of-bounds-static",
                                  "out-of-bounds-dynamic",
                                  "divergent-barrier",
                                  "missing-wait",
                                  "missing-barrier-after-wait",
                                  "wrong-swizzle",
                                  "stale-accumulator"};
constexpr int kThreads = 128, kRounds = 4;

// Every thread passes its number to the opposite thread, kRounds times through the same shared memory.
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

// The same exchange between the lanes of a warp, through dynamic shared memory.
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

// The products of all rows with one another, for each example x of kDeep rows of kChannels: out[m][n] = the sum over
// the examples of |sum over its rows of x[row][m] x[row][n]|, for 32 channels m and the first 8 channels n. The next 16
// rows are copied while the previous ones are multiplied.
constexpr int kExamples = 3, kDeep = 32, kStageRows = 16, kStages = kExamples * kDeep / kStageRows, kChannels = 64;

template <Bug bug>
__global__ void multiply_rows(const delfast::bfloat16* x, float* out) {
  DELFAST_DYNAMIC_SHARED(unsigned char, memory);
  const ptx::Shared shared = ptx::shared_address(memory);
  const int me = int(threadIdx.x), lane = me % 32, first_m = me / 32 * 16;
  // place of 8 channels of a row: the same channels of 8 rows are in different banks
  const auto place = [](int row, int chunk) {
    return row * kChannels * 2 + (bug == Bug::wrong_swizzle ? chunk : chunk ^ (row & 7)) * 16;
  };
  const auto copy_stage = [&](int stage) {
    if (stage < kStages)
      for (int i = me; i < kStageRows * 8; i += 64)
        ptx::copy_async(shared + stage % 2 * (kStageRows * kChannels * 2) + place(i / 8, i % 8),
                        x + (stage * kStageRows + i / 8) * kChannels + i % 8 * 8, true);
    ptx::commit_copies();
  };
  float sums[4] = {}, products[4] = {};
  const float zeros[4] = {};
  copy_stage(0);
  for (int s = 0; s < kStages; s++) {
    copy_stage(s + 1);
    if (bug != Bug::missing_wait) ptx::wait_for_copies<1>();
    if (bug != Bug::missing_barrier_after_wait) __syncthreads();
    const ptx::Shared stage = shared + s % 2 * (kStageRows * kChannels * 2);
    uint32_t a[4], b[4];
    ptx::load_matrices_transposed(a, stage + place((lane & 7) + (lane >> 4) * 8, first_m / 8 + (lane >> 3 & 1)));
    ptx::load_matrices_transposed(b, stage + place((lane & 7) + (lane >> 3 & 1) * 8, 0));
    const uint32_t right[2] = {b[0], b[1]};
    const bool fresh = s % (kDeep / kStageRows) == 0 && bug != Bug::stale_accumulator;
    ptx::multiply<__nv_bfloat16>(products, a, right, fresh ? zeros : products);
    if (s % (kDeep / kStageRows) == kDeep / kStageRows - 1)
      for (int i = 0; i < 4; i++) sums[i] += std::fabs(products[i]);
    __syncthreads();  // before the next copies over this stage
  }
  for (int i = 0; i < 4; i++) global_store(&out[(first_m + lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2], sums[i]);
}

template <Bug bug>
bool run_products() {
  const auto value = [](int row, int channel) { return float((row * 5 + channel * 3 + row * channel) % 7 - 3); };
  std::vector<uint4> memory(kExamples * kDeep * kChannels / 8);
  delfast::bfloat16* const x = reinterpret_cast<delfast::bfloat16*>(memory.data());
  for (int i = 0; i < kExamples * kDeep * kChannels; i++) assign(x[i], value(i / kChannels, i % kChannels));
  std::vector<float> out(32 * 8);
  DELFAST_LAUNCH(multiply_rows<bug>, 2, 64, 2 * kStageRows * kChannels * 2, nullptr, x, out.data());
  if (cuda_on_cpu::bank_conflicts.count) {
    std::cout << "bank conflicts: " << cuda_on_cpu::bank_conflicts.first << "\n";
    return false;
  }
  bool right = true;
  for (int m = 0; m < 32; m++)
    for (int n = 0; n < 8; n++) {
      float want = 0;
      for (int e = 0; e < kExamples; e++) {
        float sum = 0;
        for (int row = e * kDeep; row < (e + 1) * kDeep; row++) sum += value(row, m) * value(row, n);
        want += std::fabs(sum);
      }
      right &= out[size_t(m * 8 + n)] == want;
    }
  return right;
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
  return run_products<bug>() && right;
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
    std::cout << (right ? "right results\n" : "planted_bugs.cpp: wrong results\n");
    return right ? 0 : 1;
  } catch (const cuda_on_cpu::KernelError& error) {
    std::cout << error.what() << "\n";
    return 1;
  }
}
