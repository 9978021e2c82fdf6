// Vec (defined by vec_scalar.h) in two AVX2 registers. Needs -mavx2 -mfma -mf16c.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "delfast/half.h"

namespace delfast::cpu::avx2 {

struct Vec {
  __m256 low, high;

  static Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Vec broadcast_at(const float* p) { return broadcast(*p); }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Vec load(const bfloat16* p) { return {widen(p), widen(p + 8)}; }
  static Vec load(const float16* p) { return {widen(p), widen(p + 8)}; }
  static Vec load_first(const float* p, int n) {
    const uint32_t mask = (1u << n) - 1;
    return {_mm256_maskload_ps(p, lanes(mask)), _mm256_maskload_ps(p + 8, lanes(mask >> 8))};
  }
  template <class T>
  static Vec load_first(const T* p, int n) {
    T padded[16] = {};
    for (int i = 0; i < n; i++) padded[i] = p[i];
    return load(padded);
  }
  static Vec expand(const float* p, uint32_t mask) {
    float lanes[16] = {};
    for (; mask; mask &= mask - 1) lanes[__builtin_ctz(mask)] = *p++;
    return load(lanes);
  }

  void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  void store(bfloat16* p) const {
    float lanes[16];
    store(lanes);
    for (int i = 0; i < 16; i++) assign(p[i], lanes[i]);
  }
  void store(float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
  }
  void store_masked(float* p, uint32_t mask) const {
    _mm256_maskstore_ps(p, lanes(mask), low);
    _mm256_maskstore_ps(p + 8, lanes(mask >> 8), high);
  }
  template <class T>
  void store_masked(T* p, uint32_t mask) const {
    T lanes[16];
    store(lanes);
    for (; mask; mask &= mask - 1) p[__builtin_ctz(mask)] = lanes[__builtin_ctz(mask)];
  }
  void compress(float* p, uint32_t mask) const {
    float lanes[16];
    store(lanes);
    for (; mask; mask &= mask - 1) *p++ = lanes[__builtin_ctz(mask)];
  }
  void store_bits(uint32_t* p) const { store(reinterpret_cast<float*>(p)); }

  Vec abs() const {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    return {_mm256_and_ps(low, magnitude), _mm256_and_ps(high, magnitude)};
  }
  Vec sqrt() const { return {_mm256_sqrt_ps(low), _mm256_sqrt_ps(high)}; }
  Vec at_least(int32_t threshold) const {
    const __m256i below = _mm256_set1_epi32(threshold - 1);
    return {_mm256_and_ps(low, _mm256_castsi256_ps(above(low, below))),
            _mm256_and_ps(high, _mm256_castsi256_ps(above(high, below)))};
  }
  uint32_t mask_at_least(int32_t threshold) const {
    const __m256i below = _mm256_set1_epi32(threshold - 1);
    return signs(above(low, below)) | signs(above(high, below)) << 8;
  }
  uint32_t mask_shifted_equal(int shift, uint32_t value) const {
    const __m256i wanted = _mm256_set1_epi32(int32_t(value));
    const __m128i count = _mm_cvtsi32_si128(shift);
    return signs(_mm256_cmpeq_epi32(_mm256_srl_epi32(_mm256_castps_si256(low), count), wanted)) |
           signs(_mm256_cmpeq_epi32(_mm256_srl_epi32(_mm256_castps_si256(high), count), wanted)) << 8;
  }
  int32_t largest_bits() const {
    const __m256i m = _mm256_max_epi32(_mm256_castps_si256(low), _mm256_castps_si256(high));
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
  static Vec multiply_add(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static Vec max_bits(Vec a, Vec b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }

  static __m256i above(__m256 v, __m256i below) { return _mm256_cmpgt_epi32(_mm256_castps_si256(v), below); }

 private:
  // All bits of lane i set where bit i of mask is.
  static __m256i lanes(uint32_t mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int32_t(mask)), bit), bit);
  }
  static __m256 widen(const bfloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static __m256 widen(const float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static uint32_t signs(__m256i v) { return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(v))); }
  static __m256 larger(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
};

struct Counter {
  __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
  void add(Vec v, int32_t threshold) {
    const __m256i below = _mm256_set1_epi32(threshold - 1);
    low = _mm256_sub_epi32(low, Vec::above(v.low, below));  // a true lane is -1
    high = _mm256_sub_epi32(high, Vec::above(v.high, below));
  }
  void add(const Counter& other) {
    low = _mm256_add_epi32(low, other.low);
    high = _mm256_add_epi32(high, other.high);
  }
  int64_t total() const {
    alignas(32) int32_t count[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(count), _mm256_add_epi32(low, high));
    int64_t sum = 0;
    for (int32_t c : count) sum += c;
    return sum;
  }
};

}  // namespace delfast::cpu::avx2
