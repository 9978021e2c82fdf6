// delfast::select_elements and delfast::select_units on CUDA devices.
#include "bindings/checks.h"
#include "bindings/cuda/device.h"
#include "bindings/cuda/ops.h"

namespace delfast::bindings::on_cuda {

std::tuple<Tensor, Tensor> select_elements(const TensorList& theta, const TensorList& grad,
                                           const std::string& criterion_name, int64_t k) {
  check_budget(k);
  const Criterion criterion = parse_criterion(criterion_name);
  const ScoredList list(theta, grad, criterion);
  int64_t bytes = 0;
  for (const Scored& p : list.params) bytes += (p.layout.numel() + 7) / 8;

  const OnDevice device(list.device);
  Tensor bits = device.empty({bytes}, ScalarType::Byte), info = device.empty({kFields<ElementsInfo>}, ScalarType::Long);
  const int64_t count = int64_t(list.params.size());
  const Tensor workspace = device.empty({cuda::select_elements_workspace(list.params.data(), count)}, ScalarType::Byte);
  check_launch(cuda::select_elements(list.params.data(), count, criterion, k, bits.mutable_data_ptr<uint8_t>(),
                                     fields_of<ElementsInfo>(info), workspace.mutable_data_ptr(), device.stream()),
               "select_elements");
  return {std::move(bits), std::move(info)};
}

std::tuple<Tensor, Tensor> select_units(const Tensor& scores, const IntList& counts, const IntList& lengths, int64_t k,
                                        bool cut_last) {
  const int64_t bytes = check_units(scores, counts, lengths, k);
  const OnDevice device(device_of(scores));
  Tensor bits = device.empty({bytes}, ScalarType::Byte), info = device.empty({kFields<UnitsInfo>}, ScalarType::Long);
  const Tensor scores_row = torch::stable::contiguous(scores);
  const int64_t count = int64_t(counts.size());
  const Tensor workspace =
      device.empty({cuda::select_units_workspace(counts.data(), lengths.data(), count)}, ScalarType::Byte);
  check_launch(cuda::select_units(scores_row.const_data_ptr<float>(), counts.data(), lengths.data(), count, k, cut_last,
                                  bits.mutable_data_ptr<uint8_t>(), fields_of<UnitsInfo>(info),
                                  workspace.mutable_data_ptr(), device.stream()),
               "select_units");
  return {std::move(bits), std::move(info)};
}

}  // namespace delfast::bindings::on_cuda
