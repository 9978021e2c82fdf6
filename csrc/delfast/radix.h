// The radix search that selection's passes serve: which digit to descend into, given a histogram. Shared by the
// search over elements (histograms from a kernel) and over units (few, counted here).
#pragma once

#include <cstdint>

#include "delfast/cpu_dispatch.h"

namespace delfast::cpu {

// Finds the score T (as a float's bits) such that everything above T weighs at most `budget` and everything at or
// above T weighs more. Usage: for each of three passes, fill histogram() by pass(), then descend().
class RadixSearch {
 public:
  explicit RadixSearch(int64_t budget) : left_(budget) {}

  RadixPass pass() const { return {kShift[pass_], kWidth[pass_], threshold_ >> (kShift[pass_] + kWidth[pass_])}; }

  // False if everything fits in the budget (only the first pass can find that).
  bool descend(const int64_t* histogram) {
    for (int digit = (1 << kWidth[pass_]) - 1; digit >= 0; digit--) {
      if (histogram[digit] > left_) {
        threshold_ |= uint32_t(digit) << kShift[pass_++];
        return true;
      }
      left_ -= histogram[digit];
    }
    return false;
  }

  uint32_t threshold() const { return threshold_; }
  int64_t left() const { return left_; }  // what the scores above the threshold leave of the budget

  static constexpr int kPasses = 3;

 private:
  static constexpr int kShift[kPasses] = {20, 10, 0};
  static constexpr int kWidth[kPasses] = {11, 10, 10};
  int64_t left_;
  uint32_t threshold_ = 0;
  int pass_ = 0;
};

struct UnitSelection {
  int64_t cut_unit = -1;   // the unit after the prefix, if part of the budget is left for it
  int64_t cut_size = 0;    // how many of its parameters that covers
  int64_t nonfinite = -1;  // the first unit with a NaN or infinite score; if any, nothing is selected
  int64_t selected = 0;    // whole units
  int64_t positive = 0;    // of these and the cut one: how many score above 0
};

// The units of one parameter: `count` of them, of `length` scalars each.
struct UnitGroup {
  int64_t count = 0;
  int64_t length = 0;
};

// The longest prefix of the units, in falling score (ties by index), whose sizes sum to at most budget. Scores are
// non-negative, of all groups one after the other; so are the packed bits, each group padded to whole bytes. Without
// cut_last no unit is cut.
UnitSelection select_units(const float* scores, const UnitGroup* groups, int64_t group_count, int64_t budget,
                           bool cut_last, uint8_t* bits);

}  // namespace delfast::cpu
