// Launchers of the selection of elements and of units.
#include "cuda/selection.cuh"
#include "delfast/cuda_launch.h"

namespace delfast::cuda {

namespace {

// The workspace: the state, then the ties of every tile and their sum.
constexpr int64_t kStateBytes = ceil_div(sizeof(SelectionState), 16) * 16;

int64_t workspace_bytes(int64_t tiles) { return kStateBytes + (tiles + 1) * int64_t(sizeof(unsigned long long)); }

// for_candidates(add) calls add(Candidates) for each parameter that has any, in order.
template <class ForCandidates>
Error select(ForCandidates for_candidates, Criterion criterion, int64_t budget, int64_t* nonfinite, int64_t* cut,
             bool cut_last, void* workspace, Stream stream) {
  SelectionState* const state = static_cast<SelectionState*>(workspace);
  unsigned long long* const ties =
      reinterpret_cast<unsigned long long*>(static_cast<unsigned char*>(workspace) + kStateBytes);
  int64_t tiles = 0;
  const auto launch = [&](auto kernel) {
    Chunks<Candidates, decltype(kernel)> chunks(kernel);
    tiles = 0;
    for_candidates([&](Candidates p) {
      p.first_tile = tiles;
      const int64_t blocks = ceil_div(p.layout.numel(), kTile);
      chunks.add(p, blocks);
      tiles += blocks;
    });
    chunks.flush();
  };
  DELFAST_LAUNCH(selection_begin, 1, kThreads, 0, stream, state, budget);
  for (int pass = 0; pass < kRadixPasses; pass++) {
    launch([&](const Table<Candidates>& table) {
      DELFAST_LAUNCH(selection_count, table.blocks(), kThreads, 0, stream, table, criterion, state, pass);
    });
    DELFAST_LAUNCH(selection_descend, 1, kThreads, 0, stream, state, pass);
  }
  launch([&](const Table<Candidates>& table) {
    DELFAST_LAUNCH(selection_mark, table.blocks(), kThreads, 0, stream, table, criterion, state, ties);
  });
  DELFAST_LAUNCH(selection_place_ties, 1, kThreads, 0, stream, state, ties, tiles, nonfinite, cut);
  int64_t* const cut_to_report = cut_last ? cut : nullptr;
  launch([&](const Table<Candidates>& table) {
    DELFAST_LAUNCH(selection_settle, table.blocks(), kThreads, 0, stream, table, criterion, state, ties, cut_to_report);
  });
  return last_error();
}

}  // namespace

int64_t select_elements_workspace(const Scored* params, int64_t count) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; i++) tiles += ceil_div(params[i].layout.numel(), kTile);
  return workspace_bytes(tiles);
}

Error select_elements(const Scored* params, int64_t count, Criterion criterion, int64_t k, uint8_t* bits,
                      int64_t* nonfinite, void* workspace, Stream stream) {
  const auto for_candidates = [&](auto add) {
    uint8_t* next = bits;
    for (int64_t i = 0; i < count; i++) {
      const Scored& p = params[i];
      if (!p.layout.numel()) continue;
      add(Candidates{{p.theta, p.grad, p.theta_dtype, p.grad_dtype}, p.layout, 1, next, 0, i, 0});
      next += ceil_div(p.layout.numel(), 8);
    }
  };
  return select(for_candidates, criterion, k, nonfinite, nullptr, false, workspace, stream);
}

int64_t select_units_workspace(const int64_t* counts, int64_t count) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; i++) tiles += ceil_div(counts[i], kTile);
  return workspace_bytes(tiles);
}

Error select_units(const float* scores, const int64_t* counts, const int64_t* lengths, int64_t count, int64_t k,
                   bool cut_last, uint8_t* bits, int64_t* info, void* workspace, Stream stream) {
  const auto for_candidates = [&](auto add) {
    uint8_t* next = bits;
    int64_t first_unit = 0;
    for (int64_t i = 0; i < count; i++) {
      if (!counts[i]) continue;
      add(Candidates{{scores + first_unit, nullptr, Dtype::float32, Dtype::float32},
                     {counts[i], 1, 1},
                     lengths[i],
                     next,
                     0,
                     first_unit,
                     1});
      first_unit += counts[i];
      next += ceil_div(counts[i], 8);
    }
  };
  return select(for_candidates, Criterion::weight, k, info + 2, info, cut_last, workspace, stream);
}

}  // namespace delfast::cuda
