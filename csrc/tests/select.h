// The k largest scores by the CPU kernels, and by a stable sort that defines them.
#pragma once

#include <limits>
#include <memory>

#include "delfast/radix.h"
#include "inputs.h"

namespace delfast::test {

using Bits = Guarded<uint8_t>;
using Params = std::vector<std::unique_ptr<Scores>>;

inline bool bit(const Bits& bits, int64_t i) { return bits[i / 8] >> i % 8 & 1; }
inline bool equal(const Bits& a, const Bits& b) {
  return a.size() == b.size() && std::equal(a.data(), a.data() + a.size(), b.data());
}

template <class F>  // F(param, begin, end)
void for_chunks(const Params& params, F f) {
  for (size_t p = 0; p < params.size(); p++)
    for (int64_t begin = 0, numel = params[p]->layout.numel(); begin < numel; begin += cpu::kChunk)
      f(p, begin, std::min(numel, begin + cpu::kChunk));
}

inline std::vector<std::unique_ptr<Bits>> empty_bits(const Params& params) {
  std::vector<std::unique_ptr<Bits>> bits;
  for (const auto& param : params) bits.push_back(std::make_unique<Bits>((param->layout.numel() + 7) / 8));
  return bits;
}

// The whole search over several parameters, one thread.
inline std::vector<std::unique_ptr<Bits>> select(cpu::Isa isa, const Params& params, int64_t k) {
  const cpu::SelectionKernels& kernels = cpu::selection(isa);
  const Criterion criterion = params[0]->criterion;
  cpu::RadixSearch search(k);
  bool everything = false;
  for (int pass = 0; pass < cpu::RadixSearch::kPasses && !everything; pass++) {
    std::vector<int64_t> counts(cpu::kRadixBins);
    for_chunks(params, [&](size_t p, int64_t begin, int64_t end) {
      kernels.histogram(params[p]->scored(), criterion, search.pass(), begin, end, counts.data());
    });
    everything = !search.descend(counts.data());
  }
  const uint32_t threshold = everything ? 0 : search.threshold();
  int64_t left = everything ? std::numeric_limits<int64_t>::max() : search.left();
  auto bits = empty_bits(params);
  for_chunks(params, [&](size_t p, int64_t begin, int64_t end) {
    const int64_t ties = kernels.mark(params[p]->scored(), criterion, threshold, begin, end, bits[p]->data());
    const int64_t keep = std::min(left, ties);
    kernels.clear_ties(params[p]->scored(), criterion, threshold, keep, begin, end, bits[p]->data());
    left -= keep;
  });
  return bits;
}

// All elements in falling order of scores, ties by (parameter, logical index).
inline std::vector<std::pair<size_t, int64_t>> ranking(const Params& params) {
  std::vector<std::pair<size_t, int64_t>> order;
  for (size_t p = 0; p < params.size(); p++)
    for (int64_t i = 0; i < params[p]->layout.numel(); i++) order.push_back({p, i});
  std::vector<std::vector<float>> scores(params.size());
  for (const auto& [p, i] : order) scores[p].push_back(params[p]->score(params[p]->layout.offset(i)));
  std::stable_sort(order.begin(), order.end(), [&](const auto& a, const auto& b) {
    return scores[a.first][size_t(a.second)] > scores[b.first][size_t(b.second)];
  });
  return order;
}

}  // namespace delfast::test
