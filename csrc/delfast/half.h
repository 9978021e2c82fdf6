// bfloat16 and float16 as plain bit patterns, converted by integer arithmetic: the same bits on every machine.
#pragma once

#include <cstdint>
#include <cstring>

// Code shared by files that are compiled for different instruction sets must always be inlined. The linker would keep
// one copy of a function, possibly one that this CPU cannot run.
#ifdef __CUDACC__
#define DELFAST_INLINE __host__ __device__ __forceinline__
#else
#define DELFAST_INLINE inline __attribute__((always_inline))
#endif

namespace delfast {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

DELFAST_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
DELFAST_INLINE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

DELFAST_INLINE float to_float(float x) { return x; }
DELFAST_INLINE float to_float(bfloat16 x) { return bits_float(uint32_t(x.bits) << 16); }
DELFAST_INLINE float to_float(float16 x) {
#ifdef __CUDA_ARCH__  // one instruction, with the same result
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 0x1f, mantissa = x.bits & 0x3ff;
  if (exponent == 0x1f) return bits_float(sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0));
  if (exponent == 0) return bits_float(sign | float_bits(float(mantissa) * 0x1p-24f));
  return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

// Round to nearest, ties to even; a NaN stays a NaN.
DELFAST_INLINE void assign(float& to, float x) { to = x; }
DELFAST_INLINE void assign(bfloat16& to, float x) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to.bits = nan ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DELFAST_INLINE void assign(float16& to, float x) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00 | (magnitude >> 13 & 0x3ff);
  else if (magnitude >= 0x477ff000)  // 65520 and above round to infinity
    half = 0x7c00;
  else if (magnitude < 0x38800000)  // below the least normal half: adding 0.5 leaves units of 2^-24 in the mantissa
    half = float_bits(bits_float(magnitude) + 0.5f) & 0x7ff;
  else
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  to.bits = uint16_t(sign | half);
#endif
}

}  // namespace delfast
