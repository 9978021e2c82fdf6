// The version counters by which autograd notices that a tensor changed in place.
#pragma once

#include "bindings/serving.h"

namespace delfast::bindings {

// torch's stable interface has no such function: delfast/ops/table.py defines the op. Inference tensors have no
// version.
inline void increment_versions(const TensorList& changed) {
  StableIValue argument = torch::stable::detail::from(changed);
  call_python("delfast_python::increment_versions", &argument);
}

}  // namespace delfast::bindings
