// Launcher of the kernel for rows in pieces, in a file of its own so that it compiles in parallel.
#include "cuda/criticality_pieces.cuh"
#include "cuda/criticality_plan.cuh"

namespace delfast::cuda {

namespace {

int words_of_pieces(const Rows& p) {
  if (in_chunks(p)) return kPieceRows * kChunkPitch;
  return rows_of_pieces_block(p) * pitch_of_pieces(row_words(int(p.length)));
}
// The rows of a block have at most kBlockRow elements together. Lists and padding take most memory with 16 rows.
constexpr int kMaxPieceWords = kPieceRows * pitch_of_pieces(row_words(kBlockRow / kPieceRows));

}  // namespace

void launch_pieces(const Plan& plan, Criterion criterion, Stream stream) {
  int words = 0;
  for (const Rows& p : plan.in_pieces) words = std::max(words, words_of_pieces(p));
  const auto blocks = [](const Rows& p) { return ceil_div(p.rows, rows_of_pieces_block(p)); };
  launch_rows(plan.in_pieces, int64_t(plan.in_pieces.size()), blocks,
              [&]<int kBytes>(const Table<Rows, kBytes>& table) {
                const auto kernel = criticality_pieces<kBytes>;
                // see launch_tops
                if (words * 4 > 40 << 10)
                  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxPieceWords * 4);
                cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
                DELFAST_LAUNCH(criticality_pieces<kBytes>, table.blocks(), kRowThreads, size_t(words) * 4, stream,
                               table, criterion);
              });
}

}  // namespace delfast::cuda
