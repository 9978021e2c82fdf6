// Registers a kernel for every dtype but float64, which the op's reference serves.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>

namespace delfast::bindings {

inline bool is_float64(const at::Tensor& t) { return t.scalar_type() == at::kDouble; }
inline bool is_float64(at::TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const at::Tensor& t) { return is_float64(t); });
}

// An op's name as a template's argument.
template <size_t length>
struct Name {
  char text[length];
  constexpr Name(const char (&name)[length]) { std::copy_n(name, length, text); }
};

template <Name name, auto kernel, class Function = std::remove_pointer_t<decltype(kernel)>>
struct Served;

// float64 in the first argument (or, for a list, in any of its tensors) selects the reference. delfast/ops/table.py
// registers the references as ops of the namespace delfast_reference, on every device.
template <Name name, auto kernel, class Result, class First, class... Rest>
struct Served<name, kernel, Result(First, Rest...)> {
  static Result call(First first, Rest... rest) {
    if (!is_float64(first)) return kernel(first, rest...);
    static const auto reference = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow((std::string("delfast_reference::") + name.text).c_str(), "")
                                      .template typed<Result(First, Rest...)>();
    return reference.call(first, rest...);
  }
};

template <Name name, auto kernel>
void serve(torch::Library& m) {
  using Op = Served<name, kernel>;
  m.impl(name.text, TORCH_FN(Op::call));
}

}  // namespace delfast::bindings
