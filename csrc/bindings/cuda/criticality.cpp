// delfast::criticality on CUDA devices.
#include "bindings/checks.h"
#include "bindings/cuda/device.h"
#include "bindings/cuda/ops.h"

namespace delfast::bindings::on_cuda {

Tensor criticality(const TensorList& theta, const TensorList& grad, const std::string& criterion_name,
                   const std::string& aggregate_name, const IntList& top_h) {
  const Criterion criterion = parse_criterion(criterion_name);
  const Aggregate aggregate = parse_aggregate(aggregate_name);
  const ScoredList list(theta, grad, criterion, InPieces::read);
  const int64_t units = check_top_h(list.params, top_h);

  const OnDevice device(list.device);
  Tensor scores = device.empty({units}, ScalarType::Float);
  const int64_t count = int64_t(list.params.size());
  const Tensor workspace =
      device.empty({cuda::criticality_workspace(list.params.data(), top_h.data(), count, aggregate)}, ScalarType::Byte);
  check_launch(cuda::criticality(list.params.data(), top_h.data(), count, criterion, aggregate,
                                 scores.mutable_data_ptr<float>(), workspace.mutable_data_ptr(), device.stream()),
               "criticality");
  return scores;
}

}  // namespace delfast::bindings::on_cuda
