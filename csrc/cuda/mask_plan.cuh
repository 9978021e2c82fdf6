// The plan of a mask: lists its masked entries as pieces for the updates (delfast/mask_plan.h).
//
// Mapping. A block takes kCountedBits bits of one parameter, a thread 32 of them. The first launch counts the entries
// and pieces of each block's bits, one block then adds these counts, and a third launch writes the pieces to their
// places.
// Memory. The bits are read twice, by words where they are aligned, otherwise by bytes. They may begin at any byte.
// Numerics. Integers only.
#pragma once

#include "cuda/mask_bits.cuh"
#include "delfast/cuda_launch.h"
#include "delfast/mask_plan.h"

namespace delfast::cuda {

constexpr int kCountedBits = 32 * kThreads;
constexpr int kSumThreads = 1024;

struct PlannedBits {
  const uint8_t* bits;
  int64_t units, unit_length;
  int64_t first_block;  // number of its first block, over all parameters
};

// A thread's word of bits and the pieces that its block lists: the masked ones of long units, or the stretches of other
// units.
struct CountedBits {
  uint32_t word;
  bool leads;  // first word of a stretch that has a masked unit

  __device__ __forceinline__ CountedBits(const PlannedBits& p, int64_t block)
      : word(load_word(p.bits, p.units, block * kThreads + int64_t(threadIdx.x))) {
    const uint32_t filled = __ballot_sync(kAllLanes, word != 0);
    const int words = stretch_units(p.unit_length) / 32;
    const uint32_t own = words == 32 ? kAllLanes : (1u << words) - 1;
    leads = lane() % words == 0 && (filled >> lane() & own);
  }
  // Masked units, and in the upper half stretches, of the threads before this one; `total`: of all threads.
  __device__ __forceinline__ unsigned long long scan(unsigned long long* totals, unsigned long long& total) const {
    return block_exclusive_scan(static_cast<unsigned long long>(leads) << 32 | unsigned(__popc(word)), totals, total);
  }
};

// counts[block] = masked entries, pieces[block] = their pieces.
template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    mask_plan_count(DELFAST_GRID_CONSTANT(Table<PlannedBits, kBytes>) table, int64_t piece_length, long long* counts,
                    long long* pieces) {
  const int entry = find_entry(table);
  const PlannedBits& p = table.entries[entry];
  const int64_t block = blockIdx.x - table.first_block[entry];
  DELFAST_SHARED(unsigned long long, totals, [kWarp]);
  unsigned long long total;
  CountedBits(p, block).scan(totals, total);
  if (threadIdx.x) return;
  const long long units = (long long)(uint32_t(total)), stretches = (long long)(total >> 32);
  global_store(&counts[p.first_block + block], units * (long long)(p.unit_length));
  global_store(&pieces[p.first_block + block],
               has_long_units(p.unit_length) ? units * (long long)((p.unit_length + piece_length - 1) / piece_length)
                                             : stretches);
}

// Replaces each block's counts by the sums of the counts before it, [blocks] included, and writes the head.
__global__ void __launch_bounds__(kSumThreads)
    mask_plan_sum(int64_t blocks, int64_t params, long long* counts, long long* pieces, MaskPlanHead* head) {
  DELFAST_SHARED(long long, totals, [kWarp]);
  for (int which = 0; which < 2; which++) {
    long long* const list = which ? pieces : counts;
    long long before = 0;
    for (int64_t begin = 0; begin < blocks; begin += kSumThreads) {
      const int64_t i = begin + int64_t(threadIdx.x);
      const long long mine = i < blocks ? global_load(&list[i]) : 0;
      long long total;
      const long long sum = before + block_exclusive_scan(mine, totals, total);
      if (i < blocks) global_store(&list[i], sum);
      before += total;
    }
    if (threadIdx.x) continue;
    global_store(&list[blocks], before);
    if (which) *head = {params, int64_t(before)};
  }
}

// `first` is the number of the table's first parameter.
template <int kBytes>
__global__ void __launch_bounds__(kThreads)
    mask_plan_list(DELFAST_GRID_CONSTANT(Table<PlannedBits, kBytes>) table, int64_t piece_length, int first,
                   const long long* counts, const long long* pieces, MaskedParam* params, MaskPiece* list) {
  const int entry = find_entry(table);
  const PlannedBits& p = table.entries[entry];
  const int64_t block = blockIdx.x - table.first_block[entry], number = p.first_block + block;
  const int64_t length = p.unit_length, of_earlier = global_load_const(&counts[p.first_block]);
  if (block == 0 && threadIdx.x == 0) {
    const int64_t blocks = table.first_block[entry + 1] - table.first_block[entry];
    params[first + entry] = {p.units, length, global_load_const(&counts[p.first_block + blocks]) - of_earlier};
  }
  DELFAST_SHARED(unsigned long long, totals, [kWarp]);
  const CountedBits own(p, block);
  unsigned long long total;
  const unsigned long long before = own.scan(totals, total);
  const int64_t rank = global_load_const(&counts[number]) - of_earlier + int64_t(uint32_t(before)) * length;
  const int64_t unit = block * kCountedBits + int64_t(threadIdx.x) * 32;
  MaskPiece* next = list + global_load_const(&pieces[number]);
  if (!has_long_units(length)) {
    if (!own.leads) return;
    const int64_t left = p.units - unit, whole = stretch_units(length);
    next[before >> 32] = {unit, rank, first + entry, int32_t(left < whole ? left : whole)};
    return;
  }
  next += int64_t(uint32_t(before)) * ((length + piece_length - 1) / piece_length);
  int64_t of_unit = rank;
  for (uint32_t bits = own.word; bits; bits &= bits - 1, of_unit += length)
    for (int64_t at = 0; at < length; at += piece_length)
      *next++ = {(unit + __ffs(int(bits)) - 1) * length + at, of_unit + at, first + entry,
                 int32_t(length - at < piece_length ? length - at : piece_length)};
}

}  // namespace delfast::cuda
