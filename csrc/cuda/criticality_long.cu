// Launchers of the second and third kernels over long rows, in a file of their own so that they compile in parallel.
#include "cuda/criticality_long_sum.cuh"
#include "cuda/criticality_long_top.cuh"
#include "cuda/criticality_plan.cuh"

namespace delfast::cuda {

void launch_long_sums(const Plan& plan, unsigned char* workspace, Stream stream) {
  launch_rows(
      plan.list, plan.long_count, [](const Rows& p) { return p.rows; },
      [&]<int kBytes>(const Table<Rows, kBytes>& table) {
        DELFAST_LAUNCH(criticality_long_add<kBytes>, table.blocks(), kRowThreads, 0, stream, table, workspace);
      });
}

void launch_long_tops(const Plan& plan, Criterion criterion, unsigned char* workspace, Stream stream) {
  launch_rows(
      plan.list, plan.long_count, [](const Rows& p) { return p.reduce == Reduce::mean ? 0 : segment_blocks(p); },
      [&]<int kBytes>(const Table<Rows, kBytes>& table) {
        DELFAST_LAUNCH(criticality_long_count<kBytes>, table.blocks(), kThreads, 0, stream, table, criterion,
                       workspace);
      });
  launch_rows(
      plan.list, plan.long_count, [](const Rows& p) { return p.reduce == Reduce::max ? 0 : segment_blocks(p); },
      [&]<int kBytes>(const Table<Rows, kBytes>& table) {
        DELFAST_LAUNCH(criticality_long_sum<kBytes>, table.blocks(), kRowThreads, 0, stream, table, criterion,
                       workspace);
      });
}

}  // namespace delfast::cuda
