// Launchers of the masked updates.
#include "cuda/masked_update.cuh"

namespace delfast::cuda {

namespace {

unsigned multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return unsigned(count);
}

// The constants of a step from its options, in float32. The rates are 0 here and computed on the device.
SgdStep constants(const SgdOptions& o) {
  return {0, float(o.momentum), float(1 - o.dampening), float(o.weight_decay), 0, o.nesterov, false};
}
AdamWStep constants(const AdamWOptions& o) {
  return {float(o.beta1), float(1 - o.beta1), float(o.beta2), float(1 - o.beta2), float(o.eps), 0, 0, 0, 0};
}

template <class Rule, class Options>
Error update(const Updated* params, int64_t count, const StepInputs& inputs, const Options& options, const void* plan,
             void* workspace, Stream stream) {
  const int64_t max_pieces = MaskPlanShape(params, count).max_pieces;
  if (max_pieces > INT32_MAX / 2) return "more pieces than a kernel counts";
  const MaskPlan view(const_cast<void*>(plan), count);
  Prepared<Rule>* const prepared = static_cast<Prepared<Rule>*>(workspace);
  const auto for_entries = [&](auto add) {
    for (int64_t i = 0; i < count; i++) {
      const Updated& u = params[i];
      add({u.param, u.source, u.bits, u.layout, u.param_dtype, u.source_dtype, u.by_row}, 0);
    }
  };
  int first = 0;
  launch_tables<Masked>(count, for_entries, [&]<int kBytes>(const Table<Masked, kBytes>& table) {
    DELFAST_LAUNCH((masked_update_prepare<Options, Rule, kBytes>), 1, kPrepareThreads, 0, stream, table, options,
                   inputs, view, first, int(count), prepared);
    first += table.count;
  });
  if (!max_pieces) return last_error();
  const int64_t needed = ceil_div(max_pieces, kThreads / kWarp),
                resident = int64_t(multiprocessors()) * Rule::kResident;
  Rule common = {};
  if constexpr (!std::is_same_v<Rule, ResetRule>) common.step = constants(options);
  DELFAST_LAUNCH(masked_update<Rule>, unsigned(needed < resident ? needed : resident), kThreads, 0, stream, view,
                 prepared, common, inputs.found_inf);
  return last_error();
}

}  // namespace

int64_t masked_update_workspace(int64_t count) {
  return count * int64_t(sizeof(Prepared<SgdRule>) > sizeof(Prepared<AdamWRule>) ? sizeof(Prepared<SgdRule>)
                                                                                 : sizeof(Prepared<AdamWRule>));
}

Error masked_reset(const Updated* params, int64_t count, const void* plan, void* workspace, Stream stream) {
  return update<ResetRule>(params, count, {}, ResetOptions(), plan, workspace, stream);
}

Error masked_sgd(const Updated* params, int64_t count, const StepInputs& inputs, const SgdOptions& options,
                 const void* plan, void* workspace, Stream stream) {
  if (options.momentum != 0) return update<SgdRule>(params, count, inputs, options, plan, workspace, stream);
  return update<PlainSgdRule>(params, count, inputs, options, plan, workspace, stream);
}

Error masked_adamw(const Updated* params, int64_t count, const StepInputs& inputs, const AdamWOptions& options,
                   const void* plan, void* workspace, Stream stream) {
  return update<AdamWRule>(params, count, inputs, options, plan, workspace, stream);
}

}  // namespace delfast::cuda
