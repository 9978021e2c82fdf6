// Selection of units (channels): there are few of them, so plain loops do.
#include <cmath>

#include "delfast/radix.h"

namespace delfast::cpu {

namespace {

// Calls f(unit, its score's bits, its size, its byte of bits, its bit there) for every unit.
template <class F>
void for_units(const float* scores, const UnitGroup* groups, int64_t group_count, uint8_t* bits, F f) {
  int64_t unit = 0;
  for (int64_t g = 0; g < group_count; g++) {
    for (int64_t i = 0; i < groups[g].count; i++, unit++)
      f(unit, float_bits(std::fabs(scores[unit])), groups[g].length, bits + i / 8, uint8_t(1u << i % 8));
    bits += (groups[g].count + 7) / 8;
  }
}

}  // namespace

UnitsInfo select_units(const float* scores, const UnitGroup* groups, int64_t group_count, int64_t budget, bool cut_last,
                       uint8_t* bits) {
  UnitsInfo result;
  const auto each = [&](auto f) { for_units(scores, groups, group_count, bits, f); };
  each([&](int64_t unit, uint32_t score, int64_t, uint8_t* byte, uint8_t) {
    *byte = 0;
    if (score >= 0x7f800000 && result.nonfinite < 0) result.nonfinite = unit;
  });
  if (result.nonfinite >= 0) return result;

  RadixSearch search(budget);
  bool everything = false;
  for (int p = 0; p < RadixSearch::kPasses && !everything; p++) {
    int64_t histogram[kRadixBins] = {};
    const RadixPass pass = search.pass();
    each([&](int64_t, uint32_t score, int64_t size, uint8_t*, uint8_t) {
      if (score >> (pass.shift + pass.width) == pass.prefix)
        histogram[score >> pass.shift & ((1u << pass.width) - 1)] += size;
    });
    everything = !search.descend(histogram);
  }

  int64_t left = search.left(), cut_is_positive = 0;
  bool fits = true;  // a tie that does not fit ends the prefix, even if a later, smaller one would fit
  each([&](int64_t unit, uint32_t score, int64_t size, uint8_t* byte, uint8_t bit) {
    bool selected = everything || score > search.threshold();
    if (!selected && fits && score == search.threshold()) {
      selected = fits = size <= left;
      if (fits) {
        left -= size;
      } else if (left > 0) {
        result.cut_unit = unit;
        result.cut_size = left;
        cut_is_positive = score > 0;
      }
    }
    if (!selected) return;
    *byte |= bit;
    result.selected++;
    result.positive += score > 0;
  });
  if (cut_last)
    result.positive += cut_is_positive;
  else
    result.cut_unit = -1, result.cut_size = 0;
  return result;
}

}  // namespace delfast::cpu
