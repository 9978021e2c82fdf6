// Gathered columns, for each element size and for ranges of rows: memory beside the range does not change.
#include <vector>

#include "delfast/gather.h"
#include "inputs.h"

namespace delfast::test {
namespace {

template <class Element>
void gathers(int64_t rows, int64_t length, const std::vector<int64_t>& columns) {
  std::vector<Element> source(rows * length), target(rows * columns.size(), Element(7));
  for (size_t i = 0; i < source.size(); i++) source[i] = Element(i * 37 + 11);
  const int64_t begin = rows / 3, end = rows - rows / 4, count = columns.size();
  cpu::gather_columns({source.data(), target.data(), columns.data(), length, count, sizeof(Element)}, begin, end);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t j = 0; j < count; j++) {
      describe(sizeof(Element), " bytes, row ", row, " of ", rows, ", column ", columns[j], " of ", length);
      const bool inside = row >= begin && row < end;
      CHECK_EQUAL(target[row * count + j], inside ? source[row * length + columns[j]] : Element(7));
    }
}

}  // namespace
}  // namespace delfast::test

int main() {
  using namespace delfast::test;
  for (const auto& columns : {std::vector<int64_t>{0}, {4, 2, 0}, {0, 1, 2, 3, 4}, {4, 4}, {}})
    for (int64_t rows : {0, 1, 13}) {
      gathers<uint16_t>(rows, 5, columns);
      gathers<uint32_t>(rows, 5, columns);
      gathers<uint64_t>(rows, 5, columns);
    }
  return report();
}
