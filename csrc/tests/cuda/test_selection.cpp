// Selection by the CUDA kernels, run on the CPU, against the CPU kernels: the same bits, for every schedule of threads
// and order of blocks. What the CPU kernels compute is checked in test_selection.cpp.
#include <limits>

#include "cases.h"

namespace delfast::test {
namespace {

struct Selected {
  std::vector<uint8_t> bits;
  int64_t nonfinite;
};

Selected select_by_cuda(const Params& params, Criterion criterion, int64_t k) {
  const std::vector<Scored> list = scored(params);
  const int64_t count = int64_t(list.size());
  int64_t bytes = 0;
  for (const Scored& p : list) bytes += (p.layout.numel() + 7) / 8;
  Bits bits(bytes);
  Guarded<int64_t> nonfinite(1);
  Workspace workspace(cuda::select_elements_workspace(list.data(), count));
  const char* error =
      cuda::select_elements(list.data(), count, criterion, k, bits.data(), nonfinite.data(), workspace.get(), kStream);
  CHECK(error == nullptr);
  return {{bits.begin(), bits.end()}, nonfinite[0]};
}

void check(const Params& params, const std::vector<int64_t>& budgets, const std::vector<uint64_t>& seeds,
           const std::string& what) {
  const Criterion criterion = params.empty() ? Criterion::weighted_grad : params[0]->criterion;
  for (int64_t k : budgets) {
    std::vector<uint8_t> expected;
    if (!params.empty())
      for (const auto& bits : select(cpu::Isa::scalar, params, k))
        expected.insert(expected.end(), bits->begin(), bits->end());
    for (uint64_t seed : seeds) {
      describe(what, ", ", name(criterion), ", k = ", k, ", seed ", seed);
      cuda_on_cpu::set_seed(seed);
      const Selected selected = select_by_cuda(params, criterion, k);
      CHECK(selected.bits == expected);
      CHECK_EQUAL(selected.nonfinite, int64_t(-1));
    }
  }
}

int64_t elements(const Params& params) {
  int64_t n = 0;
  for (const auto& p : params) n += p->layout.numel();
  return n;
}

Params one(Layout layout, Kind kind, Random& random, Dtype dtype = Dtype::float32, int64_t shift = 0) {
  Params params;
  params.push_back(std::make_unique<Scores>(layout, Criterion::weighted_grad, dtype, dtype, shift));
  params[0]->fill(kind, random);
  return params;
}

void nonfinite(const std::vector<uint64_t>& seeds, Random& random) {
  for (float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::quiet_NaN()}) {
    Params params = many_params(Criterion::weighted_grad, random);
    int64_t first = -1;
    for (size_t p = 100; p < params.size(); p += 57) {
      const int64_t numel = params[p]->layout.numel();
      if (!numel) continue;
      params[p]->theta.set(numel - 1, 1);
      params[p]->grad.set(numel - 1, bad);
      if (first < 0) first = int64_t(p);
    }
    for (uint64_t seed : seeds) {
      describe("not finite, seed ", seed);
      cuda_on_cpu::set_seed(seed);
      const Selected selected = select_by_cuda(params, Criterion::weighted_grad, 1000);
      CHECK_EQUAL(selected.nonfinite, first);
      CHECK(std::all_of(selected.bits.begin(), selected.bits.end(), [](uint8_t byte) { return byte == 0; }));
    }
  }
}

void units(const std::vector<uint64_t>& seeds, Random& random) {
  for (int round = 0; round < (kFewCases ? 4 : 24); round++) {
    const int64_t groups = round % 6 ? random.below(40) : 300, distinct = round % 2 ? 5 : 1 << 20;
    std::vector<int64_t> counts, lengths;
    std::vector<cpu::UnitGroup> given;
    int64_t total = 0, unit_count = 0, bytes = 0;
    for (int64_t g = 0; g < groups; g++) {
      counts.push_back(g == 3 && round % 4 == 0 ? 20000 : random.below(40));
      lengths.push_back(1 + random.below(5000));
      given.push_back({counts.back(), lengths.back()});
      total += counts.back() * lengths.back();
      unit_count += counts.back();
      bytes += (counts.back() + 7) / 8;
    }
    Guarded<float> scores(unit_count, round % 3);
    for (float& score : scores) score = float(random.below(distinct)) * 0.37f;
    if (round % 8 == 7 && unit_count) scores[random.below(unit_count)] = std::numeric_limits<float>::quiet_NaN();
    for (int64_t budget : {random.below(total + 1), total / 3, int64_t(0), int64_t(1), total}) {
      if (kFewCases && budget != total / 3) continue;
      Bits expected(bytes);
      const cpu::UnitSelection reference =
          cpu::select_units(scores.data(), given.data(), groups, budget, expected.data());
      for (uint64_t seed : seeds)
        for (bool cut_last : {false, true}) {
          describe("units, round ", round, ", ", unit_count, " in ", groups, " groups, budget ", budget, " of ", total,
                   ", seed ", seed);
          cuda_on_cpu::set_seed(seed);
          Bits bits(bytes);
          Guarded<int64_t> info(3);
          Workspace workspace(cuda::select_units_workspace(counts.data(), groups));
          const char* error = cuda::select_units(scores.data(), counts.data(), lengths.data(), groups, budget, cut_last,
                                                 bits.data(), info.data(), workspace.get(), kStream);
          CHECK(error == nullptr);
          CHECK_EQUAL(info[2], reference.nonfinite);
          CHECK(equal(bits, expected));
          CHECK_EQUAL(info[0], cut_last ? reference.cut_unit : -1);
          CHECK_EQUAL(info[1], cut_last && reference.cut_unit >= 0 ? reference.cut_size : 0);
        }
    }
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
  check(awkward, {n / 3}, list, "awkward");
  if (!kFewCases) {
    check(awkward, {1}, list, "awkward");
    check(awkward, {0, n - 1, n, n + 5}, {list.back()}, "awkward");
  }
  for (Criterion criterion : kCriteria) {
    const Params many = many_params(criterion, random);
    const int64_t all = elements(many);
    check(many, {all / 3}, list, "300 parameters");
    if (!kFewCases) check(many, {0, 1, all - 1, all, all + 1}, list, "300 parameters");
  }
  check({}, {0, 7}, list, "no parameters");
  for (Kind kind : kKinds)  // ties across tiles
    for (delfast::Dtype dtype : kDtypes) {
      if (kFewCases && kind != Kind::ties) continue;
      check(one({3, 9000, 1}, kind, random, dtype), {1, 8191, 8192, 20001}, {list.back()}, name(kind));
      check(one({3, 9000, 1}, kind, random, dtype, 1), {1, 13000}, {list.back()}, name(kind));
    }
  for (Layout layout : {Layout{5, 63, 9}, Layout{3, 2, 2}, Layout{2, 49, 49}, Layout{37, 1899, 9}})
    check(one(layout, Kind::few_values, random), {1, layout.numel() / 3}, list, "channels-last");
  nonfinite(list, random);
  units(list, random);
  return report();
}
