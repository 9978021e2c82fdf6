// Registers the CUDA kernels of every op.
#include <torch/library.h>

#include "bindings/cuda/ops.h"

TORCH_LIBRARY_IMPL(delfast, CUDA, m) {
  m.impl("criticality", TORCH_FN(delfast::bindings::on_cuda::criticality));
  m.impl("select_elements", TORCH_FN(delfast::bindings::on_cuda::select_elements));
  m.impl("select_units", TORCH_FN(delfast::bindings::on_cuda::select_units));
  m.impl("masked_reset_", TORCH_FN(delfast::bindings::on_cuda::masked_reset_));
  m.impl("masked_sgd_", TORCH_FN(delfast::bindings::on_cuda::masked_sgd_));
  m.impl("masked_adamw_", TORCH_FN(delfast::bindings::on_cuda::masked_adamw_));
  m.impl("per_example_accumulate_", TORCH_FN(delfast::bindings::on_cuda::per_example_accumulate_));
  m.impl("channel_dot", TORCH_FN(delfast::bindings::on_cuda::channel_dot));
}
