// All checks and conversions between torch tensors and the kernels' plain structs.
#pragma once

#include <optional>
#include <type_traits>
#include <vector>

#include "bindings/torch.h"
#include "delfast/layouts.h"
#include "delfast/selection.h"

namespace delfast::bindings {

// All tensors of an op must be on one device: the device of its first tensor, which selected the kernel. `role`, in
// parts, names the tensor in the error.
template <class... Role>
void check_device(Device device, const Tensor& t, const Role&... role) {
  DELFAST_CHECK_VALUE(device_of(t) == device, "expected ", role..., " on ", device, ", got it on ", device_of(t),
                      "; move all tensors to one device");
}
inline void check_devices(Device device, const TensorList& list, const char* role) {
  for (size_t i = 0; i < list.size(); i++) check_device(device, list[i], role, " #", i);
}
template <class... Role>
Dtype dtype_of(const Tensor& t, const Role&... role) {
  const TorchDtype type = type_of(t);
  if (type == ScalarType::Float) return Dtype::float32;
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  DELFAST_CHECK_VALUE(type == ScalarType::Half, "expected ", role..., " to be float32, bfloat16 or float16, got ", type,
                      "; convert the model (model.float())");
  return Dtype::float16;
}

inline Strided strided(const Tensor& t) { return {t.dim(), t.sizes().data(), t.strides().data()}; }

inline bool is_in_layout(const Tensor& t, const Layout& layout, int64_t piece = 0) {
  if (t.numel() == 0) return true;
  if (piece) return piece_of(strided(t)) == piece;
  if (layout.spatial == 1 && t.is_contiguous()) return true;  // read from a flag, and the usual case
  const std::optional<Layout> own = layout_of(strided(t));
  return own && own->length == layout.length && own->spatial == layout.spatial;
}

// Returns true if some dimension repeats the same elements.
inline bool is_expanded(const Tensor& t) {
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.size(d) > 1 && t.stride(d) == 0) return true;
  return false;
}

inline Tensor copy_in_layout(const Tensor& t, const Layout& layout, int64_t piece = 0) {
  const IntList strides = strides_for(t.dim(), t.sizes().data(), layout, piece);
  Tensor copy = empty_strided(t.sizes(), strides, type_of(t), device_of(t));
  torch::stable::copy_(copy, untracked(t));
  return copy;
}

// Copies of tensors whose strides the kernels do not support, kept for as long as the kernels read them.
class Copies {
 public:
  // Returns the data of `t` in the given layout, without a copy if `t` has that layout.
  const void* read(const Tensor& t, const Layout& layout, int64_t piece = 0) {
    if (is_in_layout(t, layout, piece)) return t.const_data_ptr();
    return kept_.emplace_back(copy_in_layout(t, layout, piece)).const_data_ptr();
  }
  // Returns memory to write to, in the given layout; write_back() copies it to the tensor, without autograd. The caller
  // increments versions.
  void* write(const Tensor& t, const Layout& layout) {
    if (is_in_layout(t, layout)) return t.mutable_data_ptr();
    DELFAST_CHECK_VALUE(!is_expanded(t), "expected elements to write in memory of their own, got shape ", t.sizes(),
                        " with strides ", t.strides(), "; clone() the expanded tensor");
    return written_.emplace_back(untracked(t), copy_in_layout(t, layout)).second.mutable_data_ptr();
  }
  void write_back() {
    for (auto& [original, copy] : written_) torch::stable::copy_(original, copy);
  }

 private:
  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> written_;
};

// The layout in which the kernels read a parameter: its own, or contiguous if the parameter must be copied.
inline Layout usable_layout(const Tensor& t) {
  if (const std::optional<Layout> layout = layout_of(strided(t))) return *layout;
  return t.dim() > 1 ? Layout{t.size(0), t.numel() / t.size(0), 1} : Layout{t.numel(), 1, 1};
}

// Rows in pieces are read in place, or copied first.
enum class InPieces : bool { copied, read };

// The piece length of rows that are read in place, or 0. A block holds few long rows, so it would use less than a
// quarter of each sector that it reads: a copy moves fewer bytes.
inline int64_t usable_piece(const Tensor& t, const Layout& layout) {
  if (layout.length > 2048 * int64_t(t.element_size()) || layout_of(strided(t))) return 0;
  return piece_of(strided(t));
}

