// The score c_j of sixteen elements at a time, shared by criticality and selection.
// Included once per instruction set, inside its namespace, after its Vec.

// Elements to prefetch ahead: rows follow one another in memory, and the hardware's prefetcher pauses between pages.
// With this distance the means of ResNet-50's channels ran at 0.95 of a stream's bandwidth, without at 0.86 (avx512 on
// an AMD EPYC, 2 CPUs, commit 62cbee7; benchmarks/test_kernels.py). No measurement of other distances is kept.
constexpr int64_t kAhead = 512;

template <class Theta, class Grad>
struct WeightedGrad {  // |theta g|, the product rounded once, to float32
  const Theta* theta;
  const Grad* grad;
  Vec at(int64_t i) const {
    __builtin_prefetch(theta + i + kAhead);
    __builtin_prefetch(grad + i + kAhead);
    return (Vec::load(theta + i) * Vec::load(grad + i)).abs();
  }
  Vec first(int64_t i, int n) const { return (Vec::load_first(theta + i, n) * Vec::load_first(grad + i, n)).abs(); }
  WeightedGrad from(int64_t i) const { return {theta + i, grad + i}; }
};

template <class T>
struct Magnitude {  // |g| or |theta|
  const T* values;
  Vec at(int64_t i) const { return Vec::load(values + i).abs(); }
  Vec first(int64_t i, int n) const { return Vec::load_first(values + i, n).abs(); }
  Magnitude from(int64_t i) const { return {values + i}; }
};

template <class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(static_cast<const float*>(nullptr));
    case Dtype::bfloat16:
      return f(static_cast<const bfloat16*>(nullptr));
    case Dtype::float16:
      if constexpr (kFewInstances)
        __builtin_trap();
      else
        return f(static_cast<const float16*>(nullptr));
  }
}

// Calls f with this parameter's typed scores under this criterion.
template <class F>
void with_score(const Scored& p, Criterion criterion, F f) {
  const void* values = p.theta;
  Dtype dtype = p.theta_dtype;
  switch (criterion) {  // no default: -Wswitch reports a criterion that is missing here
    case Criterion::weighted_grad:
      with_dtype(p.theta_dtype, [&]<class Theta>(const Theta*) {
        with_dtype(p.grad_dtype, [&]<class Grad>(const Grad*) {
          f(WeightedGrad<Theta, Grad>{static_cast<const Theta*>(p.theta), static_cast<const Grad*>(p.grad)});
        });
      });
      return;
    case Criterion::grad:
      values = p.grad;
      dtype = p.grad_dtype;
      break;
    case Criterion::weight:
      break;
  }
  with_dtype(dtype, [&]<class T>(const T*) { f(Magnitude<T>{static_cast<const T*>(values)}); });
}

// Calls f(v, i, n) for the 16-lane groups of [begin, end): n lanes from element i, the others zero.
template <class Score, class F>
void for_groups(const Score& score, int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + 16 <= end; i += 16) f(score.at(i), i, 16);
  if (i < end) f(score.first(i, int(end - i)), i, int(end - i));
}
