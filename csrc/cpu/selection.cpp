// Selection of units (channels): there are few of them, so plain loops do.
#include <cmath>
#include <cstring>

#include "delfast/radix.h"

namespace delfast::cpu {

UnitSelection select_units(const float* scores, const int64_t* sizes, int64_t units, int64_t budget, uint8_t* bits) {
  UnitSelection result;
  std::memset(bits, 0, size_t(units + 7) / 8);
  const auto choose = [&](int64_t i) { bits[i / 8] |= uint8_t(1u << i % 8); };
  for (int64_t i = 0; i < units; i++)
    if (!std::isfinite(scores[i])) {
      result.nonfinite = i;
      return result;
    }

  RadixSearch search(budget);
  bool everything = false;
  for (int p = 0; p < RadixSearch::kPasses && !everything; p++) {
    int64_t histogram[kRadixBins] = {};
    const RadixPass pass = search.pass();
    for (int64_t i = 0; i < units; i++) {
      const uint32_t score = float_bits(std::fabs(scores[i]));  // fabs: a score of -0.0 is 0
      if (score >> (pass.shift + pass.width) == pass.prefix)
        histogram[score >> pass.shift & ((1u << pass.width) - 1)] += sizes[i];
    }
    everything = !search.descend(histogram);
  }

  int64_t left = search.left();
  bool fits = true;  // a tie that does not fit ends the prefix, even if a later, smaller one would fit
  for (int64_t i = 0; i < units; i++) {
    const uint32_t score = float_bits(std::fabs(scores[i]));
    if (everything || score > search.threshold()) {
      choose(i);
    } else if (fits && score == search.threshold()) {
      fits = sizes[i] <= left;
      if (fits) {
        choose(i);
        left -= sizes[i];
      } else if (left > 0) {
        result.cut_unit = i;
        result.cut_size = left;
      }
    }
  }
  return result;
}

}  // namespace delfast::cpu
