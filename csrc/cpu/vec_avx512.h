// Vec (defined by vec_scalar.h) in one AVX-512 register. Needs -mavx512f -mavx512bw -mavx512dq -mavx512vl.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "delfast/half.h"

namespace delfast::cpu::avx512 {

struct Vec {
  __m512 v;

  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vec broadcast_at(const float* p) { return broadcast(*p); }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) { return widen_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vec load_first(const bfloat16* p, int n) { return widen_bfloat16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static Vec load_first(const float16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
  static Vec expand(const float* p, uint32_t mask) { return {_mm512_maskz_expandloadu_ps(__mmask16(mask), p)}; }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bfloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bfloat16()); }
  void store(float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_float16()); }
  void store_masked(float* p, uint32_t mask) const { _mm512_mask_storeu_ps(p, __mmask16(mask), v); }
  void store_masked(bfloat16* p, uint32_t mask) const {
    _mm256_mask_storeu_epi16(p, __mmask16(mask), narrow_bfloat16());
  }
  void store_masked(float16* p, uint32_t mask) const { _mm256_mask_storeu_epi16(p, __mmask16(mask), narrow_float16()); }
  // Compress in a register, then store: the form that compresses to memory is microcoded on Zen 4 and 5.
  void compress(float* p, uint32_t mask) const {
    _mm512_mask_storeu_ps(p, first(__builtin_popcount(mask)), _mm512_maskz_compress_ps(__mmask16(mask), v));
  }
  void store_bits(uint32_t* p) const { _mm512_storeu_si512(p, bits()); }

  Vec abs() const { return {_mm512_abs_ps(v)}; }
  Vec sqrt() const { return {_mm512_sqrt_ps(v)}; }
  Vec at_least(int32_t threshold) const { return {_mm512_maskz_mov_ps(__mmask16(mask_at_least(threshold)), v)}; }
  uint32_t mask_at_least(int32_t threshold) const {
    return _mm512_cmpge_epi32_mask(bits(), _mm512_set1_epi32(threshold));
  }
  uint32_t mask_shifted_equal(int shift, uint32_t value) const {
    return _mm512_cmpeq_epi32_mask(_mm512_srl_epi32(bits(), _mm_cvtsi32_si128(shift)),
                                   _mm512_set1_epi32(int32_t(value)));
  }
  int32_t largest_bits() const { return _mm512_reduce_max_epi32(bits()); }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max_bits(Vec a, Vec b) { return {_mm512_castsi512_ps(_mm512_max_epi32(a.bits(), b.bits()))}; }

  __m512i bits() const { return _mm512_castps_si512(v); }

 private:
  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
  static Vec widen_bfloat16(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  // By integers, not by vcvtneps2bf16, which flushes denormals.
  __m256i narrow_bfloat16() const {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits(), 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits(), _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
  }
  __m256i narrow_float16() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

struct Counter {
  __m512i count = _mm512_setzero_si512();
  void add(Vec v, int32_t threshold) {
    const __mmask16 mask = _mm512_cmpge_epi32_mask(v.bits(), _mm512_set1_epi32(threshold));
    count = _mm512_mask_sub_epi32(count, mask, count, _mm512_set1_epi32(-1));
  }
  void add(const Counter& other) { count = _mm512_add_epi32(count, other.count); }
  int64_t total() const { return _mm512_reduce_add_epi32(count); }
};

}  // namespace delfast::cpu::avx512
