// The scores c_j of a parameter, four neighbours at a time. They are loaded as raw words, so that many loads can be in
// flight before the first is used, and then converted to non-negative floats, whose bits have the same order.
#pragma once

#include "cuda/common.cuh"

namespace delfast::cuda {

constexpr uint32_t kInfinity = 0x7f800000;  // the scores from these bits on are infinite or NaN

// Also clears the sign of a NaN: scores are ranked by their bits.
__device__ __forceinline__ float without_sign(float x) { return bits_float(float_bits(x) & 0x7fffffff); }

template <class T>
using FourWords = typename WordOf<4 * int(sizeof(T))>::type;

template <class T>
__device__ __forceinline__ bool aligned_to_four(const T* address) {
  return reinterpret_cast<uintptr_t>(address) % (4 * sizeof(T)) == 0;
}

template <class T>
__device__ __forceinline__ FourWords<T> load_words(const T* address) {
  return global_load_const(reinterpret_cast<const FourWords<T>*>(address));
}

template <class T>
__device__ __forceinline__ void unpack(const FourWords<T>& words, float (&out)[4]) {
  T values[4];
  memcpy(values, &words, sizeof values);
  for (int j = 0; j < 4; j++) out[j] = to_float(values[j]);
}

template <class Theta, class Grad>
struct WeightedGrads {  // |theta g|, the product rounded once, to float32
  struct Raw {
    FourWords<Theta> theta;
    FourWords<Grad> grad;
  };
  const Theta* theta;
  const Grad* grad;

  __device__ __forceinline__ WeightedGrads from(int64_t i) const { return {theta + i, grad + i}; }
  __device__ __forceinline__ const Theta* first() const { return theta; }
  // Returns true if four scores from element i on can be loaded at once.
  __device__ __forceinline__ bool aligned(int64_t i) const {
    return aligned_to_four(theta + i) && aligned_to_four(grad + i);
  }
  __device__ __forceinline__ Raw load(int64_t i) const { return {load_words(theta + i), load_words(grad + i)}; }
  static __device__ __forceinline__ void scores(const Raw& raw, float (&out)[4]) {
    float gradients[4];
    unpack<Theta>(raw.theta, out);
    unpack<Grad>(raw.grad, gradients);
    for (int j = 0; j < 4; j++) out[j] = without_sign(out[j] * gradients[j]);
  }
  __device__ __forceinline__ float one(int64_t i) const {
    return without_sign(load_one(theta + i) * load_one(grad + i));
  }
};

template <class T>
struct Magnitudes {  // |g| or |theta|
  struct Raw {
    FourWords<T> values;
  };
  const T* values;

  __device__ __forceinline__ Magnitudes from(int64_t i) const { return {values + i}; }
  __device__ __forceinline__ const T* first() const { return values; }
  __device__ __forceinline__ bool aligned(int64_t i) const { return aligned_to_four(values + i); }
  __device__ __forceinline__ Raw load(int64_t i) const { return {load_words(values + i)}; }
  static __device__ __forceinline__ void scores(const Raw& raw, float (&out)[4]) {
    unpack<T>(raw.values, out);
    for (int j = 0; j < 4; j++) out[j] = without_sign(out[j]);
  }
  __device__ __forceinline__ float one(int64_t i) const { return without_sign(load_one(values + i)); }
};

// The operands of a parameter's scores.
struct Operands {
  const void* theta;
  const void* grad;
  Dtype theta_dtype, grad_dtype;
};

// Calls f with a typed reader of this parameter's scores under this criterion.
template <class F>
__device__ __forceinline__ void with_scores(const Operands& p, Criterion criterion, F f) {
  const void* values = nullptr;
  Dtype dtype = Dtype::float32;
  switch (criterion) {  // no default: -Wswitch reports a criterion that is missing here
    case Criterion::weighted_grad:
      return with_dtype(p.theta_dtype, [&]<class Theta>(const Theta*) {
        with_dtype(p.grad_dtype, [&]<class Grad>(const Grad*) {
          f(WeightedGrads<Theta, Grad>{static_cast<const Theta*>(p.theta), static_cast<const Grad*>(p.grad)});
        });
      });
    case Criterion::grad:
      values = p.grad;
      dtype = p.grad_dtype;
      break;
    case Criterion::weight:
      values = p.theta;
      dtype = p.theta_dtype;
      break;
  }
  // after the switch, so that both criteria share the instances of f
  with_dtype(dtype, [&]<class T>(const T*) { f(Magnitudes<T>{static_cast<const T*>(values)}); });
}

// Calls f(i, bits) for each of the first `length` scores, distributed over the threads of a block of kThreads.
template <class Scores, class F>
__device__ __forceinline__ void for_each_score(const Scores& score, int length, F f) {
  const int packs = score.aligned(0) ? length / 4 : 0;
  for (int pack = int(threadIdx.x); pack < packs; pack += kThreads) {
    float values[4];
    Scores::scores(score.load(4 * pack), values);
    for (int j = 0; j < 4; j++) f(4 * pack + j, float_bits(values[j]));
  }
  for (int i = 4 * packs + int(threadIdx.x); i < length; i += kThreads) f(i, float_bits(score.one(i)));
}

}  // namespace delfast::cuda
