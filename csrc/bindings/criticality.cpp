// delfast::criticality on the CPU: checks, threads, one kernel call per task.
#include <algorithm>

#include "bindings/checks.h"
#include "bindings/ops.h"
#include "bindings/threads.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::bindings {

namespace {

struct RowTask {
  size_t param;
  int64_t begin, end;  // rows
  int64_t work;
};

}  // namespace

Tensor criticality(const TensorList& theta, const TensorList& grad, const std::string& criterion_name,
                   const std::string& aggregate_name, const IntList& top_h) {
  const Criterion criterion = parse_criterion(criterion_name);
  const Aggregate aggregate = parse_aggregate(aggregate_name);
  const ScoredList list(theta, grad, criterion);
  const int64_t all_units = check_top_h(list.params, top_h);

  std::vector<RowTask> tasks;
  std::vector<int64_t> first_unit;
  int64_t units = 0;  // units before this parameter
  for (size_t p = 0; p < list.params.size(); p++) {
    const Layout& layout = list.params[p].layout;
    first_unit.push_back(units);
    units += layout.rows;
    const int64_t rows_per_task = std::max<int64_t>(1, cpu::kChunk / layout.length);
    for (int64_t row = 0; row < layout.rows; row += rows_per_task) {
      const int64_t end = std::min(layout.rows, row + rows_per_task);
      tasks.push_back({p, row, end, (end - row) * layout.length});
    }
  }

  Tensor scores = empty({all_units}, ScalarType::Float);
  float* out = scores.mutable_data_ptr<float>();
  const auto& kernels = cpu::criticality(cpu::isa());
  run_tasks(tasks, [&](const RowTask& task) {
    kernels.score_rows(list.params[task.param], criterion, aggregate, top_h[task.param], out + first_unit[task.param],
                       task.begin, task.end);
  });
  return scores;
}

}  // namespace delfast::bindings
