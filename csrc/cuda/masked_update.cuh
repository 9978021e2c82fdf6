// In-place updates of the masked entries of parameters: reset, SGD, AdamW. Entries outside the mask are not written.
//
// Mapping. One small launch computes each parameter's rates and counts its step. The second launch, the update, has as
// many blocks as can be resident and no barriers; a warp takes one piece of the mask's plan (delfast/mask_plan.h) after
// another.
// - Part of a long row: a lane takes packs of four neighbours, kPackRounds in flight, where parameter, gradient and
//   state are aligned to packs. Otherwise it takes single elements, kOneRounds in flight.
// - Stretch of elements or short rows: lanes take masked elements only. Each lane first writes the numbers of its
//   word's masked units to the warp's list in shared memory; the warp then reads the list. A stretch of 1024 elements
//   with n masked ones takes as many writes to the list as its fullest word has bits, and n / 32 rounds instead of 32.
//   A round reads the list, loads gradient, parameter and each state, applies the rule, and stores all but the
//   gradient. A piece takes a few shuffles.
// Memory. Neighbouring lanes take neighbouring packs, or elements that are neighbours in the state. Requests begin at
// sectors of 32 bytes: of the first state in a stretch, of the parameter in a part of a row that is taken element by
// element. An unmasked unit costs no memory access except its bits, which are read only in stretches.
// Numerics. float32. Every product and sum is rounded (the files are compiled without fused multiply-add), in the CPU
// kernels' order. The result is rounded once to the parameter's dtype.
#pragma once

#include "cuda/mask_bits.cuh"
#include "delfast/cuda_launch.h"
#include "delfast/mask_plan.h"

