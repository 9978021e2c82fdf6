// The instruction sets, the selected one, and the table of kernels of each.
//
// Every kernel takes a range and runs it on the calling thread: threads belong to the caller. The result for a row
// or an element never depends on the range it came in, so it never depends on the number of threads.
#pragma once

#include <cstdint>

#include "delfast/params.h"
#include "delfast/per_example.h"

namespace delfast::cpu {

// amx is avx512 with tile multiplication for per-example sums of bfloat16.
enum class Isa : int8_t { scalar, avx2, avx512, amx };
inline constexpr Isa kIsas[] = {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx};
inline constexpr const char* kIsaNames[] = {"scalar", "avx2", "avx512", "amx"};

// Returns true if this build and this CPU (cpuid and XCR0) support it.
DELFAST_EXPORT bool isa_supported(Isa isa);
// The selected instruction set: DELFAST_FORCE_ISA if it is set, otherwise the best supported.
DELFAST_EXPORT Isa isa();
// Returns false, and changes nothing, if the name is unknown or not supported.
DELFAST_EXPORT bool force_isa(const char* name);
// The reason why DELFAST_FORCE_ISA was not applied, or null.
DELFAST_EXPORT const char* isa_request_problem();

// Elements of a parameter that one task covers: selection and element-wise updates cut parameters at its multiples.
// A multiple of 512, so that the packed bits of two tasks never share a byte (or a cache line).
inline constexpr int64_t kChunk = 1 << 16;

struct CriticalityKernels {
  // out[r] = aggregate of row r, for r in [begin, end); `top` is used by topk_mean and lies in [1, length].
  void (*score_rows)(const Scored&, Criterion, Aggregate, int64_t top, float* out, int64_t begin, int64_t end);
};

// Selection is a radix search on the 31 bits of a non-negative float, in three passes of 11, 10 and 10 bits.
struct RadixPass {
  int shift;  // the digit is bits [shift, shift + width)
  int width;
  uint32_t prefix;  // only scores whose bits above the digit equal this are counted
};
inline constexpr int kRadixBins = 2048;

struct SelectionKernels {
  // histogram[digit] += 1 for each element of [begin, end) of the parameter, in any order.
  void (*histogram)(const Scored&, Criterion, RadixPass, int64_t begin, int64_t end, int64_t* histogram);
  // Sets the bits of scores >= threshold (a float's bits) among logical elements [begin, end), begin a multiple of
  // kChunk; returns the number of scores equal to it.
  int64_t (*mark)(const Scored&, Criterion, uint32_t threshold, int64_t begin, int64_t end, uint8_t* bits);
  // Clears the bits of scores == threshold among logical elements [begin, end), except the first `keep`.
  void (*clear_ties)(const Scored&, Criterion, uint32_t threshold, int64_t keep, int64_t begin, int64_t end,
                     uint8_t* bits);
};

struct MaskedUpdateKernels {
  // [begin, end) are bits: rows, or logical elements (then begin is a multiple of kChunk); `rank` is the number of
  // bits set before `begin`.
  void (*reset)(const Updated&, int64_t begin, int64_t end, int64_t rank);
  void (*sgd)(const Updated&, const SgdStep&, int64_t begin, int64_t end, int64_t rank);
  void (*adamw)(const Updated&, const AdamWStep&, int64_t begin, int64_t end, int64_t rank);
};

// Rows of elements to copy as float32, with zeros before and after each row; for AMX see AmxLayout.
struct Packing {
  const void* from = nullptr;
  float* to = nullptr;
  Dtype dtype = Dtype::float32;
  Transform transform = Transform::none;
  int64_t rows = 0, length = 0;  // no rows: the operand is not copied
  int64_t before = 0, after = 0;
  int64_t groups = 1;  // element g * (length / groups) + j of a row goes to j * groups + g
};

// bfloat16 operands in the layout that per_example_amx.cpp writes and reads: inputs [plane][column
// block][example][pair][16][2], output gradients [row block][example][16][output_grad_pitch]. Counts are for one
// example.
struct AmxLayout {
  static constexpr int64_t kSide = 16, kStep = 32;  // rows, or columns, and positions of a tile

