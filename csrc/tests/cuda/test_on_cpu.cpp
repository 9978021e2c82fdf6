// The CUDA-on-CPU headers themselves: the meaning of each operation, poisoned shared memory, the order of blocks,
// failures that name their place, and the sector counter against numbers counted by hand.
#include "check.h"
#include "cuda/common.cuh"

namespace delfast::test {
namespace {

using cuda_on_cpu::set_seed;

constexpr int kBlock = 72;  // two warps and a quarter

// A kernel's result, one number for each thread of one block.
template <class Kernel, class... Arguments>
std::vector<uint64_t> results(Kernel kernel, int threads, Arguments... arguments) {
  std::vector<uint64_t> out(size_t(threads), 0);
  DELFAST_LAUNCH(kernel, 1, unsigned(threads), 0, nullptr, out.data(), arguments...);
  return out;
}

uint64_t number(int i) { return 1000 + 7 * uint64_t(i) * uint64_t(i); }

template <int operation>
__global__ void warp_operations(uint64_t* out, int argument) {
  const int i = int(threadIdx.x);
  const unsigned mine = unsigned(number(i));
  switch (operation) {
    case 0:
      out[i] = __shfl_sync(~0u, mine, argument);
      break;
    case 1:
      out[i] = __shfl_xor_sync(~0u, mine, argument);
      break;
    case 2:
      out[i] = __shfl_down_sync(~0u, mine, unsigned(argument));
      break;
    case 3:
      out[i] = __shfl_up_sync(~0u, mine, unsigned(argument));
      break;
    case 4:
      out[i] = __ballot_sync(~0u, i % argument == 0);
      break;
    case 5:
      out[i] = __reduce_add_sync(~0u, mine);
      break;
    case 6:
      out[i] = __reduce_max_sync(~0u, mine % 1013);
      break;
    case 7:
      out[i] = __shfl_xor_sync(~0u, mine, argument, 8);
      break;
    case 8:
      out[i] = uint64_t(__shfl_down_sync(~0u, double(mine) * 1e9, unsigned(argument)));
      break;
  }
}

void check_warp_operations() {
  const int threads = 64;
  for (uint64_t seed : {0, 1, 2})
    for (int argument : {1, 2, 5, 16}) {
      set_seed(seed);
      const auto shuffled = results(warp_operations<0>, threads, argument),
                 crossed = results(warp_operations<1>, threads, argument),
                 down = results(warp_operations<2>, threads, argument),
                 up = results(warp_operations<3>, threads, argument),
                 ballot = results(warp_operations<4>, threads, argument),
                 sum = results(warp_operations<5>, threads, argument),
                 largest = results(warp_operations<6>, threads, argument),
                 narrow = results(warp_operations<7>, threads, argument % 8),
                 wide = results(warp_operations<8>, threads, argument);
      for (int i = 0; i < threads; i++) {
        describe("warp operations, seed ", seed, ", argument ", argument, ", thread ", i);
        const int base = i / 32 * 32, lane = i % 32;
        const int below = lane + argument < 32 ? i + argument : i, above = lane >= argument ? i - argument : i;
        uint64_t bits = 0, total = 0, most = 0;
        for (int l = 0; l < 32; l++) {
          bits |= uint64_t((base + l) % argument == 0) << l;
          total += number(base + l);
          most = std::max(most, number(base + l) % 1013);
        }
        const size_t at = size_t(i);
        CHECK_EQUAL(shuffled[at], number(base + argument));
        CHECK_EQUAL(crossed[at], number(base + (lane ^ argument)));
        CHECK_EQUAL(down[at], number(below));
        CHECK_EQUAL(up[at], number(above));
        CHECK_EQUAL(ballot[at], bits);
        CHECK_EQUAL(sum[at], total);
        CHECK_EQUAL(largest[at], most);
        CHECK_EQUAL(narrow[at], number(base + (lane ^ argument % 8)));
        CHECK_EQUAL(wide[at], number(below) * 1000000000);
      }
    }
}

__global__ void block_sum(uint64_t* out) {
  DELFAST_SHARED(uint64_t, totals, [32]);
  uint64_t total;
  const uint64_t before = cuda::block_exclusive_scan(number(int(threadIdx.x)), totals, total);
  out[threadIdx.x] = before * 1000003 + total;
}

__global__ void atomics(uint64_t* out) {
  DELFAST_SHARED(unsigned, sum);
  DELFAST_SHARED(unsigned, most);
  DELFAST_SHARED(unsigned, least);
  if (threadIdx.x == 0) sum = 0, most = 0, least = ~0u;
  __syncthreads();
  atomicAdd(&sum, threadIdx.x);
  atomicMax(&most, threadIdx.x);
  atomicMin(&least, threadIdx.x + 3);
  __syncthreads();
  out[threadIdx.x] = uint64_t(sum) << 32 | most << 16 | least;
}

// Reads memory that the block has not written, then writes it, so that the next block could read it.
__global__ void leftover(float* out) {
  DELFAST_SHARED(float, fixed, [kBlock]);
  DELFAST_DYNAMIC_SHARED(float, dynamic);
  const unsigned i = threadIdx.x;
  out[blockIdx.x * kBlock + i] = fixed[i] + dynamic[i];
  fixed[i] = dynamic[i] = 1;
}

__global__ void order_of_blocks(int* order, int* next) { order[(*next)++] = int(blockIdx.x); }

// The last block to finish reads the results of all others.
__global__ void last_block_adds(int* written, unsigned* done, int* sum) {
  written[blockIdx.x] = int(blockIdx.x) + 1;
  __threadfence();
  if (atomicAdd(done, 1u) + 1 != gridDim.x) return;
  __threadfence();
  for (unsigned b = 0; b < gridDim.x; b++) *sum += written[b];
}

void check_blocks() {
  for (uint64_t seed : {0, 5}) {
    set_seed(seed);
    describe("blocks, seed ", seed);
    const auto sums = results(block_sum, 96);
    uint64_t before = 0, total = 0;
    for (int i = 0; i < 96; i++) total += number(i);
    for (int i = 0; i < 96; i++, before += number(i - 1)) CHECK_EQUAL(sums[size_t(i)], before * 1000003 + total);
    for (uint64_t x : results(atomics, kBlock))
      CHECK_EQUAL(x, uint64_t(kBlock * (kBlock - 1) / 2) << 32 | 71 << 16 | 3);
    std::vector<float> left(4 * kBlock, 0);
    DELFAST_LAUNCH(leftover, 4, kBlock, kBlock * sizeof(float), nullptr, left.data());
    for (float x : left) CHECK(std::isnan(x));
    std::vector<int> order(50), sorted(50);
    int next = 0;
    DELFAST_LAUNCH(order_of_blocks, 50, 1, 0, nullptr, order.data(), &next);
    for (int i = 0; i < 50; i++) sorted[size_t(i)] = i;
    CHECK_EQUAL(order == sorted, seed == 0);
    CHECK(std::is_permutation(order.begin(), order.end(), sorted.begin()));
    unsigned done = 0;
    int sum = 0;
    DELFAST_LAUNCH(last_block_adds, 50, 1, 0, nullptr, order.data(), &done, &sum);
    CHECK_EQUAL(sum, 50 * 51 / 2);
  }
}

// ---- failures

__global__ void trap(int thread) {
  if (int(threadIdx.x) == thread) __trap();
}
__global__ void misaligned(const unsigned char* memory) { global_load(reinterpret_cast<const uint4*>(memory + 4)); }
__global__ void exit_before_barrier() {
  if (threadIdx.x < 3) return;
  __syncthreads();
}
__global__ void different_operations() {
  if (threadIdx.x % 2)
    __ballot_sync(~0u, 1);
  else
    __reduce_add_sync(~0u, 1);
}
__global__ void lane_missing() {
  if (threadIdx.x) __syncwarp();
}
__global__ void shuffle_from_outside() {
  if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 9);
}
__global__ void nothing() {}

template <class F>
void check_fails(const char* what, const std::vector<std::string>& said, F f) {
  describe(what);
  std::string message;
  try {
    f();
  } catch (const cuda_on_cpu::KernelError& error) {
    message = error.what();
  }
  for (const std::string& part : said)
    CHECK_THAT(message.find(part) != std::string::npos, "expected '" + part + "', got '" + message + "'");
}

void check_failures() {
  for (uint64_t seed : {0, 3}) {
    set_seed(seed);
    alignas(16) const unsigned char memory[32] = {};
    check_fails("trap", {"kernel trap", "__trap", "thread 5", "test_on_cpu.cpp:"},
                [] { DELFAST_LAUNCH(trap, 1, 64, 0, nullptr, 5); });
    check_fails("misaligned", {"aligned to 16 bytes", "test_on_cpu.cpp:"},
                [&] { DELFAST_LAUNCH(misaligned, 1, 1, 0, nullptr, memory); });
    check_fails("exit before a barrier", {"divergent __syncthreads", "has exited"},
                [] { DELFAST_LAUNCH(exit_before_barrier, 1, 64, 0, nullptr); });
    check_fails("different operations", {"different operations", "__ballot_sync", "__reduce_add_sync"},
                [] { DELFAST_LAUNCH(different_operations, 1, 32, 0, nullptr); });
    check_fails("a lane is missing", {"deadlock", "waits at __syncwarp"},
                [] { DELFAST_LAUNCH(lane_missing, 1, 32, 0, nullptr); });
    check_fails("a shuffle from outside", {"from lane 9"},
                [] { DELFAST_LAUNCH(shuffle_from_outside, 1, 32, 0, nullptr); });
    check_fails("too many threads", {"1025 threads"}, [] { DELFAST_LAUNCH(nothing, 1, 1025, 0, nullptr); });
    check_fails("no blocks", {"a grid of impossible size"}, [] { DELFAST_LAUNCH(nothing, 0, 32, 0, nullptr); });
    cudaFuncSetAttribute(nothing, cudaFuncAttributePreferredSharedMemoryCarveout, 100);  // does not raise the limit
    check_fails("too much shared memory", {"48129 bytes", "48128 allowed"},
                [] { DELFAST_LAUNCH(nothing, 1, 32, 48129, nullptr); });
    describe("after all these a launch works");
    CHECK_EQUAL(results(warp_operations<5>, 32, 1)[0] > 0, true);
  }
  cudaFuncSetAttribute(trap, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000);
  DELFAST_LAUNCH(trap, 1, 32, 99999, nullptr, -1);  // allowed now
}

// ---- sectors

template <int stride>
__global__ void read_strided(const float* in, float* out, int from) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  global_store(&out[i], global_load(&in[from + i * stride]));
}
__global__ void read_packs(const uint4* in, float* out, int n) {
  uint32_t sum = 0;
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) sum += global_load_const(&in[i]).x;
  __syncwarp();
  if (threadIdx.x == 0) global_store(out, float(sum));
}

