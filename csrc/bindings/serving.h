// Registers a kernel for every dtype except float64, for which the op's reference is called. delfast/ops/table.py
// defines the ops of the namespace delfast_python, which native kernels call.
#pragma once

#include <algorithm>

#include "bindings/torch.h"

namespace delfast::bindings {

// Calls a Python op with the arguments on the stack, which its results replace. Throws the error that the op raised.
// Python itself raises an error that is no Exception, such as KeyboardInterrupt, as soon as it runs again (module.cpp).
inline void call_python(const char* name, StableIValue* stack) {
  if (!torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION)) return;
  StableIValue raised;
  check_torch(torch_call_dispatcher("delfast_python::last_error", "", &raised, TORCH_ABI_VERSION), "call Python");
  const std::string error = torch::stable::detail::to<std::string>(raised);
  const size_t colon = error.find(": ");
  const std::string kind = error.substr(0, colon), message = colon == error.npos ? error : error.substr(colon + 2);
  if (kind == "ValueError") throw std::invalid_argument(message);
  if (kind == "IndexError") throw std::out_of_range(message);
  throw std::runtime_error(kind == "RuntimeError" ? message : error);
}

// The name of an op as a template argument.
template <size_t length>
struct Name {
  char text[length];
  constexpr Name(const char (&name)[length]) { std::copy_n(name, length, text); }
};

// Reads an argument on the stack and leaves it there.
template <class Argument>
struct Peeked;

template <>
struct Peeked<Tensor> {
  static bool is_float64(StableIValue argument) {
    int32_t dtype;
    check_torch(aoti_torch_get_dtype(torch::stable::detail::to<AtenTensorHandle>(argument), &dtype), "read a dtype");
    return dtype == aoti_torch_dtype_float64();
  }
};

template <>
struct Peeked<TensorList> {
  static bool is_float64(StableIValue argument) {
    const auto list = torch::stable::detail::to<StableListHandle>(argument);
    size_t size;
    check_torch(torch_list_size(list, &size), "read a list");
    for (size_t i = 0; i < size; i++) {
      StableIValue item;
      check_torch(torch_list_get_item(list, i, &item), "read a list");
      if (Peeked<Tensor>::is_float64(item)) return true;
    }
    return false;
  }
};

template <class Function>
struct FirstOf;
template <class Result, class First, class... Rest>
struct FirstOf<Result(First, Rest...)> {
  using type = std::remove_cvref_t<First>;
};

// float64 in the first argument (or, for a list, in any of its tensors) selects the reference.
template <Name name, auto kernel>
void served(StableIValue* stack, uint64_t arguments, uint64_t results) {
  using First = typename FirstOf<std::remove_pointer_t<decltype(kernel)>>::type;
  if (Peeked<First>::is_float64(stack[0]))
    return call_python((std::string("delfast_python::") + name.text).c_str(), stack);
  TORCH_BOX(kernel)(stack, arguments, results);
}

template <Name name, auto kernel>
void serve(torch::stable::detail::StableLibrary& m) {
  m.impl(name.text, &served<name, kernel>);
}

}  // namespace delfast::bindings
