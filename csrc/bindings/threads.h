// Tasks over torch's own threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace delfast::bindings {

// Below this many elements, waking the other threads costs more than they save (a few microseconds).
inline constexpr int64_t kWorthThreads = 1 << 15;

// Calls f(task) for every task, on all threads if there is enough to do. Tasks are cut by the data's shape alone, and
// no result depends on which thread runs which.
template <class Tasks, class F>
void run_tasks(Tasks& tasks, int64_t elements, F f) {
  const int64_t count = int64_t(tasks.size());
  const int64_t grain = elements < kWorthThreads ? std::max<int64_t>(1, count) : 1;
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) f(tasks[t]);
  });
}

}  // namespace delfast::bindings
