// In-place updates of the masked entries of parameters: reset, SGD, AdamW. Entries outside the mask are not written.
//
// Mapping. A block takes a tile of kUpdateTile elements of one parameter: in memory order where the mask is by rows, in
// logical order where it is by elements. "Units" are what one bit stands for: rows, or elements.
// Memory. A tile without masked entries costs its bits. The masked entries' optimizer state is one contiguous stretch,
// whatever the mask: the block copies it into shared memory and back by 16-byte accesses, whose alignment has nothing
// to do with the parameter's. By rows, the parameter and its gradient are read and written by 16-byte packs; by
// elements, neighbouring threads take neighbouring elements, and what a warp asks for is what its masked entries lie
// in. Where the state of a tile begins is the number of bits set before it: blocks count bits by stretches of
// kCountedBits, one block adds these up, and the tile's block counts the rest.
// Numerics. float32, every product and sum rounded (the files are compiled without fused multiply-add), in the CPU
// kernels' order; the result is rounded once to the parameter's dtype.
#pragma once

#include <type_traits>

#include "cuda/common.cuh"
#include "delfast/cuda_launch.h"

namespace delfast::cuda {

constexpr int kUpdateTile = 4096;
constexpr int kCountedBits = 8192;
constexpr int kPlanThreads = 1024;

struct Masked {
  void* param;
  const void* source;  // the gradient; for reset, the fresh values
  const uint8_t* bits;
  Layout layout;
  int64_t units, unit_length;  // unit_length: elements for each bit
  int64_t first_count;         // the number of its first stretch of kCountedBits, over all parameters
  int64_t index;               // of the parameter, in the list
  Dtype param_dtype, source_dtype;
  bool by_row;
};

// ---- bits

// Byte number `byte` of the bits of `units`, the last of which may be followed by padding; 0 past the end.
__device__ __forceinline__ uint32_t load_bits(const uint8_t* bits, int64_t units, int64_t byte) {
  const int64_t left = units - byte * 8;
  if (left <= 0) return 0;
  const uint32_t loaded = global_load_const(&bits[byte]);
  return left >= 8 ? loaded : loaded & ((1u << left) - 1);
}

// counts[stretch] = masked entries in the stretch.
__global__ void __launch_bounds__(kThreads)
    masked_update_count(const __grid_constant__ Table<Masked> table, long long* counts) {
  const int entry = find_entry(table);
  const Masked& p = table.entries[entry];
  const int64_t stretch = blockIdx.x - table.first_block[entry];
  uint32_t set = 0;
  for (int byte = int(threadIdx.x); byte < kCountedBits / 8; byte += kThreads)
    set += uint32_t(__popc(load_bits(p.bits, p.units, stretch * (kCountedBits / 8) + byte)));
  set = __reduce_add_sync(kAllLanes, set);
  DELFAST_SHARED(uint32_t, total);
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  if (lane() == 0) atomicAdd(&total, set);
  __syncthreads();
  if (threadIdx.x == 0) global_store(&counts[p.first_count + stretch], static_cast<long long>(total * p.unit_length));
}

// ---- rules: (entry, gradient, state) -> new entry and state

struct ResetRule {
  static constexpr int kStates = 0;
  __device__ __forceinline__ float operator()(float, float fresh, float*) const { return fresh; }
};

struct PlainSgdRule {  // without momentum there is no state
  static constexpr int kStates = 0;
  SgdStep step;
  __device__ __forceinline__ float operator()(float entry, float gradient, float*) const {
    gradient = gradient * step.unscale;
    if (step.weight_decay != 0) gradient = gradient + step.weight_decay * entry;
    return entry - step.lr * gradient;
  }
};

struct SgdRule {
  static constexpr int kStates = 1;
  SgdStep step;
  __device__ __forceinline__ float operator()(float entry, float gradient, float* state) const {
    gradient = gradient * step.unscale;
    if (step.weight_decay != 0) gradient = gradient + step.weight_decay * entry;
    float& buffer = state[0];
    buffer = step.first ? gradient : step.momentum * buffer + step.gradient_share * gradient;
    return entry - step.lr * (step.nesterov ? gradient + step.momentum * buffer : buffer);
  }
};

struct AdamWRule {
  static constexpr int kStates = 2;
  AdamWStep step;
  __device__ __forceinline__ float operator()(float entry, float gradient, float* state) const {
    gradient = gradient * step.unscale;
    state[0] = step.beta1 * state[0] + step.one_minus_beta1 * gradient;
    state[1] = step.beta2 * state[1] + step.one_minus_beta2 * gradient * gradient;
    const float denominator = sqrtf(state[1]) / step.correction + step.eps;
    return entry * step.decay - step.step_size * (state[0] / denominator);
  }
};

// ---- the plan: one block, before the update

struct Inputs {
  float* steps;
  const float* grad_scale;
  const float* found_inf;
  const float* lr;
  int64_t params, stretches;
  int64_t state_numel;
  int states;
};

__device__ __forceinline__ float unscale_factor(const Inputs& in, bool maximize) {
  const float factor = in.grad_scale ? float(1.0 / double(global_load_const(in.grad_scale))) : 1.0f;
  return maximize ? -factor : factor;
}

// Read on the device, so that a captured graph sees a schedule.
template <class Options>
__device__ __forceinline__ double rate(const Options& o, const Inputs& in) {
  return in.lr ? double(global_load_const(in.lr)) : o.lr;
}

__device__ __forceinline__ SgdRule make_rule(const SgdOptions& o, const Inputs& in, double taken) {
  return {{float(rate(o, in)), float(o.momentum), float(1 - o.dampening), float(o.weight_decay),
           unscale_factor(in, o.maximize), o.nesterov, taken == 0}};
}
__device__ __forceinline__ AdamWRule make_rule(const AdamWOptions& o, const Inputs& in, double taken) {
  const double lr = rate(o, in);
  return {{float(o.beta1), float(1 - o.beta1), float(o.beta2), float(1 - o.beta2), float(o.eps),
           float(lr / (1 - pow(o.beta1, taken + 1))), float(sqrt(1 - pow(o.beta2, taken + 1))),
           float(1 - lr * o.weight_decay), unscale_factor(in, o.maximize)}};
}

__device__ __forceinline__ bool is_skipped(const float* found_inf) {
  return found_inf && global_load_const(found_inf) != 0;
}

// Turns the stretches' counts into the number of masked entries before them, counts[stretches] included; makes each
// parameter's rule; counts the step.
template <class Options, class Rule>
__global__ void __launch_bounds__(kPlanThreads)
    masked_update_plan(Options options, Inputs in, long long* counts, Rule* rules) {
  if (is_skipped(in.found_inf)) return;
  if (in.states) {
    DELFAST_SHARED(long long, totals, [kWarp]);
    long long before = 0;
    for (int64_t begin = 0; begin < in.stretches; begin += kPlanThreads) {
      const int64_t i = begin + int64_t(threadIdx.x);
      const long long mine = i < in.stretches ? global_load(&counts[i]) : 0;
      long long total;
      const long long sum = before + block_exclusive_scan(mine, totals, total);
      if (i < in.stretches) global_store(&counts[i], sum);
      before += total;
    }
    if (before * in.states != in.state_numel) __trap();  // the optimizer state is of another mask
    if (threadIdx.x == 0) global_store(&counts[in.stretches], before);
  }
  for (int64_t i = threadIdx.x; i < in.params; i += kPlanThreads) {
    const float taken = global_load(&in.steps[i]);
    rules[i].step = make_rule(options, in, double(taken)).step;
    global_store(&in.steps[i], taken + 1);
  }
}

// ---- the update

// Which units of a tile are masked, and how many masked entries come before an element. Inside a tile 32 bits do:
// counts of entries are kept modulo 2^32, and their differences are less than a tile.
class TileMask {
 public:
  static constexpr int kWords = kUpdateTile / 32 + 2;

