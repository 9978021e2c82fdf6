// delfast::masked_{reset,sgd,adamw}_ on the CPU.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bindings/checks.h"
#include "bindings/ops.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::bindings {

namespace {

struct UpdateTask {
  size_t param;
  int64_t begin, end;  // positions in the list of rows, or logical elements
  int64_t rank;        // bits set before `begin`
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

// The parameters to change, checked, and cut into tasks. Tensors in odd strides are worked on as copies, which
// write_back() puts in place.
class UpdateList {
 public:
  UpdateList(at::TensorList param_tensors, at::TensorList sources, at::TensorList index,
             std::vector<at::TensorList> states) {
    const size_t count = param_tensors.size();
    TORCH_CHECK_VALUE(sources.size() == count && index.size() == count, "expected lists of equal length, got ", count,
                      " parameters, ", sources.size(), " gradients (or fresh values) and ", index.size(),
                      " indices; pass one each");
    for (const at::TensorList& state : states)
      TORCH_CHECK_VALUE(state.size() == count, "expected one state tensor per parameter, got ", count,
                        " parameters and ", state.size(), " states; pass one each");
    params.reserve(count);
    for (size_t i = 0; i < count; i++) add(param_tensors[i], sources[i], index[i], states, i);
  }

  template <class Kernel>  // kernel(param index, begin, end, rank)
  void run(Kernel kernel) {
    at::parallel_for(0, int64_t(tasks_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) kernel(tasks_[t].param, tasks_[t].begin, tasks_[t].end, tasks_[t].rank);
    });
    for (auto& [original, copy] : copies_) original.copy_(copy);
    for (c10::TensorImpl* changed : changed_)
      if (!changed->is_inference()) changed->bump_version();
  }

  std::vector<Updated> params;

 private:
  void add(const at::Tensor& param, const at::Tensor& source, const at::Tensor& index,
           const std::vector<at::TensorList>& states, size_t i) {
    TORCH_CHECK_VALUE(source.sizes() == param.sizes(), "expected values for parameter #", i, " of shape ",
                      shape_text(param.sizes()), ", got ", shape_text(source.sizes()),
                      "; pass them in the parameters' order");
    Updated u;
    u.param_dtype = dtype_of(param, "parameter", i);
    u.source_dtype = dtype_of(source, "gradient", i);
    const std::optional<Layout> layout = layout_of(param);
    const at::Tensor values = writable(param, layout ? *layout : Layout{0, param.numel(), 1});
    u.layout = *layout_of(values);
    u.param = values.mutable_data_ptr();
    u.source = kept_.emplace_back(in_layout(source, u.layout)).const_data_ptr();
    int64_t entries = 0;
    if (index.scalar_type() == at::kInt)
      entries = add_rows(u, index, i);
    else if (index.scalar_type() == at::kByte)
      entries = add_bits(u, index, i);
    else
      TORCH_CHECK_TYPE(false, "expected index #", i, " to be int32 rows or uint8 packed bits, got ",
                       index.scalar_type(), "; pass Mask.index()");
    for (size_t s = 0; s < states.size(); s++) u.state[s] = add_state(states[s][i], u, entries, i);
    params.push_back(u);
    changed_.push_back(param.unsafeGetTensorImpl());
  }

  int64_t add_rows(Updated& u, const at::Tensor& index, size_t i) {
    TORCH_CHECK_VALUE(index.dim() == 1 && index.is_contiguous(), "expected rows #", i,
                      " to be contiguous int32 (n,), got shape ", shape_text(index.sizes()), "; pass Mask.index()");
    u.rows = index.const_data_ptr<int32_t>();
    u.row_count = index.numel();
    int64_t previous = -1;
    for (int64_t r = 0; r < u.row_count; r++) {
      TORCH_CHECK_INDEX(u.rows[r] > previous && u.rows[r] < u.layout.rows, "expected rows #", i, " ascending in [0, ",
                        u.layout.rows, "), got ", u.rows[r], " after ", previous, "; the mask is of another parameter");
      previous = u.rows[r];
    }
    const int64_t rows_per_task = std::max<int64_t>(1, cpu::kChunk / std::max<int64_t>(1, u.layout.length));
    for (int64_t r = 0; r < u.row_count; r += rows_per_task)
      tasks_.push_back({params.size(), r, std::min(u.row_count, r + rows_per_task), 0});
    return u.row_count * u.layout.length;
  }

