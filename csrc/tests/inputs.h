// Shared by the tests: memory that detects stray accesses, arrays of any dtype, seeded values, and main()'s argument.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iostream>
#include <random>
#include <vector>

#include "check.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::test {

// `count` elements that end where an inaccessible page begins: reading or writing past them faults, in any build and by
// any instruction (AddressSanitizer does not detect the masked loads and stores of AVX-512). `shift` moves them down by
// that number of elements, to another alignment. All other bytes of the mapping are canaries, checked at the end.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, int64_t shift = 0) : count_(count), shift_(shift) {
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = (count + shift) * int64_t(sizeof(T));
    room_ = (bytes + page - 1) / page * page;
    void* base = mmap(nullptr, size_t(room_ + page), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(static_cast<char*>(base) + room_, size_t(page), PROT_NONE)) {
      std::perror("expected to map memory for a test");
      std::exit(1);
    }
    base_ = static_cast<unsigned char*>(base);
    mapped_ = room_ + page;
    data_ = reinterpret_cast<T*>(base_ + room_ - bytes);
    std::memset(base_, kCanary, size_t(room_));
  }
  Guarded(const Guarded& other) : Guarded(other.count_, other.shift_) {
    if (count_) std::memcpy(data_, other.data_, size_t(count_) * sizeof(T));
  }
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    const auto intact = [](unsigned char byte) { return byte == kCanary; };
    CHECK(std::all_of(base_, reinterpret_cast<unsigned char*>(data_), intact));
    CHECK(std::all_of(reinterpret_cast<unsigned char*>(data_ + count_), base_ + room_, intact));
    munmap(base_, size_t(mapped_));
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr unsigned char kCanary = 0xa5;
  int64_t count_, shift_, room_, mapped_;
  unsigned char* base_;
  T* data_;
};

#ifdef DELFAST_FEW_INSTANCES
inline constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16};
#else
inline constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
#endif
inline constexpr Dtype kSecondHalf = kFewInstances ? Dtype::bfloat16 : Dtype::float16;
inline const char* name(Dtype dtype) {
  return dtype == Dtype::float32 ? "float32" : dtype == Dtype::bfloat16 ? "bfloat16" : "float16";
}
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline constexpr Criterion kCriteria[] = {Criterion::weighted_grad, Criterion::grad, Criterion::weight};
inline const char* name(Criterion criterion) {
  return criterion == Criterion::weighted_grad ? "|theta g|" : criterion == Criterion::grad ? "|g|" : "|theta|";
}

inline const char* name(Transform transform) { return transform == Transform::abs ? "abs" : "square"; }

// An array whose dtype is selected at run time.
class Array {
 public:
  Array(Dtype dtype, int64_t count, int64_t shift = 0)
      : dtype_(dtype), bytes_(count * size_of(dtype), shift * size_of(dtype)) {}

  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  Dtype dtype() const { return dtype_; }
  int64_t size() const { return bytes_.size() / size_of(dtype_); }

  float get(int64_t i) const {
    if (dtype_ == Dtype::float32) return bits_float(bits(i));
    if (dtype_ == Dtype::bfloat16) return to_float(bfloat16{uint16_t(bits(i))});
    return to_float(float16{uint16_t(bits(i))});
  }
  void set(int64_t i, float value) { set_bits(i, rounded_bits(value)); }
  uint32_t bits(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, bytes_.data() + i * size_of(dtype_), size_t(size_of(dtype_)));
    return bits;
  }
  void set_bits(int64_t i, uint32_t bits) {
    std::memcpy(bytes_.data() + i * size_of(dtype_), &bits, size_t(size_of(dtype_)));
  }
  // The value rounded to this dtype.
  uint32_t rounded_bits(float value) const {
    bfloat16 b;
    float16 h;
    assign(b, value);
    assign(h, value);
    return dtype_ == Dtype::float32 ? float_bits(value) : dtype_ == Dtype::bfloat16 ? b.bits : h.bits;
  }

 private:
  Dtype dtype_;
  Guarded<unsigned char> bytes_;
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  uint32_t bits() { return uint32_t(engine_()); }
  Dtype dtype() { return kDtypes[below(int64_t(std::size(kDtypes)))]; }
  int64_t below(int64_t limit) { return int64_t((uint64_t(bits()) << 32 | bits()) % uint64_t(limit)); }
  float unit() { return float(bits() >> 8) * 0x1p-24f; }  // [0, 1)
  // Random values of either sign over several powers of two, like a trained network's weights and gradients.
  float value() { return (2 * unit() - 1) * bits_float(uint32_t(127 - below(10)) << 23); }

 private:
  std::mt19937 engine_;  // the same sequence on every platform, unlike the standard distributions
};

