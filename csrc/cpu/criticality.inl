// Channel scores: one pass over theta and the gradient, without |theta g| in memory. Written once against Vec; included
// by criticality_{scalar,avx2,avx512}.cpp inside the namespace of each.
//
// Numerics. Scores are float32; sum.inl defines the order of their sums.

#include "cpu/score.inl"
#include "cpu/sum.inl"

namespace {

// A row up to this length is scored once into a buffer on the stack, which the top-h search reads. A longer row is
// scored again in every round of the search.
constexpr int64_t kBuffered = 1 << 14;

template <class Score>
int32_t largest(const Score& score, int64_t length) {
  Vec best = Vec::broadcast(0);
  for_groups(score, 0, length, [&](Vec v, int64_t, int) { best = Vec::max_bits(best, v); });
  return best.largest_bits();
}

template <class Score>
int64_t count_at_least(const Score& score, int64_t length, int32_t threshold) {
  Counter counter[4];  // four chains, so that the loads limit the speed and not the latency of the additions
  int64_t i = 0;
  for (; i + 64 <= length; i += 64)
    for (int j = 0; j < 4; j++) counter[j].add(score.at(i + 16 * j), threshold);
  for_groups(score, i, length, [&](Vec v, int64_t, int) { counter[0].add(v, threshold); });
  for (int j = 1; j < 4; j++) counter[0].add(counter[j]);
  return counter[0].total();
}

// The sum of the `top` largest scores, exactly as defined: with T the top-th largest, the sum of all scores >= T if
// there are `top` of them, otherwise the sum of those > T plus T for each missing one. The result does not depend on
// the course of the search, so the search may start from a hint, the T of the previous row. It takes widening steps
// until T lies between two counts, then interpolates, and bisects where interpolation shrinks the interval too little.
template <class Score>
double sum_of_largest(const Score& score, int64_t length, int64_t top, int32_t largest, int32_t& hint) {
  if (largest >= 0x7f800000) return bits_float(uint32_t(largest));  // infinite or NaN: so is the result
  const int32_t limit = largest + 1;
  int32_t low = 0, high = limit;
  // at_low: number of scores >= low, at least `top`; at_high: number >= high, fewer
  int64_t at_low = length, at_high = 0;
  int32_t middle = hint;
  int64_t step = 0;
  for (bool bisect = false; at_low != top && high - low > 1;) {
    if (middle <= low || middle >= high) middle = low + (high - low) / 2;
    const int64_t width = int64_t(high) - low, count = count_at_least(score, length, middle);
    (count >= top ? low : high) = middle;
    (count >= top ? at_low : at_high) = count;
    if (low == 0 || high == limit) {
      // a factor of two in the scores changes the count by about as much, so aim slightly beyond T
      step = step ? 4 * step : (count > top ? count - top : top - count) * (int64_t(3) << 22) / top + (1 << 14);
      step = step < limit ? step : limit;
      middle = int32_t(low == 0 ? (high > step ? high - step : 0) : (limit - low > step ? low + step : limit));
    } else {
      const double fraction = bisect ? 0.5 : double(at_low - top) / double(at_low - at_high);
      bisect = !bisect && int64_t(high) - low > width / 2;
      const int64_t inside = int64_t(double(high - low) * fraction);
      middle = low + int32_t(inside < 1 ? 1 : inside);
    }
  }
  hint = low;
  const bool exact = at_low == top;
  const int32_t threshold = exact ? low : high;
  Sum sum;
  for_groups(score, 0, length, [&](Vec v, int64_t, int) { sum.add(v.at_least(threshold)); });
  return sum.total() + (exact ? 0 : double(top - at_high) * double(bits_float(uint32_t(low))));
}

template <class Score>
double sum_of_largest_buffered(const Score& score, int64_t length, int64_t top, int32_t& hint) {
  if (length > kBuffered) return sum_of_largest(score, length, top, largest(score, length), hint);
  alignas(64) float buffer[kBuffered];
  Vec best = Vec::broadcast(0);
  for_groups(score, 0, length, [&](Vec v, int64_t i, int) {
    v.store(buffer + i);  // i + 16 <= kBuffered
    best = Vec::max_bits(best, v);
  });
  return sum_of_largest(Magnitude<float>{buffer}, length, top, best.largest_bits(), hint);
}

template <class Score>
float aggregate_row(const Score& score, int64_t length, Aggregate aggregate, int64_t top, int32_t& hint) {
  switch (aggregate) {
    case Aggregate::mean:
      return float(sum_row(score, length) / double(length));
    case Aggregate::sum:
      return float(sum_row(score, length));
    case Aggregate::max:
      return bits_float(uint32_t(largest(score, length)));
    case Aggregate::topk_mean:
      break;
  }
  if (top == length) return float(sum_row(score, length) / double(length));
  if (top == 1) return bits_float(uint32_t(largest(score, length)));
  return float(sum_of_largest_buffered(score, length, top, hint) / double(top));
}

void score_rows(const Scored& p, Criterion criterion, Aggregate aggregate, int64_t top, float* out, int64_t begin,
                int64_t end) {
  const int64_t length = p.layout.length;
  with_score(p, criterion, [&](auto score) {
    if (length == 1) {  // every aggregate of one element is the element
      for_groups(score, begin, end, [&](Vec v, int64_t i, int n) { v.store_masked(out + i, (1u << n) - 1); });
      return;
    }
    int32_t hint = 0;
    for (int64_t row = begin; row < end; row++)
      out[row] = aggregate_row(score.from(row * length), length, aggregate, top, hint);
  });
}

}  // namespace

extern const CriticalityKernels kCriticality;
const CriticalityKernels kCriticality = {score_rows};
