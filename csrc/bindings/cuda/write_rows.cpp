// delfast::write_rows_ on CUDA devices. An index outside a weight stops the device, as torch's own checks do.
#include "bindings/cuda/device.h"
#include "bindings/cuda/ops.h"
#include "bindings/written_rows.h"

namespace delfast::bindings::on_cuda {

void write_rows_(const TensorList& weights, const TensorList& rows, const TensorList& indices, const IntList& dims) {
  if (weights.empty()) return;
  WrittenRowsList list(weights, rows, indices, dims);
  const OnDevice device(list.device);
  check_launch(cuda::write_rows(list.written.data(), int64_t(list.written.size()), device.stream()), "write_rows_");
  list.finish();
}

}  // namespace delfast::bindings::on_cuda
