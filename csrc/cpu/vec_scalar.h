// Vec: 16 floats, one lane at a time. This file is the definition. vec_avx2.h and vec_avx512.h give the same results
// bit for bit (except multiply_add) with wider registers. All kernels are written against Vec, so that they add in the
// same order on every instruction set.
#pragma once

#include <cstdint>

#include "delfast/half.h"

namespace delfast::cpu::scalar {

struct Vec {
  float lane[16];

  static Vec broadcast(float x) {
    Vec v;
    for (float& lane : v.lane) lane = x;
    return v;
  }
  // Broadcasts a value from memory. Volatile, because GCC 12 at -O3 would otherwise load neighbours of the next
  // iteration as well, past the end of the array, to broadcast two at a time.
  static Vec broadcast_at(const float* p) { return broadcast(*static_cast<const volatile float*>(p)); }
  template <class T>
  static Vec load(const T* p) {
    Vec v;
    for (int i = 0; i < 16; i++) v.lane[i] = to_float(p[i]);
    return v;
  }
  // The first n < 16 elements. The other lanes are zero, and memory past the n-th is not accessed.
  template <class T>
  static Vec load_first(const T* p, int n) {
    Vec v = broadcast(0);
    for (int i = 0; i < n; i++) v.lane[i] = to_float(p[i]);
    return v;
  }
  // Lane i takes the next element of the compact array if bit i of mask is set, else zero.
  static Vec expand(const float* p, uint32_t mask) {
    Vec v = broadcast(0);
    for (int i = 0; i < 16; i++)
      if (mask >> i & 1) v.lane[i] = *p++;
    return v;
  }

  template <class T>
  void store(T* p) const {
    for (int i = 0; i < 16; i++) assign(p[i], lane[i]);
  }
  // Writes the lanes whose bit is set. Memory of the other lanes is not accessed.
  template <class T>
  void store_masked(T* p, uint32_t mask) const {
    for (int i = 0; i < 16; i++)
      if (mask >> i & 1) assign(p[i], lane[i]);
  }
  void compress(float* p, uint32_t mask) const {
    for (int i = 0; i < 16; i++)
      if (mask >> i & 1) *p++ = lane[i];
  }
  void store_bits(uint32_t* p) const {
    for (int i = 0; i < 16; i++) p[i] = float_bits(lane[i]);
  }

  Vec abs() const {
    return map([](float x) { return bits_float(float_bits(x) & 0x7fffffff); });
  }
  Vec sqrt() const {
    return map([](float x) { return __builtin_sqrtf(x); });
  }
  // Keeps the lanes whose bits are >= threshold as integers (lanes are non-negative floats); the others become zero.
  Vec at_least(int32_t threshold) const {
    return map([=](float x) { return int32_t(float_bits(x)) >= threshold ? x : 0.0f; });
  }
  uint32_t mask_at_least(int32_t threshold) const {
    uint32_t mask = 0;
    for (int i = 0; i < 16; i++) mask |= uint32_t(int32_t(float_bits(lane[i])) >= threshold) << i;
    return mask;
  }
  uint32_t mask_shifted_equal(int shift, uint32_t value) const {
    uint32_t mask = 0;
    for (int i = 0; i < 16; i++) mask |= uint32_t(float_bits(lane[i]) >> shift == value) << i;
    return mask;
  }
  int32_t largest_bits() const {
    int32_t largest = 0;
    for (float x : lane) largest = int32_t(float_bits(x)) > largest ? int32_t(float_bits(x)) : largest;
    return largest;
  }

  friend Vec operator+(Vec a, Vec b) {
    return zip(a, b, [](float x, float y) { return x + y; });
  }
  friend Vec operator-(Vec a, Vec b) {
    return zip(a, b, [](float x, float y) { return x - y; });
  }
  friend Vec operator*(Vec a, Vec b) {
    return zip(a, b, [](float x, float y) { return x * y; });
  }
  friend Vec operator/(Vec a, Vec b) {
    return zip(a, b, [](float x, float y) { return x / y; });
  }
  // a b + c, rounded once where the instruction set supports it, otherwise twice: the only operation whose bits differ.
  static Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }
  // Larger by bits as integers: the larger of non-negative floats; a NaN is larger than every number.
  static Vec max_bits(Vec a, Vec b) {
    return zip(a, b, [](float x, float y) { return int32_t(float_bits(x)) > int32_t(float_bits(y)) ? x : y; });
  }

 private:
  template <class F>
  Vec map(F f) const {
    Vec v;
    for (int i = 0; i < 16; i++) v.lane[i] = f(lane[i]);
    return v;
  }
  template <class F>
  static Vec zip(Vec a, Vec b, F f) {
    Vec v;
    for (int i = 0; i < 16; i++) v.lane[i] = f(a.lane[i], b.lane[i]);
    return v;
  }
};

// Counts lanes whose bits are >= a threshold.
struct Counter {
  int32_t count[16] = {};
  void add(Vec v, int32_t threshold) {
    for (int i = 0; i < 16; i++) count[i] += int32_t(float_bits(v.lane[i])) >= threshold;
  }
  void add(const Counter& other) {
    for (int i = 0; i < 16; i++) count[i] += other.count[i];
  }
  int64_t total() const {
    int64_t sum = 0;
    for (int32_t c : count) sum += c;
    return sum;
  }
};

}  // namespace delfast::cpu::scalar
