// Rows written into a weight: what a compact layer's rows do after a step of the optimizer.
#pragma once

#include <cstdint>

namespace delfast {

// A weight is [outer][channels] pieces of `bytes` bytes each, and the rows are [outer][count] such pieces: piece
// (o, j) goes to piece (o, index[j]). Rows along dim 0 have outer = 1, and a piece is a row in its memory order.
struct WrittenRows {
  void* weight = nullptr;
  const void* rows = nullptr;
  const int64_t* index = nullptr;  // count of them, distinct, each in [0, channels)
  int64_t outer = 1, count = 0, channels = 0, bytes = 0;
};

namespace cpu {

// Pieces [begin, end) of outer * count, on the calling thread. Copies only: one version serves all instruction sets.
void write_rows(const WrittenRows&, int64_t begin, int64_t end);

}  // namespace cpu
}  // namespace delfast
