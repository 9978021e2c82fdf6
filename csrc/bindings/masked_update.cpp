// delfast::masked_{reset,sgd,adamw}_ on the CPU.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bindings/checks.h"
#include "bindings/ops.h"
#include "bindings/threads.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::bindings {

namespace {

struct UpdateTask {
  size_t param;
  int64_t begin, end;  // bits: rows, or logical elements
  int64_t rank;        // bits set before `begin`
  int64_t work;
};

int64_t count_bits(const uint8_t* bits, int64_t bytes) {
  int64_t count = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, bits + i, 8);
    count += __builtin_popcountll(word);
  }
  for (; i < bytes; i++) count += __builtin_popcount(bits[i]);
  return count;
}

// The parameters to change, checked, and cut into tasks.
class UpdateList {
 public:
  // state: flat, `state_count` values per masked entry, parameter after parameter; null without state.
  UpdateList(at::TensorList param_tensors, at::TensorList sources, const at::Tensor* state, int state_count,
             const at::Tensor& bits, const c10::List<bool>& by_row) {
    const size_t count = param_tensors.size();
    TORCH_CHECK_VALUE(sources.size() == count && by_row.size() == count, "expected lists of equal length, got ", count,
                      " parameters, ", sources.size(), " gradients (or fresh values) and ", by_row.size(),
                      " values of by_row; pass one each");
    TORCH_CHECK_TYPE(bits.scalar_type() == at::kByte && bits.dim() == 1 && bits.is_contiguous(),
                     "expected bits to be contiguous uint8 (bytes,), got ", bits.scalar_type(), " ",
                     shape_text(bits.sizes()), "; concatenate the masks' packed bits");
    bits_ = bits.const_data_ptr<uint8_t>();
    bytes_left_ = bits.numel();
    params.reserve(count);
    std::vector<int64_t> entries;
    entries.reserve(count);
    changed_.reserve(count + 1);
    for (size_t i = 0; i < count; i++) {
      Updated u = add(param_tensors[i], sources[i], by_row.get(i), i);
      entries.push_back(add_tasks(u, i));
      params.push_back(u);
      changed_.push_back(param_tensors[i].unsafeGetTensorImpl());
    }
    TORCH_CHECK_VALUE(bytes_left_ == 0, "expected bits for ", count, " parameters, got ", bytes_left_,
                      " bytes more; the mask is of other parameters");
    if (state) set_state(*state, state_count, entries);
  }

  template <class Kernel>  // kernel(param index, begin, end, rank)
  void run(Kernel kernel) {
    run_tasks(tasks_, [&](const UpdateTask& task) { kernel(task.param, task.begin, task.end, task.rank); });
    copies_.write_back();
    for (c10::TensorImpl* changed : changed_)
      if (!changed->is_inference()) changed->bump_version();
  }

  std::vector<Updated> params;

 private:
  Updated add(const at::Tensor& param, const at::Tensor& source, bool by_row, size_t i) {
    TORCH_CHECK_VALUE(source.sizes() == param.sizes(), "expected values for parameter #", i, " of shape ",
                      shape_text(param.sizes()), ", got ", shape_text(source.sizes()),
                      "; pass them in the parameters' order");
    Updated u;
    u.param_dtype = dtype_of(param, "parameter", i);
    u.source_dtype = dtype_of(source, "gradient", i);
    u.layout = usable_layout(param);
    u.param = copies_.write(param, u.layout);
    u.source = copies_.read(source, u.layout);
    u.bits = bits_;
    u.by_row = by_row;
    return u;
  }

  // Cuts at multiples of whole bytes of bits, leaves out what has none set; returns the number of masked entries.
  int64_t add_tasks(const Updated& u, size_t i) {
    const int64_t units = u.by_row ? u.layout.rows : u.layout.numel(), bytes = (units + 7) / 8;
    TORCH_CHECK_VALUE(bytes <= bytes_left_, "expected ", bytes, " bytes of bits for parameter #", i, ", got ",
                      bytes_left_, "; the mask is of other parameters");
    const int64_t length = u.by_row ? u.layout.length : 1;
    const int64_t step = std::max<int64_t>(8, cpu::kChunk / length / 8 * 8);
    int64_t rank = 0;
    for (int64_t begin = 0; begin < units; begin += step) {
      const int64_t end = std::min(units, begin + step);
      const int64_t set = count_bits(u.bits + begin / 8, (end - begin + 7) / 8);
      if (set) tasks_.push_back({i, begin, end, rank, set * length});
      rank += set;
    }
    TORCH_CHECK_VALUE(units % 8 == 0 || !(u.bits[bytes - 1] >> units % 8), "expected the bits past the last of the ",
                      units, " of parameter #", i, " to be zero; the mask is of other parameters");
    bits_ += bytes;
    bytes_left_ -= bytes;
    entries_ += rank * length;
    return rank * length;
  }

