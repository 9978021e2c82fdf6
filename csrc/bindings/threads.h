// Tasks over torch's own threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bindings/torch.h"

namespace delfast::bindings {

// Minimum work for several threads, in elements: below it, waking the other threads costs more than they save (a few
// microseconds). No measurement is kept.
inline constexpr int64_t kWorthThreads = 1 << 15;

// Returns the number of the calling thread, less than torch::stable::get_num_threads().
inline int thread_number() {
  uint32_t number;
  check_torch(torch_get_thread_idx(&number), "number its threads");
  return int(number);
}

// Calls f(task) for every task, on all threads if the work is large enough. `task.work` is the number of elements that
// it processes. Every thread gets neighbouring tasks of about the same work. Tasks depend only on the data's shape, and
// no result depends on which thread runs a task.
template <class Tasks, class F>
void run_tasks(Tasks& tasks, F f) {
  std::vector<int64_t> starts;
  starts.reserve(tasks.size());
  int64_t total = 0;
  for (const auto& task : tasks) {
    starts.push_back(total);
    total += std::max<int64_t>(1, task.work);
  }
  torch::stable::parallel_for(0, total, kWorthThreads, [&](int64_t begin, int64_t end) {
    const auto first = std::lower_bound(starts.begin(), starts.end(), begin);
    for (size_t t = size_t(first - starts.begin()); t < tasks.size() && starts[t] < end; t++) f(tasks[t]);
  });
}

}  // namespace delfast::bindings
