// Registers the CUDA kernels of every op.
#include "bindings/cuda/ops.h"
#include "bindings/serving.h"

STABLE_TORCH_LIBRARY_IMPL(delfast, CUDA, m) {
  namespace bindings = delfast::bindings;
  using bindings::serve;
  serve<"criticality", &bindings::on_cuda::criticality>(m);
  serve<"select_elements", &bindings::on_cuda::select_elements>(m);
  serve<"select_units", &bindings::on_cuda::select_units>(m);
  serve<"masked_plan", &bindings::on_cuda::masked_plan>(m);
  serve<"masked_reset_", &bindings::on_cuda::masked_reset_>(m);
  serve<"masked_sgd_", &bindings::on_cuda::masked_sgd_>(m);
  serve<"masked_adamw_", &bindings::on_cuda::masked_adamw_>(m);
  serve<"per_example_accumulate_", &bindings::on_cuda::per_example_accumulate_>(m);
  serve<"channel_dot", &bindings::on_cuda::channel_dot>(m);
  serve<"channel_sums_", &bindings::on_cuda::channel_sums_>(m);
  m.impl("write_rows_", TORCH_BOX(&bindings::on_cuda::write_rows_));  // for any dtype
}
