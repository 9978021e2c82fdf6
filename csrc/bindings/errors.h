// Error messages of one line, put together without iostreams.
//
// A number that goes through a std::ostream is formatted by a facet of the locale. A process that holds two copies of
// libstdc++ (an extension linked with -static-libstdc++ and loaded before torch is enough) may look that facet up in
// the wrong copy: the message ends before the number, or the process ends with a segmentation fault
// (https://github.com/pytorch/pytorch/issues/109923). TORCH_CHECK puts its parts through such a stream, unless it gets
// one std::string.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <concepts>
#include <string>
#include <string_view>

namespace delfast::bindings {

inline std::string text_of(std::string_view text) { return std::string(text); }
template <std::same_as<c10::Device> Device>  // a template, since text converts to a Device
std::string text_of(Device device) {
  return device.str();
}
template <std::same_as<c10::ScalarType> Type>
std::string text_of(Type type) {
  return c10::toString(type);
}
template <std::integral Number>
std::string text_of(Number number) {
  return std::to_string(number);
}

template <class... Parts>
std::string text(const Parts&... parts) {
  return (std::string() + ... + text_of(parts));
}

inline std::string shape_text(c10::IntArrayRef sizes) {
  std::string all = "(";
  for (size_t i = 0; i < sizes.size(); i++) all += (i ? ", " : "") + std::to_string(sizes[i]);
  return all + ")";
}

}  // namespace delfast::bindings

// ValueError, TypeError and IndexError in Python.
#define DELFAST_CHECK_VALUE(condition, ...) TORCH_CHECK_VALUE(condition, ::delfast::bindings::text(__VA_ARGS__))
#define DELFAST_CHECK_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, ::delfast::bindings::text(__VA_ARGS__))
#define DELFAST_CHECK_INDEX(condition, ...) TORCH_CHECK_INDEX(condition, ::delfast::bindings::text(__VA_ARGS__))
