// Random layers for the tests of the per-example sums, on the CPU and on CUDA.
#pragma once

#include <sstream>
#include <string>

#include "delfast/per_example.h"
#include "inputs.h"

namespace delfast::test {

inline std::string text(const ConvShape& s) {
  std::ostringstream out;
  out << s.examples << " x " << s.in_channels << " -> " << s.out_channels << ", groups " << s.groups;
  for (int i = 0; i < 3; i++)
    out << "; " << s.in[i] << " by " << s.kernel[i] << " stride " << s.stride[i] << " padding " << s.padding[i]
        << " dilation " << s.dilation[i];
  return out.str();
}

// A layer of 1 to 3 dimensions, 0 to 9 examples, sizes of 1 to 9, kernels of 1 to 5, strides and dilations of 1 to 3,
// padding of 0 to 3, and groups. Every third layer reads maps of one pixel, for which kernels join the examples. `most`
// limits the number of products of a test's loop.
inline ConvShape random_layer(Random& random, int64_t most) {
  while (true) {
    ConvShape s;
    s.examples = random.below(10);
    s.groups = random.below(2) ? 1 : 1 + random.below(20);
    s.in_channels = s.groups * (1 + random.below(random.below(2) ? 3 : 40 / s.groups + 1));
    s.out_channels = s.groups * (1 + random.below(random.below(2) ? 3 : 40 / s.groups + 1));
    const bool one_pixel = random.below(3) == 0;
    bool fits = true;
    for (int i = int(random.below(3)); i < 3; i++) {
      s.in[i] = one_pixel ? 1 : 1 + random.below(9);
      s.kernel[i] = one_pixel && random.below(4) ? 1 : 1 + random.below(5);
      s.stride[i] = 1 + random.below(3);
      s.padding[i] = one_pixel && s.kernel[i] == 1 ? 0 : random.below(4);
      s.dilation[i] = 1 + random.below(3);
      const int64_t span = s.in[i] + 2 * s.padding[i] - s.dilation[i] * (s.kernel[i] - 1) - 1;
      fits &= span >= 0;
      s.out[i] = span / s.stride[i] + 1;
    }
    if (fits && s.out_channels * s.row() * s.examples * s.positions() <= most) return s;
  }
}

}  // namespace delfast::test
