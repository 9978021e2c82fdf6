// Reset, SGD and AdamW on rows and on elements, against a plain loop in the documented order of operations: equal to
// the bit, on every instruction set, for any division of the work. Entries outside the mask keep their bits, including
// NaNs.
#include <memory>

#include "inputs.h"

namespace delfast::test {
namespace {

// One of the three updates with its constants, for the kernel and for the loop.
struct Rule {
  std::string name;
  int states;
  SgdStep sgd{};
  AdamWStep adamw{};

  void run(cpu::Isa isa, const Updated& u, int64_t begin, int64_t end, int64_t rank) const {
    const cpu::MaskedUpdateKernels& kernels = cpu::masked_update(isa);
    if (name == "reset") return kernels.reset(u, begin, end, rank);
    if (states == 2) return kernels.adamw(u, adamw, begin, end, rank);
    kernels.sgd(u, sgd, begin, end, rank);
  }

  // Every operation is rounded to float32, in this order.
  float operator()(float p, float g, float* state0, float* state1) const {
    if (name == "reset") return g;
    if (states == 2) {
      g = g * adamw.unscale;
      *state0 = adamw.beta1 * *state0 + adamw.one_minus_beta1 * g;
      *state1 = adamw.beta2 * *state1 + adamw.one_minus_beta2 * g * g;
      const float denominator = std::sqrt(*state1) / adamw.correction + adamw.eps;
      return p * adamw.decay - adamw.step_size * (*state0 / denominator);
    }
    g = g * sgd.unscale;
    if (sgd.weight_decay != 0) g = g + sgd.weight_decay * p;
    if (!states) return p - sgd.lr * g;
    *state0 = sgd.first ? g : sgd.momentum * *state0 + sgd.gradient_share * g;
    return p - sgd.lr * (sgd.nesterov ? g + sgd.momentum * *state0 : *state0);
  }
};

const std::vector<Rule>& rules() {
  static const std::vector<Rule> list = {
      {"reset", 0},
      {"SGD", 0, {0.1f, 0, 1, 0, 1, false, false}},
      {"SGD with weight decay, maximizing", 0, {0.1f, 0, 1, 5e-4f, -0.125f, false, false}},
      {"first SGD step with momentum", 1, {0.015f, 0.9f, 1, 5e-4f, 1, false, true}},
      {"SGD with momentum and dampening", 1, {0.015f, 0.9f, 0.7f, 0, 1.0f / 1024, false, false}},
      {"SGD with Nesterov momentum", 1, {0.015f, 0.9f, 1, 5e-4f, 1, true, false}},
      {"first AdamW step", 2, {}, {0.9f, 0.1f, 0.999f, 0.001f, 1e-8f, 0.01f, 0.0316228f, 0.9999f, 1}},
      {"AdamW", 2, {}, {0.9f, 0.1f, 0.999f, 0.001f, 1e-8f, 0.0017f, 0.1f, 1, -1.0f / 512}},
  };
  return list;
}

// Arrays for one update: masked entries are ordinary numbers, some of them random bits; the others are random bits.
struct Problem {
  Layout layout;
  Array param, source;
  std::vector<std::unique_ptr<Guarded<float>>> state;
  std::vector<int64_t> entries;  // offsets of the masked entries, in the order of the state

  Problem(const Rule& rule, Layout layout, Dtype param_dtype, Dtype source_dtype, std::vector<int64_t> masked,
          int64_t shift, Random& random)
      : layout(layout),
        param(param_dtype, layout.numel(), shift),
        source(source_dtype, layout.numel(), shift),
        entries(std::move(masked)) {
    for (int64_t i = 0; i < layout.numel(); i++) {
      param.set_bits(i, random.bits());
      source.set_bits(i, random.bits());
    }
    for (int64_t i : entries) {
      if (random.below(64)) param.set(i, random.value());
      if (random.below(64)) source.set(i, random.value());
    }
    for (int s = 0; s < rule.states; s++) {
      state.push_back(std::make_unique<Guarded<float>>(int64_t(entries.size()), shift));
      for (float& x : *state.back()) x = s ? std::fabs(random.value()) : random.value();
    }
  }

  Updated updated(Array& changed, std::vector<std::unique_ptr<Guarded<float>>>& changed_state) const {
    Updated u;
    u.param = changed.data();
    u.source = source.data();
    u.param_dtype = param.dtype();
    u.source_dtype = source.dtype();
    u.layout = layout;
    for (size_t s = 0; s < changed_state.size(); s++) u.state[s] = changed_state[s]->data();
    return u;
  }

