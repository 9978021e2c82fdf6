// Checks that print their place and the values, and are counted. Fifty lines instead of a test framework: these tests
// must run on a machine that has only Python and a compiler.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iomanip>
#include <iostream>
#include <sstream>
#include <string>
#include <type_traits>

#include "delfast/half.h"

namespace delfast::test {

inline int64_t checks = 0, failures = 0;
inline std::string current_case;  // first part of a failure's message

template <class... Parts>
void describe(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  current_case = text.str();
}

template <class T>
std::string shown(const T& value) {
  std::ostringstream text;
  if constexpr (std::is_enum_v<T>)
    text << int64_t(value);
  else if constexpr (std::is_same_v<T, float>)
    text << std::setprecision(9) << value << " (bits 0x" << std::hex << float_bits(value) << ")";
  else if constexpr (std::is_same_v<T, double>)
    text << std::setprecision(17) << value;
  else if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>)
    text << +value << " (0x" << std::hex << std::make_unsigned_t<T>(value) + 0u << ")";
  else
    text << std::boolalpha << value;
  return text.str();
}

inline void fail(const char* file, int line, const std::string& message) {
  constexpr int kShown = 20;
  if (++failures <= kShown) std::cout << file << ":" << line << ": [" << current_case << "] " << message << "\n";
  if (failures == kShown) std::cout << "further failures are only counted\n";
}

// Returns true if both are the same bits (0 and -0 differ). All NaNs are equal, because the compiler decides which NaN
// an operation on two of them yields.
inline bool same(float a, float b) { return float_bits(a) == float_bits(b) || (std::isnan(a) && std::isnan(b)); }

// The last line of every main. A test that checked nothing has failed too.
inline int report() {
  std::cout << checks << " checks, " << failures << " failures\n";
  return checks && !failures ? 0 : 1;
}

}  // namespace delfast::test

#define CHECK_THAT(condition, text)                                      \
  do {                                                                   \
    ::delfast::test::checks++;                                           \
    if (!(condition)) ::delfast::test::fail(__FILE__, __LINE__, (text)); \
  } while (0)

#define CHECK(condition) CHECK_THAT(condition, "expected " #condition)

#define CHECK_EQUAL(actual, expected)                                                                            \
  do {                                                                                                           \
    const auto actual_ = (actual);                                                                               \
    const auto expected_ = (expected);                                                                           \
    CHECK_THAT(actual_ == expected_, "expected " #actual " == " + ::delfast::test::shown(expected_) + ", got " + \
                                         ::delfast::test::shown(actual_));                                       \
  } while (0)

#define CHECK_SAME(actual, expected)                                                                         \
  do {                                                                                                       \
    const float actual_ = (actual), expected_ = (expected);                                                  \
    CHECK_THAT(::delfast::test::same(actual_, expected_), "expected " #actual " to be " +                    \
                                                              ::delfast::test::shown(expected_) + ", got " + \
                                                              ::delfast::test::shown(actual_));              \
  } while (0)

#define CHECK_NEAR(actual, expected, bound)                                                         \
  do {                                                                                              \
    const double actual_ = (actual), expected_ = (expected), bound_ = (bound);                      \
    CHECK_THAT(std::fabs(actual_ - expected_) <= bound_,                                            \
               "expected " #actual " within " + ::delfast::test::shown(bound_) + " of " +           \
                   ::delfast::test::shown(expected_) + ", got " + ::delfast::test::shown(actual_)); \
  } while (0)
