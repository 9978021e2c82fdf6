// Channel scores: one pass over theta and the gradient for every row that fits in shared memory; no |theta g| in global
// memory.
//
// Mapping. Rows are of four classes, each with its own kernel: one element (a thread each); up to kWarpRow (a warp
// each); up to kBlockRow (a block each); longer (several blocks each, one per segment, and a second pass).
// Memory. A row's scores are computed once, by coalesced 16-byte loads, into shared memory, where the radix select for
// the top h and the sum read them. A long row does not fit: its segments are read once in each of the three radix
// passes and once for the sum.
// Numerics, the CPU kernels' bit for bit. A sum keeps 16 interleaved partial sums in float32 for kBlock elements, then
// adds them to 16 partial sums in double, which are added pairwise at the end. Who loads an element depends on its
// alignment, who adds it does not: sums read shared memory by the element's place in the row.
#pragma once

#include "cuda/radix.cuh"

namespace delfast::cuda {

constexpr int64_t kBlock = 512;           // elements that 16 float32 sums cover
constexpr int64_t kWarpRow = 2 * kBlock;  // 2 x 16 sums: one for each lane
constexpr int64_t kBlockRow = 1 << 14;
constexpr int64_t kSegment = kThreads / 16 * kBlock;  // of a long row: one sum for each thread
constexpr int64_t kElementTile = 2048;                // elements for a block, of rows of one element
constexpr int kWarps = kThreads / kWarp;

enum class Reduce : int8_t { sum, mean, max, top };

struct Rows {
  Operands operands;
  Reduce reduce;
  int64_t rows, length;
  int64_t top;   // for Reduce::top, in (1, length)
  float* out;    // of the first row
  int64_t slot;  // of long rows: the number of the first, over all parameters
};

// Shared memory holds 16 words after every kBlock scores, so that the 32 sums of two blocks, which a warp adds up side
// by side, lie in 32 banks.
__host__ __device__ constexpr int64_t shared_slot(int64_t element) { return element + element / kBlock * 16; }

// ---- groups of threads that share a row

struct WarpGroup {
  static __device__ __forceinline__ int thread() { return lane(); }
  static __device__ __forceinline__ int threads() { return kWarp; }
  static __device__ __forceinline__ void sync() { __syncwarp(); }
};
struct BlockGroup {
  static __device__ __forceinline__ int thread() { return int(threadIdx.x); }
  static __device__ __forceinline__ int threads() { return int(blockDim.x); }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
};

// ---- the top h of a row in shared memory

struct Threshold {
  uint32_t bits;  // scores from these bits on count in full ...
  uint32_t tie;   // ... and `ties` more scores with these bits
  int64_t ties;
};

constexpr int kSelectBins = 256;

// The digit at which the 256 bins' sum from the top first exceeds `left`, which loses what lies above it; for a warp,
// with the same result in every lane.
__device__ __forceinline__ uint32_t select_digit(const uint32_t* bins, uint32_t& left, uint32_t& count) {
  constexpr int kBins = kSelectBins / kWarp;
  const int top = kSelectBins - 1 - lane() * kBins;
  uint32_t sum = 0;
  for (int i = 0; i < kBins; i++) sum += bins[top - i];
  uint32_t above = warp_inclusive_scan(sum) - sum;
  const bool here = above <= left && left < above + sum;
  uint32_t digit = 0, at = 0;
  if (here) {
    for (int i = 0; i < kBins; i++) {
      at = bins[top - i];
      digit = uint32_t(top - i);
      if (above + at > left) break;
      above += at;
    }
  }
  const int owner = __ffs(int(__ballot_sync(kAllLanes, here))) - 1;
  left -= __shfl_sync(kAllLanes, above, owner);
  count = __shfl_sync(kAllLanes, at, owner);
  return __shfl_sync(kAllLanes, digit, owner);
}

// Radix select by four digits of 8, 8, 8 and 7 bits. Every warp of the group descends on its own, to the same result.
template <class Group>
__device__ __forceinline__ Threshold select_top(const uint32_t* scores, int length, int64_t top, uint32_t* bins) {
  uint32_t threshold = 0, left = uint32_t(top) - 1, count = 0;
  for (int shift = 23; shift >= 0; shift = shift > 7 ? shift - 8 : shift - 7) {
    const int width = shift ? 8 : 7;
    for (int bin = Group::thread(); bin < kSelectBins; bin += Group::threads()) bins[bin] = 0;
    Group::sync();
    for (int e = Group::thread(); e < length; e += Group::threads()) {
      const uint32_t bits = scores[shared_slot(e)];
      if (bits >> (shift + width) == threshold >> (shift + width))
        atomicAdd(&bins[bits >> shift & ((1u << width) - 1)], 1u);
    }
    Group::sync();
    threshold |= select_digit(bins, left, count) << shift;
    Group::sync();
    if (shift == 0) break;
  }
  // left + 1 of the `count` scores equal to the threshold belong to the top
  if (left + 1 == count) return {threshold, 0, 0};
  return {threshold + 1, threshold, int64_t(left) + 1};
}

// The float32 sum number `sum` (of the 16 of each block, block after block) of the scores in shared memory.
__device__ __forceinline__ float partial_sum(const uint32_t* scores, int64_t length, int sum, uint32_t threshold) {
  const int64_t first = sum / 16 * kBlock + sum % 16;
  float total = 0;
  for (int64_t e = first; e < first + kBlock && e < length; e += 16) {
    const uint32_t bits = scores[shared_slot(e)];
    if (bits >= threshold) total += bits_float(bits);
  }
  return total;
}

// What 16 lanes' double sums make, in lane 0 of a warp.
__device__ __forceinline__ double add_pairwise(double sum) {
  for (int width = 8; width; width /= 2) sum += __shfl_down_sync(kAllLanes, sum, width);
  return sum;
}

__device__ __forceinline__ float reduced(const Rows& p, double sum, const Threshold& t) {
  switch (p.reduce) {
    case Reduce::mean:
      return float(sum / double(p.length));
    case Reduce::top:
      return float((sum + double(t.ties) * double(bits_float(t.tie))) / double(p.top));
    default:
      return float(sum);
  }
}

// ---- the kernels

__global__ void __launch_bounds__(kThreads)
    criticality_elements(const __grid_constant__ Table<Rows> table, Criterion criterion) {
  const int entry = find_entry(table);
  const Rows& p = table.entries[entry];
  const int64_t begin = int64_t(blockIdx.x - table.first_block[entry]) * kElementTile;
  const int64_t end = begin + kElementTile < p.rows ? begin + kElementTile : p.rows;
  with_score(p.operands, criterion, [&](auto score) {
    for_each_score(score, begin, end, int(threadIdx.x), kThreads,
                   [&](int64_t i, uint32_t bits) { global_store(&p.out[i], bits_float(bits)); });
  });
}

// Dynamic shared memory: per warp, a row's scores, then its bins.
__global__ void __launch_bounds__(kThreads)
    criticality_warp_rows(const __grid_constant__ Table<Rows> table, Criterion criterion, int slots) {
  const int entry = find_entry(table);
  const Rows& p = table.entries[entry];
  const int64_t row = int64_t(blockIdx.x - table.first_block[entry]) * kWarps + warp();
  if (row >= p.rows) return;  // the whole warp: warps do not wait for one another
  DELFAST_DYNAMIC_SHARED(uint32_t, shared);
  uint32_t* const scores = shared + warp() * (slots + kSelectBins);
  uint32_t* const bins = scores + slots;

  const int64_t begin = row * p.length;
  uint32_t largest = 0;
  with_score(p.operands, criterion, [&](auto score) {
    for_each_score(score, begin, begin + p.length, lane(), kWarp, [&](int64_t i, uint32_t bits) {
      scores[shared_slot(i - begin)] = bits;
      largest = bits > largest ? bits : largest;
    });
  });
  __syncwarp();
  if (p.reduce == Reduce::max) {
    largest = __reduce_max_sync(kAllLanes, largest);
    if (lane() == 0) global_store(&p.out[row], bits_float(largest));
    return;
  }
  Threshold threshold = {0, 0, 0};
  if (p.reduce == Reduce::top) threshold = select_top<WarpGroup>(scores, int(p.length), p.top, bins);
  double sum = double(partial_sum(scores, p.length, lane(), threshold.bits));
  sum += __shfl_down_sync(kAllLanes, sum, 16);  // the second block's sums
  sum = add_pairwise(sum);
  if (lane() == 0) global_store(&p.out[row], reduced(p, sum, threshold));
}

// Dynamic shared memory: the row's scores, then its bins, then its partial sums, in words.
__host__ __device__ constexpr int64_t block_row_words(int64_t length) {
  return shared_slot(length) + kSelectBins + (length + kBlock - 1) / kBlock * 16;
}

// kBlockRow elements take 71 KB: three
// blocks of 512 threads on sm_90, 75 % of its threads; rows of half of that leave room for six blocks of 256, as many.
__global__ void __launch_bounds__(2 * kThreads)
    criticality_block_rows(const __grid_constant__ Table<Rows> table, Criterion criterion, int slots) {
  const int entry = find_entry(table);
  const Rows& p = table.entries[entry];
  const int64_t row = blockIdx.x - table.first_block[entry];
  DELFAST_DYNAMIC_SHARED(uint32_t, scores);
  uint32_t* const bins = scores + slots;
  float* const partial = reinterpret_cast<float*>(bins + kSelectBins);

  const int64_t begin = row * p.length;
  uint32_t largest = 0;
  if (threadIdx.x == 0) bins[0] = 0;  // the largest score, for Reduce::max
  with_score(p.operands, criterion, [&](auto score) {
    for_each_score(score, begin, begin + p.length, int(threadIdx.x), int(blockDim.x), [&](int64_t i, uint32_t bits) {
      scores[shared_slot(i - begin)] = bits;
      largest = bits > largest ? bits : largest;
    });
  });
  __syncthreads();
  if (p.reduce == Reduce::max) {
    largest = __reduce_max_sync(kAllLanes, largest);
    if (lane() == 0) atomicMax(&bins[0], largest);
    __syncthreads();
    if (threadIdx.x == 0) global_store(&p.out[row], bits_float(bins[0]));
    return;
  }
  Threshold threshold = {0, 0, 0};
  if (p.reduce == Reduce::top) threshold = select_top<BlockGroup>(scores, int(p.length), p.top, bins);
  const int blocks = int((p.length + kBlock - 1) / kBlock);
  for (int i = int(threadIdx.x); i < blocks * 16; i += int(blockDim.x))
    partial[i] = partial_sum(scores, p.length, i, threshold.bits);
  __syncthreads();
  if (warp() != 0) return;
  double sum = 0;
  if (lane() < 16)
    for (int b = 0; b < blocks; b++) sum += double(partial[b * 16 + lane()]);
  sum = add_pairwise(sum);
  if (lane() == 0) global_store(&p.out[row], reduced(p, sum, threshold));
}

// ---- long rows: what their blocks share, in global memory

struct LongRow {
  uint32_t histogram[kRadixBins];
  uint32_t left, digits;  // of the search: what is left of the budget, the digits found so far
  uint32_t largest;
  uint32_t threshold, tie, ties;  // as in Threshold
};

struct LongRows {
  LongRow* rows;
  float* partial;  // 16 sums per block of every row, rows padded to `pitch`
  int64_t pitch;
};

struct Segment {
  int64_t row, begin, end;  // elements of the row
};
__device__ __forceinline__ Segment segment_of(const Rows& p, int64_t block) {
  const int64_t per_row = (p.length + kSegment - 1) / kSegment, begin = block % per_row * kSegment;
  return {block / per_row, begin, begin + kSegment < p.length ? begin + kSegment : p.length};
}

__global__ void __launch_bounds__(kThreads)
    criticality_long_begin(const __grid_constant__ Table<Rows> table, LongRows long_rows) {
  const int entry = find_entry(table);
  const Rows& p = table.entries[entry];
  LongRow& row = long_rows.rows[p.slot + blockIdx.x - table.first_block[entry]];
  for (int bin = int(threadIdx.x); bin < kRadixBins; bin += kThreads) global_store(&row.histogram[bin], 0u);
  if (threadIdx.x) return;
  global_store(&row.left, uint32_t(p.top) - 1);
  global_store(&row.digits, 0u);
  global_store(&row.largest, 0u);
  global_store(&row.threshold, 0u);
  global_store(&row.tie, 0u);
  global_store(&row.ties, 0u);
}

__global__ void __launch_bounds__(kThreads) criticality_long_count(const __grid_constant__ Table<Rows> table,
                                                                   Criterion criterion, LongRows long_rows, int pass) {
  const int entry = find_entry(table);
  const Rows& p = table.entries[entry];
  if (p.reduce != Reduce::top) return;
  const Segment segment = segment_of(p, blockIdx.x - table.first_block[entry]);
  LongRow& row = long_rows.rows[p.slot + segment.row];
  const uint32_t digits = global_load(&row.digits);
  DELFAST_SHARED(uint32_t, bins, [kRadixBins]);
  clear_bins(bins);
  const int64_t start = segment.row * p.length;
  with_score(p.operands, criterion, [&](auto score) {
    for_each_score(score, start + segment.begin, start + segment.end, int(threadIdx.x), kThreads,
                   [&](int64_t, uint32_t bits) { count_digit(bits, radix_pass(pass), digits, bins); });
  });
  add_bins(bins, 1u, row.histogram);
}

__global__ void __launch_bounds__(kThreads)
    criticality_long_descend(const __grid_constant__ Table<Rows> table, LongRows long_rows, int pass) {
  const int entry = find_entry(table);
  const Rows& p = table.entries[entry];
  if (p.reduce != Reduce::top) return;
  LongRow& row = long_rows.rows[p.slot + blockIdx.x - table.first_block[entry]];
  DELFAST_SHARED(uint32_t, bins, [kRadixBins]);
  DELFAST_SHARED(uint32_t, totals, [kWarp]);
  const uint32_t left = global_load(&row.left), digits = global_load(&row.digits);
  descend(row.histogram, left, bins, totals, [&](uint32_t digit, uint32_t above, uint32_t count) {
    const uint32_t found = digits | digit << radix_pass(pass).shift, ties = left - above + 1;
    global_store(&row.digits, found);
    global_store(&row.left, left - above);
    if (pass < kRadixPasses - 1) return;
    global_store(&row.threshold, found + (ties != count));
    global_store(&row.tie, found);
    global_store(&row.ties, ties != count ? ties : 0u);
  });
}

__global__ void __launch_bounds__(kThreads)
    criticality_long_sum(const __grid_constant__ Table<Rows> table, Criterion criterion, LongRows long_rows) {
  const int entry = find_entry(table);
  const Rows& p = table.entries[entry];
  const Segment segment = segment_of(p, blockIdx.x - table.first_block[entry]);
  LongRow& row = long_rows.rows[p.slot + segment.row];
  DELFAST_SHARED(uint32_t, scores, [shared_slot(kSegment)]);
  const int64_t start = segment.row * p.length + segment.begin, length = segment.end - segment.begin;
  uint32_t largest = 0;
  with_score(p.operands, criterion, [&](auto score) {
    for_each_score(score, start, start + length, int(threadIdx.x), kThreads, [&](int64_t i, uint32_t bits) {
      scores[shared_slot(i - start)] = bits;
      largest = bits > largest ? bits : largest;
    });
  });
  if (p.reduce == Reduce::max) {
    largest = __reduce_max_sync(kAllLanes, largest);
    if (lane() == 0) atomicMax(&row.largest, largest);
    return;
  }
  __syncthreads();
  const int sum = int(threadIdx.x);
  if (sum / 16 * kBlock >= length) return;
  float* const partial = long_rows.partial + (p.slot + segment.row) * long_rows.pitch + segment.begin / kBlock * 16;
  global_store(&partial[sum], partial_sum(scores, length, sum, global_load(&row.threshold)));
}

// A block per row: adds up its partial sums in their order, which 16 lanes do while the others fetch.
__global__ void __launch_bounds__(kThreads)
    criticality_long_finish(const __grid_constant__ Table<Rows> table, LongRows long_rows) {
  const int entry = find_entry(table);
  const Rows& p = table.entries[entry];
  const int64_t index = blockIdx.x - table.first_block[entry];
  const LongRow& row = long_rows.rows[p.slot + index];
  if (p.reduce == Reduce::max) {
    if (threadIdx.x == 0) global_store(&p.out[index], bits_float(global_load(&row.largest)));
    return;
  }
  constexpr int kFetched = 16 * kThreads;
  DELFAST_SHARED(float, fetched, [kFetched]);
  const float* const partial = long_rows.partial + (p.slot + index) * long_rows.pitch;
  const int64_t count = (p.length + kBlock - 1) / kBlock * 16;
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kFetched) {
    const int here = int(count - begin < kFetched ? count - begin : kFetched);
    for (int i = int(threadIdx.x); i < here; i += kThreads) fetched[i] = global_load_const(&partial[begin + i]);
    __syncthreads();
    if (threadIdx.x < 16)
      for (int i = int(threadIdx.x); i < here; i += 16) sum += double(fetched[i]);
    __syncthreads();
  }
  if (warp() != 0) return;
  sum = add_pairwise(sum);
  const Threshold threshold = {0, global_load(&row.tie), int64_t(global_load(&row.ties))};
  if (threadIdx.x == 0) global_store(&p.out[index], reduced(p, sum, threshold));
}

}  // namespace delfast::cuda
