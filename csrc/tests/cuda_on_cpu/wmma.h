// The warp's matrix operations, nvcuda::wmma, as far as the kernels use them: 16 x 16 tiles of float32, from operands
// of 16 bits (16 deep) or tf32 (8 deep).
//
// Where a fragment keeps which element is unspecified, so here lane l has the elements from l * num_elements on, in
// row-major order; code that relies on more than that fragments of one type agree is wrong on a GPU. As there, the
// lanes must come together with the same pointer and pitch, aligned to 32 and 16 bytes. Products are exact, as the
// hardware's are (PTX ISA, "wmma.mma"), and are added to the accumulator one by one in float32; on the hardware the
// order and the rounding of these additions, of "at least single precision", are unspecified.
#pragma once

#include "cuda_on_cpu/intrinsics.h"
#include "delfast/half.h"

using __half = delfast::float16;
using __nv_bfloat16 = delfast::bfloat16;

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
enum layout_t { mem_row_major, mem_col_major };
namespace precision {
struct tf32 {};  // float32 of whose mantissa the first 10 bits count
}  // namespace precision

template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment {
  static_assert(m == 16 && n == 16 && (std::is_same_v<Use, accumulator> || k == (std::is_same_v<T, precision::tf32> ? 8 : 16)),
                "no such shape");
  static constexpr int kRows = std::is_same_v<Use, matrix_b> ? k : m, kColumns = std::is_same_v<Use, matrix_a> ? k : n;
  static constexpr int num_elements = kRows * kColumns / cuda_on_cpu::kWarp;
  using element_type = std::conditional_t<std::is_same_v<T, precision::tf32>, float, T>;
  element_type x[num_elements];
};

template <class Use, int m, int n, int k, class T, class Layout>
void fill_fragment(fragment<Use, m, n, k, T, Layout>& f, typename fragment<Use, m, n, k, T, Layout>::element_type value) {
  for (auto& element : f.x) element = value;
}

// To nearest, ties away from zero (PTX ISA, "cvt.rna.tf32.f32"); what is not finite stays as it is.
inline float __float_to_tf32(float value) {
  const uint32_t bits = delfast::float_bits(value);
  return (bits & 0x7f800000) == 0x7f800000 ? value : delfast::bits_float((bits + 0x1000) & ~0x1fffu);
}

}  // namespace nvcuda::wmma

namespace cuda_on_cpu {

// Ends when all 32 lanes have come with the same matrix.
inline void agree_on_matrix(const char* name, const void* matrix, unsigned pitch, size_t element_bytes,
                            const Place& place) {
  if (reinterpret_cast<uintptr_t>(matrix) % 32 || pitch * element_bytes % 16)
    fail_here(std::string(name) + " of a matrix that is not aligned to 32 bytes, or its rows to 16", place);
  warp_operation(name, ~0u, reinterpret_cast<uint64_t>(matrix), int(pitch), place, false,
                 [name](Thread* warp, unsigned lanes) {
                   for (int l = 0; l < kWarp; l++)
                     if (lanes != ~0u || warp[l].value != warp[0].value || warp[l].source != warp[0].source)
                       return report_failure(std::string(name) + " with lanes missing, or of different matrices: " +
                                             describe_thread(device.current / kWarp * kWarp));
                 });
}

// Calls f(element of the fragment, place in the matrix) for each element that this lane has.
template <class Fragment, class F>
void for_each_element(Fragment& fragment, unsigned pitch, bool by_rows, F f) {
  for (int i = 0; i < Fragment::num_elements; i++) {
    const int element = lane_number() * Fragment::num_elements + i;
    const size_t row = size_t(element / Fragment::kColumns), column = size_t(element % Fragment::kColumns);
    f(fragment.x[i], by_rows ? row * pitch + column : column * pitch + row);
  }
}

inline float operand(float value) { return delfast::bits_float(delfast::float_bits(value) & ~0x1fffu); }  // tf32
inline float operand(delfast::float16 value) { return delfast::to_float(value); }
inline float operand(delfast::bfloat16 value) { return delfast::to_float(value); }

}  // namespace cuda_on_cpu

namespace nvcuda::wmma {

template <class Use, int k, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, k, T, Layout>& f,
                      const typename fragment<Use, 16, 16, k, T, Layout>::element_type* matrix, unsigned pitch,
                      cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  cuda_on_cpu::agree_on_matrix("load_matrix_sync", matrix, pitch, sizeof *matrix, place);
  cuda_on_cpu::for_each_element(f, pitch, std::is_same_v<Layout, row_major>,
                                [&](auto& element, size_t at) { element = matrix[at]; });
}

template <int k>
void store_matrix_sync(float* matrix, const fragment<accumulator, 16, 16, k, float>& f, unsigned pitch, layout_t layout,
                       cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  cuda_on_cpu::agree_on_matrix("store_matrix_sync", matrix, pitch, sizeof *matrix, place);
  cuda_on_cpu::for_each_element(f, pitch, layout == mem_row_major,
                                [&](const float& element, size_t at) { matrix[at] = element; });
}

// d = a b + c. The last lane to come multiplies for all of them.
template <int k, class T, class LayoutA, class LayoutB>
void mma_sync(fragment<accumulator, 16, 16, k, float>& d, const fragment<matrix_a, 16, 16, k, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, k, T, LayoutB>& b, const fragment<accumulator, 16, 16, k, float>& c,
              cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  struct Part {
    float a[16 * k / 32], b[16 * k / 32], c[8];
    float* d;
  } part;
  for (int i = 0; i < 16 * k / 32; i++) {
    part.a[i] = cuda_on_cpu::operand(a.x[i]);
    part.b[i] = cuda_on_cpu::operand(b.x[i]);
  }
  std::memcpy(part.c, c.x, sizeof part.c);
  part.d = d.x;
  cuda_on_cpu::warp_operation(
      "mma_sync", ~0u, reinterpret_cast<uint64_t>(&part), 0, place, false,
      [](cuda_on_cpu::Thread* warp, unsigned lanes) {
        if (lanes != ~0u) return cuda_on_cpu::report_failure("mma_sync with lanes missing");
        float left[16][k], right[k][16], sums[16][16];
        for (int l = 0; l < cuda_on_cpu::kWarp; l++) {
          const Part& part = *reinterpret_cast<const Part*>(warp[l].value);
          std::memcpy(&left[0][0] + l * 16 * k / 32, part.a, sizeof part.a);
          std::memcpy(&right[0][0] + l * 16 * k / 32, part.b, sizeof part.b);
          std::memcpy(&sums[0][0] + l * 8, part.c, sizeof part.c);
        }
        for (int i = 0; i < 16; i++)
          for (int t = 0; t < k; t++)
            for (int j = 0; j < 16; j++) sums[i][j] += left[i][t] * right[t][j];
        for (int l = 0; l < cuda_on_cpu::kWarp; l++)
          std::memcpy(reinterpret_cast<const Part*>(warp[l].value)->d, &sums[0][0] + l * 8, 8 * sizeof(float));
      });
}

}  // namespace nvcuda::wmma
