// delfast::masked_plan and masked_{reset,sgd,adamw}_ on the CPU, whose kernels read only the bits of a plan.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bindings/checks.h"
#include "bindings/ops.h"
#include "bindings/threads.h"
#include "bindings/updates.h"
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

// The list, cut into tasks at whole bytes of bits, without tasks whose bits are all zero.
class UpdateTasks {
 public:
  UpdateTasks(const TensorList& params, const TensorList& sources, const Tensor& bits, const BoolList& by_row)
      : list_(params, sources, bits, by_row) {
    const int64_t count = int64_t(list_.params.size());
    DELFAST_CHECK_VALUE(
        !list_.plan || is_of_shapes(MaskPlan(const_cast<void*>(list_.plan), count), list_.params.data(), count),
        "expected a plan of these ", count,
        " parameters, got one of other shapes; pass what masked_plan returned for them");
    entries_.reserve(list_.params.size());
    for (size_t i = 0; i < list_.params.size(); i++) entries_.push_back(add_tasks(list_.params[i], i));
  }

  const UpdateList& list() const { return list_; }

  // state: flat, `count` values for each masked entry, parameter after parameter, each at a multiple of 4. The state of
  // another mask with the same rounded sizes is not detected.
  void set_state(const Tensor& state, int count) {
    int64_t all = 0;
    for (int64_t entries : entries_) all += padded_state(count * entries);
    DELFAST_CHECK_VALUE(state.numel() == all, "expected state to be contiguous float32 (", all, ",), got ",
                        type_of(state), " ", state.sizes(), "; the optimizer state is of another mask");
    float* next = state.mutable_data_ptr<float>();
    for (size_t i = 0; i < list_.params.size(); i++) {
      for (int s = 0; s < count; s++) list_.params[i].state[s] = next + s * entries_[i];
      next += padded_state(count * entries_[i]);
    }
    list_.also_changes(state);
  }

  // Returns the number of steps of each parameter before this one, and increments it.
  std::vector<double> advance(const Tensor& steps) {
    float* const counts = steps.mutable_data_ptr<float>();
    const std::vector<double> taken(counts, counts + list_.params.size());
    for (size_t i = 0; i < taken.size(); i++) counts[i] += 1;
    list_.also_changes(steps);
    return taken;
  }

  template <class Kernel>  // kernel(parameter, its index, begin, end, rank)
  void run(Kernel kernel) {
    run_tasks(tasks_, [&](const UpdateTask& task) {
      kernel(list_.params[task.param], task.param, task.begin, task.end, task.rank);
    });
    list_.finish();
  }

 private:
  // Returns the number of masked entries.
  int64_t add_tasks(const Updated& u, size_t i) {
    const int64_t units = units_of(u), bytes = (units + 7) / 8, length = unit_length_of(u);
    const int64_t step = std::max<int64_t>(8, cpu::kChunk / length / 8 * 8);
    int64_t rank = 0;
    for (int64_t begin = 0; begin < units; begin += step) {
      const int64_t end = std::min(units, begin + step);
      const int64_t set = count_bits(u.bits + begin / 8, (end - begin + 7) / 8);
      if (set) tasks_.push_back({i, begin, end, rank, set * length});
      rank += set;
    }
    DELFAST_CHECK_VALUE(units % 8 == 0 || !(u.bits[bytes - 1] >> units % 8), "expected the bits past the last of the ",
                        units, " of parameter #", i, " to be zero; the mask is of other parameters");
    return rank * length;
  }

  UpdateList list_;
  std::vector<UpdateTask> tasks_;
  std::vector<int64_t> entries_;  // number of masked entries of each parameter
};

bool skipped(const OptionalTensor& found_inf) { return found_inf && number_in(*found_inf) != 0; }

float unscale_factor(const OptionalTensor& grad_scale, bool maximize) {
  const float factor = grad_scale ? float(1.0 / number_in(*grad_scale)) : 1.0f;
  return maximize ? -factor : factor;
}

}  // namespace

