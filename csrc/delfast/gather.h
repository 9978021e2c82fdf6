// Copies some columns of a matrix side by side: the part of an output gradient that a compact layer's backward uses.
#pragma once

#include <cstdint>

namespace delfast {

struct Gather {
  const void* source = nullptr;      // [rows][length], row-major
  void* target = nullptr;            // [rows][count]
  const int64_t* columns = nullptr;  // [count], each in [0, length)
  int64_t length = 0, count = 0;
  int element_size = 4;  // bytes: 2, 4 or 8
};

namespace cpu {

// Gathers rows [begin, end) on the calling thread. It only loads and stores, so one version serves all instruction
// sets: it takes about a cycle for each element, and the matrix multiplication after it takes hundreds of operations
// for each element.
void gather_columns(const Gather&, int64_t begin, int64_t end);

}  // namespace cpu
}  // namespace delfast
