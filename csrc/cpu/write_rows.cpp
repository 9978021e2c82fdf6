#include "delfast/write_rows.h"

#include <cstring>

namespace delfast::cpu {

namespace {

// `bytes` is a constant where pieces are single elements: memcpy is then one load and one store.
template <class Bytes>
void copy(const WrittenRows& w, int64_t begin, int64_t end, Bytes bytes) {
  const unsigned char* source = static_cast<const unsigned char*>(w.rows) + begin * bytes;
  for (int64_t piece = begin; piece < end; piece++, source += bytes) {
    const int64_t o = piece / w.count, j = piece - o * w.count;
    std::memcpy(static_cast<unsigned char*>(w.weight) + (o * w.channels + w.index[j]) * bytes, source, size_t(bytes));
  }
}

template <int64_t value>
struct Constant {
  constexpr operator int64_t() const { return value; }
};

}  // namespace

void write_rows(const WrittenRows& w, int64_t begin, int64_t end) {
  switch (w.bytes) {
    case 2:
      return copy(w, begin, end, Constant<2>());
    case 4:
      return copy(w, begin, end, Constant<4>());
    case 8:
      return copy(w, begin, end, Constant<8>());
    default:
      return copy(w, begin, end, w.bytes);
  }
}

}  // namespace delfast::cpu
