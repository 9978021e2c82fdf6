// Masked updates by the CUDA kernels, run on the CPU, against the scalar CPU kernels: equal to the bit, for every
// schedule of threads and order of blocks. cpu/test_masked_update.cpp checks the CPU kernels. Plans are compared with a
// plain list of pieces.
#include <cmath>

#include "cases.h"
#include "delfast/mask_plan.h"

namespace delfast::test {
namespace {

enum class Masked { nothing, everything, some, ends };

struct Param {
  Layout layout;
  Array values, source;
  Guarded<uint8_t> bits;
  bool by_row;
  int64_t entries = 0;  // number of masked ones

  Param(Layout layout, bool by_row, Dtype dtype, Dtype source_dtype, Masked masked, int64_t shift, int64_t source_shift,
        Random& random)
      : layout(layout),
        values(dtype, layout.numel(), shift),
        source(source_dtype, layout.numel(), source_shift),
        bits(((by_row ? layout.rows : layout.numel()) + 7) / 8),
        by_row(by_row) {
    for (int64_t i = 0; i < layout.numel(); i++) {
      values.set(i, random.value());
      source.set(i, random.value());
    }
    std::fill(bits.begin(), bits.end(), uint8_t(0));
    const int64_t units = by_row ? layout.rows : layout.numel();
    for (int64_t i = 0; i < units; i++) {
      const bool set = masked == Masked::everything || (masked == Masked::some && random.below(3) == 0) ||
                       (masked == Masked::ends && (i == 0 || i == units - 1));
      bits[i / 8] |= uint8_t(set << i % 8);
      entries += set * (by_row ? layout.length : 1);
    }
  }
  Updated updated() {
    Updated u;
    u.param = values.data();
    u.source = source.data();
    u.param_dtype = values.dtype();
    u.source_dtype = source.dtype();
    u.layout = layout;
    u.bits = bits.data();
    u.by_row = by_row;
    return u;
  }
};
using List = std::vector<Param>;

List awkward_list(Random& random) {
  List list;
  const auto add = [&](Layout layout, bool by_row, Dtype dtype, Dtype source, Masked masked) {
    const int64_t n = int64_t(list.size());
    list.emplace_back(layout, by_row, dtype, source, masked, n % 5, n % 7 == 3 ? n % 5 + 1 : n % 5, random);
  };
  int n = 0;  // so that each length meets each kind of mask
  for (Dtype dtype : kDtypes)
    for (Dtype source : kDtypes) {
      for (bool by_row : {true, false})
        for (int64_t length : {1, 31, 32, 33, 1000, 4608})
          add({length == 1 ? 37 : length < 1000 ? 9 : 3, length, 1}, by_row, dtype, source, Masked(n++ % 4));
      n++;
    }
  for (Dtype dtype : kDtypes)
    for (bool by_row : {true, false})
      add({3, 70000, 1}, by_row, dtype, Dtype::float32, by_row ? Masked::ends : Masked::some);
  // rows of every size of stretch, in several blocks, and around the shortest length that is not part of a stretch
  for (int64_t length : {2, 3, 7, 15, 17})
    add({20000 / length, length, 1}, true, Dtype::float32, kSecondHalf, Masked::some);
  for (int64_t length : {63, 64, 65, 68, 511, 512, 513, 1028})
    for (Dtype dtype : {Dtype::float32, kSecondHalf}) add({7, length, 1}, true, dtype, dtype, Masked::some);
  // stretches without a masked element between others
  add({1, 5000, 1}, false, Dtype::float32, Dtype::float32, Masked::ends);
  const int64_t many = kFewCases ? 65539 : 1000003;  // elements of more than one tile
  add({1, many, 1}, true, Dtype::float32, Dtype::float32, Masked::everything);
  add({1, many, 1}, false, Dtype::bfloat16, Dtype::float32, Masked::some);
  for (Layout layout : {Layout{5, 63, 9}, Layout{3, 2, 2}, Layout{37, 1899, 9}})
    for (bool by_row : {true, false}) add(layout, by_row, Dtype::float32, kSecondHalf, Masked::some);
  return list;
}

List many(Random& random) {
  List list;
  for (int i = 0; i < 300; i++)
    list.emplace_back(Layout{random.below(9), 1 + random.below(70), 1}, i % 2 == 0, random.dtype(), random.dtype(),
                      Masked(random.below(4)), random.below(8), random.below(8), random);
  return list;
}

struct Update {
  const char* name;
  int states;
  cuda::SgdOptions sgd{};
  cuda::AdamWOptions adamw{};
};
const Update kUpdates[] = {
    // AdamW's rates are floats, so that a rate from the device is the same
    {"reset", 0},
    {"SGD", 0, {0.1, 0, 0, 5e-4, false, true}},
    {"SGD with momentum", 1, {0.015, 0.9, 0.3, 5e-4, false, false}},
    {"SGD with Nesterov momentum", 1, {0.015, 0.9, 0, 0, true, false}},
    {"AdamW", 2, {}, {0x1p-10, 0.9, 0.999, 1e-8, 0.01, false}},
    {"AdamW, to maximize", 2, {}, {0x1p-10, 0.5, 0.9, 1e-3, 0, true}},
};

// The documented step on the CPU. `state` is flat, as for the op.
void step_on_cpu(List& list, const Update& update, float* state, float* steps, double grad_scale) {
  const auto& kernels = cpu::masked_update(cpu::Isa::scalar);
  for (size_t i = 0; i < list.size(); i++) {
    Updated u = list[i].updated();
    for (int s = 0; s < update.states; s++) u.state[s] = state + s * list[i].entries;
    state += padded_state(update.states * list[i].entries);
    const int64_t end = list[i].by_row ? u.layout.rows : u.layout.numel();
    const double taken = steps[i];
    const auto [lr, momentum, dampening, weight_decay, nesterov, maximize] = update.sgd;
    const float unscale = float(1 / grad_scale) * (maximize || update.adamw.maximize ? -1.0f : 1.0f);
    // elements go by chunks, as from the binding
    const int64_t chunk = list[i].by_row ? std::max<int64_t>(end, 1) : cpu::kChunk;
    int64_t rank = 0;
    for (int64_t begin = 0; begin < end; begin += chunk) {
      const int64_t stop = std::min(end, begin + chunk);
      if (update.states == 2) {
        const auto& a = update.adamw;
        kernels.adamw(u,
                      {float(a.beta1), float(1 - a.beta1), float(a.beta2), float(1 - a.beta2), float(a.eps),
                       float(a.lr / (1 - std::pow(a.beta1, taken + 1))),
                       float(std::sqrt(1 - std::pow(a.beta2, taken + 1))), float(1 - a.lr * a.weight_decay), unscale},
                      begin, stop, rank);
      } else if (std::string(update.name) == "reset") {
        kernels.reset(u, begin, stop, rank);
      } else {
        kernels.sgd(
            u, {float(lr), float(momentum), float(1 - dampening), float(weight_decay), unscale, nesterov, taken == 0},
            begin, stop, rank);
      }
      for (int64_t b = begin; b < stop; b++) rank += u.bits[b / 8] >> b % 8 & 1;
    }
    steps[i] += 1;
  }
}

bool same_memory(const Array& a, const Array& b) {
  return !std::memcmp(a.data(), b.data(), size_t(a.size() * size_of(a.dtype())));
}

// A plan from its head on, made by the kernels.
class Plan {
 public:
  explicit Plan(const std::vector<Updated>& params)
      : shape_(params.data(), count(params)), memory_(shape_.bytes() - shape_.head_offset()) {
    Workspace workspace(cuda::mask_plan_workspace(params.data(), count(params)));
    CHECK(cuda::mask_plan(params.data(), count(params), memory_.get(), workspace.get(), kStream) == nullptr);
  }
  void* get() { return memory_.get(); }