  AmxLayout() = default;
  explicit AmxLayout(const ConvShape&);

  bool used = false;
  int64_t phases[3] = {1, 1, 1};              // planes by dimension: one for each phase of the stride that a tap reads
  int64_t plane[3] = {1, 1, 1};               // positions of a plane
  int64_t steps = 0;                          // steps of kStep positions of a plane
  int64_t pairs = 0;                          // pairs of positions of a plane, including those read past its end
  int64_t row_blocks = 0, column_blocks = 0;  // blocks of kSide
  int64_t zeros = 0;                          // zeros before the output gradients of a row
  int64_t output_grad_pitch = 0;              // elements from one row of output gradients to the next

  int64_t planes() const { return phases[0] * phases[1] * phases[2]; }
  int64_t column() const { return pairs * 2 * kSide; }  // elements of a block
  int64_t row() const { return kSide * output_grad_pitch; }
  int64_t inputs() const { return planes() * column_blocks * column(); }
  int64_t output_grad() const { return row_blocks * row(); }

  struct Source {
    int64_t plane, offset;
  };
  Source source(const ConvShape&, int64_t tap) const;  // source of position 0 at a tap
};

// A block of examples in the form that the kernels read.
struct PerExampleBlock {
  Packing pack_inputs, pack_output_grad;
  const float* inputs = nullptr;
  const float* output_grad = nullptr;
  float* sums = nullptr;
  Transform transform = Transform::abs;
  ConvShape shape;
  AmxLayout amx;  // if used, inputs and output_grad are bfloat16
  // neighbouring elements that a tap reads: its group's channels, or a row of taps with their channels
  int64_t columns = 0;
};

// The division of the sums into blocks of examples. An operand that the kernels cannot read in place is packed first.
struct PerExamplePlan {
  PerExamplePlan(const PerExample&, Isa);
  PerExampleBlock block(int64_t first_example, float* workspace) const;

  PerExample whole;
  int64_t block_examples = 1;
  int64_t workspace = 0;  // floats

 private:
  AmxLayout amx_;
  bool packs_inputs() const;
  bool packs_output_grad() const;
};

// The division of ChannelSums' examples among threads: slabs of examples by blocks of kLanes channels. The numbers
// depend only on the shape.
struct ChannelSumsPlan {
  static constexpr int64_t kLanes = 16;

  explicit ChannelSumsPlan(const ChannelSums&);
  int64_t units() const { return slabs * blocks; }
  int64_t workspace() const { return units() * 2 * kLanes; }  // doubles: for each unit the weighted and the plain sums

  int64_t blocks = 0, slabs = 0, slab_examples = 0;
};

struct PerExampleKernels {
  void (*pack)(const PerExampleBlock&, const Packing&, int64_t begin, int64_t end);  // rows of one operand
  // The sums are computed tile by tile. Each tile adds all examples in order, so the order of tiles does not matter.
  int64_t (*tiles)(const PerExampleBlock&);
  void (*accumulate)(const PerExampleBlock&, int64_t begin, int64_t end);
  // Writes out[begin, end), from examples * channels elements.
  void (*channel_dot)(const ChannelDot&, int64_t begin, int64_t end);
  // Writes the sums of the units [begin, end) to the workspace; add_channel_sums then adds them.
  void (*channel_sums)(const ChannelSums&, const ChannelSumsPlan&, double* workspace, int64_t begin, int64_t end);
};

const CriticalityKernels& criticality(Isa isa);
const SelectionKernels& selection(Isa isa);
const MaskedUpdateKernels& masked_update(Isa isa);
const PerExampleKernels& per_example(Isa isa);

void add_channel_sums(const ChannelSums&, const ChannelSumsPlan&, const double* workspace);

}  // namespace delfast::cpu
