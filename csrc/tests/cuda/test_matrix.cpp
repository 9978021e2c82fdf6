// The CUDA-on-CPU headers of asynchronous copies and of matrix operands in shared memory: the time at which a copy
// completes, the layout of fragments, tf32's rounding, bank conflicts, and the misuse that they must detect.
#include "check.h"
#include "cuda/ptx.cuh"

namespace delfast::test {
namespace {

using nvcuda::wmma::precision::tf32;

// ---- copies

// out: the content of a thread's 16 bytes (as float 0 of 4) before it waits, after it waits for all but the last group,
// and after it waits for all. Odd threads copy zeros in the first group.
__global__ void copy_twice(const float* in, float* out) {
  DELFAST_DYNAMIC_SHARED(float, memory);
  const int me = int(threadIdx.x);
  for (int group = 0; group < 2; group++) {
    ptx::copy_async(ptx::shared_address(memory + (group * 32 + me) * 4), in + (group * 32 + me) * 4,
                    group == 1 || me % 2 == 0);
    ptx::commit_copies();
  }
  out[me * 4] = memory[me * 4];
  out[me * 4 + 1] = memory[(32 + me) * 4];
  ptx::wait_for_copies<1>();
  out[me * 4 + 2] = memory[me * 4];
  ptx::wait_for_copies<0>();
  out[me * 4 + 3] = memory[(32 + me) * 4];
}

void check_completion() {
  alignas(16) float in[256];
  for (int i = 0; i < 256; i++) in[i] = float(i);
  for (uint64_t seed = 0; seed < 6; seed++) {
    describe("asynchronous copies, seed ", seed);
    cuda_on_cpu::set_seed(seed);
    float out[128];
    DELFAST_LAUNCH(copy_twice, 1, 32, 1024, nullptr, in, out);
    int early = 0;
    for (int i = 0; i < 32; i++) {
      const float first = i % 2 ? 0.0f : float(4 * i), second = float(128 + 4 * i);
      for (int before = 0; before < 2; before++) {
        early += !std::isnan(out[4 * i + before]);
        CHECK(std::isnan(out[4 * i + before]) || out[4 * i + before] == (before ? second : first));
      }
      CHECK_EQUAL(out[4 * i + 2], first);
      CHECK_EQUAL(out[4 * i + 3], second);
    }
    CHECK(seed % 3 == 0 ? early == 0 : seed % 3 == 1 ? early == 64 : early > 0 && early < 64);
  }
}

enum class Misuse { none, misaligned_to, misaligned_from, global, twice, unawaited, conflict, lanes };

template <Misuse misuse>
__global__ void misuse_copies(const char* in) {
  DELFAST_DYNAMIC_SHARED(char, memory);
  const int me = int(threadIdx.x);
  const ptx::Shared mine = ptx::shared_address(memory + me * 16);
  char* const elsewhere = const_cast<char*>(in);
  ptx::copy_async(misuse == Misuse::global ? elsewhere : mine + (misuse == Misuse::misaligned_to ? 8 : 0),
                  in + me * 16 + (misuse == Misuse::misaligned_from ? 8 : 0), true);
  if (misuse == Misuse::twice) ptx::copy_async(mine, in, true);
  ptx::commit_copies();
  if (misuse != Misuse::unawaited) ptx::wait_for_copies<0>();
  __syncthreads();
  uint32_t words[4];
  if (misuse != Misuse::lanes || me != 3)
    ptx::load_matrices_transposed(words, misuse == Misuse::conflict ? memory + me % 8 * 64 : mine);
}

template <Misuse misuse>
std::string message_of() {
  alignas(16) static const char in[1024] = {};
  cuda_on_cpu::bank_conflicts = {};
  try {
    DELFAST_LAUNCH(misuse_copies<misuse>, 1, 32, 1024, nullptr, in);
  } catch (const cuda_on_cpu::KernelError& error) {
    return error.what();
  }
  return "";
}

void check_says(const std::string& message, const std::string& said) {
  CHECK_THAT(message.find(said) != std::string::npos, "expected '" + said + "', got '" + message + "'");
}

void check_misuse() {
  for (uint64_t seed = 0; seed < 3; seed++) {
    describe("misuse, seed ", seed);
    cuda_on_cpu::set_seed(seed);
    CHECK(message_of<Misuse::none>().empty());
    CHECK_EQUAL(cuda_on_cpu::bank_conflicts.count, uint64_t(0));
    check_says(message_of<Misuse::misaligned_to>(), "to a misaligned address");
    check_says(message_of<Misuse::misaligned_from>(), "aligned to 16 bytes");
    check_says(message_of<Misuse::global>(), "not dynamic shared memory");
    check_says(message_of<Misuse::twice>(), "over another that was not waited for");
    check_says(message_of<Misuse::unawaited>(), "whose asynchronous copy was not waited for");
    check_says(message_of<Misuse::lanes>(), "waits at load_matrices_transposed");
    CHECK(message_of<Misuse::conflict>().empty());
    CHECK_EQUAL(cuda_on_cpu::bank_conflicts.count, uint64_t(4));  // 4 times 8 lanes, in 2 x 4 banks
    check_says(cuda_on_cpu::bank_conflicts.first, "test_matrix.cpp");
  }
}

// ---- products

// a: [k][16], b: [k][16], whose first 8 columns count; of 16 bits, by ldmatrix; out = 2 a^T b + 1.
template <class T>
__global__ void multiply_halves(const T* a, const T* b, float* out) {
  DELFAST_DYNAMIC_SHARED(char, memory);
  const int lane = int(threadIdx.x), k = lane / 2, chunk = lane % 2;
  ptx::copy_async(ptx::shared_address(memory + (k * 2 + chunk) * 16), a + k * 16 + chunk * 8, true);
  ptx::copy_async(ptx::shared_address(memory + 512 + (k * 2 + chunk) * 16), b + k * 16 + chunk * 8, true);
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
  __syncthreads();
  uint32_t left[4], both[4];
  ptx::load_matrices_transposed(left, memory + ((lane & 7) + (lane >> 4) * 8) * 32 + (lane >> 3 & 1) * 16);
  ptx::load_matrices_transposed(both, memory + 512 + ((lane & 7) + (lane >> 3 & 1) * 8) * 32);
  const uint32_t right[2] = {both[0], both[1]};
  float sums[4] = {1, 1, 1, 1};
  for (int round = 0; round < 2; round++) ptx::multiply<T>(sums, left, right, sums);
  for (int i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}
// The same product in float32, with fragments by hand: PTX ISA, "Matrix Fragments for mma.m16n8k8".
__global__ void multiply_floats(const float* a, const float* b, float* out) {
  const int lane = int(threadIdx.x), group = lane / 4, in_group = lane % 4;
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; i++) left[i] = float_bits(a[(in_group + i / 2 * 4) * 16 + group + i % 2 * 8]);
  for (int i = 0; i < 2; i++) right[i] = float_bits(b[(in_group + i * 4) * 16 + group]);
  float sums[4] = {1, 1, 1, 1};
  for (int round = 0; round < 2; round++) ptx::multiply<tf32>(sums, left, right, sums);
  for (int i = 0; i < 4; i++) out[(group + i / 2 * 8) * 8 + in_group * 2 + i % 2] = sums[i];
}

template <class T, class Kernel>
void check_products(const char* what, Kernel kernel, int depth) {
  alignas(16) T a[256] = {}, b[256] = {};
  const auto left = [](int k, int i) { return float((i * 5 + k * 3 + i * k) % 17 - 8); };
  const auto right = [](int k, int j) { return float((k * 7 + j * 11 + j * k) % 13 - 6) * 0.25f; };
  for (int k = 0; k < depth; k++)
    for (int i = 0; i < 16; i++) {
      assign(a[k * 16 + i], left(k, i));
      assign(b[k * 16 + i], right(k, i));
    }
  for (uint64_t seed = 0; seed < 3; seed++) {
    describe(what, ", seed ", seed);
    cuda_on_cpu::set_seed(seed);
    float out[128];
    DELFAST_LAUNCH(kernel, 1, 32, 1024, nullptr, a, b, out);
    for (int i = 0; i < 16; i++)
      for (int j = 0; j < 8; j++) {
        float sum = 0;
        for (int k = 0; k < depth; k++) sum += left(k, i) * right(k, j);  // exact
        CHECK_EQUAL(out[i * 8 + j], 2 * sum + 1);
      }
  }
}

// The same result as cvt.rna.tf32.f32. Infinities and NaNs stay infinities and NaNs, infinities with their sign.
void check_rounding() {
  const auto rounded = [](uint32_t bits) { return bits_float(cuda::round_to_tf32(bits) & ~0x1fffu); };
  for (uint32_t sign : {0u, 0x80000000u})
    for (uint32_t exponent : {0u, 1u, 100u, 127u, 254u})
      for (uint32_t mantissa :
           {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x1fffu, 0x2000u, 0x2fffu, 0x3000u, 0x7fefffu, 0x7ff000u, 0x7fffffu}) {
        const uint32_t bits = sign | exponent << 23 | mantissa;
        describe("tf32 of 0x", std::hex, bits);
        CHECK_SAME(rounded(bits), nvcuda::wmma::__float_to_tf32(bits_float(bits)));
      }
  for (uint32_t sign : {0u, 0x80000000u}) {
    describe("tf32 of what is not finite, sign ", sign);
    CHECK_SAME(rounded(sign | 0x7f800000), bits_float(sign | 0x7f800000));
    for (uint32_t payload : {0x1000u, 0x2000u, 0x400000u, 0x400001u, 0x7fefffu, 0x7ff000u, 0x7ff001u, 0x7fffffu})
      CHECK(std::isnan(rounded(sign | 0x7f800000 | payload)));
  }
}

}  // namespace
}  // namespace delfast::test

int main() {
  using namespace delfast::test;
  check_completion();
  check_misuse();
  check_products<delfast::float16>("float16", multiply_halves<delfast::float16>, 16);
  check_products<delfast::bfloat16>("bfloat16", multiply_halves<delfast::bfloat16>, 16);
  check_products<float>("tf32", multiply_floats, 8);
  check_rounding();
  return report();
}
