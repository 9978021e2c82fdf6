// Sums over the examples of |g| or g^2, where g is the weight gradient of a single example. g is never stored in global
// memory.
//
// Mapping. A block takes a tile of kTile output channels by kTile columns (a tap and an input channel) and a slab of
// examples, one example after another. The tile of g is an implicit GEMM over the example's positions, kDepth at a
// time. Examples are split into slabs where the tiles alone do not fill a GPU; a second kernel adds the slabs' sums in
// order. In a layer with one position for each example, g is an outer product and |g| = |output gradient| |input|; the
// launcher then turns the examples into positions of one example (Transform).
// Depthwise layers have a single input channel for each output channel, so that outputs share no inputs. A block takes
// kLanes channels and kTaps taps; its strands divide the positions, and their sums are added at the end of each
// example.
// Memory. For each example a block reads kTile channels of output gradients and of inputs, by coalesced 16-byte loads
// (8 bytes where 16-bit values are widened), once for each tap. A source in the padding is not read and counts as 0.
// Values go through registers to one half of shared memory while the other half is multiplied. Sums stay in registers
// (per_example_multiply.cuh) and are read and written once for each call.
// Numerics. The positions of an example are added in float32 in order (depthwise: within strands, which are then added
// in order), then the examples in order, then the slabs. No atomics: every run gives the same bits.
#pragma once

#include "cuda/per_example_multiply.cuh"

namespace delfast::cuda {

struct Position {
  int z, y, x;
};

// A PerExample as its kernels read it. The launcher has checked that sizes within an example fit in 31 bits.
struct Layer {
  const void* inputs;
  const void* output_grad;
  float* out;          // the sums; with slabs, those of slab 0
  int64_t slab_pitch;  // elements from one slab's sums to the next; 0: one slab, whose sums are added to `out`
  int64_t examples, slab_examples;
  int64_t in_channels, out_channels;    // channels of all groups
  int64_t group_inputs, group_outputs;  // channels of each group
  int64_t row;                          // columns of an output channel
  int in[3], out_size[3], kernel[3], stride[3], padding[3], dilation[3];
  Position step;                          // from one position that a thread loads to its next
  uint32_t tiles, m_tiles, column_tiles;  // tiles of a slab, of a group's output channels, of a row
  Dtype inputs_dtype, output_grad_dtype;
  Transform transform;
  Transform operand_transform;

  __host__ __device__ __forceinline__ Position position(int index) const {
    return {index / out_size[2] / out_size[1], index / out_size[2] % out_size[1], index % out_size[2]};
  }
  __device__ __forceinline__ void advance(Position& p) const {
    p = {p.z + step.z, p.y + step.y, p.x + step.x};
    if (p.x >= out_size[2]) p.x -= out_size[2], p.y++;
    if (p.y >= out_size[1]) p.y -= out_size[1], p.z++;
  }
  __device__ __forceinline__ int out_index(const Position& p) const {
    return (p.z * out_size[1] + p.y) * out_size[2] + p.x;
  }
  // Source of position 0 at this tap.
  __device__ __forceinline__ Position tap_offset(int tap) const {
    const int z = tap / kernel[2] / kernel[1], y = tap / kernel[2] % kernel[1], x = tap % kernel[2];
    return {z * dilation[0] - padding[0], y * dilation[1] - padding[1], x * dilation[2] - padding[2]};
  }
  // Input position that position p reads at this tap, or -1 in the padding.
  __device__ __forceinline__ int source(const Position& p, const Position& tap) const {
    const int z = p.z * stride[0] + tap.z, y = p.y * stride[1] + tap.y, x = p.x * stride[2] + tap.x;
    const bool inside = unsigned(z) < unsigned(in[0]) && unsigned(y) < unsigned(in[1]) && unsigned(x) < unsigned(in[2]);
    return inside ? (z * in[1] + y) * in[2] + x : -1;
  }
  __device__ __forceinline__ int in_size() const { return in[0] * in[1] * in[2]; }
  __device__ __forceinline__ int positions() const { return out_size[0] * out_size[1] * out_size[2]; }