void check_sectors() {
  alignas(32) static float in[4096], out[256];
  const auto count = [&](auto kernel, const char* name, auto... arguments) {
    cuda_on_cpu::sectors.start();
    DELFAST_LAUNCH(kernel, 2, 64, 0, nullptr, arguments...);
    return cuda_on_cpu::sectors.stop().at(name);
  };
  for (uint64_t seed : {0, 1}) {
    set_seed(seed);
    describe("sectors, seed ", seed);
    const auto aligned = count(read_strided<1>, "kernel", in, out, 0);  // 4 warps of 128 bytes
    CHECK_EQUAL(aligned.loads.asked, 16u);
    CHECK_EQUAL(aligned.loads.least, 16u);
    CHECK_EQUAL(aligned.stores.asked, 16u);
    CHECK_EQUAL(aligned.ratio(), 1.0);
    const auto shifted = count(read_strided<1>, "kernel", in, out, 1);  // each warp reaches into a fifth sector
    CHECK_EQUAL(shifted.loads.asked, 20u);
    CHECK_EQUAL(shifted.loads.least, 17u);
    const auto strided = count(read_strided<8>, "kernel", in, out, 0);  // a sector for each lane
    CHECK_EQUAL(strided.loads.asked, 128u);
    CHECK_EQUAL(strided.loads.least, 128u);
    const auto packs =
        count(read_packs, "kernel", reinterpret_cast<const uint4*>(in), out, 100);  // both blocks read 50 sectors
    CHECK_EQUAL(packs.loads.asked, 100u);
    CHECK_EQUAL(packs.loads.least, 50u);
    CHECK_EQUAL(packs.stores.asked, 2u);
  }
}

}  // namespace
}  // namespace delfast::test

int main() {
  using namespace delfast::test;
  check_warp_operations();
  check_blocks();
  check_failures();
  check_sectors();
  return report();
}