namespace delfast::cuda {

constexpr int kPrepareThreads = 1024;

struct Masked {
  void* param;
  const void* source;  // the gradient; for reset, the new values
  const uint8_t* bits;
  Layout layout;
  Dtype param_dtype, source_dtype;
  bool by_row;
};

// ---- rates: values of a step that are available only on the device, for each parameter. All others are arguments of
// the update, because constants take no registers.

struct NoRates {
  template <class Rule>
  __device__ __forceinline__ void set(Rule&) const {}
};

struct SgdRates {
  float lr, unscale;
  bool first;
  template <class Rule>
  __device__ __forceinline__ void set(Rule& rule) const {
    rule.step.lr = lr;
    rule.step.unscale = unscale;
    rule.step.first = first;
  }
};

struct AdamWRates {
  float step_size, correction, decay, unscale;
  template <class Rule>
  __device__ __forceinline__ void set(Rule& rule) const {
    rule.step.step_size = step_size;
    rule.step.correction = correction;
    rule.step.decay = decay;
    rule.step.unscale = unscale;
  }
};

// ---- rules: (entry, gradient, state) -> new entry and state. kResident: resident blocks of a multiprocessor, given
// the registers that kPackRounds packs and kOneRounds elements in flight need.

struct ResetRule {
  using Rates = NoRates;
  static constexpr int kStates = 0, kResident = 3, kPackRounds = 4, kOneRounds = 6;
  __device__ __forceinline__ float operator()(float, float fresh, float*) const { return fresh; }
};

struct PlainSgdRule {  // without momentum: no state
  using Rates = SgdRates;
  static constexpr int kStates = 0, kResident = 3, kPackRounds = 4, kOneRounds = 4;
  SgdStep step;
  __device__ __forceinline__ float operator()(float entry, float gradient, float*) const {
    gradient = gradient * step.unscale;
    if (step.weight_decay != 0) gradient = gradient + step.weight_decay * entry;
    return entry - step.lr * gradient;
  }
};

struct SgdRule {
  using Rates = SgdRates;
  static constexpr int kStates = 1, kResident = 3, kPackRounds = 3, kOneRounds = 4;
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
  using Rates = AdamWRates;
  static constexpr int kStates = 2, kResident = 3, kPackRounds = 2, kOneRounds = 3;
  AdamWStep step;
  __device__ __forceinline__ float operator()(float entry, float gradient, float* state) const {
    gradient = gradient * step.unscale;
    state[0] = step.beta1 * state[0] + step.one_minus_beta1 * gradient;
    state[1] = step.beta2 * state[1] + step.one_minus_beta2 * gradient * gradient;
    const float denominator = sqrtf(state[1]) / step.correction + step.eps;
    return entry * step.decay - step.step_size * (state[0] / denominator);
  }
};

// ---- before the update: one block for each table

struct ResetOptions {};  // a reset has no options and counts no steps

__device__ __forceinline__ float unscale_factor(const StepInputs& in, bool maximize) {
  const float factor = in.grad_scale ? float(1.0 / double(global_load_const(in.grad_scale))) : 1.0f;
  return maximize ? -factor : factor;
}

// Read on the device, so that a captured graph follows a schedule.
template <class Options>
__device__ __forceinline__ double rate(const Options& o, const StepInputs& in) {
  return in.lr ? double(global_load_const(in.lr)) : o.lr;
}

__device__ __forceinline__ SgdRates make_rates(const SgdOptions& o, const StepInputs& in, double taken) {
  return {float(rate(o, in)), unscale_factor(in, o.maximize), taken == 0};
}
__device__ __forceinline__ AdamWRates make_rates(const AdamWOptions& o, const StepInputs& in, double taken) {
  const double lr = rate(o, in);
  return {float(lr / (1 - pow(o.beta1, taken + 1))), float(sqrt(1 - pow(o.beta2, taken + 1))),
          float(1 - lr * o.weight_decay), unscale_factor(in, o.maximize)};
}

__device__ __forceinline__ bool is_skipped(const float* found_inf) {
  return found_inf && global_load_const(found_inf) != 0;
}

// The values that the update reads for a parameter.
template <class Rule>
struct alignas(16) Prepared {
  Masked masked;
  float* state;
  int64_t entries;  // masked entries: the distance between kinds of state
  typename Rule::Rates rates;
};

// Computes each parameter's rates and counts its step. `first` is the number of the table's first parameter. A plan for
// other shapes traps, and so does the optimizer state of another mask.
template <class Options, class Rule, int kBytes>
__global__ void __launch_bounds__(kPrepareThreads)
    masked_update_prepare(DELFAST_GRID_CONSTANT(Table<Masked, kBytes>) table, Options options, StepInputs in,
                          MaskPlan plan, int first, int params, Prepared<Rule>* prepared) {
  static_assert(Table<Masked, kBytes>::kEntries <= kPrepareThreads);
  if (is_skipped(in.found_inf)) return;
  if (plan.head->params != params || plan.head->pieces < 0) __trap();
  const int thread = int(threadIdx.x);
  const bool has_param = thread < table.count;
  Prepared<Rule>& own = prepared[first + (has_param ? thread : 0)];
  if (has_param) {
    const Masked& m = table.entries[thread];
    const MaskedParam planned = plan.params[first + thread];
    const int64_t units = m.by_row ? m.layout.rows : m.layout.numel(), length = m.by_row ? m.layout.length : 1;
    if (planned.units != units || planned.unit_length != length) __trap();
    own.masked = m;
    own.entries = planned.entries;
  }
  if constexpr (Rule::kStates > 0) {
    DELFAST_SHARED(long long, totals, [kWarp]);
    long long before = 0;
    for (int begin = 0; begin < params; begin += kPrepareThreads) {
      const int i = begin + thread;
      const long long mine = i < params ? padded_state(Rule::kStates * plan.params[i].entries) : 0;
      long long total;
      const long long sum = before + block_exclusive_scan(mine, totals, total);
      if (i >= first && i < first + table.count) prepared[i].state = in.state + sum;
      before += total;
    }
    if (before != in.state_numel) __trap();
  }
  if constexpr (!std::is_same_v<Rule, ResetRule>) {
    __syncthreads();  // no thread has trapped
    if (!has_param) return;
    const float taken = global_load(&in.steps[first + thread]);
    own.rates = make_rates(options, in, double(taken));
    global_store(&in.steps[first + thread], taken + 1);
  }
}

// ---- the update

// The first `packs` packs of a part of a long unit.
template <class Param, class Source, class Rule>
__device__ __forceinline__ void update_packs(Param* param, const Source* source, float* const* states, int packs,
                                             const Rule& rule) {
  constexpr int kStates = Rule::kStates, kPackRounds = Rule::kPackRounds;
  using ParamWord = typename WordOf<4 * int(sizeof(Param))>::type;
  using SourceWord = typename WordOf<4 * int(sizeof(Source))>::type;
  const auto unpack = []<class T>(const T*, const auto& word, float (&out)[4]) {
    T values[4];
    memcpy(values, &word, sizeof word);
    for (int j = 0; j < 4; j++) out[j] = to_float(values[j]);
  };
#pragma unroll 1
  for (int begin = lane(); begin < packs; begin += kWarp * kPackRounds) {
    ParamWord weights[kPackRounds] = {};
    SourceWord gradients[kPackRounds] = {};
    uint4 kept[kPackRounds][kStates + 1] = {};
#pragma unroll
    for (int u = 0; u < kPackRounds; u++) {
      const int pack = begin + kWarp * u;
      if (pack >= packs) continue;
      gradients[u] = global_load_const(reinterpret_cast<const SourceWord*>(source) + pack);
      weights[u] = global_load(reinterpret_cast<const ParamWord*>(param) + pack);
      for (int s = 0; s < kStates; s++) kept[u][s] = global_load(reinterpret_cast<const uint4*>(states[s]) + pack);
    }
#pragma unroll
    for (int u = 0; u < kPackRounds; u++) {
      const int pack = begin + kWarp * u;
      if (pack >= packs) continue;
      float entries[4], values[4], state[kStates + 1][4];
      unpack(param, weights[u], entries);
      unpack(source, gradients[u], values);
      for (int s = 0; s < kStates; s++) unpack(states[s], kept[u][s], state[s]);
      for (int j = 0; j < 4; j++) {
        float own[kStates + 1];
        for (int s = 0; s < kStates; s++) own[s] = state[s][j];
        entries[j] = rule(entries[j], values[j], own);
        for (int s = 0; s < kStates; s++) state[s][j] = own[s];
      }
      store_pack(param + 4 * pack, entries);
      for (int s = 0; s < kStates; s++) store_pack(states[s] + 4 * pack, state[s]);
    }
  }
}

// The numbers of the set bits among 1024, in order, in a warp's part of shared memory. Two words of each 34 stay empty,
// so that lanes that write 32 entries apart write to different banks.
struct BitList {
  static constexpr int kPlaces = kWarp * kWarp / 32 * 34;
  uint16_t* places;

