// delfast::write_rows_ on the CPU.

#include "delfast/write_rows.h"

#include <algorithm>

#include "bindings/ops.h"
#include "bindings/threads.h"
#include "bindings/written_rows.h"

namespace delfast::bindings {

namespace {

struct Pieces {
  const WrittenRows* rows;
  int64_t begin, end, work;
};

}  // namespace

void write_rows_(const TensorList& weights, const TensorList& rows, const TensorList& indices, const IntList& dims) {
  if (weights.empty()) return;
  WrittenRowsList list(weights, rows, indices, dims);
  std::vector<Pieces> tasks;
  for (size_t i = 0; i < list.written.size(); i++) {
    const WrittenRows& w = list.written[i];
    for (int64_t j = 0; j < w.count; j++)
      DELFAST_CHECK_INDEX(w.index[j] >= 0 && w.index[j] < w.channels, "expected index #", i, " in [0, ", w.channels,
                          "), got ", w.index[j]);
    const int64_t pieces = w.outer * w.count,
                  each = std::max<int64_t>(1, 4 * kWorthThreads / std::max<int64_t>(1, w.bytes));
    for (int64_t begin = 0; begin < pieces; begin += each) {
      const int64_t end = std::min(begin + each, pieces);
      tasks.push_back({&w, begin, end, (end - begin) * w.bytes / 4});
    }
  }
  run_tasks(tasks, [](const Pieces& p) { cpu::write_rows(*p.rows, p.begin, p.end); });
  list.finish();
}

}  // namespace delfast::bindings
