// Written rows, for pieces of every size and for ranges of pieces: memory beside the range does not change.
#include "written.h"

int main() {
  using namespace delfast;
  using namespace delfast::test;
  Random random(5);
  for (const WrittenCase& given : written_cases(random))
    for (const bool all : {true, false}) {
      WrittenCase c = given;
      const int64_t pieces = c.outer * c.count, begin = all ? 0 : pieces / 3, end = all ? pieces : pieces - pieces / 4;
      describe(c.outer, " x ", c.count, " of ", c.channels, " pieces of ", c.bytes, " bytes, [", begin, ", ", end, ")");
      const auto expected = c.expected(begin, end);
      cpu::write_rows(c.written(), begin, end);
      CHECK(c.is(expected));
    }
  return report();
}