  void set_state(const at::Tensor& state, int state_count, const std::vector<int64_t>& entries) {
    TORCH_CHECK_VALUE(
        state.scalar_type() == at::kFloat && state.is_contiguous() && state.numel() == state_count * entries_,
        "expected state to be contiguous float32 (", state_count * entries_, ",), got ", state.scalar_type(), " ",
        shape_text(state.sizes()), "; the optimizer state is of another mask");
    float* next = state.mutable_data_ptr<float>();
    for (size_t i = 0; i < params.size(); i++) {
      for (int s = 0; s < state_count; s++, next += entries[i]) params[i].state[s] = next;
    }
    changed_.push_back(state.unsafeGetTensorImpl());
  }

  const uint8_t* bits_;
  int64_t bytes_left_;
  std::vector<UpdateTask> tasks_;
  int64_t entries_ = 0;
  Copies copies_;
  std::vector<c10::TensorImpl*> changed_;
};

bool skipped(const OptionalTensor& found_inf) { return found_inf && found_inf->item<double>() != 0; }

float unscale_factor(const OptionalTensor& grad_scale, bool maximize) {
  const float factor = grad_scale ? float(1.0 / grad_scale->item<double>()) : 1.0f;
  return maximize ? -factor : factor;
}

// Steps taken before this one, of each parameter; counts this one.
std::vector<double> advance(const at::Tensor& steps, size_t params) {
  TORCH_CHECK_VALUE(steps.scalar_type() == at::kFloat && steps.is_contiguous() && size_t(steps.numel()) == params,
                    "expected steps to be contiguous float32 (", params, ",), got ", steps.scalar_type(), " ",
                    shape_text(steps.sizes()), "; pass one counter per parameter");
  float* counts = steps.mutable_data_ptr<float>();
  const std::vector<double> taken(counts, counts + params);
  for (size_t i = 0; i < params; i++) counts[i] += 1;
  if (!steps.is_inference()) steps.unsafeGetTensorImpl()->bump_version();
  return taken;
}

}  // namespace

void masked_reset_(at::TensorList params, at::TensorList fresh, const at::Tensor& bits, const c10::List<bool>& by_row) {
  UpdateList list(params, fresh, nullptr, 0, bits, by_row);
  const auto kernel = cpu::masked_update(cpu::isa()).reset;
  list.run([&](size_t p, int64_t begin, int64_t end, int64_t rank) { kernel(list.params[p], begin, end, rank); });
}

void masked_sgd_(at::TensorList params, at::TensorList grads, const at::Tensor& state, const at::Tensor& steps,
                 const at::Tensor& bits, const c10::List<bool>& by_row, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, const OptionalTensor& grad_scale,
                 const OptionalTensor& found_inf) {
  UpdateList list(params, grads, momentum != 0 ? &state : nullptr, 1, bits, by_row);
  if (skipped(found_inf)) return;
  SgdStep step{float(lr),
               float(momentum),
               float(1 - dampening),
               float(weight_decay),
               unscale_factor(grad_scale, maximize),
               nesterov,
               false};
  std::vector<SgdStep> step_of;
  step_of.reserve(params.size());
  for (double taken : advance(steps, params.size())) {
    step.first = taken == 0;
    step_of.push_back(step);
  }
  const auto kernel = cpu::masked_update(cpu::isa()).sgd;
  list.run([&](size_t p, int64_t begin, int64_t end, int64_t rank) {
    kernel(list.params[p], step_of[p], begin, end, rank);
  });
}

void masked_adamw_(at::TensorList params, at::TensorList grads, const at::Tensor& state, const at::Tensor& steps,
                   const at::Tensor& bits, const c10::List<bool>& by_row, double lr, double beta1, double beta2,
                   double eps, double weight_decay, bool maximize, const OptionalTensor& grad_scale,
                   const OptionalTensor& found_inf) {
  UpdateList list(params, grads, &state, 2, bits, by_row);
  if (skipped(found_inf)) return;
  std::vector<AdamWStep> step_of;
  step_of.reserve(params.size());
  for (double taken : advance(steps, params.size()))
    step_of.push_back({float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(eps),
                       float(lr / (1 - std::pow(beta1, taken + 1))), float(std::sqrt(1 - std::pow(beta2, taken + 1))),
                       float(1 - lr * weight_decay), unscale_factor(grad_scale, maximize)});
  const auto kernel = cpu::masked_update(cpu::isa()).adamw;
  list.run([&](size_t p, int64_t begin, int64_t end, int64_t rank) {
    kernel(list.params[p], step_of[p], begin, end, rank);
  });
}

}  // namespace delfast::bindings