  __device__ __forceinline__ int64_t slab() const { return blockIdx.x / tiles; }
  __device__ __forceinline__ int64_t first_example() const { return slab() * slab_examples; }
  __device__ __forceinline__ int64_t end_example() const {
    const int64_t end = first_example() + slab_examples;
    return end < examples ? end : examples;
  }
  // Adds to the sums from element i on, or writes them to the slab's sums.
  template <int kCount>
  __device__ __forceinline__ void write_sums(int64_t i, const float (&values)[kCount]) const {
    float sums[kCount] = {};
    if (!slab_pitch) load_pack<true>(out + i, sums);
    for (int j = 0; j < kCount; j++) sums[j] += values[j];
    store_pack(out + slab() * slab_pitch + i, sums);
  }
};

// ---- operands between global and shared memory: as read, and as float32

// Calls f(dtype of the output gradients, dtype of the inputs, transform). The arguments are constants where both dtypes
// are float32 and not transformed, so that the loops of f do not branch.
template <class F>
__device__ __forceinline__ void with_kinds(const Layer& layer, F f) {
  if (layer.output_grad_dtype == Dtype::float32 && layer.inputs_dtype == Dtype::float32 &&
      layer.operand_transform == Transform::none)
    return f(Dtype::float32, Dtype::float32, Transform::none);
  f(layer.output_grad_dtype, layer.inputs_dtype, layer.operand_transform);
}

// kPack neighbours of either 32 or 16 bits.
template <int kPack>
__device__ __forceinline__ typename WordOf<4 * kPack>::type read_raw(const void* values, int64_t i, Dtype dtype) {
  using Word = typename WordOf<4 * kPack>::type;
  if (dtype == Dtype::float32)
    return global_load_const(reinterpret_cast<const Word*>(static_cast<const float*>(values) + i));
  using Half = typename WordOf<2 * kPack>::type;
  const Half half = global_load_const(reinterpret_cast<const Half*>(static_cast<const uint16_t*>(values) + i));
  Word word = {};
  memcpy(&word, &half, sizeof half);
  return word;
}
template <int kPack, class Word>
__device__ __forceinline__ void widen(const Word& word, Dtype dtype, float (&out)[kPack]) {
  with_dtype(dtype, [&]<class T>(const T*) {
    T values[kPack];
    memcpy(values, &word, sizeof values);
    for (int i = 0; i < kPack; i++) out[i] = to_float(values[i]);
  });
}

// ---- tiles

template <class Staged>
union TileMemory {
  Stage<Staged> stages[2];
  float tile[kTile][kPitch];  // after the last product
};

// A thread's part of the copies: for each stage kLoads packs of output gradients and of inputs, of kPack elements,
// kRows positions apart. Its channels and its column are the same for all of them.
template <class Multiply, int kPack>
class Loader {
  using Staged = typename Multiply::Staged;
  static constexpr int kPacks = kTile / kPack;
  // 16-bit stages are copied unchanged; all others are converted to float32
  static constexpr bool kCopied = sizeof(Staged) == 2;
  using Word = typename WordOf<(kCopied ? 2 : 4) * kPack>::type;

 public:
  static constexpr int kRows = kTileThreads / kPacks, kLoads = kDepth / kRows;

