// Matrix operands from shared memory and their products, with the names of csrc/cuda/ptx.cuh. Fragments have the layout
// of the PTX ISA: "Warp Level Matrix Instructions: ldmatrix", "Matrix fragments for mma.m16n8k8 / mma.m16n8k16".
//
// 8 lanes at a time read 16 bytes each. It is counted as a conflict if two of them read different places in the same 4
// of the 32 banks. For ThreadSanitizer each lane reads the 16 bytes whose address it gives. Products are exact and
// added to the accumulator one by one, as in wmma.h.
#pragma once

#include "cuda_on_cpu/async_copies.h"
#include "cuda_on_cpu/wmma.h"

namespace cuda_on_cpu {

struct BankConflicts {
  uint64_t count = 0;  // groups of 8 lanes that read some banks more than once
  std::string first;   // place of the first
};
inline BankConflicts bank_conflicts;

// address(l): the address that lane l reads.
template <class Address>
void count_conflicts(Address address) {
  for (int first = 0; first < kWarp; first += 8) {
    bool conflict = false;
    for (int i = first; i < first + 8; i++)
      for (int j = first; j < i; j++)
        conflict |= address(i) != address(j) && address(i) / 16 % 8 == address(j) / 16 % 8;
    if (conflict && !bank_conflicts.count++) bank_conflicts.first = describe_thread(device.current);
  }
}

inline bool whole_warp(const char* name, unsigned lanes) {
  if (lanes != ~0u) report_failure(std::string(name) + " with lanes missing");
  return lanes == ~0u;
}

}  // namespace cuda_on_cpu

namespace ptx {

inline void load_16_bytes(uint32_t (&words)[4], Shared from, cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  cuda_on_cpu::async_copies.check_load("load_16_bytes", from, place);
  std::memcpy(words, from, 16);
  cuda_on_cpu::warp_operation("load_16_bytes", ~0u, reinterpret_cast<uint64_t>(from), 0, place, false,
                              [](cuda_on_cpu::Thread* warp, unsigned lanes) {
                                if (cuda_on_cpu::whole_warp("load_16_bytes", lanes))
                                  cuda_on_cpu::count_conflicts([&](int l) { return warp[l].value; });
                              });
}

inline void load_matrices_transposed(uint32_t (&words)[4], Shared row,
                                     cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  struct Part {
    uint16_t row[8];
    uint32_t* words;
    uint64_t address;
  } part;
  cuda_on_cpu::async_copies.check_load("load_matrices_transposed", row, place);
  std::memcpy(part.row, row, 16);
  part.words = words;
  part.address = reinterpret_cast<uint64_t>(row);
  cuda_on_cpu::warp_operation(
      "load_matrices_transposed", ~0u, reinterpret_cast<uint64_t>(&part), 0, place, false,
      [](cuda_on_cpu::Thread* warp, unsigned lanes) {
        if (!cuda_on_cpu::whole_warp("load_matrices_transposed", lanes)) return;
        const auto of = [&](int l) -> const Part& { return *reinterpret_cast<const Part*>(warp[l].value); };
        cuda_on_cpu::count_conflicts([&](int l) { return of(l).address; });
        for (int l = 0; l < cuda_on_cpu::kWarp; l++)
          for (int matrix = 0; matrix < 4; matrix++) {
            const int first = 8 * matrix + 2 * (l % 4), column = l / 4;
            of(l).words[matrix] = of(first).row[column] | uint32_t(of(first + 1).row[column]) << 16;
          }
      });
}

template <class Operand>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
              cuda_on_cpu::Place place = cuda_on_cpu::Place::current()) {
  constexpr bool kTf32 = std::is_same_v<Operand, nvcuda::wmma::precision::tf32>;
  constexpr int kDeep = kTf32 ? 8 : 16, kPacked = kTf32 ? 1 : 2;  // elements of a word
  using Element = std::conditional_t<kTf32, float, Operand>;
  struct Part {
    float a[4 * kPacked], b[2 * kPacked], c[4];
    float* d;
  } part;
  const auto unpack = [](const uint32_t* words, int count, float* out) {
    Element elements[4 * kPacked];
    std::memcpy(elements, words, size_t(count) * 4);
    for (int i = 0; i < count * kPacked; i++) out[i] = cuda_on_cpu::operand(elements[i]);
  };
  unpack(a, 4, part.a);
  unpack(b, 2, part.b);
  std::memcpy(part.c, c, sizeof part.c);
  part.d = d;
  cuda_on_cpu::warp_operation("multiply", ~0u, reinterpret_cast<uint64_t>(&part), 0, place, false,
                              [](cuda_on_cpu::Thread* warp, unsigned lanes) {
                                if (!cuda_on_cpu::whole_warp("multiply", lanes)) return;
                                float left[16][kDeep], right[kDeep][8], sums[16][8];
                                const auto of = [&](int l) -> const Part& {
                                  return *reinterpret_cast<const Part*>(warp[l].value);
                                };
                                for (int l = 0; l < cuda_on_cpu::kWarp; l++) {
                                  const int group = l / 4, in_group = l % 4;
                                  for (int word = 0; word < 4; word++)
                                    for (int e = 0; e < kPacked; e++) {
                                      const int depth = kPacked * in_group + e + kDeep / 2 * (word / 2);
                                      left[group + 8 * (word % 2)][depth] = of(l).a[kPacked * word + e];
                                      if (word % 2 == 0) right[depth][group] = of(l).b[kPacked * (word / 2) + e];
                                    }
                                  for (int i = 0; i < 4; i++)
                                    sums[group + 8 * (i / 2)][2 * in_group + i % 2] = of(l).c[i];
                                }
                                for (int i = 0; i < 16; i++)
                                  for (int t = 0; t < kDeep; t++)
                                    for (int j = 0; j < 8; j++) sums[i][j] += left[i][t] * right[t][j];
                                for (int l = 0; l < cuda_on_cpu::kWarp; l++)
                                  for (int i = 0; i < 4; i++)
                                    of(l).d[i] = sums[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
                              });
}

}  // namespace ptx
