// The k-th largest score by radix search, and the bits of the scores at or above it; |theta g| is computed again in
// each pass, so that only the answer is written. Included per instruction set like criticality.inl.

#include "cpu/score.inl"

namespace {

// Calls count(digit, lane) for each element of [begin, end) that matches the pass's prefix.
template <class F>
void for_digits(const Scored& p, Criterion criterion, RadixPass pass, int64_t begin, int64_t end, F count) {
  const uint32_t digit = (1u << pass.width) - 1;
  const bool everything = pass.shift + pass.width == 31;
  with_score(p, criterion, [&](auto score) {
    for_groups(score, begin, end, [&](Vec v, int64_t, int n) {
      uint32_t bits[16];
      v.store_bits(bits);
      if (everything) {
        for (int i = 0; i < n; i++) count(bits[i] >> pass.shift & digit, i);
        return;
      }
      uint32_t mask = v.mask_shifted_equal(pass.shift + pass.width, pass.prefix) & ((1u << n) - 1);
      for (; mask; mask &= mask - 1) count(bits[__builtin_ctz(mask)] >> pass.shift & digit, 0);
    });
  });
}

void histogram(const Scored& p, Criterion criterion, RadixPass pass, int64_t begin, int64_t end, int64_t* histogram) {
  if (end - begin < kRadixBins) {  // clearing and adding the four histograms below would take longer than they save
    for_digits(p, criterion, pass, begin, end, [&](uint32_t digit, int) { histogram[digit]++; });
    return;
  }
  // Four interleaved histograms: neighbours often share a digit, and each would wait for the other's store.
  uint32_t counts[4][kRadixBins] = {};
  for_digits(p, criterion, pass, begin, end, [&](uint32_t digit, int lane) { counts[lane % 4][digit]++; });
  for (int bin = 0; bin < kRadixBins; bin++)
    histogram[bin] += int64_t(counts[0][bin]) + counts[1][bin] + counts[2][bin] + counts[3][bin];
}

// Elements in memory order are not in logical order if rows are permuted (channels-last): collect them first.
template <class T>
void gather(const void* values, const Layout& layout, int64_t begin, int n, T* out) {
  for (int i = 0; i < n; i++) out[i] = static_cast<const T*>(values)[layout.offset(begin + i)];
}

// Calls f(v, i, n) for the groups of logical elements [begin, end) in any layout.
template <class F>
void for_logical_groups(const Scored& p, Criterion criterion, int64_t begin, int64_t end, F f) {
  if (p.layout.spatial == 1) {
    with_score(p, criterion, [&](auto score) { for_groups(score, begin, end, f); });
    return;
  }
  for (int64_t i = begin; i < end; i += 16) {
    const int n = int(end - i < 16 ? end - i : 16);
    float theta[16] = {}, grad[16] = {};  // large enough for any dtype: the widest is float
    Scored group = p;
    group.layout = {n, 1, 1};
    const auto fill = [&](const void*& values, Dtype dtype, float* room) {
      if (!values) return;
      with_dtype(dtype, [&]<class T>(const T*) { gather(values, p.layout, i, n, reinterpret_cast<T*>(room)); });
      values = room;
    };
    fill(group.theta, group.theta_dtype, theta);
    fill(group.grad, group.grad_dtype, grad);
    with_score(group, criterion,
               [&](auto score) { for_groups(score, 0, n, [&](Vec v, int64_t, int) { f(v, i, n); }); });
  }
}

int64_t mark(const Scored& p, Criterion criterion, uint32_t threshold, int64_t begin, int64_t end, uint8_t* bits) {
  int64_t ties = 0;
  for_logical_groups(p, criterion, begin, end, [&](Vec v, int64_t i, int n) {
    const uint32_t lanes = (1u << n) - 1;
    const uint32_t mask = v.mask_at_least(int32_t(threshold)) & lanes;
    bits[i / 8] = uint8_t(mask);
    if (n > 8) bits[i / 8 + 1] = uint8_t(mask >> 8);
    if (mask) ties += __builtin_popcount(v.mask_shifted_equal(0, threshold) & lanes);
  });
  return ties;
}

void clear_ties(const Scored& p, Criterion criterion, uint32_t threshold, int64_t keep, int64_t begin, int64_t end,
                uint8_t* bits) {
  for_logical_groups(p, criterion, begin, end, [&](Vec v, int64_t i, int n) {
    uint32_t ties = v.mask_shifted_equal(0, threshold) & ((1u << n) - 1);
    for (; ties; ties &= ties - 1) {
      if (keep-- > 0) continue;
      const int64_t element = i + __builtin_ctz(ties);
      bits[element / 8] &= uint8_t(~(1u << element % 8));
    }
  });
}

}  // namespace

extern const SelectionKernels kSelection;
const SelectionKernels kSelection = {histogram, mark, clear_ties};