  int64_t add_bits(Updated& u, const at::Tensor& index, size_t i) {
    const int64_t numel = u.layout.numel();
    TORCH_CHECK_VALUE(index.dim() == 1 && index.is_contiguous() && index.numel() == (numel + 7) / 8, "expected bits #",
                      i, " to be contiguous uint8 (", (numel + 7) / 8, ",), got shape ", shape_text(index.sizes()),
                      "; the mask is of another parameter");
    u.bits = index.const_data_ptr<uint8_t>();
    int64_t rank = 0;
    for (int64_t begin = 0; begin < numel; begin += cpu::kChunk) {
      const int64_t end = std::min(numel, begin + cpu::kChunk);
      const int64_t set = count_bits(u.bits + begin / 8, (end - begin + 7) / 8);
      if (set) tasks_.push_back({params.size(), begin, end, rank});
      rank += set;
    }
    return rank;
  }

  float* add_state(const at::Tensor& state, const Updated& u, int64_t entries, size_t i) {
    TORCH_CHECK_VALUE(state.scalar_type() == at::kFloat && state.numel() == entries && (!u.bits || state.dim() == 1),
                      "expected state #", i, " to be float32 with ", entries, " entries, got ", state.scalar_type(),
                      " with ", state.numel(), "; the optimizer state is of another mask");
    changed_.push_back(state.unsafeGetTensorImpl());
    // rows keep their own memory order in the state; bits are listed in logical order, one dimension
    return writable(state, u.bits ? Layout{0, 1, 1} : u.layout).mutable_data_ptr<float>();
  }

  at::Tensor writable(const at::Tensor& t, const Layout& layout) {
    at::Tensor usable = in_layout(t, layout);
    if (!usable.is_same(t)) copies_.emplace_back(t, usable);
    return usable;
  }

  std::vector<UpdateTask> tasks_;
  std::vector<at::Tensor> kept_;
  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
  std::vector<c10::TensorImpl*> changed_;
};

bool skipped(const OptionalTensor& found_inf) { return found_inf && found_inf->item<double>() != 0; }

float unscale_factor(const OptionalTensor& grad_scale, bool maximize) {
  const float factor = grad_scale ? float(1.0 / grad_scale->item<double>()) : 1.0f;
  return maximize ? -factor : factor;
}

// Steps taken before this one; counts this one.
std::vector<double> advance(at::TensorList steps, size_t params) {
  TORCH_CHECK_VALUE(steps.size() == params, "expected one step counter per parameter, got ", params, " parameters and ",
                    steps.size(), " counters; pass one float32 scalar each");
  std::vector<double> taken;
  taken.reserve(params);
  for (const at::Tensor& step : steps) {
    float* count = step.mutable_data_ptr<float>();
    taken.push_back(*count);
    *count += 1;
    if (!step.is_inference()) step.unsafeGetTensorImpl()->bump_version();
  }
  return taken;
}

}  // namespace

void masked_reset_(at::TensorList params, at::TensorList fresh, at::TensorList index) {
  UpdateList list(params, fresh, index, {});
  const auto kernel = cpu::masked_update(cpu::isa()).reset;
  list.run([&](size_t p, int64_t begin, int64_t end, int64_t rank) { kernel(list.params[p], begin, end, rank); });
}

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList steps,
                 at::TensorList index, double lr, double momentum, double dampening, double weight_decay, bool nesterov,
                 bool maximize, const OptionalTensor& grad_scale, const OptionalTensor& found_inf) {
  std::vector<at::TensorList> states;
  if (momentum != 0) states.push_back(momentum_buffers);
  UpdateList list(params, grads, index, states);
  if (skipped(found_inf)) return;
  SgdStep step{float(lr),
               float(momentum),
               float(1 - dampening),
               float(weight_decay),
               unscale_factor(grad_scale, maximize),
               nesterov,
               false};
  std::vector<SgdStep> step_of;
  for (double taken : advance(steps, params.size())) {
    step.first = taken == 0;
    step_of.push_back(step);
  }
  const auto kernel = cpu::masked_update(cpu::isa()).sgd;
  list.run([&](size_t p, int64_t begin, int64_t end, int64_t rank) {
    kernel(list.params[p], step_of[p], begin, end, rank);
  });
}

void masked_adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                   at::TensorList steps, at::TensorList index, double lr, double beta1, double beta2, double eps,
                   double weight_decay, bool maximize, const OptionalTensor& grad_scale,
                   const OptionalTensor& found_inf) {
  UpdateList list(params, grads, index, {exp_avgs, exp_avg_sqs});
  if (skipped(found_inf)) return;
  std::vector<AdamWStep> step_of;
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
