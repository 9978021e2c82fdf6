// The radix search of the selection: finds the next digit from a histogram. Shared by the search over elements
// (histograms from a kernel) and over units (few, counted here).
#pragma once

#include <cstdint>

#include "delfast/cpu_dispatch.h"
#include "delfast/selection.h"

namespace delfast::cpu {

// Finds the score T (as a float's bits) such that everything above T weighs at most `budget` and everything at or
// above T weighs more. Usage: for each of three passes, fill histogram() by pass(), then descend().
class RadixSearch {
 public:
  explicit RadixSearch(int64_t budget) : left_(budget) {}

  RadixPass pass() const { return {kShift[pass_], kWidth[pass_], threshold_ >> (kShift[pass_] + kWidth[pass_])}; }

  // Returns false if all scores fit in the budget, which only the first pass can detect.
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
  int64_t left() const { return left_; }  // part of the budget that the scores above the threshold leave

  static constexpr int kPasses = 3;

 private:
  static constexpr int kShift[kPasses] = {20, 10, 0};
  static constexpr int kWidth[kPasses] = {11, 10, 10};
  int64_t left_;
  uint32_t threshold_ = 0;
  int pass_ = 0;
};

// The units of one parameter: `count` of them, of `length` scalars each.
struct UnitGroup {
  int64_t count = 0;
  int64_t length = 0;
};

// Selects the longest prefix of the units, in falling order of scores (ties by index), whose sizes sum to at most
// budget. Scores are non-negative, group after group. The packed bits also follow group after group, each group padded
// to whole bytes. Without cut_last no unit is cut.
UnitsInfo select_units(const float* scores, const UnitGroup* groups, int64_t group_count, int64_t budget, bool cut_last,
                       uint8_t* bits);

}  // namespace delfast::cpu
