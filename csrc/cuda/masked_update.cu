// Launchers of the masked updates.
#include "cuda/masked_update.cuh"

namespace delfast::cuda {

namespace {

// Calls add(entry) for each parameter that has elements, in order; returns the number of stretches of counted bits.
template <class F>
int64_t for_masked(const Updated* params, int64_t count, F add) {
  int64_t stretches = 0;
  for (int64_t i = 0; i < count; i++) {
    const Updated& u = params[i];
    const int64_t units = u.by_row ? u.layout.rows : u.layout.numel();
    if (!u.layout.numel()) continue;
    add(Masked{u.param, u.source, u.bits, u.layout, units, u.by_row ? u.layout.length : 1, stretches, i, u.param_dtype,
               u.source_dtype, u.by_row});
    stretches += ceil_div(units, kCountedBits);
  }
  return stretches;
}

// Launches one kernel over all parameters, as many at a time as a table holds.
template <class Blocks, class Kernel>
int64_t launch(const Updated* params, int64_t count, Blocks blocks_of, Kernel kernel) {
  Chunks<Masked, Kernel> chunks(kernel);
  const int64_t stretches = for_masked(params, count, [&](const Masked& p) { chunks.add(p, blocks_of(p)); });
  chunks.flush();
  return stretches;
}

int64_t update_blocks(const Masked& p) { return ceil_div(p.units * p.unit_length, kUpdateTile); }

// The workspace: the stretches' counts and their sum, then a rule for each parameter.
int64_t count_bytes(int64_t stretches) { return ceil_div((stretches + 1) * int64_t(sizeof(long long)), 16) * 16; }

template <class Rule, class Options>
Error step(const Updated* params, int64_t count, const StepInputs& inputs, const Options& options, void* workspace,
           Stream stream) {
  if (!count) return nullptr;
  constexpr int kStates = Rule::kStates;
  long long* const counts = static_cast<long long*>(workspace);
  const int64_t stretches =
      kStates ? launch(
                    params, count, [](const Masked& p) { return ceil_div(p.units, kCountedBits); },
                    [&](const Table<Masked>& table) {
                      DELFAST_LAUNCH(masked_update_count, table.blocks(), kThreads, 0, stream, table, counts);
                    })
              : 0;
  Rule* const rules = reinterpret_cast<Rule*>(static_cast<unsigned char*>(workspace) + count_bytes(stretches));
  const Inputs in = {inputs.steps, inputs.grad_scale, inputs.found_inf,   inputs.lr,
                     count,        stretches,         inputs.state_numel, kStates};
  DELFAST_LAUNCH((masked_update_plan<Options, Rule>), 1, kPlanThreads, 0, stream, options, in, counts, rules);
  launch(params, count, update_blocks, [&](const Table<Masked>& table) {
    DELFAST_LAUNCH(masked_update<Rule>, table.blocks(), kThreads, kStates * (kUpdateTile + 4) * sizeof(float), stream,
                   table, rules, inputs.found_inf, inputs.state, counts);
  });
  return last_error();
}

}  // namespace

Error masked_reset(const Updated* params, int64_t count, Stream stream) {
  launch(params, count, update_blocks, [&](const Table<Masked>& table) {
    DELFAST_LAUNCH(masked_update<ResetRule>, table.blocks(), kThreads, 0, stream, table,
                   static_cast<const ResetRule*>(nullptr), static_cast<const float*>(nullptr),
                   static_cast<float*>(nullptr), static_cast<const long long*>(nullptr));
  });
  return last_error();
}

int64_t masked_update_workspace(const Updated* params, int64_t count) {
  const int64_t stretches = for_masked(params, count, [](const Masked&) {});
  return count_bytes(stretches) +
         count * int64_t(sizeof(SgdRule) > sizeof(AdamWRule) ? sizeof(SgdRule) : sizeof(AdamWRule));
}

Error masked_sgd(const Updated* params, int64_t count, const StepInputs& inputs, const SgdOptions& options,
                 void* workspace, Stream stream) {
  if (options.momentum != 0) return step<SgdRule>(params, count, inputs, options, workspace, stream);
  return step<PlainSgdRule>(params, count, inputs, options, workspace, stream);
}

Error masked_adamw(const Updated* params, int64_t count, const StepInputs& inputs, const AdamWOptions& options,
                   void* workspace, Stream stream) {
  return step<AdamWRule>(params, count, inputs, options, workspace, stream);
}

}  // namespace delfast::cuda
