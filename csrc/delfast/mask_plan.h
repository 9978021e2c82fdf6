// The plan of a mask: its masked entries listed as pieces, computed once for each mask. In memory: the packed bits of
// all parameters, padded to 16 bytes, then MaskPlanHead, a MaskedParam for each parameter, and the MaskPieces. A plan
// has no pointers. Its content depends only on the bits and the parameters' shapes, its size only on the shapes. The
// CUDA kernels write and read the list; a plan made on the CPU has the shapes and no list.
#pragma once

#include "delfast/params.h"

namespace delfast {

// A unit is the part of a parameter for one bit: a row, or an element.
DELFAST_INLINE int64_t units_of(const Updated& u) { return u.by_row ? u.layout.rows : u.layout.numel(); }
DELFAST_INLINE int64_t unit_length_of(const Updated& u) { return u.by_row ? u.layout.length : 1; }

struct MaskPlanHead {
  int64_t params;
  int64_t pieces;  // -1: not listed
};
struct MaskedParam {
  int64_t units, unit_length;
  int64_t entries;  // number of masked ones, if listed
};
// For a parameter with long units: a part of one masked unit. For others: a stretch of units with at least one masked
// unit.
struct MaskPiece {
  int64_t first;  // element in memory, or unit
  int64_t rank;   // masked entries of the parameter before the piece
  int32_t param;
  int32_t count;  // number of elements, or of units
};

constexpr int64_t kLongUnit = 64;  // elements
DELFAST_INLINE bool has_long_units(int64_t unit_length) { return unit_length >= kLongUnit; }

// Units of a stretch: a power of two from 32 to 1024, so that a warp holds their bits, with about 1024 to 2048
// elements.
DELFAST_INLINE int stretch_units(int64_t unit_length) {
  int units = 1024;
  while (units > 32 && units * unit_length > 1024) units /= 2;
  return units;
}

struct MaskPlanShape {
  int64_t params = 0, bit_bytes = 0, max_pieces = 0;
  int64_t piece_length = 0;  // maximum number of elements of a long unit in one piece

  MaskPlanShape(const Updated* list, int64_t count) : params(count) {
    int64_t numel = 0;
    for (int64_t i = 0; i < count; i++) numel += list[i].layout.numel();
    // shorter pieces, so that more warps share the rows of a small network
    piece_length = numel < (int64_t(1) << 25) ? 512 : 2048;
    for (int64_t i = 0; i < count; i++) {
      const int64_t units = units_of(list[i]), length = unit_length_of(list[i]);
      bit_bytes += (units + 7) / 8;
      max_pieces += has_long_units(length) ? units * pieces_of_unit(length)
                                           : (units + stretch_units(length) - 1) / stretch_units(length);
    }
  }
  int64_t pieces_of_unit(int64_t length) const { return (length + piece_length - 1) / piece_length; }
  int64_t head_offset() const { return (bit_bytes + 15) / 16 * 16; }
  int64_t bytes() const {
    return head_offset() + int64_t(sizeof(MaskPlanHead)) + params * int64_t(sizeof(MaskedParam)) +
           max_pieces * int64_t(sizeof(MaskPiece));
  }
};

// The parts of a plan of `count` parameters, from its head on.
struct MaskPlan {
  MaskPlanHead* head;
  MaskedParam* params;
  MaskPiece* pieces;

  MaskPlan(void* plan, int64_t count)
      : head(static_cast<MaskPlanHead*>(plan)),
        params(reinterpret_cast<MaskedParam*>(head + 1)),
        pieces(reinterpret_cast<MaskPiece*>(params + count)) {}
};

inline void write_shapes(const MaskPlan& plan, const Updated* list, int64_t count) {
  *plan.head = {count, -1};
  for (int64_t i = 0; i < count; i++) plan.params[i] = {units_of(list[i]), unit_length_of(list[i]), 0};
}
inline bool is_of_shapes(const MaskPlan& plan, const Updated* list, int64_t count) {
  bool same = plan.head->params == count;
  for (int64_t i = 0; i < count && same; i++)
    same = plan.params[i].units == units_of(list[i]) && plan.params[i].unit_length == unit_length_of(list[i]);
  return same;
}

// Number of floats that a parameter's optimizer state occupies: each parameter's state begins at a multiple of 16
// bytes.
DELFAST_INLINE int64_t padded_state(int64_t values) { return (values + 3) / 4 * 4; }

}  // namespace delfast
