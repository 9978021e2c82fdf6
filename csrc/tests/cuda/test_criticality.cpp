// Channel scores by the CUDA kernels, run on the CPU, against the scalar CPU kernels: equal to the bit, for every
// schedule of threads and order of blocks. cpu/test_criticality.cpp checks the CPU kernels.
#include <limits>

#include "cases.h"
#include "cuda/criticality_plan.cuh"

namespace delfast::test {
namespace {

struct Question {
  Aggregate aggregate;
  const char* name;
};
constexpr Question kQuestions[] = {
    {Aggregate::topk_mean, "topk_mean"}, {Aggregate::mean, "mean"}, {Aggregate::sum, "sum"}, {Aggregate::max, "max"}};

std::vector<int64_t> some_tops(const Params& params) {
  std::vector<int64_t> tops;
  for (const auto& p : params) {
    const int64_t length = p->layout.length;
    const int64_t choices[] = {length / 10, length / 10, 1, length, length / 2, length - 1, 2};
    tops.push_back(std::clamp(choices[tops.size() % std::size(choices)], int64_t(1), length));
  }
  return tops;
}

// The CPU kernels do not support rows in pieces.
std::unique_ptr<Scores> contiguous_rows(const Scores& p) {
  auto copy = std::make_unique<Scores>(p);
  if (!p.piece) return copy;
  copy->piece = 0;
  for (int64_t i = 0; i < p.layout.numel(); i++) {
    const int64_t row = i / p.layout.length, e = i % p.layout.length;
    const int64_t from = (e / p.piece * p.layout.rows + row) * p.piece + e % p.piece;
    copy->theta.set_bits(i, p.theta.bits(from));
    copy->grad.set_bits(i, p.grad.bits(from));
  }
  return copy;
}

void check(const Params& params, const Question& question, const std::vector<uint64_t>& seeds, const std::string& what,
           const std::vector<int64_t>& tops) {
  const std::vector<Scored> list = scored(params);
  const int64_t count = int64_t(list.size());
  const Criterion criterion = params.empty() ? Criterion::weighted_grad : params[0]->criterion;
  std::vector<float> expected;
  for (int64_t p = 0; p < count; p++) {
    const int64_t rows = list[size_t(p)].layout.rows, first = int64_t(expected.size());
    expected.resize(size_t(first + rows));
    const std::unique_ptr<Scores> contiguous = contiguous_rows(*params[size_t(p)]);
    cpu::criticality(cpu::Isa::scalar)
        .score_rows(contiguous->scored(), criterion, question.aggregate, tops[size_t(p)], expected.data() + first, 0,
                    rows);
  }
  for (uint64_t seed : seeds) {
    cuda_on_cpu::set_seed(seed);
    Workspace workspace(cuda::criticality_workspace(list.data(), tops.data(), count, question.aggregate));
    Guarded<float> out(int64_t(expected.size()));
    const char* error = cuda::criticality(list.data(), tops.data(), count, criterion, question.aggregate, out.data(),
                                          workspace.get(), kStream);
    describe(what, ", ", name(criterion), ", ", question.name, ", seed ", seed);
    CHECK(error == nullptr);
    int64_t unit = 0;
    for (int64_t p = 0; p < count; p++)
      for (int64_t row = 0; row < list[size_t(p)].layout.rows; row++, unit++) {
        describe(what, ", ", name(criterion), ", ", question.name, " ", tops[size_t(p)], ", seed ", seed,
                 ", parameter ", p, ", row ", row, " of ", list[size_t(p)].layout.length, " elements, pieces of ",
                 list[size_t(p)].piece, ", ", name(list[size_t(p)].theta_dtype), " and ",
                 name(list[size_t(p)].grad_dtype));
        CHECK_SAME(out[unit], expected[size_t(unit)]);
      }
  }
}

void check(const Params& params, const Question& question, const std::vector<uint64_t>& seeds,
           const std::string& what) {
  check(params, question, seeds, what, some_tops(params));
}

// Every kind of values, in rows for each kernel that selects a top h, with every criterion.
void every_kind(const std::vector<uint64_t>& seeds, Random& random) {
  for (Criterion criterion : kCriteria)
    for (Dtype dtype : kDtypes) {
      if (kFewCases && (criterion != Criterion::weighted_grad || dtype != Dtype::float32)) continue;
      Params params;
      for (Kind kind : kKinds)
        for (int64_t length : {31, 1000, 4608, 16384, 20000, 70000}) {
          params.push_back(std::make_unique<Scores>(Layout{1, length, 1}, criterion, dtype, Dtype::float32, 1));
          params.back()->fill(kind, random);
        }
      for (const auto top :
           {+[](int64_t) -> int64_t { return 1; }, +[](int64_t) -> int64_t { return 2; },
            +[](int64_t n) { return n / 10; }, +[](int64_t n) { return n / 2; }, +[](int64_t n) { return n - 1; }}) {
        std::vector<int64_t> tops;
        for (const auto& p : params) tops.push_back(top(p->layout.length));
        check(params, kQuestions[0], {seeds.back()}, "every kind", tops);
        if (kFewCases) break;
      }
      for (const Question& question : kQuestions) check(params, question, {seeds.back()}, "every kind");
    }
}

void nonfinite(const std::vector<uint64_t>& seeds, Random& random) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  Params params;
  for (float bad : {infinity, nan, -infinity, -nan})
    for (int64_t length : {1, 33, 1500, 17000}) {
      params.push_back(
          std::make_unique<Scores>(Layout{2, length, 1}, Criterion::weighted_grad, Dtype::float32, Dtype::bfloat16));
      params.back()->fill(Kind::ordinary, random);
      params.back()->grad.set(random.below(2 * length), bad);
    }
  for (const Question& question : kQuestions) check(params, question, seeds, "not finite");
}

uint64_t launches(const Params& params, const Question& question, int driver) {
  cuda_on_cpu::device.driver_version = driver;
  const uint64_t before = cuda_on_cpu::device.launches;
  check(params, question, {0}, "launches, driver " + std::to_string(driver));
  cuda_on_cpu::device.driver_version = kDrivers[1];
  return cuda_on_cpu::device.launches - before;
}

void launch_counts(Random& random) {
  Params params;
  const auto add = [&](int64_t rows, int64_t length) {
    params.push_back(
        std::make_unique<Scores>(Layout{rows, length, 1}, Criterion::weighted_grad, Dtype::float32, Dtype::float32));
    params.back()->fill(Kind::ordinary, random);
  };
  for (int i = 0; i < 300; i++) add(1 + i % 3, i % 4 ? 1 + i % 90 : 1);
  for (int64_t length : {2048, 2049, 16384}) add(2, length);
  constexpr int kEntries = cuda::Table<cuda::Rows>::kEntries;
  for (const Question& question : kQuestions) {
    const bool whole = question.aggregate == Aggregate::mean || question.aggregate == Aggregate::sum;
    describe(question.name);
    if (kFewCases && question.aggregate != Aggregate::topk_mean) continue;
    CHECK_EQUAL(launches(params, question, kDrivers[1]), uint64_t(1));
    CHECK_EQUAL(launches(params, question, kDrivers[0]), uint64_t(cuda::ceil_div(303, kEntries)));
    Params more;
    for (int64_t length : {16385, 40000}) {
      add(2, length);
      more.push_back(std::move(params.back()));
      params.pop_back();
    }
    for (auto& param : more) params.push_back(std::move(param));
    describe(question.name, ", with long rows");
    CHECK_EQUAL(launches(params, question, kDrivers[1]),
                uint64_t(whole || question.aggregate == Aggregate::max ? 2 : 3));
    params.resize(303);
  }
  for (int64_t pieces : {1, 200}) {  // only rows in pieces, and together with contiguous rows
    Params some;
    for (int64_t i = 0; i < pieces; i++) {
      some.push_back(std::make_unique<Scores>(Layout{4, 6, 1}, Criterion::weight, Dtype::float32, Dtype::float32));
      some.back()->piece = 2;
      some.back()->fill(Kind::ordinary, random);
    }
    describe(pieces, " of rows in pieces");
    CHECK_EQUAL(launches(some, kQuestions[0], kDrivers[1]), uint64_t(1));
    CHECK_EQUAL(launches(some, kQuestions[0], kDrivers[0]), uint64_t(cuda::ceil_div(pieces, kEntries)));
    some.push_back(std::make_unique<Scores>(Layout{4, 6, 1}, Criterion::weight, Dtype::float32, Dtype::float32));
    some.back()->fill(Kind::ordinary, random);
    CHECK_EQUAL(launches(some, kQuestions[1], kDrivers[1]), uint64_t(2));
  }
}

void refusal() {
  Scored p;
  p.layout = {2, kMaxRowInPieces + 2, 1};
  p.piece = 2;
  const int64_t top = 1;
  const char* error = cuda::criticality(&p, &top, 1, Criterion::weight, Aggregate::max, nullptr, nullptr, kStream);
  CHECK(error && std::string(error).rfind("expected rows in pieces of at most 16384 elements", 0) == 0);
}

// Rows in pieces. For every piece a few lengths: those of a warp, of a block and the longest, some aligned to packs and
// some not. A few contiguous and empty rows are among them.
void in_pieces(const std::vector<uint64_t>& seeds, Random& random) {
  struct Shape {
    int64_t rows, piece, inputs;
  };
  const Shape shapes[] = {{3, 1, 2},    {16, 1, 97},  {33, 1, 512}, {12, 1, 1000}, {9, 1, 2049},  {5, 1, 16384},
                          {3, 4, 2},    {16, 4, 3},   {33, 4, 130}, {8, 4, 600},   {3, 9, 2},     {16, 9, 57},
                          {33, 9, 58},  {4, 9, 250},  {3, 16, 3},   {33, 16, 32},  {20, 16, 129}, {6, 16, 512},
                          {2, 300, 50}, {3, 513, 3},  {17, 40, 26}, {5, 64, 9},    {7, 65, 9},    {9, 72, 40},
                          {100, 1, 31}, {2, 8192, 2}, {16, 1, 700}};
  for (Criterion criterion : kCriteria) {
    if (kFewCases && criterion != Criterion::weighted_grad) continue;
    Params params;
    const auto add = [&](const Layout& layout, int64_t piece) {
      const int64_t n = int64_t(params.size()) + int64_t(criterion);
      params.push_back(std::make_unique<Scores>(layout, criterion, random.dtype(), random.dtype(), n % 3 ? 0 : n % 5,
                                                n % 7 ? 0 : 3));
      params.back()->piece = piece;
      params.back()->fill(kKinds[n % int64_t(std::size(kKinds))], random);
    };
    for (const Shape& s : shapes) {
      if (kFewCases && s.rows * s.piece * s.inputs > 30000) continue;
      add({s.rows, s.piece * s.inputs, 1}, s.piece);
      if (random.below(3) == 0) add({random.below(4), 1 + random.below(99), 1}, 0);
    }
    for (const Question& question : kQuestions) check(params, question, seeds, "in pieces");
    for (int turn = 0; turn < 3 && !kFewCases; turn++) {  // other tops, kinds and alignments
      std::rotate(params.begin(), params.begin() + 5, params.end());
      for (auto& param : params) param->fill(kKinds[random.below(int64_t(std::size(kKinds)))], random);
      check(params, kQuestions[0], {seeds.back()}, "in pieces");
    }
    for (float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::quiet_NaN()}) {
      for (auto& param : params)
        if (param->piece) param->theta.set(random.below(param->theta.size()), bad);
      for (const Question& question : kQuestions) check(params, question, {seeds.back()}, "in pieces, not finite");
    }
  }
}

