// The launcher of write_rows.
#include "cuda/write_rows.cuh"

namespace delfast::cuda {

namespace {

// The widest word that divides a piece and the addresses of both sides.
int word_size(const WrittenRows& w) {
  const uint64_t all = uint64_t(reinterpret_cast<uintptr_t>(w.weight)) | uint64_t(reinterpret_cast<uintptr_t>(w.rows)) |
                       uint64_t(w.bytes) | 16;
  return int(all & (~all + 1));
}

}  // namespace

Error write_rows(const WrittenRows* weights, int64_t count, Stream stream) {
  const auto for_entries = [&](auto add) {
    for (int64_t i = 0; i < count; i++) {
      const WrittenRows& w = weights[i];
      const int size = word_size(w);
      const int64_t words = w.bytes / size, total = w.outer * w.count * words;
      if (total)
        add({w.weight, w.rows, w.index, words, w.count, w.channels, total, size}, ceil_div(total, kWrittenTile));
    }
  };
  launch_tables<Written>(count, for_entries, [&]<int kBytes>(const Table<Written, kBytes>& table) {
    DELFAST_LAUNCH(write_rows_words<kBytes>, table.blocks(), kThreads, 0, stream, table);
  });
  return last_error();
}

}  // namespace delfast::cuda