  // For the whole block, with shared memory for `words` and `sums` of kWords each and `totals` of 32.
  __device__ __forceinline__ TileMask(const Masked& p, int64_t begin, uint32_t* words, uint32_t* sums,
                                      unsigned long long* totals)
      : words_(words), sums_(sums), unit_length_(uint32_t(p.unit_length)) {
    const int64_t first_unit = begin / p.unit_length, offset = begin - first_unit * p.unit_length;
    first_unit_ = uint32_t(first_unit % 32);
    first_offset_ = uint32_t(offset);
    first_rest_ = int(p.unit_length - offset < kUpdateTile ? p.unit_length - offset : kUpdateTile);
    divisor_ = uint32_t(p.unit_length < kUpdateTile ? p.unit_length : kUpdateTile);
    // the bits of this tile, and those before it in its counted stretch
    const int64_t first_byte = first_unit / 32 * 4;
    stretch = first_unit / kCountedBits;
    for (int byte = int(threadIdx.x); byte < 4 * kWords; byte += kThreads)
      reinterpret_cast<uint8_t*>(words)[byte] = uint8_t(load_bits(p.bits, p.units, first_byte + byte));
    uint32_t passed = 0;
    for (int64_t byte = stretch * (kCountedBits / 8) + int64_t(threadIdx.x); byte < first_byte; byte += kThreads)
      passed += uint32_t(__popc(load_bits(p.bits, p.units, byte)));
    __syncthreads();
    const int thread = int(threadIdx.x);
    const uint32_t in_word = thread < kWords ? uint32_t(__popc(words[thread])) : 0;
    unsigned long long total;
    const unsigned long long sum =
        block_exclusive_scan(static_cast<unsigned long long>(passed) << 32 | in_word, totals, total);
    if (thread < kWords) sums[thread] = uint32_t(sum);
    __syncthreads();
    const bool set = words_[0] >> first_unit_ & 1;
    entries_before = (int64_t(total >> 32) + units_before(first_unit_)) * p.unit_length + (set ? offset : 0);
    first_entries_ = entries(first_unit_, first_offset_);
  }

