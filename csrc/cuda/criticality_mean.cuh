// Means and sums of whole rows, in one reading.
//
// Mapping. Four lanes share kBlock elements; each adds 4 of the 16 sums. A block takes as many whole rows of up to
// kBlockRow elements as give each four lanes one kBlock, or one segment of a long row, whose sums it writes to the
// workspace.
// Memory. Scores stay in registers. Each thread has kMeanLoads packs of four in flight before the first is added. Rows
// that do not begin at a pack are read element by element, by 16 neighbouring lanes.
// Numerics: criticality_rows.cuh.
#pragma once

#include "cuda/criticality_sum.cuh"

namespace delfast::cuda {

__host__ __device__ constexpr int rows_of_mean_block(int length) { return kGroups / blocks_of_row(length); }

DELFAST_BODY void mean_rows(const Rows& p, Criterion criterion, int64_t block, unsigned char* workspace) {
  if (p.length == 1) return score_elements(p, criterion, block);
  DELFAST_SHARED(uint4, partial, [kGroups * 4]);
  if (p.is_long()) {
    const Segment segment(p, block);
    sum_rows<false>(p, criterion, segment.first, segment.length, 1, 0, partial);
    return store_sums(segment, partial, LongRow(p, workspace, segment.row));
  }
  const int length = int(p.length), per_row = blocks_of_row(length), most = rows_of_mean_block(length);
  const int64_t first_row = block * most;
  const int rows = p.rows - first_row < most ? int(p.rows - first_row) : most;
  sum_rows<false>(p, criterion, first_row * length, length, rows, 0, partial);
  const float* const sums = reinterpret_cast<const float*>(partial);
  for (int pair = warp() * 2; pair < rows; pair += 2 * kRowWarps) {
    const int row = pair + lane() / 16;
    double sum = 0;
    if (row < rows)
      for (int b = 0; b < per_row; b++) sum += double(sums[(row * per_row + b) * 16 + lane() % 16]);
    sum = add_pairwise(sum);
    if (lane() % 16 == 0 && row < rows) global_store(&p.out[first_row + row], reduced(p, sum, {0, 0, 0}));
  }
}

template <int kBytes>
__global__ void __launch_bounds__(kRowThreads, kMeanResident)
    criticality_mean(DELFAST_GRID_CONSTANT(Table<Rows, kBytes>) table, Criterion criterion, unsigned char* workspace) {
  const int entry = find_entry(table);
  mean_rows(table.entries[entry], criterion, blockIdx.x - table.first_block[entry], workspace);
}

}  // namespace delfast::cuda
