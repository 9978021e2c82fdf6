#include "delfast/gather.h"

namespace delfast::cpu {

namespace {

template <class Element>
void copy(const Gather& g, int64_t begin, int64_t end) {
  const Element* __restrict__ source = static_cast<const Element*>(g.source) + begin * g.length;
  Element* __restrict__ target = static_cast<Element*>(g.target) + begin * g.count;
  for (int64_t row = begin; row < end; row++, source += g.length, target += g.count)
    for (int64_t j = 0; j < g.count; j++) target[j] = source[g.columns[j]];
}

}  // namespace

void gather_columns(const Gather& g, int64_t begin, int64_t end) {
  switch (g.element_size) {
    case 2:
      return copy<uint16_t>(g, begin, end);
    case 4:
      return copy<uint32_t>(g, begin, end);
    default:
      return copy<uint64_t>(g, begin, end);
  }
}

}  // namespace delfast::cpu
