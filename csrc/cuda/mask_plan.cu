// The launcher of mask_plan.
#include "cuda/mask_plan.cuh"

namespace delfast::cuda {

namespace {

// A parameter without units has a block too, which stores a count of zero.
int64_t blocks_of(const Updated& u) {
  const int64_t blocks = ceil_div(units_of(u), kCountedBits);
  return blocks ? blocks : 1;
}

int64_t all_blocks(const Updated* params, int64_t count) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; i++) blocks += blocks_of(params[i]);
  return blocks;
}

}  // namespace

int64_t mask_plan_workspace(const Updated* params, int64_t count) {
  return 2 * (all_blocks(params, count) + 1) * int64_t(sizeof(long long));
}

Error mask_plan(const Updated* params, int64_t count, void* plan, void* workspace, Stream stream) {
  const int64_t blocks = all_blocks(params, count), piece_length = MaskPlanShape(params, count).piece_length;
  const MaskPlan view(plan, count);
  long long* const counts = static_cast<long long*>(workspace);
  long long* const pieces = counts + blocks + 1;
  const auto for_entries = [&](auto add) {
    int64_t block = 0;
    for (int64_t i = 0; i < count; i++) {
      add({params[i].bits, units_of(params[i]), unit_length_of(params[i]), block}, blocks_of(params[i]));
      block += blocks_of(params[i]);
    }
  };
  launch_tables<PlannedBits>(count, for_entries, [&]<int kBytes>(const Table<PlannedBits, kBytes>& table) {
    DELFAST_LAUNCH(mask_plan_count<kBytes>, table.blocks(), kThreads, 0, stream, table, piece_length, counts, pieces);
  });
  DELFAST_LAUNCH(mask_plan_sum, 1, kSumThreads, 0, stream, blocks, count, counts, pieces, view.head);
  int first = 0;
  launch_tables<PlannedBits>(count, for_entries, [&]<int kBytes>(const Table<PlannedBits, kBytes>& table) {
    DELFAST_LAUNCH(mask_plan_list<kBytes>, table.blocks(), kThreads, 0, stream, table, piece_length, first, counts,
                   pieces, view.params, view.pieces);
    first += table.count;
  });
  return last_error();
}

}  // namespace delfast::cuda
