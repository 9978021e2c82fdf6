// Channel scores by the CUDA kernels, run on the CPU, against the scalar CPU kernels: equal to the bit, for every
// schedule of threads and order of blocks. What the CPU kernels compute is checked in test_criticality.cpp.
#include <limits>

#include "cases.h"

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

void check(const Params& params, const Question& question, const std::vector<uint64_t>& seeds, const std::string& what,
           const std::vector<int64_t>& tops) {
  const std::vector<Scored> list = scored(params);
  const int64_t count = int64_t(list.size());
  const Criterion criterion = params.empty() ? Criterion::weighted_grad : params[0]->criterion;
  std::vector<float> expected;
  for (int64_t p = 0; p < count; p++) {
    const int64_t rows = list[size_t(p)].layout.rows, first = int64_t(expected.size());
    expected.resize(size_t(first + rows));
    cpu::criticality(cpu::Isa::scalar)
        .score_rows(list[size_t(p)], criterion, question.aggregate, tops[size_t(p)], expected.data() + first, 0, rows);
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
                 ", parameter ", p, ", row ", row, " of ", list[size_t(p)].layout.length, " elements, ",
                 name(list[size_t(p)].theta_dtype), " and ", name(list[size_t(p)].grad_dtype));
        CHECK_SAME(out[unit], expected[size_t(unit)]);
      }
  }
}

void check(const Params& params, const Question& question, const std::vector<uint64_t>& seeds,
           const std::string& what) {
  check(params, question, seeds, what, some_tops(params));
}

// Every kind of values in rows for each kernel that selects a top h, by every criterion.
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
    for (const Question& question : kQuestions) check(many, question, list, "300 parameters");
  }
  check({}, kQuestions[0], list, "no parameters");
  every_kind(list, random);
  nonfinite(list, random);
  return report();
}
