// The results of the selection besides the bits: the second output of delfast::select_elements and select_units. The
// fields are the elements of that int64 tensor, in order.
#pragma once

#include <cstdint>

namespace delfast {

struct ElementsInfo {
  int64_t nonfinite = -1;  // first parameter with a NaN or infinite score; if any, nothing is selected
  int64_t positive = 0;    // number of selected elements that score above 0
};

struct UnitsInfo {
  int64_t cut_unit = -1;   // the unit after the prefix, if part of the budget is left for it
  int64_t cut_size = 0;    // number of its scalars that fit in that part
  int64_t nonfinite = -1;  // first unit with a NaN or infinite score; if any, nothing is selected
  int64_t selected = 0;    // number of whole units
  int64_t positive = 0;    // number of selected units, with the cut one, that score above 0
};

}  // namespace delfast
