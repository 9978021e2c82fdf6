// The k largest scores: single kernels against counting, the radix search against a stable sort, and the selection of
// units against the definition of the longest prefix.
#include <numeric>

#include "select.h"

namespace delfast::test {
namespace {

void check_selection(cpu::Isa isa, const Params& params, const std::string& what) {
  const auto order = ranking(params);
  const int64_t n = int64_t(order.size());
  for (int64_t k : {int64_t(0), int64_t(1), n / 2, n - 1, n, n + 5}) {
    describe(what, ", ", name(params[0]->criterion), ", theta ", name(params[0]->theta.dtype()), ", grad ",
             name(params[0]->grad.dtype()), ", ", n, " elements in ", params.size(), " parameters, k = ", k);
    auto expected = empty_bits(params);
    for (auto& bits : expected) std::fill(bits->begin(), bits->end(), uint8_t(0));
    for (int64_t r = 0; r < std::min(k, n); r++) {
      const auto& [p, i] = order[size_t(r)];
      (*expected[p])[i / 8] |= uint8_t(1u << i % 8);
    }
    const auto selected = select(isa, params, k);
    for (size_t p = 0; p < params.size(); p++) CHECK(equal(*selected[p], *expected[p]));
  }
}

Params one(Layout layout, Criterion criterion, Dtype theta, Dtype grad, Kind kind, Random& random, int64_t shift = 0) {
  Params params;
  params.push_back(std::make_unique<Scores>(layout, criterion, theta, grad, shift));
  params[0]->fill(kind, random);
  return params;
}

void elements(cpu::Isa isa, Random& random) {
  for (int64_t size : {1, 15, 16, 17, 1000})
    for (Dtype theta : kDtypes)
      for (Dtype grad : kDtypes)
        for (Criterion criterion : kCriteria)
          for (Kind kind : kKinds)
            check_selection(isa, one({size, 1, 1}, criterion, theta, grad, kind, random, size % 3), name(kind));
  for (int64_t size : {65535, 65536, 65537, 140000})
    for (Kind kind : kKinds) {
      const Dtype dtype = random.dtype();
      check_selection(isa, one({size, 1, 1}, Criterion::weighted_grad, dtype, Dtype::float32, kind, random),
                      name(kind));
    }
  for (Kind kind : kKinds) {  // ties between parameters, an empty parameter, unlike dtypes
    Params params;
    for (int64_t rows : {3, 0, 700, 1})
      for (Dtype theta : kDtypes) {
        params.push_back(
            std::make_unique<Scores>(Layout{rows, 29, 1}, Criterion::weighted_grad, theta, Dtype::float32));
        params.back()->fill(kind, random);
      }
    check_selection(isa, params, name(kind));
  }
}

// The same logical tensor, contiguous and channels-last, must give the same bits.
void channels_last(cpu::Isa isa, Random& random) {
  for (Layout layout : {Layout{5, 63, 9}, Layout{3, 2, 2}, Layout{2, 49, 49}, Layout{37, 1899, 9}})
    for (Criterion criterion : kCriteria)
      for (Dtype theta : kDtypes)
        for (Dtype grad : kDtypes) {
          if (layout.numel() > 1000 && (theta != grad || criterion != Criterion::weighted_grad)) continue;
          Params apart = one(layout, criterion, theta, grad, Kind::few_values, random);
          Params contiguous = one({layout.rows, layout.length, 1}, criterion, theta, grad, Kind::zeros, random);
          const int64_t channels = layout.length / layout.spatial;
          for (int64_t row = 0; row < layout.rows; row++)
            for (int64_t c = 0; c < channels; c++)
              for (int64_t s = 0; s < layout.spatial; s++) {
                const int64_t logical = row * layout.length + c * layout.spatial + s;
                const int64_t memory = row * layout.length + s * channels + c;
                contiguous[0]->theta.set_bits(logical, apart[0]->theta.bits(memory));
                contiguous[0]->grad.set_bits(logical, apart[0]->grad.bits(memory));
              }
          for (int64_t k : {int64_t(0), int64_t(1), layout.numel() / 3, layout.numel()}) {
            describe("channels-last, spatial ", layout.spatial, ", ", name(criterion), ", k = ", k);
            CHECK(equal(*select(isa, apart, k)[0], *select(isa, contiguous, k)[0]));
          }
          check_selection(isa, apart, "channels-last");
        }
}

// Each kernel alone: odd ranges, digits and thresholds that the search would not select.
void kernels_alone(cpu::Isa isa, Random& random) {
  const cpu::SelectionKernels& kernels = cpu::selection(isa);
  const int64_t size = cpu::kChunk + 531;
  for (Kind kind : {Kind::ordinary, Kind::few_values, Kind::denormal}) {
    const Params params = one({size, 1, 1}, Criterion::weighted_grad, Dtype::float32, Dtype::bfloat16, kind, random);
    const Scores& scores = *params[0];
    const auto score_bits = [&](int64_t i) { return float_bits(scores.score(i)); };

    for (int64_t begin : {int64_t(0), int64_t(7), size - cpu::kRadixBins, size - cpu::kRadixBins + 1, size - 5}) {
      const uint32_t seen = score_bits(begin);  // a prefix that occurs
      for (cpu::RadixPass pass : {cpu::RadixPass{20, 11, 0}, {10, 10, seen >> 20}, {0, 10, seen >> 10}, {0, 10, 1}}) {
        describe("histogram, ", name(kind), ", from ", begin, ", shift ", pass.shift);
        Guarded<int64_t> counts(cpu::kRadixBins);
        std::vector<int64_t> expected(cpu::kRadixBins, 1000);  // counts are added to the values before
        std::fill(counts.begin(), counts.end(), 1000);
        for (int64_t i = begin; i < size; i++)
          if (score_bits(i) >> (pass.shift + pass.width) == pass.prefix)
            expected[score_bits(i) >> pass.shift & ((1u << pass.width) - 1)]++;
        kernels.histogram(scores.scored(), Criterion::weighted_grad, pass, begin, size, counts.data());
        CHECK(std::equal(expected.begin(), expected.end(), counts.data()));
      }
    }

    for (uint32_t threshold : {0u, 1u, score_bits(3), score_bits(size - 1), 0x7f7fffffu}) {
      describe("mark and clear_ties, ", name(kind), ", threshold 0x", std::hex, threshold);
      Bits bits((size + 7) / 8);
      std::fill(bits.begin(), bits.end(), uint8_t(0x5a));
      int64_t ties = 0, wrong = 0;
      const int64_t marked =
          kernels.mark(scores.scored(), Criterion::weighted_grad, threshold, cpu::kChunk, size, bits.data());
      for (int64_t i = cpu::kChunk; i < size; i++) {
        ties += score_bits(i) == threshold;
        wrong += bit(bits, i) != (score_bits(i) >= threshold);
      }
      CHECK_EQUAL(marked, ties);
      CHECK_EQUAL(wrong, 0);
      CHECK(std::all_of(bits.data(), bits.data() + cpu::kChunk / 8, [](uint8_t byte) { return byte == 0x5a; }));

      const int64_t keep = ties / 2;
      kernels.clear_ties(scores.scored(), Criterion::weighted_grad, threshold, keep, cpu::kChunk, size, bits.data());
      for (int64_t i = cpu::kChunk, met = 0; i < size; i++) {
        const bool tie = score_bits(i) == threshold;
        met += tie;
        wrong += bit(bits, i) != (tie ? met <= keep : score_bits(i) > threshold);
      }
      CHECK_EQUAL(wrong, 0);
    }
  }
}

void check_units(const std::vector<float>& scores, const std::vector<cpu::UnitGroup>& groups, int64_t budget) {
  Guarded<float> given_scores(int64_t(scores.size()));
  Guarded<cpu::UnitGroup> given_groups(int64_t(groups.size()));
  std::copy(scores.begin(), scores.end(), given_scores.begin());
  std::copy(groups.begin(), groups.end(), given_groups.begin());
  std::vector<int64_t> sizes, places;  // size of each unit, and number of its bit
  int64_t bytes = 0;
  for (const cpu::UnitGroup& group : groups) {
    for (int64_t i = 0; i < group.count; i++) {
      sizes.push_back(group.length);
      places.push_back(8 * bytes + i);
    }
    bytes += (group.count + 7) / 8;
  }
  Bits bits(bytes), uncut_bits(bytes);
  const auto select = [&](bool cut_last, Bits& into) {
    return cpu::select_units(given_scores.data(), given_groups.data(), int64_t(groups.size()), budget, cut_last,
                             into.data());
  };
  const UnitsInfo selection = select(true, bits), uncut = select(false, uncut_bits);

  const auto bad = std::find_if(scores.begin(), scores.end(), [](float x) { return !std::isfinite(x); });
  CHECK_EQUAL(selection.nonfinite, bad == scores.end() ? int64_t(-1) : int64_t(bad - scores.begin()));
  if (bad != scores.end()) return;

  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  std::vector<bool> expected(size_t(8 * bytes));
  int64_t left = budget, cut_unit = -1, selected = 0, positive = 0;
  for (size_t unit : order) {
    if (sizes[unit] > left) {
      if (left > 0) cut_unit = int64_t(unit);
      break;
    }
    expected[size_t(places[unit])] = true;
    left -= sizes[unit];
    selected++;
    positive += std::fabs(scores[unit]) > 0;
  }
  CHECK_EQUAL(selection.cut_unit, cut_unit);
  CHECK_EQUAL(selection.cut_size, cut_unit < 0 ? int64_t(0) : left);
  CHECK_EQUAL(selection.selected, selected);
  CHECK_EQUAL(selection.positive, positive + (cut_unit >= 0 && std::fabs(scores[size_t(cut_unit)]) > 0));
  for (int64_t i = 0; i < bits.size() * 8; i++) CHECK_EQUAL(bit(bits, i), bool(expected[size_t(i)]));
  CHECK(equal(bits, uncut_bits));
  CHECK_EQUAL(uncut.cut_unit, int64_t(-1));
  CHECK_EQUAL(uncut.cut_size, int64_t(0));
  CHECK_EQUAL(uncut.selected, selected);
  CHECK_EQUAL(uncut.positive, positive);
}

void units(Random& random) {
  for (int round = 0; round < 3000; round++) {
    const int64_t count = random.below(round % 100 ? 40 : 3000), distinct = 1 + random.below(round % 2 ? 5 : 1 << 20);
    std::vector<float> scores;
    std::vector<cpu::UnitGroup> groups;
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
      const float score = float(random.below(distinct)) * (round % 3 ? 0.37f : 0x1p-149f);
      scores.push_back(score == 0 && random.below(2) ? -0.0f : score);
      if (groups.empty() || random.below(10) == 0)  // some without units
        groups.push_back({0, round % 5 ? 1 + random.below(20) : random.below(3)});
      groups.back().count++;
      total += groups.back().length;
    }
    const float spoilers[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()};
    if (round % 10 == 0 && count) scores[size_t(random.below(count))] = spoilers[random.below(2)];
    for (int64_t budget : {int64_t(0), int64_t(1), random.below(total + 1), total - 1, total, total + 1}) {
      describe("select_units, round ", round, ", ", count, " units, budget ", budget, " of ", total);
      if (budget >= 0) check_units(scores, groups, budget);
    }
  }
}

}  // namespace
}  // namespace delfast::test

int main(int argc, char** argv) {
  using namespace delfast::test;
  const delfast::cpu::Isa isa = isa_argument(argc, argv);
  Random random(3);
  elements(isa, random);
  channels_last(isa, random);
  kernels_alone(isa, random);
  units(random);
  return report();
}
