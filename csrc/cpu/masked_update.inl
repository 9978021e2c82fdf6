// In-place updates of the masked entries of a parameter: reset, SGD, AdamW. Entries outside the mask are not written
// and, in masks of rows, not read. Included per instruction set like criticality.inl.
//
// A rule turns (entries, gradients, optimizer state) into new entries and new state, 16 at a time. Two loops apply a
// rule, one over whole rows and one over elements.
//
// Numerics. float32, every product and sum rounded (no FMA), so that all instruction sets agree. The result is rounded
// once to the parameter's dtype.

#include "cpu/score.inl"

namespace {

struct ResetRule {
  static constexpr int kStates = 0;
  Vec operator()(Vec, Vec fresh, Vec*) const { return fresh; }
};

struct SgdRule {
  static constexpr int kStates = 1;
  SgdStep step;
  Vec operator()(Vec entries, Vec gradient, Vec* state) const {
    gradient = gradient * Vec::broadcast(step.unscale);
    if (step.weight_decay != 0) gradient = gradient + Vec::broadcast(step.weight_decay) * entries;
    const Vec momentum = Vec::broadcast(step.momentum);
    Vec& buffer = state[0];
    buffer = step.first ? gradient : momentum * buffer + Vec::broadcast(step.gradient_share) * gradient;
    return entries - Vec::broadcast(step.lr) * (step.nesterov ? gradient + momentum * buffer : buffer);
  }
};

struct PlainSgdRule {  // without momentum: no state
  static constexpr int kStates = 0;
  SgdStep step;
  Vec operator()(Vec entries, Vec gradient, Vec*) const {
    gradient = gradient * Vec::broadcast(step.unscale);
    if (step.weight_decay != 0) gradient = gradient + Vec::broadcast(step.weight_decay) * entries;
    return entries - Vec::broadcast(step.lr) * gradient;
  }
};

struct AdamWRule {
  static constexpr int kStates = 2;
  AdamWStep step;
  Vec operator()(Vec entries, Vec gradient, Vec* state) const {
    gradient = gradient * Vec::broadcast(step.unscale);
    state[0] = Vec::broadcast(step.beta1) * state[0] + Vec::broadcast(step.one_minus_beta1) * gradient;
    state[1] = Vec::broadcast(step.beta2) * state[1] + Vec::broadcast(step.one_minus_beta2) * gradient * gradient;
    const Vec denominator = state[1].sqrt() / Vec::broadcast(step.correction) + Vec::broadcast(step.eps);
    return entries * Vec::broadcast(step.decay) - Vec::broadcast(step.step_size) * (state[0] / denominator);
  }
};

template <class Rule, class Param, class Source>
void update_rows(const Rule& rule, const Updated& u, int64_t begin, int64_t end, int64_t rank) {
  const int64_t length = u.layout.length;
  for (int64_t row = begin; row < end; row++) {
    if (!(u.bits[row / 8] >> row % 8 & 1)) continue;
    Param* param = static_cast<Param*>(u.param) + row * length;
    const Source* source = static_cast<const Source*>(u.source) + row * length;
    const int64_t compact = rank++ * length;
    Vec state[2];
    int64_t i = 0;
    for (; i + 16 <= length; i += 16) {
      for (int s = 0; s < Rule::kStates; s++) state[s] = Vec::load(u.state[s] + compact + i);
      rule(Vec::load(param + i), Vec::load(source + i), state).store(param + i);
      for (int s = 0; s < Rule::kStates; s++) state[s].store(u.state[s] + compact + i);
    }
    if (i == length) continue;
    const int n = int(length - i);
    const uint32_t lanes = (1u << n) - 1;
    for (int s = 0; s < Rule::kStates; s++) state[s] = Vec::load_first(u.state[s] + compact + i, n);
    rule(Vec::load_first(param + i, n), Vec::load_first(source + i, n), state).store_masked(param + i, lanes);
    for (int s = 0; s < Rule::kStates; s++) state[s].store_masked(u.state[s] + compact + i, lanes);
  }
}

template <class Rule, class Param, class Source>
void update_elements(const Rule& rule, const Updated& u, int64_t begin, int64_t end, int64_t rank) {
  Param* param = static_cast<Param*>(u.param);
  const Source* source = static_cast<const Source*>(u.source);
  for (int64_t i = begin; i < end; i += 16) {
    const int n = int(end - i < 16 ? end - i : 16);
    const uint32_t mask = (u.bits[i / 8] | (n > 8 ? uint32_t(u.bits[i / 8 + 1]) << 8 : 0)) & ((1u << n) - 1);
    if (!mask) continue;
    Vec state[2];
    for (int s = 0; s < Rule::kStates; s++) state[s] = Vec::expand(u.state[s] + rank, mask);
    if (u.layout.spatial == 1) {
      const Vec old = n == 16 ? Vec::load(param + i) : Vec::load_first(param + i, n);
      const Vec new_source = n == 16 ? Vec::load(source + i) : Vec::load_first(source + i, n);
      rule(old, new_source, state).store_masked(param + i, mask);
    } else {  // channels-last: sixteen logical neighbours are apart in memory
      Param old[16] = {};
      Source new_source[16] = {};
      for (int j = 0; j < n; j++) {
        old[j] = param[u.layout.offset(i + j)];
        new_source[j] = source[u.layout.offset(i + j)];
      }
      rule(Vec::load(old), Vec::load(new_source), state).store(old);
      for (uint32_t m = mask; m; m &= m - 1) param[u.layout.offset(i + __builtin_ctz(m))] = old[__builtin_ctz(m)];
    }
    for (int s = 0; s < Rule::kStates; s++) state[s].compress(u.state[s] + rank, mask);
    rank += __builtin_popcount(mask);
  }
}

template <class Rule>
void update(const Rule& rule, const Updated& u, int64_t begin, int64_t end, int64_t rank) {
  with_dtype(u.param_dtype, [&]<class Param>(const Param*) {
    with_dtype(u.source_dtype, [&]<class Source>(const Source*) {
      if (u.by_row)
        update_rows<Rule, Param, Source>(rule, u, begin, end, rank);
      else
        update_elements<Rule, Param, Source>(rule, u, begin, end, rank);
    });
  });
}

void reset(const Updated& u, int64_t begin, int64_t end, int64_t rank) { update(ResetRule{}, u, begin, end, rank); }
void sgd(const Updated& u, const SgdStep& step, int64_t begin, int64_t end, int64_t rank) {
  if (step.momentum != 0)
    update(SgdRule{step}, u, begin, end, rank);
  else
    update(PlainSgdRule{step}, u, begin, end, rank);
}
void adamw(const Updated& u, const AdamWStep& step, int64_t begin, int64_t end, int64_t rank) {
  update(AdamWRule{step}, u, begin, end, rank);
}

}  // namespace

extern const MaskedUpdateKernels kMaskedUpdate;
const MaskedUpdateKernels kMaskedUpdate = {reset, sgd, adamw};
