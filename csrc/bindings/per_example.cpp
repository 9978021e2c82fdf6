// delfast::per_example_accumulate_, delfast::channel_dot and delfast::channel_sums_ on the CPU.
#include "bindings/per_example.h"

#include <algorithm>

#include "bindings/ops.h"
#include "bindings/threads.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::bindings {

namespace {

// Calls f(begin, end) for parts of [0, count), on all threads if the work is large enough. No result depends on the
// parts.
template <class F>
void run_range(int64_t count, int64_t work_each, F f) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kWorthThreads / std::max<int64_t>(1, work_each)), f);
}

// Work of a product and its sum relative to a copied element: a vector unit takes about a thirtieth of the time that
// memory takes for an element. An estimate; it decides only whether other threads help.
constexpr int64_t kProductsPerElement = 32;

}  // namespace

void per_example_accumulate_(const Tensor& sums, const Tensor& inputs, const Tensor& output_grad, const IntList& stride,
                             const IntList& padding, const IntList& dilation, int64_t groups,
                             const std::string& transform, bool /*allow_tf32: for CUDA*/) {
  PerExampleOperands checked(sums, inputs, output_grad, stride, padding, dilation, groups, transform);
  if (!checked.operands.shape.examples) return checked.finish();
  const cpu::Isa isa = cpu::isa();
  const auto& kernels = cpu::per_example(isa);
  const cpu::PerExamplePlan plan(checked.operands, isa);
  const Tensor workspace = empty({plan.workspace}, ScalarType::Float);
  const ConvShape& s = checked.operands.shape;
  const int64_t products = s.out_channels * s.row() * s.positions();  // products of an example
  for (int64_t first = 0; first < s.examples; first += plan.block_examples) {
    const cpu::PerExampleBlock block = plan.block(first, workspace.mutable_data_ptr<float>());
    const cpu::Packing &of_inputs = block.pack_inputs, &of_output_grad = block.pack_output_grad;
    const int64_t rows =
        of_inputs.rows + of_output_grad.rows;  // rows of both operands: threads wait for each other less often
    run_range(rows, std::max(of_inputs.length, of_output_grad.length), [&](int64_t begin, int64_t end) {
      kernels.pack(block, of_inputs, std::min(begin, of_inputs.rows), std::min(end, of_inputs.rows));
      kernels.pack(block, of_output_grad, std::max(begin, of_inputs.rows) - of_inputs.rows,
                   std::max(end, of_inputs.rows) - of_inputs.rows);
    });
    const int64_t tiles = kernels.tiles(block), examples = std::min(plan.block_examples, s.examples - first);
    run_range(tiles, products * examples / tiles / kProductsPerElement,
              [&](int64_t begin, int64_t end) { kernels.accumulate(block, begin, end); });
  }
  checked.finish();
}

Tensor channel_dot(const Tensor& output_grad, const OptionalTensor& values) {
  ChannelDotOperands checked(output_grad, values);
  ChannelDot& dot = checked.dot;
  Tensor out = empty({dot.examples, dot.channels}, ScalarType::Float);
  dot.out = out.mutable_data_ptr<float>();
  const auto& kernels = cpu::per_example(cpu::isa());
  run_range(out.numel(), dot.positions, [&](int64_t begin, int64_t end) { kernels.channel_dot(dot, begin, end); });
  return out;
}

void channel_sums_(const TensorList& sums, const Tensor& output_grad, const OptionalTensor& values,
                   const OptionalTensor& mean, const OptionalTensor& variance, double eps,
                   const std::string& transform) {
  ChannelSumsOperands checked(sums, output_grad, values, mean, variance, eps, transform);
  const ChannelSums& p = checked.operands;
  if (!output_grad.numel()) return checked.finish();
  const cpu::ChannelSumsPlan plan(p);
  const Tensor workspace = empty({plan.workspace()}, ScalarType::Double);
  double* const parts = workspace.mutable_data_ptr<double>();
  const auto& kernels = cpu::per_example(cpu::isa());
  run_range(plan.units(), plan.slab_examples * p.positions * cpu::ChannelSumsPlan::kLanes,
            [&](int64_t begin, int64_t end) { kernels.channel_sums(p, plan, parts, begin, end); });
  cpu::add_channel_sums(p, plan, parts);
  checked.finish();
}

}  // namespace delfast::bindings
