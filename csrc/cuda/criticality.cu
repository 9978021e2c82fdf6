// Channel scores (delfast::criticality): the launch of the top h and the maximum, and the entry point.
//
// The kernels in reading order. Each is launched once for as many parameters as a table holds (Table), only if there
// are such rows. "Long" rows have more than kBlockRow = 16,384 elements. For "topk_mean" and "max":
//
//   kernel                  file                       rows
//   criticality_top         criticality_top.cuh        all contiguous rows; of long rows a sample
//   criticality_long_count  criticality_long_top.cuh   long rows, except means over the whole row (top = length)
//   criticality_long_sum    criticality_long_sum.cuh   long rows, except maxima
//
// For "mean" and "sum":
//
//   criticality_mean        criticality_mean.cuh       all contiguous rows; of long rows the sums of segments
//   criticality_long_add    criticality_long_sum.cuh   long rows
//
// For all aggregates:
//
//   criticality_pieces      criticality_pieces.cuh     rows in pieces (Scored), of at most 16,384 elements
//
// Shared code, also in reading order: criticality_plan.cuh (the rows of each launch, the workspace),
// criticality_rows.cuh (constants, Rows, the final reduction), criticality_sum.cuh (16 float32 sums),
// criticality_team.cuh and criticality_select.cuh (the search for the h-th largest in shared memory),
// criticality_long.cuh (long rows).
#include "cuda/criticality_plan.cuh"
#include "cuda/criticality_top.cuh"

namespace delfast::cuda {

namespace {

// Number of words of dynamic shared memory.
int words_of(const Rows& p) {
  if (p.length == 1) return 0;
  if (p.is_long()) return row_words(4 * sample_runs(p.length));
  return row_words(int(p.length)) * (p.length > kWarpRow ? 1 : kRowWarps);
}
constexpr int kMaxWords = std::max(row_words(kBlockRow), kRowWarps* row_words(kWarpRow));
static_assert(row_words(4 * kMaxRuns) <= kMaxWords);

// The top h and the maximum: one launch for all rows and for the samples of long rows, then the two readings of long
// rows.
void launch_tops(const Plan& plan, Criterion criterion, unsigned char* workspace, Stream stream) {
  const auto blocks = [](const Rows& p) {
    return p.length == 1                        ? ceil_div(p.rows, kElementTile)
           : p.is_long() || p.length > kWarpRow ? p.rows
                                                : ceil_div(p.rows, kRowWarps);
  };
  int words = 0;
  for (const Rows& p : plan.list) words = std::max(words, words_of(p));
  launch_rows(plan.list, int64_t(plan.list.size()), blocks, [&]<int kBytes>(const Table<Rows, kBytes>& table) {
    const auto kernel = criticality_top<kBytes>;
    // Above the 48 KiB default, which includes static shared memory. Always request the maximum: another thread may
    // launch the kernel meanwhile.
    if (words * 4 > 40 << 10) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxWords * 4);
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
    DELFAST_LAUNCH(criticality_top<kBytes>, table.blocks(), kRowThreads, size_t(words) * 4, stream, table, criterion,
                   workspace);
  });
  launch_long_tops(plan, criterion, workspace, stream);
}

}  // namespace

int64_t criticality_workspace(const Scored* params, const int64_t* top, int64_t count, Aggregate aggregate) {
  return Plan(params, top, count, aggregate, nullptr).units * int64_t(sizeof(LongState));
}

Error criticality(const Scored* params, const int64_t* top, int64_t count, Criterion criterion, Aggregate aggregate,
                  float* out, void* workspace, Stream stream) {
  for (int64_t i = 0; i < count; i++) {
    if (params[i].layout.length > UINT32_MAX)
      return "expected rows of fewer than 2^32 elements, got a longer one; leave that parameter out";
    if (params[i].piece && params[i].layout.length > kMaxRowInPieces)
      return "expected rows in pieces of at most 16384 elements, got a longer one; pass a contiguous copy";
  }
  const Plan plan(params, top, count, aggregate, out);
  const bool whole_rows = aggregate == Aggregate::mean || aggregate == Aggregate::sum;
  (whole_rows ? launch_means : launch_tops)(plan, criterion, static_cast<unsigned char*>(workspace), stream);
  launch_pieces(plan, criterion, stream);
  return last_error();
}

}  // namespace delfast::cuda