  // Compares it with a plain list.
  void check(const std::vector<Updated>& params) {
    const MaskPlan plan(memory_.get(), count(params));
    std::vector<MaskPiece> pieces;
    for (size_t p = 0; p < params.size(); p++) {
      const Updated& u = params[p];
      const int64_t units = units_of(u), length = unit_length_of(u), stretch = stretch_units(length);
      const auto is_set = [&](int64_t unit) { return u.bits[unit / 8] >> unit % 8 & 1; };
      int64_t rank = 0;
      for (int64_t unit = 0; unit < units; unit++) {
        if (!is_set(unit)) continue;
        if (length >= kLongUnit) {
          for (int64_t at = 0; at < length; at += shape_.piece_length)
            pieces.push_back(
                {unit * length + at, rank + at, int32_t(p), int32_t(std::min(length - at, shape_.piece_length))});
        } else if (pieces.empty() || pieces.back().param != int32_t(p) ||
                   pieces.back().first != unit / stretch * stretch) {
          const int64_t first = unit / stretch * stretch;
          pieces.push_back({first, rank, int32_t(p), int32_t(std::min(units - first, stretch))});
        }
        rank += length;
      }
      const MaskedParam& made = plan.params[p];
      CHECK(made.units == units && made.unit_length == length && made.entries == rank);
    }
    CHECK_EQUAL(plan.head->params, count(params));
    CHECK_EQUAL(plan.head->pieces, int64_t(pieces.size()));
    CHECK(int64_t(pieces.size()) <= shape_.max_pieces);
    for (size_t i = 0; i < pieces.size(); i++) CHECK(!std::memcmp(&plan.pieces[i], &pieces[i], sizeof(MaskPiece)));
  }

