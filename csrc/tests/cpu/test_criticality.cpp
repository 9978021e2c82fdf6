// Channel scores against a float64 reference that sorts, and bit for bit against the scalar kernels.
//
// The bound. With u = 2^-24, a float32 operation errs by at most u relative to its result, plus, for a product that
// underflows, 2^-150 (half a denormal's spacing); sums of denormals are exact.
// - A score is one product: u, and 2^-150. Changing every score by a factor within 1 +- u and a term within 2^-150
//   changes the sum of the h largest as much as it would change the sum of the same h scores, whichever are then the
//   largest.
// - One of 16 lanes adds kBlock / 16 = 32 non-negative scores, the first to zero: 31 roundings, 31 u.
// - The remaining additions are in double: 2^-53 for each, and at most 2^-30 u in total for the lengths here.
// - The result is rounded to float32: u, and 2^-150 if it is denormal.
// Together 33 u, up to products of these terms, and 2^-150 for the score (a mean) or each score (a sum) and the result.
// A maximum is rounded once, and rounding is monotone: it is exact.

#include <functional>
#include <limits>

#include "inputs.h"

namespace delfast::test {
namespace {

constexpr double kRelative = 33.01 * 0x1p-24;

struct Question {
  Aggregate aggregate;
  int64_t top;
  const char* name;
};

std::vector<Question> questions(int64_t length) {
  std::vector<Question> list = {{Aggregate::mean, 1, "mean"}, {Aggregate::sum, 1, "sum"}, {Aggregate::max, 1, "max"}};
  std::vector<int64_t> tops;
  for (int64_t top : {int64_t(1), int64_t(2), length / 10, length / 2, length - 1, length})
    if (top >= 1 && top <= length && std::find(tops.begin(), tops.end(), top) == tops.end()) tops.push_back(top);
  for (int64_t top : tops) list.push_back({Aggregate::topk_mean, top, "topk_mean"});
  return list;
}

// `falling`: the exact scores of one row, in falling order.
void check_score(float actual, const std::vector<double>& falling, const Question& question) {
  if (std::isnan(falling[0])) {
    CHECK(std::isnan(actual));
    return;
  }
  const bool of_all = question.aggregate != Aggregate::topk_mean;
  const size_t counted = of_all ? falling.size() : size_t(question.top);
  double sum = 0;
  for (size_t i = 0; i < counted; i++) sum += falling[i];
  if (std::isinf(sum) || counted == 1 || question.aggregate == Aggregate::max)
    CHECK_SAME(actual, float(falling[0]));
  else if (question.aggregate == Aggregate::sum)
    CHECK_NEAR(actual, sum, kRelative * sum + double(counted + 1) * 0x1p-150);
  else
    CHECK_NEAR(actual, sum / double(counted), kRelative * sum / double(counted) + 2 * 0x1p-150);
}

// A NaN is sorted before every number, because every aggregate of it is NaN.
std::vector<double> falling_scores(const Scores& scores, int64_t row) {
  std::vector<double> falling;
  for (int64_t i = 0; i < scores.layout.length; i++) falling.push_back(scores.exact(row * scores.layout.length + i));
  std::sort(falling.begin(), falling.end(), [](double a, double b) { return std::isnan(a) ? !std::isnan(b) : a > b; });
  return falling;
}

void check_all(cpu::Isa isa, const Scores& scores, const std::string& what, Random& random) {
  const auto score_rows = cpu::criticality(isa).score_rows;
  const auto score_rows_scalar = cpu::criticality(cpu::Isa::scalar).score_rows;
  const int64_t rows = scores.layout.rows, length = scores.layout.length;
  std::vector<std::vector<double>> falling;
  for (int64_t row = 0; row < rows; row++) falling.push_back(falling_scores(scores, row));
  for (const Question& question : questions(length)) {
    describe(what, ", theta ", name(scores.theta.dtype()), ", grad ", name(scores.grad.dtype()), ", ",
             name(scores.criterion), ", ", rows, " rows of ", length, ", ", question.name, " ", question.top);
    Guarded<float> whole(rows), split(rows), scalar(rows);
    const auto run = [&](auto kernel, Guarded<float>& out, int64_t begin, int64_t end) {
      kernel(scores.scored(), scores.criterion, question.aggregate, question.top, out.data(), begin, end);
    };
    run(score_rows, whole, 0, rows);
    run(score_rows_scalar, scalar, 0, rows);
    const int64_t cut = random.below(rows + 1), second_cut = cut + random.below(rows - cut + 1);
    run(score_rows, split, second_cut, rows);
    run(score_rows, split, 0, cut);
    run(score_rows, split, cut, second_cut);
    for (int64_t row = 0; row < rows; row++) {
      check_score(whole[row], falling[size_t(row)], question);
      CHECK_SAME(split[row], whole[row]);
      CHECK_SAME(scalar[row], whole[row]);
    }
  }
}

constexpr int64_t kLengths[] = {1,   2,   15,  16,   17,   31,    32,    33,    64,    65,   127,
                                511, 512, 513, 1000, 4608, 16383, 16384, 16385, 20000, 70000};

int64_t rows_of(int64_t length) { return length == 1 ? 37 : length < 1000 ? 5 : length < 10000 ? 3 : 2; }

// A criterion that does not read one of the two is tested with a single dtype for it.
bool distinct(Criterion criterion, Dtype theta, Dtype grad) {
  return (criterion != Criterion::grad || theta == Dtype::float32) &&
         (criterion != Criterion::weight || grad == Dtype::float32);
}

void ordinary_rows(cpu::Isa isa, Random& random) {
  for (int64_t length : kLengths)
    for (Dtype theta : kDtypes)
      for (Dtype grad : kDtypes)
        for (Criterion criterion : kCriteria) {
          if (!distinct(criterion, theta, grad)) continue;
          // the longest rows once, in the dtypes of a mixed-precision model
          if (length > 16385 && (theta != Dtype::bfloat16 || criterion != Criterion::weighted_grad)) continue;
          for (int64_t shift : {0, 1}) {  // another alignment
            if (shift && length > 1000) continue;
            Scores scores({rows_of(length), length, 1}, criterion, theta, grad, shift);
            scores.fill(Kind::ordinary, random);
            check_all(isa, scores, "ordinary", random);
          }
        }
}

constexpr int64_t kAwkwardLengths[] = {1, 2, 15, 17, 33, 513, 1000, 16384, 16385};

void awkward_rows(cpu::Isa isa, Random& random) {
  for (Kind kind : kKinds)
    for (int64_t length : kAwkwardLengths)
      for (Dtype dtype : kDtypes)
        for (Criterion criterion : kCriteria) {
          if (kind == Kind::ordinary || (criterion != Criterion::weighted_grad && length > 1000)) continue;
          Scores scores({rows_of(length), length, 1}, criterion, dtype, dtype);
          scores.fill(kind, random);
          check_all(isa, scores, name(kind), random);
        }
}

void nonfinite_rows(cpu::Isa isa, Random& random) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t length : kAwkwardLengths)
    for (Dtype dtype : kDtypes) {
      if (length > 16384 && dtype != Dtype::float32) continue;
      const auto check = [&](const char* what, const std::function<void(Scores&, int64_t)>& spoil) {
        Scores scores({rows_of(length), length, 1}, Criterion::weighted_grad, dtype, dtype);
        scores.fill(Kind::ordinary, random);
        spoil(scores, random.below(scores.layout.numel()));  // one element: the other rows do not change
        check_all(isa, scores, what, random);
      };
      check("NaN in theta", [&](Scores& s, int64_t i) { s.theta.set(i, nan); });
      check("-NaN in the gradient", [&](Scores& s, int64_t i) { s.grad.set(i, -nan); });
      check("-infinity in the gradient", [&](Scores& s, int64_t i) { s.grad.set(i, -infinity), s.theta.set(i, 0.5f); });
      check("0 times infinity", [&](Scores& s, int64_t i) { s.grad.set(i, infinity), s.theta.set(i, 0.0f); });
      check("infinity and NaN", [&](Scores& s, int64_t i) {
        s.grad.set(i, infinity), s.theta.set(i, 1.0f), s.theta.set(i / length * length, nan);
      });
    }
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast::test;
  const delfast::cpu::Isa isa = isa_argument(argc, argv);
  Random random(2);
  ordinary_rows(isa, random);
  awkward_rows(isa, random);
  nonfinite_rows(isa, random);
  return report();
}
