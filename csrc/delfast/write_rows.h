// Writes rows into a weight, as after an optimizer step on a compact layer's rows.
#pragma once

#include <cstdint>

namespace delfast {

// A weight is [outer][channels] pieces of `bytes` bytes each, and the rows are [outer][count] pieces of the same size.
// Piece (o, j) is written to piece (o, index[j]). Rows along dim 0 have outer = 1, and a piece is a row in its memory
// order.
struct WrittenRows {
  void* weight = nullptr;
  const void* rows = nullptr;
  const int64_t* index = nullptr;  // [count], distinct, each in [0, channels)
  int64_t outer = 1, count = 0, channels = 0, bytes = 0;
};

namespace cpu {

// Copies pieces [begin, end) of outer * count, on the calling thread. It only copies: one version serves all
// instruction sets.
void write_rows(const WrittenRows&, int64_t begin, int64_t end);

}  // namespace cpu
}  // namespace delfast