// Kinds of rows that an implementation may compute wrongly.
enum class Kind { ordinary, few_values, ties, zeros, denormal, outlier };
inline constexpr Kind kKinds[] = {Kind::ordinary, Kind::few_values, Kind::ties,
                                  Kind::zeros,    Kind::denormal,   Kind::outlier};
inline const char* name(Kind kind) {
  constexpr const char* names[] = {"ordinary", "few values", "ties", "zeros", "denormal", "outlier"};
  return names[int(kind)];
}

inline void fill(Array& array, Kind kind, Random& random) {
  const float least = array.dtype() == Dtype::float32    ? 0x1p-149f
                      : array.dtype() == Dtype::bfloat16 ? 0x1p-133f
                                                         : 0x1p-24f;
  const int64_t outlier = array.size() ? random.below(array.size()) : 0;
  for (int64_t i = 0; i < array.size(); i++) {
    float x = random.value();
    if (kind == Kind::few_values) x = float(random.below(3)) - 1.25f;
    // a bad number to add repeatedly in float32: the error of 512 additions is 100 * 2^-24
    if (kind == Kind::ties) x = random.below(2) ? 0.89f : -0.89f;
    if (kind == Kind::zeros) x = random.below(2) ? 0.0f : -0.0f;
    if (kind == Kind::denormal) x = least * float(random.below(100)) * (random.below(2) ? 1.0f : -1.0f);
    if (kind == Kind::outlier && i == outlier) x = 30000;
    array.set(i, x);
  }
}

// theta, its gradient, and the struct with which a kernel reads them.
struct Scores {
  Array theta, grad;
  Layout layout;
  int64_t piece = 0;  // see Scored
  Criterion criterion;

  Scores(Layout layout, Criterion criterion, Dtype theta_dtype, Dtype grad_dtype, int64_t shift = 0)
      : Scores(layout, criterion, theta_dtype, grad_dtype, shift, shift) {}
  Scores(Layout layout, Criterion criterion, Dtype theta_dtype, Dtype grad_dtype, int64_t theta_shift,
         int64_t grad_shift)
      : theta(theta_dtype, layout.numel(), theta_shift),
        grad(grad_dtype, layout.numel(), grad_shift),
        layout(layout),
        criterion(criterion) {}

  void fill(Kind kind, Random& random) {
    test::fill(theta, kind, random);
    // denormal products come from denormals times ordinary numbers
    test::fill(grad, kind == Kind::denormal && criterion == Criterion::weighted_grad ? Kind::ordinary : kind, random);
  }
  // Pointers that the criterion does not read are null, as the kernels allow.
  Scored scored() const {
    return {criterion == Criterion::grad ? nullptr : theta.data(),
            criterion == Criterion::weight ? nullptr : grad.data(),
            theta.dtype(),
            grad.dtype(),
            layout,
            piece};
  }
  // c_j of the element at this offset, without rounding: a double represents the product of two floats exactly.
  double exact(int64_t i) const {
    if (criterion == Criterion::weight) return std::fabs(double(theta.get(i)));
    if (criterion == Criterion::grad) return std::fabs(double(grad.get(i)));
    return std::fabs(double(theta.get(i)) * double(grad.get(i)));
  }
  // c_j by definition: rounded once, to float32.
  float score(int64_t i) const { return float(exact(i)); }
};

// The instruction set that ctest names. Exits if this CPU does not support it; ctest reports the test as skipped.
inline cpu::Isa isa_argument(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  for (int i = 0; i < int(std::size(cpu::kIsaNames)); i++) {
    if (name != cpu::kIsaNames[i]) continue;
    if (cpu::isa_supported(cpu::Isa(i))) return cpu::Isa(i);
    std::cout << "skipped: this CPU or build does not have " << name << "\n";
    std::exit(77);
  }
  std::cerr << "expected one argument, scalar, avx2, avx512 or amx, got '" << name << "'\n";
  std::exit(2);
}

}  // namespace delfast::test
