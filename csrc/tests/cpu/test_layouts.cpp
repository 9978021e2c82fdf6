// Layouts from sizes and strides, and back: every element is at the offset that the layout gives.
#include <algorithm>
#include <numeric>
#include <set>

#include "check.h"
#include "delfast/layouts.h"
#include "inputs.h"

namespace delfast::test {
namespace {

// Offset of each element of the tensor, in row-major order.
std::vector<int64_t> places(const Strided& t) {
  std::vector<int64_t> found, index(size_t(t.dims), 0);
  for (int64_t i = 0; i < t.numel(); i++) {
    int64_t left = i, place = 0;
    for (int64_t d = t.dims; d-- > 0; left /= t.sizes[d]) place += left % t.sizes[d] * t.strides[d];
    found.push_back(place);
  }
  return found;
}

// The offsets at which the kernels read them.
std::vector<int64_t> looked_for(const Layout& layout, int64_t piece) {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < layout.numel(); i++) {
    const int64_t row = i / layout.length, e = i % layout.length;
    found.push_back(piece ? (e / piece * layout.rows + row) * piece + e % piece : layout.offset(i));
  }
  return found;
}

// Sizes of a few dimensions, some of them 1, in memory in any order of dimensions, sometimes with gaps.
void any_order(Random& random) {
  int64_t in_rows = 0, in_pieces = 0;
  for (int round = 0; round < 20000; round++) {
    const int64_t dims = 1 + random.below(5);
    std::vector<int64_t> sizes, strides(static_cast<size_t>(dims)), order(static_cast<size_t>(dims));
    for (int64_t d = 0; d < dims; d++) sizes.push_back(1 + random.below(4));
    std::iota(order.begin(), order.end(), 0);
    for (int64_t d = dims; d-- > 1;) std::swap(order[size_t(d)], order[size_t(random.below(d + 1))]);
    int64_t next = random.below(20) ? 1 : 2;
    for (int64_t d : order) {
      strides[size_t(d)] = next;
      next *= sizes[size_t(d)] + (random.below(20) ? 0 : 1);
    }
    const Strided t{dims, sizes.data(), strides.data()};
    describe("round ", round);
    const std::vector<int64_t> expected = places(t);
    if (const auto layout = layout_of(t)) {
      in_rows++;
      CHECK(looked_for(*layout, 0) == expected);
    } else if (const int64_t piece = piece_of(t)) {
      in_pieces++;
      const Layout rows{sizes[0], t.numel() / sizes[0], 1};
      CHECK(piece < rows.length && looked_for(rows, piece) == expected);
      const std::vector<int64_t> again = strides_for(dims, sizes.data(), rows, piece);
      const Strided copy{dims, sizes.data(), again.data()};
      CHECK(piece_of(copy) == piece && places(copy) == expected);
    } else {  // every order without gaps that one of the two describes is found
      const std::set<int64_t> distinct(expected.begin(), expected.end());
      CHECK(int64_t(distinct.size()) == t.numel());
      if (dims > 1) {
        const Layout rows{sizes[0], t.numel() / sizes[0], 1};
        CHECK(looked_for(rows, 0) != expected);
        for (int64_t piece = 1; piece < rows.length; piece++)
          if (rows.length % piece == 0) CHECK(looked_for(rows, piece) != expected);
      }
    }
  }
  CHECK(in_rows > 1000 && in_pieces > 1000);
}

// Copies are made in the strides of a layout.
void back_and_forth() {
  const int64_t sizes[] = {3, 4, 5, 2};
  for (const Layout& layout : {Layout{3, 40, 1}, Layout{3, 40, 10}}) {
    const std::vector<int64_t> strides = strides_for(4, sizes, layout);
    const auto found = layout_of({4, sizes, strides.data()});
    CHECK(found && found->rows == 3 && found->length == 40 && found->spatial == layout.spatial);
  }
  const int64_t none[] = {3, 0}, apart[] = {7, 1};
  CHECK(layout_of({2, none, apart})->numel() == 0);
  CHECK(piece_of({2, none, apart}) == 0);
  CHECK(layout_of({0, nullptr, nullptr})->numel() == 1);
}

}  // namespace
}  // namespace delfast::test

int main() {
  using namespace delfast::test;
  Random random(7);
  any_order(random);
  back_and_forth();
  return report();
}
