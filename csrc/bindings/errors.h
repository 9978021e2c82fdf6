// Error messages of one line, composed without iostreams.
//
// A number that goes through a std::ostream is formatted by a facet of the locale. A process that holds two copies of
// libstdc++ (an extension linked with -static-libstdc++ and loaded before torch is enough) may find that facet in
// the wrong copy: the message ends before the number, or the process ends with a segmentation fault
// (https://github.com/pytorch/pytorch/issues/109923).
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <concepts>
#include <stdexcept>
#include <string>
#include <string_view>

namespace delfast::bindings {

using torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::string text_of(std::string_view text) { return std::string(text); }
template <std::integral Number>
std::string text_of(Number number) {
  return std::to_string(number);
}

inline std::string text_of(Sizes sizes) {
  std::string all = "(";
  for (size_t i = 0; i < sizes.size(); i++) all += (i ? ", " : "") + std::to_string(sizes[i]);
  return all + ")";
}

template <class... Parts>
std::string text(const Parts&... parts) {
  return (std::string() + ... + text_of(parts));
}

}  // namespace delfast::bindings

// ValueError and IndexError in Python.
#define DELFAST_CHECK_VALUE(condition, ...)                                                \
  do {                                                                                     \
    if (!(condition)) throw std::invalid_argument(::delfast::bindings::text(__VA_ARGS__)); \
  } while (false)
#define DELFAST_CHECK_INDEX(condition, ...)                                            \
  do {                                                                                 \
    if (!(condition)) throw std::out_of_range(::delfast::bindings::text(__VA_ARGS__)); \
  } while (false)
