// Plain structs that describe parameters to the kernels: pointers, 64-bit sizes, no framework.
#pragma once

#include <cstddef>
#include <cstdint>

#include "delfast/half.h"

// Marks the functions of the ops' library that the Python module calls.
#define DELFAST_EXPORT __attribute__((visibility("default")))

namespace delfast {

// DELFAST_FEW_INSTANCES leaves out the dtypes and tile sizes whose code has the same control flow as others, so that
// sanitized tests build quickly. float16 is then refused; it differs from bfloat16 only by its conversions.
#ifdef DELFAST_FEW_INSTANCES
inline constexpr bool kFewInstances = true;
#else
inline constexpr bool kFewInstances = false;
#endif

enum class Dtype : int8_t { float32, bfloat16, float16 };

// c_j of a scalar parameter: |theta g|, |g| or |theta|.
enum class Criterion : int8_t { weighted_grad, grad, weight };

// Reduction of a row's scores to one: the mean of the `top` largest, or as named.
enum class Aggregate : int8_t { topk_mean, mean, sum, max };

// One parameter, viewed as `rows` rows of `length` elements (a row is a slice along dim 0, or one element of a
// parameter with ndim <= 1). A row is contiguous in memory; inside it, the element with row-major (logical) number
// e = c * spatial + s lies at offset s * (length / spatial) + c. Contiguous rows have spatial = 1, channels-last
// rows have spatial = the product of the dimensions after the second.
struct Layout {
  int64_t rows = 0;
  int64_t length = 0;
  int64_t spatial = 1;

  DELFAST_INLINE int64_t numel() const { return rows * length; }
  DELFAST_INLINE int64_t offset(int64_t logical) const {
    if (spatial == 1) return logical;
    const int64_t row = logical / length, e = logical % length;
    return row * length + e % spatial * (length / spatial) + e / spatial;
  }
};

// theta and its gradient, in the same layout. A pointer that the criterion does not need may be null.
//
// If `piece` is not 0, rows are in pieces, like those of a weight whose outputs lie along another dimension: element e
// = i * piece + s of row r is at offset (i * rows + r) * piece + s; 0 < piece < length and spatial = 1. Only
// criticality on CUDA devices reads such rows, up to kMaxRowInPieces elements, which a block keeps in shared memory.
struct Scored {
  const void* theta = nullptr;
  const void* grad = nullptr;
  Dtype theta_dtype = Dtype::float32;
  Dtype grad_dtype = Dtype::float32;
  Layout layout;
  int64_t piece = 0;
};
inline constexpr int64_t kMaxRowInPieces = 1 << 14;

// A parameter to change in place where its packed bits (least significant first) are set: one bit for each row, or for
// each logical element. `state` arrays hold float32 for masked entries only, in the order of the set bits; the entries
// of a row in the row's own memory order.
struct Updated {
  void* param = nullptr;
  const void* source = nullptr;  // the gradient; for reset, the new values
  Dtype param_dtype = Dtype::float32;
  Dtype source_dtype = Dtype::float32;
  float* state[2] = {nullptr, nullptr};
  Layout layout;
  const uint8_t* bits = nullptr;
  bool by_row = false;
};

// Constants of one optimizer step, already in float32.
struct SgdStep {
  float lr, momentum, gradient_share /* 1 - dampening, or 1 on the first step */, weight_decay;
  float unscale /* 1 / grad_scale, negated to maximize */;
  bool nesterov, first;
};
struct AdamWStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float step_size /* lr / (1 - beta1^t) */, correction /* sqrt(1 - beta2^t) */, decay /* 1 - lr * weight_decay */;
  float unscale;
};

}  // namespace delfast