  __device__ __forceinline__ Loader(const Layer& layer, int64_t group, int64_t m, int64_t column) : layer_(layer) {
    m += pack();
    column += pack();
    has_output_ = m < layer.group_outputs;
    has_column_ = column < layer.row;
    first_output_ = group * layer.group_outputs + m;
    first_input_ = group * layer.group_inputs + column % layer.group_inputs;
    if (has_column_) tap_ = layer.tap_offset(int(column / layer.group_inputs));
    begin(layer.first_example());
  }
  __device__ __forceinline__ void begin(int64_t example) {
    position_ = layer_.position(row());
    output_grad_ = example * layer_.positions() * layer_.out_channels + first_output_;
    inputs_ = example * layer_.in_size() * layer_.in_channels + first_input_;
  }
  __device__ __forceinline__ void load() {
    with_kinds(layer_, [&](Dtype output_grad, Dtype inputs, Transform) {
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        const bool exists = position_.z < layer_.out_size[0];
        const int source = exists && has_column_ ? layer_.source(position_, tap_) : -1;
        read_output_grad_[i] = read_inputs_[i] = Word{};
        if (exists && has_output_)
          read_output_grad_[i] =
              read(layer_.output_grad, output_grad_ + layer_.out_index(position_) * layer_.out_channels, output_grad);
        if (source >= 0) read_inputs_[i] = read(layer_.inputs, inputs_ + source * layer_.in_channels, inputs);
        layer_.advance(position_);
      }
    });
  }
  __device__ __forceinline__ void store(Stage<Staged>& stage) const {
    with_kinds(layer_, [&](Dtype output_grad, Dtype inputs, Transform transform) {
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        put(&stage.output_grad[row() + i * kRows][pack()], read_output_grad_[i], output_grad, transform);
        put(&stage.inputs[row() + i * kRows][pack()], read_inputs_[i], inputs, transform);
      }
    });
  }

 private:
  static __device__ __forceinline__ int row() { return int(threadIdx.x) / kPacks; }
  static __device__ __forceinline__ int pack() { return int(threadIdx.x) % kPacks * kPack; }
  static __device__ __forceinline__ Word read(const void* values, int64_t i, Dtype dtype) {
    if constexpr (kCopied)
      return global_load_const(reinterpret_cast<const Word*>(static_cast<const uint16_t*>(values) + i));
    else
      return read_raw<kPack>(values, i, dtype);
  }
  static __device__ __forceinline__ void put(Staged* to, const Word& word, Dtype dtype, Transform transform) {
    if constexpr (kCopied) {
      *reinterpret_cast<Word*>(to) = word;
    } else {
      float values[kPack] = {};
      widen(word, dtype, values);
      for (int i = 0; i < kPack; i++) {
        if (transform == Transform::abs) values[i] = fabsf(values[i]);
        if (transform == Transform::square) values[i] = values[i] * values[i];
        values[i] = Multiply::staged(values[i]);
      }
      Word converted;
      memcpy(&converted, values, sizeof converted);
      *reinterpret_cast<Word*>(to) = converted;
    }
  }

  const Layer& layer_;
  int64_t first_output_, first_input_, output_grad_, inputs_;
  Position position_, tap_ = {};
  bool has_output_, has_column_;
  Word read_output_grad_[kLoads], read_inputs_[kLoads];
};

template <class Multiply, int kPack>
__global__ void __launch_bounds__(kTileThreads, kPack == 1 ? 3 : Multiply::kResident)
    per_example_tiles(DELFAST_GRID_CONSTANT(Layer) layer) {
  using Memory = TileMemory<typename Multiply::Staged>;
  DELFAST_SHARED(Memory, memory);
  // neighbouring blocks take the same tile of columns and thus read the same inputs
  const uint32_t tile = blockIdx.x % layer.tiles;
  const int64_t group = tile / layer.m_tiles / layer.column_tiles;
  const int64_t m = int64_t(tile % layer.m_tiles) * kTile,
                column = int64_t(tile / layer.m_tiles % layer.column_tiles) * kTile;

  Loader<Multiply, kPack> loader(layer, group, m, column);
  Multiply multiply;
  const int positions = layer.positions();
  const int64_t end = layer.end_example();
  int64_t example = layer.first_example();
  int left = positions, stage = 0;  // left: positions of the example that are not yet multiplied
  loader.load();
  loader.store(memory.stages[0]);
  __syncthreads();
  while (example < end) {
    const bool example_ends = left <= kDepth, more = !example_ends || example + 1 < end;
    if (example_ends && more) loader.begin(example + 1);
    if (more) loader.load();
#pragma unroll
    for (int k = 0; k < kDepth; k += Multiply::kStep)
      if (k < left) multiply.multiply(memory.stages[stage], k);
    if (example_ends) multiply.end_example(layer.transform);
    left = example_ends ? positions : left - kDepth;
    example += example_ends;
    stage ^= 1;
    if (more) loader.store(memory.stages[stage]);
    __syncthreads();
  }

  multiply.store(memory.tile);
  __syncthreads();
  constexpr int kOut = kPack == 1 ? 1 : 4;
  for (int i = int(threadIdx.x) * kOut; i < kTile * kTile; i += kTileThreads * kOut) {
    const int64_t channel = m + i / kTile, at = column + i % kTile;
    if (channel >= layer.group_outputs || at >= layer.row) continue;
    float values[kOut];
    memcpy(values, &memory.tile[i / kTile][i % kTile], sizeof values);
    layer.write_sums((group * layer.group_outputs + channel) * layer.row + at, values);
  }
}

// ---- depthwise

constexpr int kLanes = 32;  // channels of a block
constexpr int kTaps = 9;

