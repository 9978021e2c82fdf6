// Weights, rows and indices of awkward sizes and alignments for the tests of write_rows, and the expected weights.
#pragma once

#include <numeric>

#include "delfast/write_rows.h"
#include "inputs.h"

namespace delfast::test {

struct WrittenCase {
  int64_t outer, channels, count, bytes;
  Guarded<unsigned char> weight, rows;
  Guarded<int64_t> index;  // distinct channels in random order

  // The addresses of weight and rows are moved by these numbers of bytes.
  WrittenCase(int64_t outer, int64_t channels, int64_t count, int64_t bytes, int64_t shift, int64_t rows_shift,
              Random& random)
      : outer(outer),
        channels(channels),
        count(count),
        bytes(bytes),
        weight(outer * channels * bytes, shift),
        rows(outer * count * bytes, rows_shift),
        index(count) {
    for (unsigned char& byte : weight) byte = static_cast<unsigned char>(random.bits());
    for (unsigned char& byte : rows) byte = static_cast<unsigned char>(random.bits());
    std::vector<int64_t> order(static_cast<size_t>(channels));
    std::iota(order.begin(), order.end(), 0);
    for (int64_t j = 0; j < count; j++) {
      std::swap(order[size_t(j)], order[size_t(j + random.below(channels - j))]);
      index[j] = order[size_t(j)];
    }
  }
  WrittenRows written() { return {weight.data(), rows.data(), index.data(), outer, count, channels, bytes}; }

  // The weight after pieces [begin, end) are written, byte by byte.
  std::vector<unsigned char> expected(int64_t begin, int64_t end) {
    std::vector<unsigned char> result(weight.begin(), weight.end());
    for (int64_t piece = begin; piece < end; piece++)
      for (int64_t byte = 0; byte < bytes; byte++)
        result[size_t((piece / count * channels + index[piece % count]) * bytes + byte)] = rows[piece * bytes + byte];
    return result;
  }
  bool is(const std::vector<unsigned char>& other) { return std::equal(weight.begin(), weight.end(), other.begin()); }
};

inline std::vector<WrittenCase> written_cases(Random& random) {
  std::vector<WrittenCase> cases;
  const auto add = [&](int64_t outer, int64_t channels, int64_t count, int64_t bytes) {
    const int64_t n = int64_t(cases.size());
    cases.emplace_back(outer, channels, count, bytes, n % 5 * 2, n % 7 == 3 ? 1 : n % 4 * 4, random);
  };
  for (int64_t bytes : {1, 2, 4, 6, 8, 16, 36, 48, 576, 40000})
    for (int64_t outer : {1, 3})
      for (int64_t count : {0, 1, 4, 7}) add(outer, 7, count, bytes);
  add(1, 1, 1, 4);
  add(700, 96, 29, 2);  // several tiles of single elements
  return cases;
}

}  // namespace delfast::test
