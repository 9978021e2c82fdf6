// The version counters by which autograd detects in-place changes of a tensor.
#pragma once

#include "bindings/serving.h"

namespace delfast::bindings {

// torch's stable interface has no function for this. delfast/ops/table.py defines an op for it from torch's own, which
// runs no bytecode, so that no signal's handler runs in between. It skips inference tensors, which have no version.
inline void increment_versions(const TensorList& changed) {
  StableIValue argument = torch::stable::detail::from(changed);
  call_python("delfast_python::increment_versions", &argument);
}

}  // namespace delfast::bindings