// A thread takes kPack channels; kThreads / kLanes * kPack strands divide the positions.
template <int kPack>
__global__ void __launch_bounds__(kThreads, 2) per_example_depthwise(DELFAST_GRID_CONSTANT(Layer) layer) {
  constexpr int kPacks = kLanes / kPack, kWarps = kThreads / kWarp, kSums = (kTaps * kLanes + kThreads - 1) / kThreads;
  DELFAST_SHARED(Position, taps, [kTaps]);
  DELFAST_SHARED(float, parts, [kWarps * kTaps * kLanes]);
  const int64_t tile = blockIdx.x % layer.tiles, first_m = tile % layer.m_tiles * kLanes;
  const int first_tap = int(tile / layer.m_tiles) * kTaps;
  const int tap_count = int(layer.row) - first_tap < kTaps ? int(layer.row) - first_tap : kTaps;
  if (int(threadIdx.x) < kTaps) {
    const int tap = int(threadIdx.x);
    taps[tap] = tap < tap_count ? layer.tap_offset(first_tap + tap) : Position{INT32_MIN, INT32_MIN, INT32_MIN};
  }
  __syncthreads();

  const int64_t m = first_m + int(threadIdx.x) % kPacks * kPack;
  const int64_t channel = m / layer.group_outputs;  // input channel: each group has one
  float sums[kSums] = {};
  for (int64_t example = layer.first_example(); example < layer.end_example(); example++) {
    const int64_t output_grad = example * layer.positions() * layer.out_channels + m,
                  inputs = example * layer.in_size() * layer.in_channels + channel;
    float gradient[kTaps][kPack] = {};
    with_kinds(layer, [&](Dtype output_grad_dtype, Dtype inputs_dtype, Transform) {
      Position position = layer.position(int(threadIdx.x) / kPacks);
      for (; m < layer.out_channels && position.z < layer.out_size[0]; layer.advance(position)) {
        float grad[kPack] = {}, input[kPack] = {};
        widen(read_raw<kPack>(layer.output_grad, output_grad + layer.out_index(position) * layer.out_channels,
                              output_grad_dtype),
              output_grad_dtype, grad);
#pragma unroll
        for (int tap = 0; tap < kTaps; tap++) {
          const int source = layer.source(position, taps[tap]);
          if (source < 0) continue;
          widen(read_raw<kPack>(layer.inputs, inputs + source * layer.in_channels, inputs_dtype), inputs_dtype, input);
          for (int i = 0; i < kPack; i++) gradient[tap][i] = fmaf(grad[i], input[i], gradient[tap][i]);
        }
      }
    });
    // the strands of a warp, then the warps
#pragma unroll
    for (int tap = 0; tap < kTaps; tap++)
      for (int i = 0; i < kPack; i++) {
        for (int step = kPacks; step < kWarp; step *= 2)
          gradient[tap][i] += __shfl_xor_sync(kAllLanes, gradient[tap][i], step);
        if (lane() < kPacks) parts[(warp() * kTaps + tap) * kLanes + lane() * kPack + i] = gradient[tap][i];
      }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSums; s++) {
      const int i = int(threadIdx.x) + s * kThreads;
      if (i >= kTaps * kLanes) continue;
      float total = 0;
      for (int w = 0; w < kWarps; w++) total += parts[w * kTaps * kLanes + i];
      sums[s] = add_example(layer.transform, sums[s], total);
    }
    __syncthreads();
  }
#pragma unroll
  for (int s = 0; s < kSums; s++) {
    const int i = int(threadIdx.x) + s * kThreads, tap = i / kLanes;
    const int64_t out = first_m + i % kLanes;
    const float value[1] = {sums[s]};
    if (tap < tap_count && out < layer.out_channels) layer.write_sums(out * layer.row + first_tap + tap, value);
  }
}

// ---- slabs

// sums[i] += the sum of partial[slab][i] over the slabs, in their order.
template <int kPack>
__global__ void __launch_bounds__(kThreads)
    per_example_add_slabs(float* sums, const float* partial, int64_t count, int64_t pitch, int64_t slabs) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + int(threadIdx.x)) * kPack;
  if (i >= count) return;
  float total[kPack] = {}, values[kPack];
  for (int64_t slab = 0; slab < slabs; slab++) {
    load_pack(partial + slab * pitch + i, values);
    for (int j = 0; j < kPack; j++) total[j] += values[j];
  }
  load_pack<true>(sums + i, values);
  for (int j = 0; j < kPack; j++) values[j] += total[j];
  store_pack(sums + i, values);
}

}  // namespace delfast::cuda