Tensor masked_plan(const TensorList& params, const Tensor& bits, const BoolList& by_row) {
  const std::vector<Updated> list = planned_list(params, bits, by_row);
  const int64_t count = int64_t(list.size());
  const MaskPlanShape shape(list.data(), count);
  const Tensor plan = empty({shape.bytes()}, ScalarType::Byte);
  uint8_t* const bytes = plan.mutable_data_ptr<uint8_t>();
  std::memset(std::copy_n(bits.const_data_ptr<uint8_t>(), bits.numel(), bytes), 0,
              size_t(shape.bytes() - bits.numel()));
  write_shapes(MaskPlan(bytes + shape.head_offset(), count), list.data(), count);
  return plan;
}

void masked_reset_(const TensorList& params, const TensorList& fresh, const Tensor& bits, const BoolList& by_row) {
  UpdateTasks tasks(params, fresh, bits, by_row);
  const auto kernel = cpu::masked_update(cpu::isa()).reset;
  tasks.run([&](const Updated& u, size_t, int64_t begin, int64_t end, int64_t rank) { kernel(u, begin, end, rank); });
}

void masked_sgd_(const TensorList& params, const TensorList& grads, const Tensor& state, const Tensor& steps,
                 const Tensor& bits, const BoolList& by_row, double lr, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, const OptionalTensor& grad_scale,
                 const OptionalTensor& found_inf, const OptionalTensor& lr_tensor) {
  UpdateTasks tasks(params, grads, bits, by_row);
  check_step(tasks.list(), state, steps, grad_scale, found_inf, lr_tensor);
  if (momentum != 0) tasks.set_state(state, 1);
  if (skipped(found_inf)) return;
  if (lr_tensor) lr = number_in(*lr_tensor);
  SgdStep step{float(lr),
               float(momentum),
               float(1 - dampening),
               float(weight_decay),
               unscale_factor(grad_scale, maximize),
               nesterov,
               false};
  std::vector<SgdStep> step_of;
  step_of.reserve(params.size());
  for (double taken : tasks.advance(steps)) {
    step.first = taken == 0;
    step_of.push_back(step);
  }
  const auto kernel = cpu::masked_update(cpu::isa()).sgd;
  tasks.run([&](const Updated& u, size_t p, int64_t begin, int64_t end, int64_t rank) {
    kernel(u, step_of[p], begin, end, rank);
  });
}

void masked_adamw_(const TensorList& params, const TensorList& grads, const Tensor& state, const Tensor& steps,
                   const Tensor& bits, const BoolList& by_row, double lr, double beta1, double beta2, double eps,
                   double weight_decay, bool maximize, const OptionalTensor& grad_scale,
                   const OptionalTensor& found_inf, const OptionalTensor& lr_tensor) {
  UpdateTasks tasks(params, grads, bits, by_row);
  check_step(tasks.list(), state, steps, grad_scale, found_inf, lr_tensor);
  tasks.set_state(state, 2);
  if (skipped(found_inf)) return;
  if (lr_tensor) lr = number_in(*lr_tensor);
  std::vector<AdamWStep> step_of;
  step_of.reserve(params.size());
  for (double taken : tasks.advance(steps))
    step_of.push_back({float(beta1), float(1 - beta1), float(beta2), float(1 - beta2), float(eps),
                       float(lr / (1 - std::pow(beta1, taken + 1))), float(std::sqrt(1 - std::pow(beta2, taken + 1))),
                       float(1 - lr * weight_decay), unscale_factor(grad_scale, maximize)});
  const auto kernel = cpu::masked_update(cpu::isa()).adamw;
  tasks.run([&](const Updated& u, size_t p, int64_t begin, int64_t end, int64_t rank) {
    kernel(u, step_of[p], begin, end, rank);
  });
}

}  // namespace delfast::bindings
