// delfast::select_elements and delfast::select_units on CUDA devices.
#include "bindings/checks.h"
#include "bindings/cuda/device.h"
#include "bindings/cuda/ops.h"

namespace delfast::bindings::on_cuda {

std::tuple<at::Tensor, at::Tensor> select_elements(at::TensorList theta, at::TensorList grad,
                                                   c10::string_view criterion_name, int64_t k) {
  check_budget(k);
  const Criterion criterion = parse_criterion(criterion_name);
  const ScoredList list(theta, grad, criterion);
  int64_t bytes = 0;
  for (const Scored& p : list.params) bytes += (p.layout.numel() + 7) / 8;

  const OnDevice device(list.device);
  at::Tensor bits = device.empty({bytes}, at::kByte), info = device.empty({2}, at::kLong);
  const int64_t count = int64_t(list.params.size());
  const at::Tensor workspace = device.empty({cuda::select_elements_workspace(list.params.data(), count)}, at::kByte);
  check_launch(cuda::select_elements(list.params.data(), count, criterion, k, bits.mutable_data_ptr<uint8_t>(),
                                     info.mutable_data_ptr<int64_t>(), workspace.mutable_data_ptr(), device.stream()),
               "select_elements");
  return {std::move(bits), std::move(info)};
}

std::tuple<at::Tensor, at::Tensor> select_units(const at::Tensor& scores, at::IntArrayRef counts,
                                                at::IntArrayRef lengths, int64_t k, bool cut_last) {
  const int64_t bytes = check_units(scores, counts, lengths, k);
  const OnDevice device(scores.device());
  at::Tensor bits = device.empty({bytes}, at::kByte), info = device.empty({5}, at::kLong);
  const at::Tensor scores_row = scores.contiguous();
  const int64_t count = int64_t(counts.size());
  const at::Tensor workspace =
      device.empty({cuda::select_units_workspace(counts.data(), lengths.data(), count)}, at::kByte);
  check_launch(cuda::select_units(scores_row.const_data_ptr<float>(), counts.data(), lengths.data(), count, k, cut_last,
                                  bits.mutable_data_ptr<uint8_t>(), info.mutable_data_ptr<int64_t>(),
                                  workspace.mutable_data_ptr(), device.stream()),
               "select_units");
  return {std::move(bits), std::move(info)};
}

}  // namespace delfast::bindings::on_cuda