  int64_t stretch;         // of kCountedBits, in which the tile begins
  int64_t entries_before;  // masked entries of that stretch before the tile

  struct Place {
    bool masked;
    int entry;     // masked entries of the tile before the element
    int unit_end;  // the first element of the tile past its unit
  };
  __device__ __forceinline__ Place at(int i) const {
    uint32_t unit = first_unit_, offset = first_offset_ + uint32_t(i);
    int unit_end = first_rest_;
    if (i >= first_rest_) {
      const uint32_t next = uint32_t(i - first_rest_) / divisor_;
      unit += 1 + next;
      offset = uint32_t(i - first_rest_) - next * divisor_;
      unit_end += int((next + 1) * divisor_);
    }
    return {bool(words_[unit / 32] >> unit % 32 & 1), int(entries(unit, offset) - first_entries_), unit_end};
  }

 private:
  __device__ __forceinline__ uint32_t units_before(uint32_t unit) const {
    return sums_[unit / 32] + uint32_t(__popc(words_[unit / 32] & ((1u << unit % 32) - 1)));
  }
  __device__ __forceinline__ uint32_t entries(uint32_t unit, uint32_t offset) const {
    const bool set = words_[unit / 32] >> unit % 32 & 1;
    return units_before(unit) * unit_length_ + (set ? offset : 0);
  }

  uint32_t* words_;
  uint32_t* sums_;
  uint32_t unit_length_, first_unit_ /* from the first word's */, first_offset_, divisor_, first_entries_;
  int first_rest_;  // elements of the tile in its first unit
};

// Copies `count` floats between global and shared memory, where they lie equally far from a 16-byte boundary.
template <bool kToShared>
__device__ __forceinline__ void copy_state(float* global, float* shared, int count) {
  const int offset = int(reinterpret_cast<uintptr_t>(global) / 4 % 4);
  for (int i = int(threadIdx.x) * 4 - offset; i < count; i += kThreads * 4) {
    if (i >= 0 && i + 4 <= count) {
      uint4* const there = reinterpret_cast<uint4*>(global + i);
      uint4* const here = reinterpret_cast<uint4*>(shared + i);
      if (kToShared)
        *here = global_load(there);
      else
        global_store(there, *here);
    } else {
      for (int j = i; j < i + 4; j++) {
        if (j < 0 || j >= count) continue;
        if (kToShared)
          shared[j] = global_load(&global[j]);
        else
          global_store(&global[j], shared[j]);
      }
    }
  }
}

// Applies a rule to the tile's masked elements. states[s] is where its first masked entry has state number s.
template <class Param, class Source, class Rule>
__device__ __forceinline__ void update_tile(const Masked& p, const TileMask& mask, int64_t begin, int length,
                                            const Rule& rule, float* const* states) {
  Param* const param = static_cast<Param*>(p.param);
  const Source* const source = static_cast<const Source*>(p.source);
  const auto apply = [&](float& entry, float gradient, int at) {
    float state[Rule::kStates + 1];
    for (int s = 0; s < Rule::kStates; s++) state[s] = states[s][at];
    entry = rule(entry, gradient, state);
    for (int s = 0; s < Rule::kStates; s++) states[s][at] = state[s];
  };
  const auto update_one = [&](int i, int64_t at) {
    const TileMask::Place place = mask.at(i);
    if (!place.masked) return;
    float entry[1], gradient[1];
    load_pack<true>(param + at, entry);
    load_pack(source + at, gradient);
    apply(entry[0], gradient[0], place.entry);
    store_pack(param + at, entry);
  };

  constexpr int kPack = 16 / int(sizeof(Param) > sizeof(Source) ? sizeof(Param) : sizeof(Source));
  const int offset = pack_offset<kPack>(param + begin);
  if (!p.by_row || offset != pack_offset<kPack>(source + begin)) {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < length; i += kThreads)
      update_one(i, p.by_row ? begin + i : p.layout.offset(begin + i));
    return;
  }
  for (int i = int(threadIdx.x) * kPack - offset; i < length; i += kThreads * kPack) {
    const bool whole = i >= 0 && i + kPack <= length;
    const TileMask::Place place = mask.at(whole ? i : 0);
    if (!whole || i + kPack > place.unit_end) {  // at an end of the tile, or of a row
#pragma unroll 1                                 // rare: not worth registers
      for (int j = i; j < i + kPack; j++)
        if (j >= 0 && j < length) update_one(j, begin + j);
    } else if (place.masked) {
      float entries[kPack], gradients[kPack];
      load_pack<true>(param + begin + i, entries);
      load_pack(source + begin + i, gradients);
      for (int j = 0; j < kPack; j++) apply(entries[j], gradients[j], place.entry + j);
      store_pack(param + begin + i, entries);
    }
  }
}