 private:
  static int64_t count(const std::vector<Updated>& params) { return int64_t(params.size()); }

  MaskPlanShape shape_;
  Workspace memory_;
};

std::vector<Updated> updated(List& list) {
  std::vector<Updated> params;
  for (Param& p : list) params.push_back(p.updated());
  return params;
}

int64_t state_values(const List& list, int states) {
  int64_t values = 0;
  for (const Param& p : list) values += padded_state(states * p.entries);
  return values;
}

// A list, and its plan in each schedule, checked.
struct Planned {
  const List& list;
  std::string what;
  std::vector<uint64_t> seeds;
  uint64_t step_launches;
  std::vector<Plan> plans = {};

  // `launches`: number for a plan, and for a step.
  Planned(const List& list, std::string what, const std::vector<uint64_t>& seeds, uint64_t plan_launches = 3,
          uint64_t step_launches = 2)
      : list(list), what(std::move(what)), seeds(seeds), step_launches(step_launches) {
    List copy = list;
    for (uint64_t seed : seeds) {
      describe(this->what, ", seed ", seed, ", plan");
      cuda_on_cpu::set_seed(seed);
      const uint64_t before = cuda_on_cpu::device.launches;
      plans.emplace_back(updated(copy));
      CHECK_EQUAL(cuda_on_cpu::device.launches - before, list.empty() ? 1 : plan_launches);
      plans.back().check(updated(copy));
    }
  }
};

void check(Planned& planned, const Update& update, Random& random) {
  const List& list = planned.list;
  const std::string& what = planned.what;
  const int64_t state_numel = state_values(list, update.states);
  const int64_t count = int64_t(list.size());
  const bool resets = std::string(update.name) == "reset";
  Guarded<float> state(state_numel, random.below(4)), steps(count);
  for (float& x : state) x = std::fabs(random.value());
  for (float& x : steps) x = float(random.below(3));
  Guarded<float> grad_scale(1);
  grad_scale[0] = 512;

  List expected = list;
  Guarded<float> expected_state = state, expected_steps = steps;
  step_on_cpu(expected, update, expected_state.data(), expected_steps.data(), 512);

  enum class Skip { no, zero, yes };
  for (size_t n = 0; n < planned.seeds.size(); n++) {
    const uint64_t seed = planned.seeds[n];
    Plan& plan = planned.plans[n];
    cuda_on_cpu::set_seed(seed);
    for (Skip skip : {Skip::no, Skip::zero, Skip::yes}) {
      if (resets && skip != Skip::no) continue;
      if (skip != Skip::no && seed != planned.seeds.back()) continue;
      if (skip == Skip::zero && kFewCases) continue;
      describe(what, ", ", update.name, ", seed ", seed, ", found_inf ", int(skip));
      List changed = list;
      Guarded<float> changed_state = state, changed_steps = steps, found_inf(1);
      found_inf[0] = skip == Skip::yes;
      const std::vector<Updated> params = updated(changed);
      Workspace workspace(cuda::masked_update_workspace(count));
      cuda::StepInputs inputs = {changed_state.data(), state_numel, changed_steps.data(), grad_scale.data(),
                                 skip == Skip::no ? nullptr : found_inf.data()};
      cuda::SgdOptions sgd = update.sgd;
      cuda::AdamWOptions adamw = update.adamw;
      Guarded<float> lr(1);
      if (skip == Skip::zero) {  // the rate from the device; the options have none
        lr[0] = float(update.states == 2 ? adamw.lr : sgd.lr);
        inputs.lr = lr.data();
        sgd.lr = adamw.lr = std::nan("");
      }
      const uint64_t before = cuda_on_cpu::device.launches;
      const char* error =
          update.states == 2
              ? cuda::masked_adamw(params.data(), count, inputs, adamw, plan.get(), workspace.get(), kStream)
          : resets ? cuda::masked_reset(params.data(), count, plan.get(), workspace.get(), kStream)
                   : cuda::masked_sgd(params.data(), count, inputs, sgd, plan.get(), workspace.get(), kStream);
      CHECK(error == nullptr);
      CHECK_EQUAL(cuda_on_cpu::device.launches - before, count ? planned.step_launches : 0);
      const bool moved = skip != Skip::yes;
      for (size_t i = 0; i < list.size(); i++) {
        describe(what, ", ", update.name, ", seed ", seed, ", found_inf ", int(skip), ", parameter ", i, ", ",
                 list[i].by_row ? "rows of " : "elements of ", list[i].layout.length, ", ",
                 name(list[i].values.dtype()), " from ", name(list[i].source.dtype()));
        CHECK(same_memory(changed[i].values, moved ? expected[i].values : list[i].values));
      }
      describe(what, ", ", update.name, ", seed ", seed, ", found_inf ", int(skip), ", state and steps");
      const auto same = [](Guarded<float>& a, Guarded<float>& b) { return std::equal(a.begin(), a.end(), b.begin()); };
      CHECK(same(changed_state, moved ? expected_state : state));
      if (!resets) CHECK(same(changed_steps, moved ? expected_steps : steps));
    }
  }
}

// Rows of a large network are cut into longer parts. The pointers are not read.
void plan_of_a_large_network(uint64_t seed) {
  cuda_on_cpu::set_seed(seed);
  Updated u;
  u.layout = {8193, 4100, 1};
  u.by_row = true;
  Guarded<uint8_t> bits(8193 / 8 + 1);
  std::fill(bits.begin(), bits.end(), uint8_t(0));
  for (int64_t row : {0, 7, 8, 4000, 8191, 8192}) bits[row / 8] |= uint8_t(1 << row % 8);
  u.bits = bits.data();
  describe("a plan of a large network");
  Plan({u}).check({u});
}

// The number of masked entries is available only on the device. A state or a plan that does not fit must stop there,
// before any change.
void what_is_of_another_mask(Random& random) {
  const auto make = [&](Layout layout, bool by_row) {
    List list;
    list.emplace_back(layout, by_row, Dtype::float32, Dtype::float32, Masked::some, 0, 0, random);
    return list;
  };
  const auto traps = [&](const char* what, List& list, Plan& plan, int64_t state_numel, const Update& update) {
    const List before = list;
    const std::vector<Updated> params = updated(list);
    Guarded<float> state(state_numel), steps(int64_t(list.size()));
    for (float& x : steps) x = 0;
    Workspace workspace(cuda::masked_update_workspace(int64_t(list.size())));
    describe(what);
    bool trapped = false;
    try {
      cuda::masked_sgd(params.data(), int64_t(params.size()),
                       {state.data(), state.size(), steps.data(), nullptr, nullptr}, update.sgd, plan.get(),
                       workspace.get(), kStream);
    } catch (const std::exception&) {
      trapped = true;
    }
    CHECK(trapped);
    for (size_t i = 0; i < list.size(); i++) CHECK(same_memory(list[i].values, before[i].values));
    CHECK_EQUAL(steps[0], 0.0f);
  };
  List rows = make({9, 33, 1}, true), turned = make({33, 9, 1}, true), elements = make({9, 33, 1}, false);
  List two = rows;
  two.push_back(rows[0]);
  Plan own(updated(rows)), of_two(updated(two));
  const int64_t numel = state_values(rows, 1);
  traps("a state of another mask", rows, own, numel + 4, kUpdates[2]);
  traps("a plan of other shapes", turned, own, numel, kUpdates[1]);
  traps("a plan by rows, a call by elements", elements, own, numel, kUpdates[2]);
  traps("a plan of more parameters", rows, of_two, numel, kUpdates[1]);
  static_cast<MaskPlanHead*>(own.get())->pieces = -1;
  traps("a plan of the CPU", rows, own, numel, kUpdates[1]);
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast::test;
  const std::vector<uint64_t> list = seeds(argc, argv);
  Random random(7);
  const List awkward = awkward_list(random), three_hundred = many(random), none;
  for (int driver : kDrivers) {  // under the first, tables are small
    cuda_on_cpu::device.driver_version = driver;
    const bool small = driver == kDrivers[0];
    std::vector<Planned> all;
    all.emplace_back(three_hundred, "300 parameters, driver " + std::to_string(driver), list, small ? 7 : 3,
                     small ? 6 : 2);
    if (!small) {
      all.emplace_back(awkward, "awkward", list);
      all.emplace_back(none, "no parameters", list);
    }
    for (Planned& planned : all)
      for (const Update& update : kUpdates) check(planned, update, random);
  }
  plan_of_a_large_network(list.back());
  what_is_of_another_mask(random);
  return report();
}
