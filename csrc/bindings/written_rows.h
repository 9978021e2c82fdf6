// The checks of write_rows_ on every device, and the list of weights that the kernels read.
#pragma once

#include <vector>

#include "bindings/checks.h"
#include "delfast/write_rows.h"

namespace delfast::bindings {

// Each device checks the indices itself. Versions of the weights are not incremented, because callers write the same
// rows again between a forward pass and its backward pass.
class WrittenRowsList {
 public:
  WrittenRowsList(const TensorList& weights, const TensorList& rows, const TensorList& indices, const IntList& dims)
      : device(device_of(weights.front())) {
    check_devices(device, weights, "weight");
    check_devices(device, rows, "rows");
    check_devices(device, indices, "index");
    const size_t count = weights.size();
    DELFAST_CHECK_VALUE(rows.size() == count && indices.size() == count && dims.size() == count,
                        "expected lists of equal length, got ", count, " weights, ", rows.size(), " rows, ",
                        indices.size(), " indices and ", dims.size(), " dims; pass one each");
    written.reserve(count);
    for (size_t i = 0; i < count; i++) written.push_back(checked(weights[i], rows[i], indices[i], dims[i], i));
  }

  // Call after the copies.
  void finish() { copies_.write_back(); }

  Device device;
  std::vector<WrittenRows> written;

 private:
  WrittenRows checked(const Tensor& weight, const Tensor& rows, const Tensor& index, int64_t dim, size_t i) {
    DELFAST_CHECK_VALUE(dim >= 0 && dim < weight.dim(), "expected dim of weight #", i, " in [0, ", weight.dim(),
                        "), got ", dim, "; pass the dimension of its rows");
    DELFAST_CHECK_VALUE(index.dim() == 1 && type_of(index) == ScalarType::Long && index.is_contiguous(),
                        "expected index #", i, " to be contiguous int64 (n,), got ", type_of(index), " ", index.sizes(),
                        "; pass the rows' numbers");
    DELFAST_CHECK_VALUE(type_of(rows) == type_of(weight), "expected rows #", i, " to be ", type_of(weight),
                        " like their weight, got ", type_of(rows), "; convert the rows");
    IntList sizes = weight.sizes().vec();
    sizes[size_t(dim)] = index.numel();
    DELFAST_CHECK_VALUE(rows.sizes().equals(Sizes(sizes)), "expected rows #", i, " of shape ", sizes, ", got ",
                        rows.sizes(), "; pass one row for each index");
    WrittenRows w;
    w.index = index.const_data_ptr<int64_t>();
    w.count = index.numel();
    w.channels = weight.size(dim);
    if (rows.numel() == 0) return {};
    // rows along dim 0 may be channels-last; along other dims, the weight and its rows are contiguous
    const Layout layout = dim == 0 ? usable_layout(weight) : Layout{weight.size(0), weight.numel() / weight.size(0), 1};
    w.weight = copies_.write(weight, layout);
    w.rows = copies_.read(rows, layout);
    for (int64_t d = 0; d < dim; d++) w.outer *= weight.size(d);
    w.bytes = int64_t(weight.element_size());
    for (int64_t d = dim + 1; d < weight.dim(); d++) w.bytes *= weight.size(d);
    return w;
  }

  Copies copies_;
};

}  // namespace delfast::bindings
