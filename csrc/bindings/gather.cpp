// delfast::gather_columns on the CPU.

#include "delfast/gather.h"

#include <algorithm>

#include "bindings/checks.h"
#include "bindings/ops.h"
#include "bindings/threads.h"

namespace delfast::bindings {

Tensor gather_columns(const Tensor& source, const Tensor& columns) {
  DELFAST_CHECK_VALUE(source.dim() == 2 && source.is_contiguous(), "expected source to be a contiguous matrix, got ",
                      source.sizes(), "; flatten it first");
  DELFAST_CHECK_VALUE(columns.dim() == 1 && type_of(columns) == ScalarType::Long && columns.is_contiguous(),
                      "expected columns to be contiguous int64 (n,), got ", type_of(columns), " ", columns.sizes());
  check_device(device_of(source), columns, "columns");
  const int64_t* first = columns.const_data_ptr<int64_t>();
  const int64_t count = columns.numel(), length = source.size(1);
  for (int64_t j = 0; j < count; j++)
    DELFAST_CHECK_INDEX(first[j] >= 0 && first[j] < length, "expected columns in [0, ", length, "), got ", first[j]);
  const int size = int(source.element_size());
  DELFAST_CHECK_VALUE(size == 2 || size == 4 || size == 8, "expected elements of 2, 4 or 8 bytes, got ",
                      type_of(source));
  Tensor target = empty({source.size(0), count}, type_of(source));
  const Gather gather{source.const_data_ptr(), target.mutable_data_ptr(), first, length, count, size};
  const int64_t grain = std::max<int64_t>(1, kWorthThreads / std::max<int64_t>(1, count));
  torch::stable::parallel_for(0, source.size(0), grain,
                              [&](int64_t begin, int64_t end) { cpu::gather_columns(gather, begin, end); });
  return target;
}

}  // namespace delfast::bindings