  __device__ __forceinline__ uint16_t& operator[](uint32_t i) const { return places[i + i / 32 * 2]; }
  // Lane i passes bits [32 i, 32 i + 32) as `word`. Returns the number of set bits.
  __device__ __forceinline__ int fill(uint32_t word) const {
    const uint32_t set = uint32_t(__popc(word)), through = warp_inclusive_scan(set);
    uint32_t next = through - set;
    for (; word; word &= word - 1) (*this)[next++] = uint16_t(32 * lane() + __ffs(int(word)) - 1);
    __syncwarp();
    return int(__shfl_sync(kAllLanes, through, kWarp - 1));
  }
};

// The masked elements of a piece, in the order of their state.
struct Ones {
  const Layout& layout;
  int64_t first;  // element of the piece: logical number if scattered, else offset in memory
  int count;
  bool all;        // all elements of the piece are masked
  bool scattered;  // logical and memory order differ: an element mask of a channels-last parameter
  BitList units;   // masked units, if not all are masked
  uint32_t unit_length;

  // Offset in memory of masked element i.
  __device__ __forceinline__ int64_t operator()(int i) const {
    uint32_t element = uint32_t(i);
    if (!all) {
      const uint32_t unit = unit_length == 1 ? element : element / unit_length;
      element += (units[unit] - unit) * unit_length;
    }
    return scattered ? layout.offset(first + element) : first + element;
  }
};

// From masked element `begin` on, which may be negative so that a warp's requests are aligned. `states` points to the
// state of element 0.
template <class Param, class Source, class Rule>
__device__ __forceinline__ void update_ones(Param* param, const Source* source, float* const* states, const Ones& ones,
                                            int begin, const Rule& rule) {
  constexpr int kStates = Rule::kStates, kOneRounds = Rule::kOneRounds;
#pragma unroll 1
  for (; begin < ones.count; begin += kWarp * kOneRounds) {
    int64_t places[kOneRounds] = {};
    float entries[kOneRounds][1] = {}, gradients[kOneRounds][1] = {}, state[kOneRounds][kStates + 1] = {};
    // one branch, the same in all lanes, skips a round past the end
    const auto takes = [&](int u) {
      return begin + kWarp * u < ones.count && uint32_t(begin + kWarp * u + lane()) < uint32_t(ones.count);
    };
#pragma unroll
    for (int u = 0; u < kOneRounds; u++) {
      const int i = begin + kWarp * u + lane();
      if (!takes(u)) continue;
      places[u] = ones(i);
      load_pack(source + places[u], gradients[u]);
      load_pack<true>(param + places[u], entries[u]);
      for (int s = 0; s < kStates; s++) state[u][s] = global_load(states[s] + i);
    }
#pragma unroll
    for (int u = 0; u < kOneRounds; u++) {
      const int i = begin + kWarp * u + lane();
      if (!takes(u)) continue;
      entries[u][0] = rule(entries[u][0], gradients[u][0], state[u]);
      store_pack(param + places[u], entries[u]);
      for (int s = 0; s < kStates; s++) global_store(states[s] + i, state[u][s]);
    }
  }
}

// The next piece, in flight: each of three lanes holds 8 bytes of it, which takes two registers instead of six.
class NextPiece {
 public:
  __device__ __forceinline__ explicit NextPiece(const MaskPiece* at) {
    if (lane() < kWords) word_ = global_load_const(reinterpret_cast<const uint2*>(at) + lane());
  }
  __device__ __forceinline__ MaskPiece get() const {
    uint2 words[kWords];
    for (int i = 0; i < kWords; i++)
      words[i] = {__shfl_sync(kAllLanes, word_.x, i), __shfl_sync(kAllLanes, word_.y, i)};
    MaskPiece piece;
    memcpy(&piece, words, sizeof piece);
    return piece;
  }

