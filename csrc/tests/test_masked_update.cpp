// Reset, SGD and AdamW on rows and on bits, against a plain loop in the documented order of operations: equal to the
// bit, on every instruction set, for any split of the work. Entries outside the mask keep their bits, NaNs included.
#include <memory>

#include "inputs.h"

namespace delfast::test {
namespace {

using Bits = Guarded<uint8_t>;

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

// Arrays for one update: masked entries are ordinary numbers (and, now and then, anything), the others any bits.
struct Problem {
  Layout layout;
  Array param, source;
  std::vector<std::unique_ptr<Guarded<float>>> state;
  std::vector<int64_t> entries;  // where the masked ones lie in memory, in the order of the state

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

  // Runs the kernel on copies, `run(updated)` choosing mask and ranges, and checks every entry.
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
using test::name;  // which the next line would hide
const char* name(Masked masked) {
  constexpr const char* names[] = {"nothing", "everything", "some", "both ends"};
  return names[int(masked)];
}

void check_rows(cpu::Isa isa, const Rule& rule, Layout layout, Dtype param, Dtype source, Masked masked, int64_t shift,
                Random& random) {
  std::vector<int32_t> chosen;
  std::vector<int64_t> entries;
  for (int64_t row = 0; row < layout.rows; row++) {
    if (!in_mask(masked, row, layout.rows, random)) continue;
    chosen.push_back(int32_t(row));
    for (int64_t i = 0; i < layout.length; i++) entries.push_back(row * layout.length + i);
  }
  const int64_t count = int64_t(chosen.size());
  Guarded<int32_t> rows(count);
  std::copy(chosen.begin(), chosen.end(), rows.begin());
  const Problem problem(rule, layout, param, source, entries, shift, random);
  const auto run = [&](std::initializer_list<int64_t> cuts) {
    describe(rule.name, ", rows (", name(masked), ") of ", layout.rows, " x ", layout.length, ", ", name(param),
             " from ", name(source), ", cuts ", cuts.size());
    problem.check(rule, [&](Updated u) {
      u.rows = rows.data();
      u.row_count = count;
      int64_t begin = 0;
      for (int64_t end : cuts) {
        rule.run(isa, u, begin, end, 0);
        begin = end;
      }
    });
  };
  run({count});
  const int64_t cut = random.below(count + 1);
  run({cut, cut, count});
}

void check_bits(cpu::Isa isa, const Rule& rule, Layout layout, Dtype param, Dtype source, Masked masked, int64_t shift,
                Random& random) {
  const int64_t numel = layout.numel();
  Bits bits((numel + 7) / 8);
  std::fill(bits.begin(), bits.end(), uint8_t(0));
  std::vector<int64_t> entries, rank_of_chunk;
  for (int64_t i = 0; i < numel; i++) {
    if (i % cpu::kChunk == 0) rank_of_chunk.push_back(int64_t(entries.size()));
    if (!in_mask(masked, i, numel, random)) continue;
    bits[i / 8] |= uint8_t(1u << i % 8);
    entries.push_back(layout.offset(i));
  }
  const Problem problem(rule, layout, param, source, entries, shift, random);
  describe(rule.name, ", bits (", name(masked), ") of ", layout.rows, " x ", layout.length, ", spatial ",
           layout.spatial, ", ", name(param), " from ", name(source));
  problem.check(rule, [&](Updated u) {
    u.bits = bits.data();
    rule.run(isa, u, 0, numel, 0);
  });
  if (numel <= cpu::kChunk) return;
  describe(current_case, ", chunk by chunk");
  problem.check(rule, [&](Updated u) {
    u.bits = bits.data();
    for (size_t chunk = rank_of_chunk.size(); chunk-- > 0;)  // in any order: the last first
      rule.run(isa, u, int64_t(chunk) * cpu::kChunk, std::min(numel, int64_t(chunk + 1) * cpu::kChunk),
               rank_of_chunk[chunk]);
  });
}

void all_dtypes(cpu::Isa isa, Random& random) {
  for (const Rule& rule : rules())
    for (Dtype param : kDtypes)
      for (Dtype source : kDtypes)
        for (Masked masked : kMasked)
          for (int64_t length : {1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 127}) {
            const int64_t shift = length % 2;
            check_rows(isa, rule, {5, length, 1}, param, source, masked, shift, random);
            check_bits(isa, rule, {5, length, 1}, param, source, masked, shift, random);
          }
}

void long_rows(cpu::Isa isa, Random& random) {
  for (const Rule& rule : rules())
    for (int64_t length : {511, 512, 513, 1000, 4608, 16383, 16384, 16385, 20000, 70000}) {
      const Dtype param = kDtypes[random.below(3)], source = kDtypes[random.below(3)];
      check_rows(isa, rule, {2, length, 1}, param, source, Masked::ends, 0, random);
      check_bits(isa, rule, {2, length, 1}, param, source, Masked::some, 0, random);
    }
}

void channels_last(cpu::Isa isa, Random& random) {
  for (const Rule& rule : rules())
    for (Dtype param : kDtypes)
      for (Dtype source : kDtypes)
        for (Layout layout : {Layout{5, 63, 9}, Layout{3, 2, 2}, Layout{2, 49, 49}, Layout{8, 9 * 16, 9}}) {
          check_bits(isa, rule, layout, param, source, Masked::some, 1, random);
          check_bits(isa, rule, layout, param, source, Masked::everything, 0, random);
          check_rows(isa, rule, layout, param, source, Masked::some, 0, random);
        }
  for (const Rule& rule : rules())
    check_bits(isa, rule, {37, 1899, 9}, Dtype::float32, Dtype::bfloat16, Masked::some, 0, random);
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
