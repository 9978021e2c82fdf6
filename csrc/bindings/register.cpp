// Registers the CPU kernels of every op.
#include "bindings/ops.h"
#include "bindings/serving.h"

STABLE_TORCH_LIBRARY_IMPL(delfast, CPU, m) {
  namespace bindings = delfast::bindings;
  using bindings::serve;
  serve<"criticality", &bindings::criticality>(m);
  serve<"select_elements", &bindings::select_elements>(m);
  serve<"select_units", &bindings::select_units>(m);
  serve<"masked_plan", &bindings::masked_plan>(m);
  serve<"masked_reset_", &bindings::masked_reset_>(m);
  serve<"masked_sgd_", &bindings::masked_sgd_>(m);
  serve<"masked_adamw_", &bindings::masked_adamw_>(m);
  serve<"per_example_accumulate_", &bindings::per_example_accumulate_>(m);
  serve<"channel_dot", &bindings::channel_dot>(m);
  serve<"channel_sums_", &bindings::channel_sums_>(m);
  m.impl("gather_columns", TORCH_BOX(&bindings::gather_columns));  // for any dtype
  m.impl("write_rows_", TORCH_BOX(&bindings::write_rows_));        // for any dtype
}
