// Launchers of the channel scores; those of means and sums are in criticality_mean.cu.
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
