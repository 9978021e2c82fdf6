// Some columns of a matrix, copied side by side: what a compact layer's backward takes of an output gradient.
#pragma once

#include <cstdint>

namespace delfast {

struct Gather {
  const void* source = nullptr;      // [rows][length], row-major
  void* target = nullptr;            // [rows][count]
  const int64_t* columns = nullptr;  // count of them, each in [0, length)
  int64_t length = 0, count = 0;
  int element_size = 4;  // bytes: 2, 4 or 8
};

namespace cpu {

// Rows [begin, end), on the calling thread. Loads and stores only, so one version serves all instruction sets: it runs
// at an element a cycle, and what follows it (a matrix multiplication with the target) does hundreds of operations a
// element.
void gather_columns(const Gather&, int64_t begin, int64_t end);

}  // namespace cpu
}  // namespace delfast
