// Launcher of the means and sums of whole rows, in a file of its own so that it compiles in parallel.
#include "cuda/criticality_mean.cuh"
#include "cuda/criticality_plan.cuh"

namespace delfast::cuda {

// Means and sums: one launch for all rows and for the segments of long rows, then one that adds the sums of long rows.
void launch_means(const Plan& plan, Criterion criterion, unsigned char* workspace, Stream stream) {
  const auto blocks = [](const Rows& p) {
    return p.length == 1 ? ceil_div(p.rows, kElementTile)
           : p.is_long() ? segment_blocks(p)
                         : ceil_div(p.rows, rows_of_mean_block(int(p.length)));
  };
  launch_rows(plan.list, int64_t(plan.list.size()), blocks, [&]<int kBytes>(const Table<Rows, kBytes>& table) {
    DELFAST_LAUNCH(criticality_mean<kBytes>, table.blocks(), kRowThreads, 0, stream, table, criterion, workspace);
  });
  launch_long_sums(plan, workspace, stream);
}

}  // namespace delfast::cuda