// The ways in which the search for a row's top h can end.
enum class End { tie, list, whole_row };

// Scores one long row, which check() has compared with the CPU's result, and reads the counts from the workspace.
End end_of_search(const Params& params, int64_t top, uint64_t seed) {
  const std::vector<Scored> list = scored(params);
  cuda_on_cpu::set_seed(seed);
  Workspace workspace(cuda::criticality_workspace(list.data(), &top, 1, Aggregate::topk_mean));
  Guarded<float> out(1);
  CHECK(!cuda::criticality(list.data(), &top, 1, params[0]->criterion, Aggregate::topk_mean, out.data(),
                           workspace.get(), kStream));
  const cuda::LongState& state = *static_cast<const cuda::LongState*>(workspace.get());
  const int64_t length = list[0].layout.length, from_hi = int64_t(state.above) + state.at_hi;
  const int64_t from_lo = from_hi + state.inside + state.at_lo;
  CHECK(from_lo <= length);
  if (top <= state.above || top > from_lo) return End::whole_row;
  if (top <= from_hi || top > from_hi + state.inside) return End::tie;
  return state.inside <= cuda::long_capacity(uint32_t(length), uint32_t(top)) ? End::list : End::whole_row;
}

// The possible results of a bracket: with independent scores and with ties the search ends without a second reading of
// the row; with a biased sample it ends with the right result.
void brackets(const std::vector<uint64_t>& seeds, Random& random) {
  const auto row = [](int64_t length, auto value) {
    Params params;
    params.push_back(std::make_unique<Scores>(Layout{1, length, 1}, Criterion::weight, Dtype::float32, Dtype::float32));
    for (int64_t i = 0; i < length; i++) params[0]->theta.set(i, value(i));
    return params;
  };
  int cases = 0;
  const auto expect = [&](const char* what, const Params& params, int64_t top, End end) {
    if (kFewCases && cases++ % 4) return;
    const int64_t length = params[0]->layout.length;
    check(params, kQuestions[0], {seeds.back()}, what, {top});
    describe(what, ", the top ", top, " of ", length);
    CHECK_EQUAL(int(end_of_search(params, top, seeds.back())), int(end));
  };
  const int64_t length = kFewCases ? 20000 : 40000;
  const auto ordinary = row(length, [&](int64_t) { return random.value(); });
  for (int64_t top : {int64_t(2), int64_t(50), length / 10, length / 2, length - 1000, length - 1})
    expect("independent", ordinary, top, End::list);
  const auto equal = row(length, [](int64_t) { return 0.5f; });
  for (int64_t top : {int64_t(2), length / 10, length - 1}) expect("equal", equal, top, End::tie);
  // nine in ten are zero: the top tenth ends near the first zero
  const auto zeros = row(length, [&](int64_t) { return random.below(10) ? 0.0f : 1 + random.unit(); });
  expect("mostly zero", zeros, length * 3 / 40, End::list);
  for (int64_t top : {length / 9, length / 8, length - 1}) expect("mostly zero", zeros, top, End::tie);
  for (int64_t top : {38, 39, 40, 41, 42})
    check(zeros, kQuestions[0], {seeds.back()}, "mostly zero", {top * length / 400});
  const auto two = row(length, [&](int64_t) { return random.below(2) ? 0.5f : 0.25f; });
  for (int64_t top : {length / 4, length * 3 / 4}) expect("two values", two, top, End::tie);

  // the list holds a single score between the ends of the bracket, all of it among the top or not
  const uint32_t least = 0x3f2048cd;
  const auto neighbours =
      row(131072, [&](int64_t i) { return bits_float(i < 1024 ? least + 1 + uint32_t(random.below(2)) : least); });
  for (int64_t top : {1023, 1024}) expect("three neighbours", neighbours, top, End::list);

  // only where the sample reads, the scores are larger, smaller, or rarely in the middle
  std::vector<int> sampled(static_cast<size_t>(length));
  const int runs = cuda::sample_runs(uint32_t(length));
  for (int u = 0; u < runs; u++)
    for (int j = 0; j < 4; j++) sampled[4 * cuda::sampled_pack(uint32_t(length), runs, u) + size_t(j)] = 1;
  const auto larger = row(length, [&](int64_t i) { return float(sampled[size_t(i)]) + random.unit(); });
  expect("a sample of large scores", larger, length / 10, End::whole_row);
  const auto smaller = row(length, [&](int64_t i) { return random.unit() * (sampled[size_t(i)] ? 0.01f : 1.0f); });
  expect("a sample of small scores", smaller, length / 10, End::whole_row);
  const auto gap = row(length, [&](int64_t i) {
    if (!sampled[size_t(i)]) return 2 + random.unit();
    return random.below(10) ? random.unit() : 4 + random.unit();
  });
  expect("a sample without the middle", gap, length / 10, End::whole_row);
}

