// delfast::select_elements and delfast::select_units on the CPU.
#include <algorithm>

#include "bindings/checks.h"
#include "bindings/ops.h"
#include "bindings/threads.h"
#include "delfast/radix.h"

namespace delfast::bindings {

namespace {

struct ElementTask {
  size_t param;
  int64_t begin, end;  // elements
  int64_t work;
  int64_t ties = 0;  // number of scores equal to the threshold, after mark
};

struct ElementTasks {
  explicit ElementTasks(const std::vector<Scored>& params) {
    for (size_t p = 0; p < params.size(); p++) {
      const int64_t numel = params[p].layout.numel();
      elements += numel;
      for (int64_t i = 0; i < numel; i += cpu::kChunk) {
        const int64_t end = std::min(numel, i + cpu::kChunk);
        list.push_back({p, i, end, end - i});
      }
    }
  }
  std::vector<ElementTask> list;
  int64_t elements = 0;
};

// Integers: the sum over threads does not depend on the distribution of the work.
std::vector<int64_t> count_digits(const std::vector<Scored>& params, const ElementTasks& tasks, Criterion criterion,
                                  cpu::RadixPass pass) {
  const auto& kernels = cpu::selection(cpu::isa());
  const int threads = tasks.elements <= kWorthThreads ? 1 : int(torch::stable::get_num_threads());
  std::vector<int64_t> counts(size_t(threads) * cpu::kRadixBins);
  run_tasks(tasks.list, [&](const ElementTask& task) {
    int64_t* mine = counts.data() + (threads > 1 ? thread_number() : 0) * cpu::kRadixBins;
    kernels.histogram(params[task.param], criterion, pass, task.begin, task.end, mine);
  });
  for (int thread = 1; thread < threads; thread++)
    for (int bin = 0; bin < cpu::kRadixBins; bin++) counts[bin] += counts[size_t(thread) * cpu::kRadixBins + bin];
  counts.resize(cpu::kRadixBins);
  return counts;
}

// Infinity and NaN have all exponent bits set: in the first pass (bits 20 to 30) they are counted in the last bins.
bool any_nonfinite(const std::vector<int64_t>& first_pass) {
  constexpr int kInfinity = 0x7f800000 >> 20;
  return std::any_of(first_pass.begin() + kInfinity, first_pass.end(), [](int64_t count) { return count != 0; });
}

int64_t first_nonfinite(const std::vector<Scored>& params, Criterion criterion) {
  for (size_t p = 0; p < params.size(); p++) {
    const std::vector<Scored> one = {params[p]};
    if (any_nonfinite(count_digits(one, ElementTasks(one), criterion, cpu::RadixSearch(0).pass()))) return int64_t(p);
  }
  return -1;
}

template <class Info>
Tensor tensor_of(const Info& info) {
  Tensor tensor = empty({kFields<Info>}, ScalarType::Long);
  *fields_of<Info>(tensor) = info;
  return tensor;
}

}  // namespace

std::tuple<Tensor, Tensor> select_elements(const TensorList& theta, const TensorList& grad,
                                           const std::string& criterion_name, int64_t k) {
  check_budget(k);
  const Criterion criterion = parse_criterion(criterion_name);
  const ScoredList list(theta, grad, criterion);
  ElementTasks tasks(list.params);

  int64_t bytes = 0;
  std::vector<int64_t> first_byte;
  first_byte.reserve(list.params.size());
  for (const Scored& p : list.params) {
    first_byte.push_back(bytes);
    bytes += (p.layout.numel() + 7) / 8;
  }
  Tensor bits = empty({bytes}, ScalarType::Byte);
  uint8_t* bits_data = bits.mutable_data_ptr<uint8_t>();
  const auto report = [&](const ElementsInfo& info) { return std::tuple(std::move(bits), tensor_of(info)); };

  cpu::RadixSearch search(k);
  bool everything = false;
  for (int pass = 0; pass < cpu::RadixSearch::kPasses && !everything; pass++) {
    const std::vector<int64_t> counts = count_digits(list.params, tasks, criterion, search.pass());
    if (pass == 0 && any_nonfinite(counts)) {
      torch::stable::zero_(bits);
      return report({first_nonfinite(list.params, criterion), 0});
    }
    everything = !search.descend(counts.data());
  }

  // Mark all scores at or above the threshold, then clear the ties beyond the budget, the last first.
  const auto& kernels = cpu::selection(cpu::isa());
  const uint32_t threshold = everything ? 0 : search.threshold();
  run_tasks(tasks.list, [&](ElementTask& task) {
    task.ties = kernels.mark(list.params[task.param], criterion, threshold, task.begin, task.end,
                             bits_data + first_byte[task.param]);
  });
  int64_t left = everything ? tasks.elements : search.left(), ties = 0;
  for (const ElementTask& task : tasks.list) {
    ties += task.ties;
    const int64_t keep = std::min(left, task.ties);
    if (keep < task.ties)
      kernels.clear_ties(list.params[task.param], criterion, threshold, keep, task.begin, task.end,
                         bits_data + first_byte[task.param]);
    left -= keep;
  }
  // with a threshold above 0, k elements above 0 are selected; otherwise all elements above 0
  return report({-1, threshold ? k : everything ? tasks.elements - ties : k - search.left()});
}

std::tuple<Tensor, Tensor> select_units(const Tensor& scores, const IntList& counts, const IntList& lengths, int64_t k,
                                        bool cut_last) {
  const int64_t bytes = check_units(scores, counts, lengths, k);
  std::vector<cpu::UnitGroup> groups;
  groups.reserve(counts.size());
  for (size_t p = 0; p < counts.size(); p++) groups.push_back({counts[p], lengths[p]});
  Tensor bits = empty({bytes}, ScalarType::Byte);
  const Tensor scores_row = torch::stable::contiguous(scores);
  const UnitsInfo info = cpu::select_units(scores_row.const_data_ptr<float>(), groups.data(), int64_t(groups.size()), k,
                                           cut_last, bits.mutable_data_ptr<uint8_t>());
  return {std::move(bits), tensor_of(info)};
}

}  // namespace delfast::bindings
