// Launchers of the channel scores: which rows go to which kernel.
#include "cuda/criticality.cuh"
#include "delfast/cuda_launch.h"

namespace delfast::cuda {

namespace {

Reduce reduce_of(Aggregate aggregate, int64_t top, int64_t length) {
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

struct LongPlan {
  int64_t rows = 0, pitch = 0;  // how many long rows there are, and the partial sums of the longest
  bool any_top = false;

  LongPlan(const Scored* params, const int64_t* top, int64_t count, Aggregate aggregate) {
    for (int64_t i = 0; i < count; i++) {
      const Layout& layout = params[i].layout;
      if (layout.length <= kBlockRow) continue;
      rows += layout.rows;
      const int64_t sums = ceil_div(layout.length, kBlock) * 16;
      pitch = sums > pitch ? sums : pitch;
      any_top |= reduce_of(aggregate, top[i], layout.length) == Reduce::top;
    }
  }
  int64_t row_bytes() const { return ceil_div(rows * int64_t(sizeof(LongRow)), 16) * 16; }
};

// Calls add(entry) for the parameters with rows of a length in [least, most].
template <class F>
void for_rows(const Scored* params, const int64_t* top, int64_t count, Aggregate aggregate, float* out, int64_t least,
              int64_t most, F add) {
  int64_t slot = 0;
  for (int64_t i = 0; i < count; i++) {
    const Scored& p = params[i];
    const int64_t rows = p.layout.rows, length = p.layout.length;
    if (rows && length >= least && length <= most) {
      add(Rows{{p.theta, p.grad, p.theta_dtype, p.grad_dtype},
               reduce_of(aggregate, top[i], length),
               rows,
               length,
               top[i],
               out,
               slot});
      slot += rows;
    }
    out += rows;
  }
}

}  // namespace

int64_t criticality_workspace(const Scored* params, const int64_t* top, int64_t count, Aggregate aggregate) {
  const LongPlan plan(params, top, count, aggregate);
  return plan.row_bytes() + plan.rows * plan.pitch * int64_t(sizeof(float));
}

Error criticality(const Scored* params, const int64_t* top, int64_t count, Criterion criterion, Aggregate aggregate,
                  float* out, void* workspace, Stream stream) {
  // Launches one kernel over all rows of a class, as many at a time as a table holds.
  const auto launch = [&](int64_t least, int64_t most, auto blocks_of, auto kernel) {
    Chunks<Rows, decltype(kernel)> chunks(kernel);
    for_rows(params, top, count, aggregate, out, least, most,
             [&](const Rows& rows) { chunks.add(rows, blocks_of(rows)); });
    chunks.flush();
  };
  int64_t longest_warp_row = 0, longest_block_row = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t length = params[i].layout.length;
    if (length > UINT32_MAX)
      return "expected rows of fewer than 2^32 elements, got a longer one; leave that parameter out";
    if (length <= kWarpRow && length > longest_warp_row) longest_warp_row = length;
    if (length <= kBlockRow && length > longest_block_row) longest_block_row = length;
  }

  launch(
      1, 1, [](const Rows& p) { return ceil_div(p.rows, kElementTile); },
      [&](const Table<Rows>& table) {
        DELFAST_LAUNCH(criticality_elements, table.blocks(), kThreads, 0, stream, table, criterion);
      });

  const int warp_slots = int(shared_slot(longest_warp_row));
  launch(
      2, kWarpRow, [](const Rows& p) { return ceil_div(p.rows, kWarps); },
      [&](const Table<Rows>& table) {
        DELFAST_LAUNCH(criticality_warp_rows, table.blocks(), kThreads,
                       kWarps * (warp_slots + kSelectBins) * sizeof(uint32_t), stream, table, criterion, warp_slots);
      });

  const int block_slots = int(shared_slot(longest_block_row));
  const size_t block_bytes = size_t(block_row_words(longest_block_row)) * sizeof(uint32_t);
  if (block_bytes > 48 << 10)  // more than a kernel gets unasked; always as much, since other threads launch it too
    cudaFuncSetAttribute(criticality_block_rows, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         int(block_row_words(kBlockRow) * int64_t(sizeof(uint32_t))));
  launch(
      kWarpRow + 1, kBlockRow, [](const Rows& p) { return p.rows; },
      [&](const Table<Rows>& table) {
        DELFAST_LAUNCH(criticality_block_rows, table.blocks(),
                       longest_block_row > kBlockRow / 2 ? 2 * kThreads : kThreads, block_bytes, stream, table,
                       criterion, block_slots);
      });

  const LongPlan plan(params, top, count, aggregate);
  if (plan.rows) {
    const LongRows long_rows = {static_cast<LongRow*>(workspace),
                                reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + plan.row_bytes()),
                                plan.pitch};
    const auto row_blocks = [](const Rows& p) { return p.rows; };
    const auto segment_blocks = [](const Rows& p) { return p.rows * ceil_div(p.length, kSegment); };
    launch(kBlockRow + 1, INT64_MAX, row_blocks, [&](const Table<Rows>& table) {
      DELFAST_LAUNCH(criticality_long_begin, table.blocks(), kThreads, 0, stream, table, long_rows);
    });
    for (int pass = 0; plan.any_top && pass < kRadixPasses; pass++) {
      launch(kBlockRow + 1, INT64_MAX, segment_blocks, [&](const Table<Rows>& table) {
        DELFAST_LAUNCH(criticality_long_count, table.blocks(), kThreads, 0, stream, table, criterion, long_rows, pass);
      });
      launch(kBlockRow + 1, INT64_MAX, row_blocks, [&](const Table<Rows>& table) {
        DELFAST_LAUNCH(criticality_long_descend, table.blocks(), kThreads, 0, stream, table, long_rows, pass);
      });
    }
    launch(kBlockRow + 1, INT64_MAX, segment_blocks, [&](const Table<Rows>& table) {
      DELFAST_LAUNCH(criticality_long_sum, table.blocks(), kThreads, 0, stream, table, criterion, long_rows);
    });
    launch(kBlockRow + 1, INT64_MAX, row_blocks, [&](const Table<Rows>& table) {
      DELFAST_LAUNCH(criticality_long_finish, table.blocks(), kThreads, 0, stream, table, long_rows);
    });
  }
  return last_error();
}

}  // namespace delfast::cuda
