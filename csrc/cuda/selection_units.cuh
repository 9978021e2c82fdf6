// Few units selected by one block in one launch: the threshold, the ties in order, the bits, the unit to cut.
//
// Mapping. A word is 32 units of one parameter. A warp takes neighbouring words, a lane one unit of each. A unit's
// score stays in its lane's registers. Three radix passes add the weights of digits in shared memory. Ties use the
// budget in the order of warps, words and lanes.
// Memory. Every score is read once, every byte of bits written once.
// Numerics. Integers only. Sums of weights have 32 bits: all units together have fewer than 2^32 scalars.
#pragma once

#include "cuda/radix.cuh"

namespace delfast::cuda {

constexpr int kUnitThreads = 1024, kUnitWarps = kUnitThreads / kWarp;
constexpr int kUnitRounds = 28;  // words of a warp, limited by registers
constexpr int kUnitWords = kUnitRounds * kUnitWarps;

struct UnitsOfParam {
  uint32_t first_unit, count, first_byte, length;  // table.first_block counts its words
};

struct UnitWord {
  uint32_t first_unit, first_byte, length, count;  // count: units, up to 32
};

template <int kBytes>
__global__ void __launch_bounds__(kUnitThreads)
    selection_few_units(DELFAST_GRID_CONSTANT(Table<UnitsOfParam, kBytes>) table, const float* scores, uint32_t budget,
                        bool cut_last, uint8_t* bits, UnitsInfo* info) {
  DELFAST_SHARED(UnitWord, words, [kUnitWords]);
  DELFAST_SHARED(uint32_t, bins, [kRadixBins]);
  DELFAST_SHARED(uint32_t, totals, [kWarp]);
  DELFAST_SHARED(uint32_t, threshold);
  DELFAST_SHARED(uint32_t, left);
  DELFAST_SHARED(uint32_t, bad);
  DELFAST_SHARED(uint32_t, found_one);
  DELFAST_SHARED(uint32_t, selected);
  DELFAST_SHARED(uint32_t, positive);
  DELFAST_SHARED(uint32_t, cut, [2]);
  constexpr uint32_t kNoUnit = UINT32_MAX;
  const int count = int(table.first_block[table.count]), rounds = (count + kUnitWarps - 1) / kUnitWarps;
  for (int entry = warp(); entry < table.count; entry += kUnitWarps) {
    const UnitsOfParam p = table.entries[entry];
    const int first = int(table.first_block[entry]);
    for (int word = lane(); word * kWarp < int(p.count); word += kWarp) {
      const uint32_t unit = uint32_t(word * kWarp), rest = p.count - unit;
      words[first + word] = {p.first_unit + unit, p.first_byte + unit / 8, p.length, rest < kWarp ? rest : kWarp};
    }
  }
  if (threadIdx.x == 0) {
    threshold = selected = positive = 0;
    left = budget;
    bad = kNoUnit;
    cut[0] = kNoUnit;
    cut[1] = 0;
  }
  __syncthreads();

  const int begin = warp() * rounds, mine = begin + rounds <= count ? rounds : count > begin ? count - begin : 0;
  const UnitWord* const own = words + begin;
  int32_t keys[kUnitRounds];  // -1 where there is no unit
#pragma unroll
  for (int r = 0; r < kUnitRounds; r++) {
    keys[r] = -1;
    if (r < mine && uint32_t(lane()) < own[r].count)
      keys[r] = int32_t(float_bits(global_load_const(&scores[own[r].first_unit + uint32_t(lane())])) & 0x7fffffff);
  }
#pragma unroll
  for (int r = 0; r < kUnitRounds; r++)
    if (keys[r] >= int32_t(kInfinity)) atomicMin(&bad, own[r].first_unit + uint32_t(lane()));

  bool everything = false;
#pragma unroll 1
  for (int pass = 0; pass < kRadixPasses && !everything; pass++) {
    clear_bins(bins);
    const RadixPass digit = radix_pass(pass);
    const uint32_t digits = threshold, budget_left = left;
    const int above = digit.shift + digit.width, prefix = int32_t(digits) >> above;
    if (threadIdx.x == 0) found_one = 0;
#pragma unroll
    for (int r = 0; r < kUnitRounds; r++)
      if (r < mine && keys[r] >> above == prefix)
        atomicAdd(&bins[uint32_t(keys[r]) >> digit.shift & ((1u << digit.width) - 1)], own[r].length);
    find_digit<kUnitThreads>(bins, budget_left, totals, [&](uint32_t found, uint32_t higher, uint32_t) {
      threshold = digits | found << digit.shift;
      left = budget_left - higher;
      found_one = 1;
    });
    __syncthreads();
    everything = !found_one;
  }
  const int32_t least = int32_t(threshold);
  const uint32_t ties_left = left;
  const bool nothing = bad != kNoUnit;

  uint32_t tied = 0;  // weight of the warp's ties
#pragma unroll
  for (int r = 0; r < kUnitRounds; r++)
    if (r < mine) tied += uint32_t(__popc(__ballot_sync(kAllLanes, keys[r] == least))) * own[r].length;
  if (lane() == 0) totals[warp()] = tied;
  __syncthreads();
  uint32_t before = 0;  // weight of the earlier ties
  for (int w = 0; w < warp(); w++) before += totals[w];

  uint32_t chosen = 0, above_zero = 0;  // numbers of the lane's units
#pragma unroll
  for (int r = 0; r < kUnitRounds; r++) {
    if (r >= mine) continue;
    const uint32_t ties = __ballot_sync(kAllLanes, keys[r] == least), length = own[r].length;
    const uint32_t from = before + uint32_t(__popc(ties & ((1u << lane()) - 1))) * length;
    const bool tie = keys[r] == least, fits = everything || from + length <= ties_left;
    const bool takes = !nothing && (keys[r] > least || (tie && fits));
    const bool is_cut = !nothing && cut_last && tie && !fits && from < ties_left;
    if (is_cut) {
      cut[0] = own[r].first_unit + uint32_t(lane());
      cut[1] = ties_left - from;
    }
    chosen += takes;
    above_zero += (takes || is_cut) && keys[r] > 0;
    const uint32_t packed = __ballot_sync(kAllLanes, takes);
    if (uint32_t(8 * lane()) < own[r].count)
      global_store(&bits[own[r].first_byte + uint32_t(lane())], uint8_t(packed >> 8 * lane()));
    before += uint32_t(__popc(ties)) * length;
  }
  chosen = __reduce_add_sync(kAllLanes, chosen);
  above_zero = __reduce_add_sync(kAllLanes, above_zero);
  if (lane() == 0 && chosen) atomicAdd(&selected, chosen);
  if (lane() == 0 && above_zero) atomicAdd(&positive, above_zero);
  __syncthreads();
  if (threadIdx.x) return;
  global_store(&info->cut_unit, cut[0] == kNoUnit ? int64_t(-1) : int64_t(cut[0]));
  global_store(&info->cut_size, int64_t(cut[1]));
  global_store(&info->nonfinite, nothing ? int64_t(bad) : int64_t(-1));
  global_store(&info->selected, int64_t(selected));
  global_store(&info->positive, int64_t(positive));
}

}  // namespace delfast::cuda
