// What the CUDA kernels offer to the bindings: launchers that know neither torch nor, here, any CUDA header.
//
// Every launcher works on the current device and on the stream it is given, allocates nothing, waits for nothing and
// can be captured in a CUDA graph. Pointers inside the structs are device pointers, the arrays of structs are the
// host's. A workspace is uninitialized device memory, aligned to 16 bytes, of as many bytes as NAME_workspace() says.
// Returns null, or what CUDA says went wrong.
#pragma once

#include <cstdint>

#include "delfast/params.h"
#include "delfast/per_example.h"
#include "delfast/write_rows.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace delfast::cuda {

using Stream = CUstream_st*;
using Error = const char*;

// out[unit] for every row of every parameter, one parameter after the other; top[i] in [1, length] is used by
// topk_mean. Bit for bit what the CPU kernels compute. One launch for as many parameters as a table holds (540 or so;
// 65 under a driver before CUDA 12.1); where rows are longer than 16,384 elements, one more, or two more for a top h;
// rows in pieces have a launch of their own.
int64_t criticality_workspace(const Scored* params, const int64_t* top, int64_t count, Aggregate aggregate);
Error criticality(const Scored* params, const int64_t* top, int64_t count, Criterion criterion, Aggregate aggregate,
                  float* out, void* workspace, Stream stream);

// The bits of the k highest-scoring elements, each parameter's padded to whole bytes, in logical order;
// info = {nonfinite, positive}: the first parameter with a NaN or infinite score (then all bits are zero), or -1, and
// how many of the selected elements score above 0. Of `min_sampled` elements or more a sample is taken first, so that
// most are read once.
inline constexpr int64_t kMinSampled = 1 << 20;
int64_t select_elements_workspace(const Scored* params, int64_t count, int64_t min_sampled = kMinSampled);
Error select_elements(const Scored* params, int64_t count, Criterion criterion, int64_t k, uint8_t* bits, int64_t* info,
                      void* workspace, Stream stream, int64_t min_sampled = kMinSampled);

// The longest prefix of the units, in falling score, whose sizes sum to at most k: counts[i] units of lengths[i]
// scalars each, their scores one group after the other. info = {cut_unit, cut_size, nonfinite, selected, positive} as
// in UnitSelection of the CPU; without cut_last the first two are -1 and 0. In one launch for up to 28,672 units or so
// of fewer than 2^32 scalars in all.
int64_t select_units_workspace(const int64_t* counts, const int64_t* lengths, int64_t count);
Error select_units(const float* scores, const int64_t* counts, const int64_t* lengths, int64_t count, int64_t k,
                   bool cut_last, uint8_t* bits, int64_t* info, void* workspace, Stream stream);

// Lists the masked entries of parameters: writes what follows the bits of a plan (delfast/mask_plan.h), from its head
// on; `plan` is aligned to 16 bytes. Of each Updated, `bits` points to its own packed bits; tensors are not looked at.
int64_t mask_plan_workspace(const Updated* params, int64_t count);
Error mask_plan(const Updated* params, int64_t count, void* plan, void* workspace, Stream stream);

// Masked updates, of the entries that `plan`, the head of a plan of these bits, lists: at most two launches for as many
// parameters as a table holds (540 or so; 65 or so under a driver before CUDA 12.1). An Updated's own `state` is not
// looked at: `state` here is the whole flat array, of state_numel float32 in all, laid out as for the CPU (parameter
// after parameter, each at a multiple of 4, in each all of state[0] before state[1]). A state_numel that is not that of
// the mask, each parameter's values rounded up to a multiple of 4, traps on the device, and so does a plan of other
// shapes; the state of another mask with the same rounded sizes is not noticed.
struct StepInputs {
  float* state;
  int64_t state_numel;
  float* steps;               // one counter per parameter: steps taken so far; this one is added
  const float* grad_scale;    // one number, or null
  const float* found_inf;     // one number, or null: unless zero, nothing changes
  const float* lr = nullptr;  // one number, or null: the rate, in place of the options'
};
struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};
struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};
int64_t masked_update_workspace(int64_t count);
Error masked_reset(const Updated* params, int64_t count, const void* plan, void* workspace, Stream stream);
Error masked_sgd(const Updated* params, int64_t count, const StepInputs& inputs, const SgdOptions& options,
                 const void* plan, void* workspace, Stream stream);
Error masked_adamw(const Updated* params, int64_t count, const StepInputs& inputs, const AdamWOptions& options,
                   const void* plan, void* workspace, Stream stream);

// Adds to p.sums what each example contributes, in at most two launches; the workspace does not grow with the examples
// beyond 32 MB. Products and sums are float32's; with tensor_cores, operands of 16 bits and one dtype are
// multiplied as they are, all others rounded to tf32 (except in depthwise layers), and their products summed in
// float32. How many blocks work depends on the current device, and with it the order of some additions.
int64_t per_example_workspace(const PerExample& p, bool tensor_cores);
Error per_example_accumulate(const PerExample& p, bool tensor_cores, void* workspace, Stream stream);

// Of the ways to use tensor cores (cuda/per_example_variants.h) the one that is used for this: the fastest where it was
// measured, or the one that is forced, where it can take the layer; else "wmma", which stands for every other kernel.
const char* per_example_variant(const PerExample& p, bool tensor_cores);
// For measurements and tests, not while another thread runs the op: a name forces a way from now on, "measured" ends
// that; false if there is no such way.
DELFAST_EXPORT bool force_per_example_variant(const char* name);

Error channel_dot(const ChannelDot& p, Stream stream);

// In at most two launches; the workspace is at most 4 MB and a few floats a channel.
int64_t channel_sums_workspace(const ChannelSums& p);
Error channel_sums(const ChannelSums& p, void* workspace, Stream stream);

// Writes the rows of all weights, in one launch for as many weights as a table holds (450 or so; 50 or so under a
// driver before CUDA 12.1). An index outside its weight traps on the device.
Error write_rows(const WrittenRows* weights, int64_t count, Stream stream);

}  // namespace delfast::cuda
