// The CUDA-on-CPU header of the warp's matrix operations: products in every layout against a loop, tf32's rounding, and
// the misuse that it must detect.
#include "check.h"
#include "cuda/common.cuh"

namespace delfast::test {
namespace {

using namespace nvcuda::wmma;

template <class T>
struct Operand;
template <>
struct Operand<precision::tf32> {
  static constexpr int kDepth = 8;
  static float of(float value) { return value; }
  using Stored = float;
};
template <class Half>
struct HalfOperand {
  static constexpr int kDepth = 16;
  static Half of(float value) {
    Half half;
    assign(half, value);
    return half;
  }
  using Stored = Half;
};
template <>
struct Operand<__half> : HalfOperand<__half> {};
template <>
struct Operand<__nv_bfloat16> : HalfOperand<__nv_bfloat16> {};

constexpr int kPitch = 24;  // larger than either side of a matrix

template <class T, class LayoutA, class LayoutB>
__global__ void multiply(const typename Operand<T>::Stored* a, const typename Operand<T>::Stored* b, float* out,
                         bool by_rows) {
  constexpr int k = Operand<T>::kDepth;
  fragment<matrix_a, 16, 16, k, T, LayoutA> left;
  fragment<matrix_b, 16, 16, k, T, LayoutB> right;
  fragment<accumulator, 16, 16, k, float> sums;
  fill_fragment(sums, 1.0f);
  load_matrix_sync(left, a, kPitch);
  load_matrix_sync(right, b, kPitch);
  for (int round = 0; round < 2; round++) mma_sync(sums, left, right, sums);
  for (int i = 0; i < sums.num_elements; i++) sums.x[i] *= 0.5f;
  store_matrix_sync(out, sums, kPitch, by_rows ? mem_row_major : mem_col_major);
}

template <class T, class LayoutA, class LayoutB>
void check_products(const char* name) {
  constexpr int k = Operand<T>::kDepth;
  constexpr bool a_rows = std::is_same_v<LayoutA, row_major>, b_rows = std::is_same_v<LayoutB, row_major>;
  alignas(32) typename Operand<T>::Stored a[16 * kPitch] = {}, b[16 * kPitch] = {};
  const auto at = [](bool by_rows, int row, int column) {
    return by_rows ? row * kPitch + column : column * kPitch + row;
  };
  const auto left = [](int i, int t) { return float((i * 5 + t * 3) % 17 - 8); };
  const auto right = [](int t, int j) { return float((t * 7 + j * 11) % 13 - 6) * 0.25f; };
  for (int i = 0; i < 16; i++)
    for (int t = 0; t < k; t++) {
      a[at(a_rows, i, t)] = Operand<T>::of(left(i, t));
      b[at(b_rows, t, i)] = Operand<T>::of(right(t, i));
    }
  for (uint64_t seed : {0, 1, 2})
    for (bool by_rows : {true, false}) {
      cuda_on_cpu::set_seed(seed);
      alignas(32) float out[16 * kPitch] = {};
      DELFAST_LAUNCH((multiply<T, LayoutA, LayoutB>), 1, 32, 0, nullptr, a, b, out, by_rows);
      describe(name, a_rows ? ", a by rows" : ", a by columns", b_rows ? ", b by rows" : ", b by columns",
               by_rows ? ", result by rows" : ", result by columns", ", seed ", seed);
      for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
          float sum = 0;
          for (int t = 0; t < k; t++) sum += left(i, t) * right(t, j);  // exact
          CHECK_EQUAL(out[at(by_rows, i, j)], sum + 0.5f);
        }
    }
}

template <class T>
void check_layouts(const char* name) {
  check_products<T, row_major, row_major>(name);
  check_products<T, row_major, col_major>(name);
  check_products<T, col_major, row_major>(name);
  check_products<T, col_major, col_major>(name);
}

// One element of a x b, with operands that tf32 cannot represent.
__global__ void multiply_one(float a, float b, bool round, float* out) {
  fragment<matrix_a, 16, 16, 8, precision::tf32, row_major> left;
  fragment<matrix_b, 16, 16, 8, precision::tf32, row_major> right;
  fragment<accumulator, 16, 16, 8, float> sums;
  fill_fragment(left, round ? __float_to_tf32(a) : a);
  fill_fragment(right, round ? __float_to_tf32(b) : b);
  fill_fragment(sums, 0.0f);
  mma_sync(sums, left, right, sums);
  if (threadIdx.x == 0) global_store(out, sums.x[0] / 8);
}

void check_tf32() {
  describe("tf32");
  const float least = 0x1p-10f;                           // smallest step above 1 in tf32
  CHECK_SAME(__float_to_tf32(1 + least / 2), 1 + least);  // a tie goes away from zero
  CHECK_SAME(__float_to_tf32(-1 - least / 2), -1 - least);
  CHECK_SAME(__float_to_tf32(1 + least / 2 - 0x1p-23f), 1.0f);
  CHECK_SAME(__float_to_tf32(1 + 3 * least / 2), 1 + 2 * least);
  CHECK_SAME(__float_to_tf32(2 - 0x1p-23f), 2.0f);
  CHECK_SAME(__float_to_tf32(-0.0f), -0.0f);
  CHECK_SAME(__float_to_tf32(bits_float(0x7f800000)), bits_float(0x7f800000));
  CHECK(std::isnan(__float_to_tf32(bits_float(0x7f800001))));
  CHECK_SAME(__float_to_tf32(bits_float(0x7f7fffff)), bits_float(0x7f800000));
  for (bool round : {false, true}) {
    float out;
    DELFAST_LAUNCH(multiply_one, 1, 32, 0, nullptr, 1 + 0.75f * least, 3.0f, round, &out);
    CHECK_SAME(out, round ? 3 * (1 + least) : 3.0f);  // bits beyond tf32 are truncated
  }
}

// ---- misuse

__global__ void load(const float* matrix, unsigned pitch, int apart) {
  fragment<matrix_a, 16, 16, 8, precision::tf32, row_major> left;
  load_matrix_sync(left, matrix + (threadIdx.x == 3 ? apart : 0), pitch);
}
__global__ void multiply_some() {
  fragment<matrix_a, 16, 16, 8, precision::tf32, row_major> left;
  fragment<matrix_b, 16, 16, 8, precision::tf32, row_major> right;
  fragment<accumulator, 16, 16, 8, float> sums;
  fill_fragment(left, 1.0f), fill_fragment(right, 1.0f), fill_fragment(sums, 1.0f);
  if (threadIdx.x != 3) mma_sync(sums, left, right, sums);
}

template <class F>
void check_fails(const char* what, const std::string& said, F f) {
  describe(what);
  std::string message;
  try {
    f();
  } catch (const cuda_on_cpu::KernelError& error) {
    message = error.what();
  }
  CHECK_THAT(message.find(said) != std::string::npos, "expected '" + said + "', got '" + message + "'");
}

void check_misuse() {
  alignas(32) static const float matrix[64 * 16] = {};
  for (uint64_t seed : {0, 3}) {
    cuda_on_cpu::set_seed(seed);
    check_fails("a matrix that begins anywhere", "aligned to 32 bytes",
                [] { DELFAST_LAUNCH(load, 1, 32, 0, nullptr, matrix + 4, 8, 0); });
    check_fails("rows that begin anywhere", "its rows to 16",
                [] { DELFAST_LAUNCH(load, 1, 32, 0, nullptr, matrix, 9, 0); });
    check_fails("two matrices", "of different matrices",
                [] { DELFAST_LAUNCH(load, 1, 32, 0, nullptr, matrix, 8, 64); });
    check_fails("half a warp", "lanes missing", [] { DELFAST_LAUNCH(load, 1, 16, 0, nullptr, matrix, 8, 0); });
    check_fails("a lane is missing", "waits at mma_sync", [] { DELFAST_LAUNCH(multiply_some, 1, 32, 0, nullptr); });
  }
}

}  // namespace
}  // namespace delfast::test

int main() {
  using namespace delfast::test;
  check_layouts<precision::tf32>("tf32");
  check_layouts<__half>("float16");
  check_layouts<__nv_bfloat16>("bfloat16");
  check_tf32();
  check_misuse();
  return report();
}