// A list of parameters in the form that the kernels read.
class ScoredList {
 public:
  ScoredList(const TensorList& theta, const TensorList& grad, Criterion criterion,
             InPieces in_pieces = InPieces::copied)
      : device(device_of(theta.empty() ? grad.front() : theta.front())) {
    check_devices(device, theta, "parameter");
    check_devices(device, grad, "gradient");
    DELFAST_CHECK_VALUE(grad.size() == theta.size() || (grad.empty() && criterion == Criterion::weight),
                        "expected one gradient per parameter, got ", theta.size(), " parameters and ", grad.size(),
                        " gradients; pass a zero gradient for a parameter that the loss does not use");
    params.reserve(theta.size());
    for (size_t i = 0; i < theta.size(); i++) {
      Scored p;
      p.theta_dtype = dtype_of(theta[i], "parameter #", i);
      p.layout = usable_layout(theta[i]);
      if (in_pieces == InPieces::read) p.piece = usable_piece(theta[i], p.layout);
      p.theta = copies_.read(theta[i], p.layout, p.piece);
      if (!grad.empty()) {
        DELFAST_CHECK_VALUE(grad[i].sizes().equals(theta[i].sizes()), "expected gradient #", i, " to have shape ",
                            theta[i].sizes(), " like its parameter, got ", grad[i].sizes(),
                            "; pass the gradients in the parameters' order");
        p.grad_dtype = dtype_of(grad[i], "gradient #", i);
        p.grad = copies_.read(grad[i], p.layout, p.piece);
      }
      params.push_back(p);
    }
  }
  Device device;
  std::vector<Scored> params;

 private:
  Copies copies_;
};

inline Criterion parse_criterion(std::string_view name) {
  if (name == "weighted_grad") return Criterion::weighted_grad;
  if (name == "grad") return Criterion::grad;
  if (name == "weight") return Criterion::weight;
  DELFAST_CHECK_VALUE(false, "expected criterion 'weighted_grad', 'grad' or 'weight', got '", name,
                      "'; pass one of these");
}

inline Aggregate parse_aggregate(std::string_view name) {
  if (name == "topk_mean") return Aggregate::topk_mean;
  if (name == "mean") return Aggregate::mean;
  if (name == "sum") return Aggregate::sum;
  if (name == "max") return Aggregate::max;
  DELFAST_CHECK_VALUE(false, "expected aggregate 'topk_mean', 'mean', 'sum' or 'max', got '", name,
                      "'; pass one of these");
}

// Returns the number of units of all parameters.
inline int64_t check_top_h(const std::vector<Scored>& params, const IntList& top_h) {
  DELFAST_CHECK_VALUE(top_h.size() == params.size(), "expected one top_h per parameter, got ", params.size(),
                      " parameters and ", top_h.size(), " values; pass one count each");
  int64_t units = 0;
  for (size_t p = 0; p < params.size(); p++) {
    const Layout& layout = params[p].layout;
    units += layout.rows;
    DELFAST_CHECK_VALUE(!layout.rows || (top_h[p] >= 1 && top_h[p] <= layout.length), "expected top_h of parameter #",
                        p, " in [1, ", layout.length, "], got ", top_h[p], "; clip it to the row");
  }
  return units;
}

// An op returns a struct of int64 fields as a tensor of int64 elements.
template <class Info>
inline constexpr int64_t kFields = sizeof(Info) / sizeof(int64_t);
template <class Info>
Info* fields_of(Tensor& tensor) {
  static_assert(std::is_standard_layout_v<Info> && sizeof(Info) % sizeof(int64_t) == 0);
  return reinterpret_cast<Info*>(tensor.mutable_data_ptr<int64_t>());
}

inline void check_budget(int64_t k) {
  DELFAST_CHECK_VALUE(k >= 0, "expected k >= 0 elements to select, got ", k, "; pass a non-negative count");
}

// Returns the number of bytes of the units' bits.
inline int64_t check_units(const Tensor& scores, const IntList& counts, const IntList& lengths, int64_t k) {
  check_budget(k);
  DELFAST_CHECK_VALUE(counts.size() == lengths.size(), "expected one count and one length per parameter, got ",
                      counts.size(), " and ", lengths.size(), "; pass lists of equal length");
  DELFAST_CHECK_VALUE(scores.dim() == 1 && type_of(scores) == ScalarType::Float,
                      "expected scores float32 (units,), got ", type_of(scores), " ", scores.sizes(),
                      "; pass what criticality returns for these parameters");
  int64_t left = scores.numel(), bytes = 0, elements = 0;
  for (size_t p = 0; p < counts.size(); p++) {
    int64_t these = 0;
    DELFAST_CHECK_VALUE(counts[p] >= 0 && lengths[p] >= 0, "expected counts and lengths >= 0, got ", counts[p], " of ",
                        lengths[p], " for parameter #", p, "; pass the parameters' unit counts and row lengths");
    DELFAST_CHECK_VALUE(
        !__builtin_mul_overflow(counts[p], lengths[p], &these) && !__builtin_add_overflow(elements, these, &elements),
        "expected fewer than 2^63 elements in all, got ", counts[p], " units of ", lengths[p], " for parameter #", p,
        "; pass the parameters' unit counts and row lengths");
    DELFAST_CHECK_VALUE(counts[p] <= left, "expected counts that sum to the ", scores.numel(), " scores, got ",
                        counts[p], " for parameter #", p, " where ", left,
                        " are left; pass what criticality returns for these parameters");
    left -= counts[p];
    bytes += (counts[p] + 7) / 8;
  }
  DELFAST_CHECK_VALUE(!left, "expected counts that sum to the ", scores.numel(), " scores, got ", scores.numel() - left,
                      "; pass what criticality returns for these parameters");
  return bytes;
}

}  // namespace delfast::bindings
