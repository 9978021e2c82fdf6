// The interface of the CUDA kernels to the bindings: launchers that depend neither on torch nor, here, on a CUDA
// header.
//
// Every launcher works on the current device and on the given stream, allocates nothing, waits for nothing, and can be
// captured in a CUDA graph. Pointers inside the structs are device pointers; the arrays of structs are in host memory.
// A workspace is uninitialized device memory, aligned to 16 bytes, of the size that NAME_workspace() returns in bytes.
// Launchers return null, or CUDA's error message.
#pragma once

#include <cstdint>

#include "delfast/params.h"
#include "delfast/per_example.h"
#include "delfast/selection.h"
#include "delfast/write_rows.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace delfast::cuda {

using Stream = CUstream_st*;
using Error = const char*;

// Writes out[unit] for every row of every parameter, one parameter after another. top[i] in [1, length] is used by
// topk_mean. The results equal the CPU kernels' bit for bit. One launch for as many parameters as a table holds (about
// 540; 65 under a driver before CUDA 12.1). Rows longer than 16,384 elements take one more launch, or two more for a
// top h. Rows in pieces have a launch of their own.
int64_t criticality_workspace(const Scored* params, const int64_t* top, int64_t count, Aggregate aggregate);
Error criticality(const Scored* params, const int64_t* top, int64_t count, Criterion criterion, Aggregate aggregate,
                  float* out, void* workspace, Stream stream);

// Writes the bits of the k highest-scoring elements, each parameter's padded to whole bytes, in logical order. With a
// NaN or infinite score all bits are zero. From `min_sampled` elements on a sample is taken first, so that most
// elements are read once.
inline constexpr int64_t kMinSampled = 1 << 20;
int64_t select_elements_workspace(const Scored* params, int64_t count, int64_t min_sampled = kMinSampled);
Error select_elements(const Scored* params, int64_t count, Criterion criterion, int64_t k, uint8_t* bits,
                      ElementsInfo* info, void* workspace, Stream stream, int64_t min_sampled = kMinSampled);

// Selects the longest prefix of the units, in falling order of scores, whose sizes sum to at most k, as the CPU's
// select_units does. Parameter i has counts[i] units of lengths[i] scalars; the scores of one parameter follow those of
// the one before. One launch for up to about 28,672 units with fewer than 2^32 scalars in total.
int64_t select_units_workspace(const int64_t* counts, const int64_t* lengths, int64_t count);
Error select_units(const float* scores, const int64_t* counts, const int64_t* lengths, int64_t count, int64_t k,
                   bool cut_last, uint8_t* bits, UnitsInfo* info, void* workspace, Stream stream);

// Lists the masked entries of parameters: writes the part of a plan (delfast/mask_plan.h) after its bits, from its head
// on. `plan` is aligned to 16 bytes. The `bits` of each Updated points to its own packed bits; its other pointers are
// not read.
int64_t mask_plan_workspace(const Updated* params, int64_t count);
Error mask_plan(const Updated* params, int64_t count, void* plan, void* workspace, Stream stream);

// Masked updates of the entries that `plan`, the head of a plan of these bits, lists: at most two launches for as many
// parameters as a table holds (about 540; about 65 under a driver before CUDA 12.1). An Updated's own `state` is not
// read: `state` here is the whole flat array of state_numel float32, laid out as for the CPU (parameter after
// parameter, each at a multiple of 4, in each all of state[0] before state[1]). Traps on the device: a state_numel
// other than the mask's (each parameter's values rounded up to a multiple of 4), and a plan for other shapes. The state
// of another mask with the same rounded sizes is not detected.
struct StepInputs {
  float* state;
  int64_t state_numel;
  float* steps;               // one counter per parameter: steps before this one; incremented
  const float* grad_scale;    // one number, or null
  const float* found_inf;     // one number, or null: unless zero, nothing changes
  const float* lr = nullptr;  // one number, or null: the rate, in place of the one in the options
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

// Adds each example's contribution to p.sums, in at most two launches. Beyond 32 MB the workspace does not grow with
// the examples. Products and sums are float32. With tensor_cores, operands of 16 bits and one dtype are multiplied
// unchanged and all others are rounded to tf32 (except in depthwise layers); their products are added in float32. The
// number of blocks depends on the current device, and with it the order of some additions.
int64_t per_example_workspace(const PerExample& p, bool tensor_cores);
Error per_example_accumulate(const PerExample& p, bool tensor_cores, void* workspace, Stream stream);

// Returns the name of the tensor-core variant for this layer (cuda/per_example_variants.h): the forced one if it
// supports the layer, otherwise the one that was fastest in measurements. "wmma" stands for all other kernels.
const char* per_example_variant(const PerExample& p, bool tensor_cores);
// For measurements and tests, while no other thread runs the op. A variant's name forces that variant from now on,
// "measured" ends that. Returns false if there is no such variant.
DELFAST_EXPORT bool force_per_example_variant(const char* name);

Error channel_dot(const ChannelDot& p, Stream stream);

// In at most two launches; the workspace is at most 4 MB plus a few floats for each channel.
int64_t channel_sums_workspace(const ChannelSums& p);
Error channel_sums(const ChannelSums& p, void* workspace, Stream stream);

// Writes the rows of all weights, in one launch for as many weights as a table holds (about 450; about 50 under a
// driver before CUDA 12.1). An index outside its weight traps on the device.
Error write_rows(const WrittenRows* weights, int64_t count, Stream stream);

}  // namespace delfast::cuda
