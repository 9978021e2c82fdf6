// The layouts that the kernels read, computed from a tensor's sizes and strides, and strides computed from a layout.
#pragma once

#include <optional>
#include <vector>

#include "delfast/params.h"

namespace delfast {

struct Strided {
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides;

  int64_t numel() const {
    int64_t all = 1;
    for (int64_t d = 0; d < dims; d++) all *= sizes[d];
    return all;
  }
};

// Row-major over dimensions [from, dims), ignoring dimensions of size 1.
inline bool packed_from(const Strided& t, int64_t from, int64_t innermost_stride) {
  int64_t expected = innermost_stride;
  for (int64_t d = t.dims - 1; d >= from; d--) {
    if (t.sizes[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.sizes[d];
  }
  return true;
}

// Returns the layout of rows that are contiguous in memory and follow each other, row-major or channels-last; otherwise
// nothing.
inline std::optional<Layout> layout_of(const Strided& t) {
  const int64_t numel = t.numel();
  if (numel == 0) return Layout{0, 1, 1};
  if (t.dims <= 1) {
    if (t.dims == 1 && t.sizes[0] > 1 && t.strides[0] != 1) return std::nullopt;
    return Layout{numel, 1, 1};
  }
  Layout layout{t.sizes[0], numel / t.sizes[0], 1};
  if (packed_from(t, 0, 1)) return layout;
  const bool rows_apart = t.sizes[0] == 1 || t.strides[0] == layout.length;
  const bool channels_inside = t.dims > 2 && (t.sizes[1] == 1 || t.strides[1] == 1);
  if (!rows_apart || !channels_inside || !packed_from(t, 2, t.sizes[1])) return std::nullopt;
  layout.spatial = layout.length / t.sizes[1];
  return layout;
}

// Returns the piece length of rows in pieces, as in the view weight.movedim(dim, 0): see Scored. 0: rows are not in
// pieces.
inline int64_t piece_of(const Strided& t) {
  if (t.dims <= 1 || t.numel() == 0) return 0;
  int64_t piece = 0, expected = 1;  // stride
  for (int64_t d = t.dims - 1; d > 0; d--) {
    if (t.sizes[d] == 1) continue;
    if (t.strides[d] != expected && !piece) {
      piece = expected;
      expected *= t.sizes[0];
    }
    if (t.strides[d] != expected) return 0;
    expected *= t.sizes[d];
  }
  return t.strides[0] == piece ? piece : 0;
}

// Returns the strides of a tensor of these sizes whose rows are laid out by `layout` and `piece`.
inline std::vector<int64_t> strides_for(int64_t dims, const int64_t* sizes, const Layout& layout, int64_t piece = 0) {
  std::vector<int64_t> strides(static_cast<size_t>(dims));
  const bool channels_last = layout.spatial != 1;
  int64_t next = channels_last ? sizes[1] : 1;
  bool inside = piece != 0;
  for (int64_t d = dims; d-- > (channels_last ? 2 : 0);) {
    if (inside && next == piece) {
      next *= layout.rows;
      inside = false;
    }
    strides[size_t(d)] = next;
    next *= sizes[d];
  }
  if (channels_last) {
    strides[1] = 1;
    strides[0] = layout.length;
  }
  if (piece) strides[0] = piece;
  return strides;
}

}  // namespace delfast