// Dynamic shared memory: an array of kUpdateTile + 4 floats for each state.
template <class Rule>
__global__ void __launch_bounds__(kThreads, 4)
    masked_update(const __grid_constant__ Table<Masked> table, const Rule* rules, const float* found_inf, float* state,
                  const long long* counts) {
  if (is_skipped(found_inf)) return;
  const int entry = find_entry(table);
  const Masked& p = table.entries[entry];
  const int64_t begin = int64_t(blockIdx.x - table.first_block[entry]) * kUpdateTile, numel = p.units * p.unit_length;
  const int length = int(numel - begin < kUpdateTile ? numel - begin : kUpdateTile);
  DELFAST_SHARED(uint32_t, words, [TileMask::kWords]);
  DELFAST_SHARED(uint32_t, sums, [TileMask::kWords]);
  DELFAST_SHARED(unsigned long long, totals, [kWarp]);
  const TileMask mask(p, begin, words, sums, totals);
  const TileMask::Place last = mask.at(length - 1);
  const int count = last.entry + last.masked;
  if (count == 0) return;

  constexpr int kStates = Rule::kStates;
  DELFAST_SHARED(float*, global, [kStates + 1]);  // in shared memory, to spare registers
  float* shared[kStates + 1];
  if constexpr (kStates > 0) {
    DELFAST_DYNAMIC_SHARED(float, room);
    if (threadIdx.x < kStates) {
      const int64_t stretches = (p.units + kCountedBits - 1) / kCountedBits;
      const long long of_earlier = global_load_const(&counts[p.first_count]),
                      of_this = global_load_const(&counts[p.first_count + stretches]) - of_earlier,
                      before = global_load_const(&counts[p.first_count + mask.stretch]) - of_earlier;
      global[threadIdx.x] = state + kStates * of_earlier + threadIdx.x * of_this + before + mask.entries_before;
    }
    __syncthreads();
    for (int s = 0; s < kStates; s++) {
      shared[s] = room + s * (kUpdateTile + 4) + reinterpret_cast<uintptr_t>(global[s]) / 4 % 4;
      copy_state<true>(global[s], shared[s], count);
    }
    __syncthreads();
  }
  Rule rule{};
  if constexpr (!std::is_same_v<Rule, ResetRule>) rule = rules[p.index];  // one for the whole block: not streamed
  with_dtype(p.param_dtype, [&]<class Param>(const Param*) {
    with_dtype(p.source_dtype,
               [&]<class Source>(const Source*) { update_tile<Param, Source>(p, mask, begin, length, rule, shared); });
  });
  if constexpr (kStates > 0) {
    __syncthreads();
    for (int s = 0; s < kStates; s++) copy_state<false>(global[s], shared[s], count);
  }
}

}  // namespace delfast::cuda
