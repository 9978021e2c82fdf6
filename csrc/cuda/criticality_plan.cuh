// The rows that each launch of the channel scores works on, and the place of long rows in the workspace.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/criticality_long.cuh"
#include "delfast/cuda_launch.h"

namespace delfast::cuda {

// Maximum number of listed candidates of a row: 1.5 times the number that the sample predicts. The prediction counts 10
// sampled scores more than are in the bracket, since few scores predict less accurately.
inline uint32_t long_capacity(uint32_t length, uint32_t top) {
  const int size = 4 * sample_runs(length);
  const SampleRanks ranks = sample_ranks(length, top, size);
  const int hi = ranks.hi > 0 ? ranks.hi : 0, lo = ranks.lo < size ? ranks.lo : size;
  const uint64_t listed = uint64_t(length) * uint32_t(lo - hi + 10) * 3 / (2 * uint32_t(size));
  return listed < length ? uint32_t(listed) : length;
}

inline Reduce reduce_of(Aggregate aggregate, int64_t top, int64_t length) {
  switch (aggregate) {
    case Aggregate::mean:
      return Reduce::mean;
    case Aggregate::sum:
      return Reduce::sum;
    case Aggregate::max:
      return Reduce::max;
    case Aggregate::topk_mean:
      break;
  }
  return top == length ? Reduce::mean : top == 1 ? Reduce::max : Reduce::top;
}

// Launches one kernel over the rows of the first `count` entries for which blocks_of is not 0.
template <class BlocksOf, class Launch>
void launch_rows(const std::vector<Rows>& list, int64_t count, BlocksOf blocks_of, Launch launch) {
  const auto for_entries = [&](auto add) {
    for (int64_t i = 0; i < count; i++)
      if (const int64_t blocks = blocks_of(list[size_t(i)])) add(list[size_t(i)], blocks);
  };
  launch_tables<Rows>(count, for_entries, launch);
}

struct Plan {
  std::vector<Rows> list;       // contiguous rows, the longest first, so that the last blocks are small ones
  std::vector<Rows> in_pieces;  // the longest first
  int64_t units = 0;            // size of the workspace in units of a LongState
  int64_t long_count = 0;       // number of entries with long rows, which come first

  Plan(const Scored* params, const int64_t* top, int64_t count, Aggregate aggregate, float* out) {
    for (int64_t i = 0; i < count; i++) {
      const Scored& p = params[i];
      const int64_t rows = p.layout.rows, length = p.layout.length, piece = p.piece;
      if (rows)
        (piece ? in_pieces : list)
            .push_back({p.theta, p.grad, out, rows, uint32_t(length), uint32_t(top[i]), 0, 0, uint32_t(piece),
                        p.theta_dtype, p.grad_dtype, reduce_of(aggregate, top[i], length)});
      if (out) out += rows;
    }
    for (auto* entries : {&list, &in_pieces})
      std::stable_sort(entries->begin(), entries->end(),
                       [](const Rows& a, const Rows& b) { return a.length > b.length; });
    for (Rows& p : list) {
      if (!p.is_long()) break;
      if (p.reduce == Reduce::top) p.capacity = long_capacity(p.length, p.top);
      p.room = uint32_t(units);
      units += p.rows * long_row_units(p.length, p.capacity);
      long_count++;
    }
  }
};

inline int64_t segment_blocks(const Rows& p) { return p.rows * p.segments(); }

// In criticality_pieces.cu: the rows in pieces, if any.
void launch_pieces(const Plan& plan, Criterion criterion, Stream stream);
// In criticality_mean.cu.
void launch_means(const Plan& plan, Criterion criterion, unsigned char* workspace, Stream stream);

// In criticality_long.cu: the launches after the first, for long rows.
void launch_long_sums(const Plan& plan, unsigned char* workspace, Stream stream);
void launch_long_tops(const Plan& plan, Criterion criterion, unsigned char* workspace, Stream stream);

}  // namespace delfast::cuda
