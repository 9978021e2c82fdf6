// The version counters by which autograd notices that a tensor changed in place.
#pragma once

#include "bindings/serving.h"

namespace delfast::bindings {

// torch's stable interface has no such function: delfast/ops/table.py makes an op of torch's, which runs no bytecode,
// so that no signal's handler comes between. It passes over inference tensors, which have no version.
inline void increment_versions(const TensorList& changed) {
  StableIValue argument = torch::stable::detail::from(changed);
  call_python("delfast_python::increment_versions", &argument);
}

}  // namespace delfast::bindings