 private:
  static constexpr int kWords = sizeof(MaskPiece) / sizeof(uint2);
  uint2 word_ = {};
};

template <class Param, class Source, class Rule>
__device__ __forceinline__ void update_piece(const Masked& m, const Rule& rule, float* const* states,
                                             const MaskPiece& piece, const BitList& list) {
  Param* const param = static_cast<Param*>(m.param);
  const Source* const source = static_cast<const Source*>(m.source);
  const int64_t length = m.by_row ? m.layout.length : 1;
  Ones ones = {m.layout, piece.first, piece.count, true, false, list, uint32_t(length)};
  int begin = 0;
  if (has_long_units(length)) {
    const auto is_aligned = [](const auto* address) {
      return reinterpret_cast<uintptr_t>(address) % (4 * sizeof(*address)) == 0;
    };
    bool aligned = is_aligned(param + piece.first) && is_aligned(source + piece.first);
    for (int s = 0; s < Rule::kStates; s++) aligned &= is_aligned(states[s]);
    const int packs = aligned ? piece.count / 4 : 0;
    update_packs(param + piece.first, source + piece.first, states, packs, rule);
    begin = packs ? 4 * packs : -sector_offset(param + piece.first);
  } else {
    const int64_t units = m.by_row ? m.layout.rows : m.layout.numel();
    const bool has_word = lane() * 32 < piece.count;
    ones.first = piece.first * length;
    ones.count = list.fill(has_word ? load_word(m.bits, units, piece.first / 32 + lane()) : 0) * int(length);
    ones.all = false;
    ones.scattered = !m.by_row && m.layout.spatial != 1;
    if constexpr (Rule::kStates > 0) begin = -sector_offset(states[0]);
  }
  update_ones(param, source, states, ones, begin, rule);
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, Rule::kResident)
    masked_update(MaskPlan plan, const Prepared<Rule>* prepared, Rule common, const float* found_inf) {
  if (is_skipped(found_inf)) return;
  const int pieces = int(plan.head->pieces), stride = int(gridDim.x) * (kThreads / kWarp);
  int i = int(blockIdx.x) * (kThreads / kWarp) + warp();
  if (i >= pieces) return;
  DELFAST_SHARED(uint16_t, places, [kThreads / kWarp][BitList::kPlaces]);
  const BitList list = {places[warp()]};
  NextPiece next(plan.pieces + i);
#pragma unroll 1
  for (; i < pieces; i += stride) {
    __syncwarp();  // the list of the previous piece is no longer in use
    const MaskPiece piece = next.get();
    if (i + stride < pieces) next = NextPiece(plan.pieces + i + stride);
    const Prepared<Rule>& p = prepared[piece.param];  // shared by many pieces: not a streaming load
    const Masked& m = p.masked;
    Rule rule = common;
    p.rates.set(rule);
    float* states[Rule::kStates + 1];
    for (int s = 0; s < Rule::kStates; s++) states[s] = p.state + s * p.entries + piece.rank;
    with_dtype(m.param_dtype, [&]<class Param>(const Param*) {
      with_dtype(m.source_dtype,
                 [&]<class Source>(const Source*) { update_piece<Param, Source>(m, rule, states, piece, list); });
    });
  }
}

}  // namespace delfast::cuda