// Sums of long rows in double: some depend on the order, some do not.
void long_sums(const std::vector<uint64_t>& seeds, Random& random) {
  for (int64_t length : {16385, 50003}) {
    if (kFewCases && length > 20000) continue;
    Params params;
    params.push_back(
        std::make_unique<Scores>(Layout{2, length, 1}, Criterion::weight, Dtype::float32, Dtype::float32, 3));
    for (int spread : {1, 10, 60}) {
      if (kFewCases && spread == 10) continue;
      for (int64_t i = 0; i < params[0]->theta.size(); i++)
        params[0]->theta.set(i, std::ldexp(random.unit(), int(random.below(2 * spread)) - spread));
      for (const Question& question : kQuestions)
        check(params, question, seeds, "spread over 2^" + std::to_string(2 * spread));
    }
  }
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast::test;
  using delfast::Criterion;
  const std::vector<uint64_t> list = seeds(argc, argv);
  Random random(5);
  const Params awkward = awkward_params(Criterion::weighted_grad, random);
  for (const Question& question : kQuestions) check(awkward, question, list, "awkward");
  for (Criterion criterion : kCriteria) {
    const Params many = many_params(criterion, random);
    for (int driver : kDrivers) {
      if (kFewCases && driver == kDrivers[0]) continue;  // launch_counts() tests both drivers
      cuda_on_cpu::device.driver_version = driver;
      for (const Question& question : kQuestions) check(many, question, list, "300 parameters");
    }
  }
  check({}, kQuestions[0], list, "no parameters");
  in_pieces(list, random);
  refusal();
  launch_counts(random);
  brackets(list, random);
  long_sums(list, random);
  every_kind(list, random);
  nonfinite(list, random);
  return report();
}