  // Runs the kernel on copies and checks every entry. `run(updated)` selects mask and ranges.
  template <class Run>
  void check(const Rule& rule, Run run) const {
    Array changed = param;
    std::vector<std::unique_ptr<Guarded<float>>> changed_state;
    for (const auto& s : state) changed_state.push_back(std::make_unique<Guarded<float>>(*s));
    run(updated(changed, changed_state));

    Array expected = param;
    for (size_t e = 0; e < entries.size(); e++) {
      float state0 = state.size() > 0 ? (*state[0])[int64_t(e)] : 0,
            state1 = state.size() > 1 ? (*state[1])[int64_t(e)] : 0;
      expected.set(entries[e], rule(param.get(entries[e]), source.get(entries[e]), &state0, &state1));
      if (state.size() > 0) CHECK_SAME((*changed_state[0])[int64_t(e)], state0);
      if (state.size() > 1) CHECK_SAME((*changed_state[1])[int64_t(e)], state1);
      CHECK_SAME(changed.get(entries[e]), expected.get(entries[e]));
      changed.set_bits(entries[e], param.bits(entries[e]));
    }
    CHECK(!std::memcmp(changed.data(), param.data(), size_t(param.size() * size_of(param.dtype()))));
  }
};

enum class Masked { nothing, everything, some, ends };
constexpr Masked kMasked[] = {Masked::nothing, Masked::everything, Masked::some, Masked::ends};
bool in_mask(Masked masked, int64_t i, int64_t count, Random& random) {
  if (masked == Masked::some) return random.below(3) == 0;
  return masked == Masked::everything || (masked == Masked::ends && (i == 0 || i == count - 1));
}
using test::name;  // the next line would hide it
const char* name(Masked masked) {
  constexpr const char* names[] = {"nothing", "everything", "some", "both ends"};
  return names[int(masked)];
}

// One mask, of rows or of logical elements: the whole range at once, then in parts, the last first.
void check_mask(cpu::Isa isa, const Rule& rule, bool by_row, Layout layout, Dtype param, Dtype source, Masked masked,
                int64_t shift, Random& random) {
  const int64_t count = by_row ? layout.rows : layout.numel();
  Guarded<uint8_t> bits((count + 7) / 8);
  std::fill(bits.begin(), bits.end(), uint8_t(0));
  std::vector<int64_t> entries, rank = {0};  // rank[i]: bits set before i
  for (int64_t i = 0; i < count; i++) {
    const bool set = in_mask(masked, i, count, random);
    rank.push_back(rank.back() + set);
    if (!set) continue;
    bits[i / 8] |= uint8_t(1u << i % 8);
    if (by_row)
      for (int64_t e = 0; e < layout.length; e++) entries.push_back(i * layout.length + e);
    else
      entries.push_back(layout.offset(i));
  }
  std::vector<int64_t> cuts = {0};  // rows may be cut anywhere, elements at the chunks
  if (by_row)
    for (int64_t part = 0; part < 3; part++) cuts.push_back(cuts.back() + random.below(count - cuts.back() + 1));
  else
    for (int64_t cut = cpu::kChunk; cut < count; cut += cpu::kChunk) cuts.push_back(cut);
  cuts.push_back(count);

  const Problem problem(rule, layout, param, source, entries, shift, random);
  for (const std::vector<int64_t>& ends : {std::vector<int64_t>{0, count}, cuts}) {
    describe(rule.name, ", ", by_row ? "rows" : "elements", " (", name(masked), ") of ", layout.rows, " x ",
             layout.length, ", spatial ", layout.spatial, ", ", name(param), " from ", name(source), ", ",
             ends.size() - 1, " parts");
    problem.check(rule, [&](Updated u) {
      u.bits = bits.data();
      u.by_row = by_row;
      for (size_t part = ends.size() - 1; part-- > 0;)
        rule.run(isa, u, ends[part], ends[part + 1], rank[size_t(ends[part])]);
    });
    if (cuts.size() == 2) return;
  }
}

void all_dtypes(cpu::Isa isa, Random& random) {
  for (const Rule& rule : rules())
    for (Dtype param : kDtypes)
      for (Dtype source : kDtypes)
        for (Masked masked : kMasked)
          for (int64_t length : {1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 127}) {
            const int64_t rows = length < 20 ? 19 : 5, shift = length % 2;
            check_mask(isa, rule, true, {rows, length, 1}, param, source, masked, shift, random);
            check_mask(isa, rule, false, {rows, length, 1}, param, source, masked, shift, random);
          }
}

void long_rows(cpu::Isa isa, Random& random) {
  for (const Rule& rule : rules())
    for (int64_t length : {511, 512, 513, 1000, 4608, 16383, 16384, 16385, 20000, 70000}) {
      const Dtype param = random.dtype(), source = random.dtype();
      check_mask(isa, rule, true, {2, length, 1}, param, source, Masked::ends, 0, random);
      check_mask(isa, rule, false, {2, length, 1}, param, source, Masked::some, 0, random);
    }
}

void channels_last(cpu::Isa isa, Random& random) {
  for (const Rule& rule : rules())
    for (Dtype param : kDtypes)
      for (Dtype source : kDtypes)
        for (Layout layout : {Layout{5, 63, 9}, Layout{3, 2, 2}, Layout{2, 49, 49}, Layout{8, 9 * 16, 9}}) {
          check_mask(isa, rule, false, layout, param, source, Masked::some, 1, random);
          check_mask(isa, rule, false, layout, param, source, Masked::everything, 0, random);
          check_mask(isa, rule, true, layout, param, source, Masked::some, 0, random);
        }
  for (const Rule& rule : rules())
    check_mask(isa, rule, false, {37, 1899, 9}, Dtype::float32, Dtype::bfloat16, Masked::some, 0, random);
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast::test;
  const delfast::cpu::Isa isa = isa_argument(argc, argv);
  Random random(4);
  all_dtypes(isa, random);
  long_rows(isa, random);
  channels_last(isa, random);
  return report();
}
