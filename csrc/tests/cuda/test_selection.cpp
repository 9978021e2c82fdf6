// Selection by the CUDA kernels, run on the CPU, against the CPU kernels: the same bits, for every schedule of threads
// and order of blocks. cpu/test_selection.cpp checks the CPU kernels.
#include <limits>

#include "cases.h"
#include "cuda/selection.cuh"
#include "cuda/selection_units.cuh"

namespace delfast::test {
namespace {

// Minimum number of elements for which a sample is taken: zero, or never.
constexpr int64_t kSampled = 0, kUnsampled = INT64_MAX;

struct Selected {
  std::vector<uint8_t> bits;
  int64_t nonfinite, positive;
  bool narrow;     // the bits came from the candidates
  int64_t listed;  // number of candidates
  uint64_t launches;
};

Selected select_by_cuda(const Params& params, Criterion criterion, int64_t k, int64_t min_sampled) {
  const std::vector<Scored> list = scored(params);
  const int64_t count = int64_t(list.size());
  int64_t bytes = 0;
  for (const Scored& p : list) bytes += (p.layout.numel() + 7) / 8;
  Bits bits(bytes);
  Guarded<ElementsInfo> info(1);
  Workspace workspace(cuda::select_elements_workspace(list.data(), count, min_sampled));
  const uint64_t launches = cuda_on_cpu::device.launches;
  const char* error = cuda::select_elements(list.data(), count, criterion, k, bits.data(), info.data(), workspace.get(),
                                            kStream, min_sampled);
  CHECK(error == nullptr);
  const auto& state = *static_cast<const cuda::SelectionState*>(workspace.get());
  const bool narrow = !state.failed && state.above <= uint64_t(k) && uint64_t(k) < state.above + state.listed;
  return {{bits.begin(), bits.end()},
          info[0].nonfinite,
          info[0].positive,
          narrow,
          state.failed ? 0 : int64_t(state.listed),
          cuda_on_cpu::device.launches - launches};
}

int64_t elements(const Params& params) {
  int64_t n = 0;
  for (const auto& p : params) n += p->layout.numel();
  return n;
}

int64_t positives(const Params& params) {
  int64_t n = 0;
  for (const auto& p : params)
    for (int64_t i = 0; i < p->layout.numel(); i++) n += p->score(i) > 0;
  return n;
}

int64_t narrow_ones = 0, wide_ones = 0;  // numbers of sampled selections by result

enum class Try { all, sampled, unsampled };

void check(const Params& params, const std::vector<int64_t>& budgets, const std::vector<uint64_t>& seeds,
           const std::string& what, Try tries = Try::all) {
  const Criterion criterion = params.empty() ? Criterion::weighted_grad : params[0]->criterion;
  const int64_t positive = positives(params);
  for (int64_t k : budgets) {
    std::vector<uint8_t> expected;
    if (!params.empty())
      for (const auto& bits : select(cpu::Isa::scalar, params, k))
        expected.insert(expected.end(), bits->begin(), bits->end());
    for (uint64_t seed : seeds)
      for (int64_t min_sampled : {kSampled, kUnsampled}) {
        if (tries == (min_sampled ? Try::sampled : Try::unsampled)) continue;
        describe(what, ", ", name(criterion), ", k = ", k, ", seed ", seed, min_sampled ? "" : ", sampled");
        cuda_on_cpu::set_seed(seed);
        const Selected selected = select_by_cuda(params, criterion, k, min_sampled);
        CHECK(selected.bits == expected);
        CHECK_EQUAL(selected.nonfinite, int64_t(-1));
        CHECK_EQUAL(selected.positive, std::min({k, elements(params), positive}));
        if (min_sampled)
          CHECK(!selected.narrow);
        else
          (selected.narrow ? narrow_ones : wide_ones)++;
      }
  }
}

Params one(Layout layout, Kind kind, Random& random, Dtype dtype = Dtype::float32, int64_t shift = 0) {
  Params params;
  params.push_back(std::make_unique<Scores>(layout, Criterion::weighted_grad, dtype, dtype, shift));
  params[0]->fill(kind, random);
  return params;
}

// Several tiles of each of five parameters: dtypes, alignments, channels-last, ties across tiles and parameters.
Params several(int round, Random& random) {
  Params params;
  for (int i = 0; i < 5; i++) {
    const Layout layout{3 + 5 * i, 9 * (200 + 177 * i), round == 5 && i % 2 ? 9 : 1};
    const int64_t shift = i % 2 ? 0 : round % 4;
    params.push_back(
        std::make_unique<Scores>(layout, Criterion::weighted_grad, kDtypes[size_t(round + i) % std::size(kDtypes)],
                                 kDtypes[size_t(round) % std::size(kDtypes)], shift, round == 4 ? 1 : shift));
    params.back()->fill(i == 3 && round % 2 ? Kind::few_values : Kind::ordinary, random);
  }
  return params;
}

// The last element of some parameters is not finite. If there is a sample, it may miss that element.
void nonfinite(const std::vector<uint64_t>& seeds, Random& random) {
  for (float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::quiet_NaN()}) {
    if (kFewCases && !std::isinf(bad)) continue;
    Params params = many_params(Criterion::weighted_grad, random);
    int64_t first = -1;
    for (size_t p = 100; p < params.size(); p += 57) {
      const int64_t numel = params[p]->layout.numel();
      if (!numel) continue;
      params[p]->theta.set(numel - 1, 1);
      params[p]->grad.set(numel - 1, bad);
      if (first < 0) first = int64_t(p);
    }
    for (uint64_t seed : seeds)
      for (int64_t min_sampled : {kSampled, kUnsampled}) {
        describe("not finite, seed ", seed, min_sampled ? "" : ", sampled");
        cuda_on_cpu::set_seed(seed);
        const Selected selected = select_by_cuda(params, Criterion::weighted_grad, 1000, min_sampled);
        CHECK_EQUAL(selected.nonfinite, first);
        CHECK(std::all_of(selected.bits.begin(), selected.bits.end(), [](uint8_t byte) { return byte == 0; }));
        CHECK(!selected.narrow);
      }
  }
}

// A tile whose scores are all in the bracket, and a list that overflows: the list is discarded.
void lists_that_run_over(const std::vector<uint64_t>& seeds, Random& random) {
  Params params = one({1, 20 * 8192, 1}, Kind::ordinary, random);
  for (int64_t i = 0; i < 8192; i++) {
    params[0]->theta.set(9 * 8192 + i, 1);
    params[0]->grad.set(9 * 8192 + i, 0.05f + 1e-7f * float(i % 100));
  }
  int64_t above = 0;
  for (int64_t i = 0; i < params[0]->layout.numel(); i++) above += params[0]->score(i) >= 0.05f;
  const int64_t before = wide_ones;
  check(params, {above - 4096}, seeds, "a full tile", Try::sampled);
  CHECK_EQUAL(wide_ones, before + int64_t(seeds.size()));
  Params ties = one({1, 12 * 8192, 1}, Kind::few_values, random);
  check(ties, {1000, 40000}, seeds, "ties in all tiles", Try::sampled);
}

// One launch for each table of parameters, then seven kernels, or five without a sample.
void launches(Random& random) {
  cuda_on_cpu::set_seed(0);
  for (int driver : kDrivers)
    for (size_t count : {size_t(1), size_t(62), size_t(300)}) {
      cuda_on_cpu::device.driver_version = driver;
      Params params = many_params(Criterion::weighted_grad, random);
      params.resize(count);
      int64_t sources = 0;
      for (const auto& p : params) sources += p->layout.numel() > 0;
      const int64_t small = cuda::Table<cuda::Source>::kEntries;
      const uint64_t tables = driver == kDrivers[0] ? uint64_t((sources + small - 1) / small) : 1;
      for (int64_t min_sampled : {kSampled, kUnsampled}) {
        describe("launches of ", count, " parameters, driver ", driver, min_sampled ? "" : ", sampled");
        const Selected selected = select_by_cuda(params, Criterion::weighted_grad, 0, min_sampled);
        CHECK_EQUAL(selected.launches, (sources ? tables : 1) + (min_sampled || !sources ? 5 : 7));
      }
    }
}

struct Units {
  std::vector<int64_t> counts, lengths;
  std::vector<float> scores;
  int64_t total() const {
    int64_t sum = 0;
    for (size_t g = 0; g < counts.size(); g++) sum += counts[g] * lengths[g];
    return sum;
  }
};

// few: true if one block selects the units, in one launch.
void check_units(const Units& units, const std::vector<int64_t>& budgets, const std::vector<uint64_t>& seeds,
                 const std::string& what, int64_t shift, bool few) {
  const int64_t groups = int64_t(units.counts.size());
  std::vector<cpu::UnitGroup> given;
  int64_t bytes = 0;
  for (size_t g = 0; g < units.counts.size(); g++) {
    given.push_back({units.counts[g], units.lengths[g]});
    bytes += (units.counts[g] + 7) / 8;
  }
  Guarded<float> scores(int64_t(units.scores.size()), shift);
  std::copy(units.scores.begin(), units.scores.end(), scores.begin());
  for (int64_t budget : budgets)
    for (bool cut_last : {false, true}) {
      Bits expected(bytes);
      const UnitsInfo reference =
          cpu::select_units(scores.data(), given.data(), groups, budget, cut_last, expected.data());
      for (uint64_t seed : seeds) {
        describe(what, ", ", scores.size(), " units in ", groups, " groups, budget ", budget, ", seed ", seed,
                 cut_last ? ", cut" : "");
        cuda_on_cpu::set_seed(seed);
        Bits bits(bytes);
        Guarded<UnitsInfo> info(1);
        Workspace workspace(cuda::select_units_workspace(units.counts.data(), units.lengths.data(), groups));
        const uint64_t launches = cuda_on_cpu::device.launches;
        const char* error = cuda::select_units(scores.data(), units.counts.data(), units.lengths.data(), groups, budget,
                                               cut_last, bits.data(), info.data(), workspace.get(), kStream);
        CHECK(error == nullptr);
        CHECK_EQUAL(cuda_on_cpu::device.launches - launches == 1, few);
        CHECK_EQUAL(info[0].nonfinite, reference.nonfinite);
        CHECK(equal(bits, expected));
        CHECK_EQUAL(info[0].cut_unit, reference.cut_unit);
        CHECK_EQUAL(info[0].cut_size, reference.cut_size);
        CHECK_EQUAL(info[0].selected, reference.selected);
        CHECK_EQUAL(info[0].positive, reference.positive);
      }
    }
}

// One group is too long for one block, or scalars are too many for 32 bits, or there are too many groups.
void units(const std::vector<uint64_t>& seeds, Random& random) {
  for (int round = 0; round < 24; round += kFewCases ? 5 : 1) {
    const int64_t groups = round % 6 ? random.below(40) : 300, distinct = round % 2 ? 5 : 1 << 20;
    const bool long_rows = round % 8 == 5, long_group = round % 8 == 4 && groups > 3;
    Units units;
    for (int64_t g = 0; g < groups; g++) {
      units.counts.push_back(g == 3 && long_group ? 30000 : random.below(70));
      units.lengths.push_back(round % 3 || random.below(4) ? 1 + random.below(5000) : 0);
      if (long_rows && g == groups / 2) {
        units.counts.back() = 3;
        units.lengths.back() = int64_t(1) << 33;
      }
      for (int64_t i = 0; i < units.counts.back(); i++)
        units.scores.push_back(float(random.below(distinct)) * (round % 5 ? 0.37f : 0x1p-149f));
    }
    const int64_t count = int64_t(units.scores.size()), total = units.total();
    if (round % 8 == 7 && count) units.scores[size_t(random.below(count))] = std::numeric_limits<float>::quiet_NaN();
    if (round % 8 == 6 && count) units.scores[size_t(random.below(count))] = -std::numeric_limits<float>::infinity();
    std::vector<int64_t> budgets = {random.below(total + 1), total / 3, round % 2, total + round / 2 % 2};
    if (total) budgets.push_back(total - 1);
    if (kFewCases) budgets = {total / 3};
    for (int driver : kDrivers) {
      cuda_on_cpu::device.driver_version = driver;
      const bool fits = driver > kDrivers[0] || groups < cuda::Table<cuda::UnitsOfParam>::kEntries;
      if (driver == kDrivers[0] && groups < 300) continue;
      check_units(units, budgets, {seeds[size_t(round) % seeds.size()]}, "units, round " + std::to_string(round),
                  round % 3, fits && !long_group && !(long_rows && groups));
    }
  }
  // as in ResNet-18, and as many as one block can select; ties at the limits of words and warps
  for (int64_t each : {512, 1024, 1025}) {
    if (kFewCases && each != 512) continue;
    Units units;
    for (int g = 0; g < 28; g++) {
      units.counts.push_back(each);
      units.lengths.push_back(1 + g * 37);
    }
    for (int64_t i = 0; i < 28 * each; i++) units.scores.push_back(i % 11 ? 0.5f : float(random.below(1000)) + 1);
    check_units(units, {units.total() / 2}, {seeds.back()}, "many units", 1, each <= 1024);
  }
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast::test;
  using delfast::Criterion, delfast::Layout;
  const std::vector<uint64_t> list = seeds(argc, argv);
  Random random(6);
  const Params awkward = awkward_params(Criterion::weighted_grad, random);
  const int64_t n = elements(awkward);
  check(awkward, {n / 3}, list, "awkward", kFewCases ? Try::unsampled : Try::sampled);
  if (!kFewCases) {
    check(awkward, {1, n / 3, n + 5}, {list.back()}, "awkward");
  }
  for (Criterion criterion : kCriteria) {
    const Params many = many_params(criterion, random);
    const int64_t all = elements(many);
    check(many, {all / 3}, list, "300 parameters",
          kFewCases && criterion != Criterion::weighted_grad ? Try::sampled : Try::all);
    if (!kFewCases) check(many, {0, 1, all - 1, all, all + 1}, {list.back()}, "300 parameters", Try::sampled);
    if (!kFewCases) check(many, {0, all}, {list.back()}, "300 parameters");
  }
  check({}, {0, 7}, list, "no parameters");
  for (int round = kFewCases ? 5 : 0; round < 6; round++) {
    const Params params = several(round, random);
    const int64_t all = elements(params);
    check(params, {all / 3}, {list.back()}, "several", Try::sampled);
    if (!kFewCases) check(params, {5, all * 7 / 10}, {list.back()}, "several", Try::sampled);
  }
  for (Kind kind : kKinds)  // ties across tiles
    for (delfast::Dtype dtype : kDtypes) {
      if (kFewCases && kind != Kind::ties) continue;
      check(one({3, 9000, 1}, kind, random, dtype), {1, 8191, 8192, 20001}, {list.back()}, name(kind), Try::sampled);
      check(one({3, 9000, 1}, kind, random, dtype, 1), {1, 13000}, {list.back()}, name(kind), Try::sampled);
    }
  for (Layout layout : {Layout{5, 63, 9}, Layout{3, 2, 2}, Layout{2, 49, 49}, Layout{37, 1899, 9}})
    check(one(layout, Kind::few_values, random), {1, layout.numel() / 3}, list, "channels-last");
  lists_that_run_over({list.back()}, random);
  nonfinite(list, random);
  if (!kFewCases) launches(random);
  units(list, random);
  describe("sampled selections: ", narrow_ones, " by their candidates, ", wide_ones, " over all scores");
  CHECK(narrow_ones > (kFewCases ? 1 : 15) && wide_ones > (kFewCases ? 1 : 15));
  return report();
}
