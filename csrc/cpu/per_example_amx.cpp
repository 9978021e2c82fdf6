// Sums over examples of |g| or g^2 of bfloat16 operands, by AMX. Compiled with -mavx512... -mamx-tile -mamx-bf16.
//
// A tile instruction multiplies 16 rows of output gradients by 16 columns of inputs over 32 positions. The output
// gradients of a row are contiguous. Inputs are stored in pairs of positions, the pairs of 16 channels side by side.
// The output gradients are spread over a plane as wide as the padded input, with zeros where there is no output, so
// that one stretch of positions serves all rows of an image and a tap is an offset into the plane. With a stride, each
// phase of the positions is a plane. Offsets are even because of the pairs: at an odd offset, output gradients are read
// from one position earlier, where there is a zero.
//
// Numerics. Products are exact and added in float32, in an order that depends only on the shape. Denormals count as 0.
// Positions whose source lies in the padding are multiplied with 0, as are pixels without an output. These pixels must
// be finite, which the float32 kernels do not require.
#include <immintrin.h>

#include "cpu/vec_avx512.h"
#include "delfast/cpu_dispatch.h"

namespace delfast::cpu {

namespace avx512 {
extern const PerExampleKernels kPerExample;
}

namespace amx {

extern const PerExampleKernels kPerExample;

namespace {

using avx512::Vec;

constexpr int kSide = 16;                 // rows and columns of a tile of sums
constexpr int kStep = AmxLayout::kStep;   // positions that one instruction multiplies
constexpr int64_t kTile = kStep * kSide;  // elements

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__mmask16 first(int64_t n) { return n >= kSide ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

// Iterates over the positions of a plane in order: next(at) returns at(position), or null past the plane's end.
class Positions {
 public:
  explicit Positions(const int64_t (&plane)[3]) : plane_(plane) {}
  template <class At>
  const bfloat16* next(At at) {
    const bfloat16* found = position_[0] < plane_[0] ? at(position_) : nullptr;
    for (int i = 2; i >= 0; i--) {
      if (++position_[i] < plane_[i] || i == 0) break;
      position_[i] = 0;
    }
    return found;
  }

 private:
  const int64_t (&plane_)[3];
  int64_t position_[3] = {0, 0, 0};
};

// Interleaves 16 channels of two positions, from `channel` on; lanes outside `channels` and null operands are zeros.
__m512i paired(const bfloat16* even, const bfloat16* odd, int64_t channel, __mmask16 channels) {
  const auto widened = [&](const bfloat16* p) {
    return p ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(channels, p + channel)) : _mm512_setzero_si512();
  };
  return _mm512_or_si512(widened(even), _mm512_slli_epi32(widened(odd), 16));
}

// Transposes a matrix of 16 x 16 elements of 32 bits.
void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// ---- packing; a row is one plane of one example's inputs, or one example's output gradients

void pack_inputs(const PerExampleBlock& b, int64_t row) {
  const ConvShape& s = b.shape;
  const AmxLayout& layout = b.amx;
  const int64_t example = row / layout.planes(), group_columns = s.in_channels / s.groups;
  int64_t phase = row % layout.planes(), start[3];  // start: input position of the plane's first
  for (int i = 2; i >= 0; i--) {
    start[i] = phase % layout.phases[i] * s.dilation[i] % s.stride[i] - s.padding[i];
    phase /= layout.phases[i];
  }
  const auto* image =
      static_cast<const bfloat16*>(b.pack_inputs.from) + example * s.in[0] * s.in[1] * s.in[2] * s.in_channels;
  const int64_t blocks = s.examples * layout.column();  // from one block of columns to the next
  auto* to = reinterpret_cast<bfloat16*>(b.pack_inputs.to) + row % layout.planes() * layout.column_blocks * blocks +
             example * layout.column();
  const auto at = [&](const int64_t (&position)[3]) -> const bfloat16* {
    int64_t pixel = 0;
    for (int i = 0; i < 3; i++) {
      const int64_t source = start[i] + position[i] * s.stride[i];
      if (source < 0 || source >= s.in[i]) return nullptr;
      pixel = pixel * s.in[i] + source;
    }
    return image + pixel * s.in_channels;
  };
  Positions positions(layout.plane);
  for (int64_t pair = 0; pair < layout.pairs; pair++, to += 2 * kSide) {
    const bfloat16 *even = positions.next(at), *odd = positions.next(at);
    bfloat16* block = to;
    for (int64_t channel = 0; channel < s.in_channels; channel += group_columns)
      for (int64_t c = 0; c < group_columns; c += kSide, block += blocks)
        _mm512_storeu_si512(block, paired(even, odd, channel + c, first(group_columns - c)));
  }
}

void pack_output_grad(const PerExampleBlock& b, int64_t example) {
  const ConvShape& s = b.shape;
  const AmxLayout& layout = b.amx;
  const int64_t group_rows = s.out_channels / s.groups;
  const auto* output_grad =
      static_cast<const bfloat16*>(b.pack_output_grad.from) + example * s.positions() * s.out_channels;
  const int64_t blocks = s.examples * layout.row();
  auto* to = reinterpret_cast<bfloat16*>(b.pack_output_grad.to) + example * layout.row();
  const auto at = [&](const int64_t (&position)[3]) -> const bfloat16* {
    for (int i = 0; i < 3; i++)
      if (position[i] >= s.out[i]) return nullptr;
    return output_grad + ((position[0] * s.out[1] + position[1]) * s.out[2] + position[2]) * s.out_channels;
  };
  for (int64_t block = 0; layout.zeros && block < layout.row_blocks; block++)
    for (int64_t r = 0; r < kSide; r++)
      _mm512_storeu_si512(to + block * blocks + r * layout.output_grad_pitch, _mm512_setzero_si512());
  to += layout.zeros;
  Positions positions(layout.plane);
  for (int64_t step = 0; step < layout.steps; step++, to += kStep) {
    const bfloat16* source[kStep];
    for (auto& position : source) position = positions.next(at);
    bfloat16* block = to;
    for (int64_t channel = 0; channel < s.out_channels; channel += group_rows)
      for (int64_t r = 0; r < group_rows; r += kSide, block += blocks) {
        __m512i pairs[kSide];
        for (int i = 0; i < kSide; i++)
          pairs[i] = paired(source[2 * i], source[2 * i + 1], channel + r, first(group_rows - r));
        transpose(pairs);
        for (int i = 0; i < kSide; i++) _mm512_storeu_si512(block + i * layout.output_grad_pitch, pairs[i]);
      }
  }
}

void pack(const PerExampleBlock& b, const Packing& p, int64_t begin, int64_t end) {
  if (!b.amx.used) return avx512::kPerExample.pack(b, p, begin, end);
  for (int64_t row = begin; row < end; row++) &p == &b.pack_inputs ? pack_inputs(b, row) : pack_output_grad(b, row);
}

// ---- accumulation

struct Operands {
  const bfloat16 *inputs, *output_grad;  // first example
  int64_t column_block, row_block;       // elements from one block to the next
  int64_t examples;
  const AmxLayout& layout;
};

using Sums = float[2 * kSide][2 * kSide];

// The gradient of one example, in up to two by two tiles, 0 to 3. Tiles 4 and 5 hold output gradients, 6 and 7 inputs.
// (GCC requires literal tile numbers.)
template <int rows, int columns>
void multiply(const Operands& o, int64_t example, Sums& gradient) {
  constexpr int64_t kPitch = sizeof gradient[0];
  const int64_t pitch = o.layout.output_grad_pitch * int64_t(sizeof(bfloat16));
  const bfloat16* output_grad = o.output_grad + example * o.layout.row();
  const bfloat16* inputs = o.inputs + example * o.layout.column();
  _tile_zero(0);
  if constexpr (columns == 2) _tile_zero(1);
  if constexpr (rows == 2) _tile_zero(2);
  if constexpr (rows == 2 && columns == 2) _tile_zero(3);
  for (int64_t step = 0; step < o.layout.steps; step++, output_grad += kStep, inputs += kTile) {
    _tile_loadd(4, output_grad, pitch);
    _tile_loadd(6, inputs, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (columns == 2) {
      _tile_loadd(7, inputs + o.column_block, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (rows == 2) {
      _tile_loadd(5, output_grad + o.row_block, pitch);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (rows == 2 && columns == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, gradient[0], kPitch);
  if constexpr (columns == 2) _tile_stored(1, gradient[0] + kSide, kPitch);
  if constexpr (rows == 2) _tile_stored(2, gradient[kSide], kPitch);
  if constexpr (rows == 2 && columns == 2) _tile_stored(3, gradient[kSide] + kSide, kPitch);
}

constexpr int kTogether = 4;  // examples added to the sums together, so that the sums are read and written less often

template <int rows, int columns, bool square>
void add_examples(const Operands& o, Sums& sums) {
  alignas(64) Sums gradients[kTogether];
  for (int64_t x = 0; x < o.examples; x += kTogether) {
    const int count = int(o.examples - x < kTogether ? o.examples - x : kTogether);
    for (int i = 0; i < count; i++) multiply<rows, columns>(o, x + i, gradients[i]);
    const auto add = [&](int these) __attribute__((always_inline)) {
      for (int r = 0; r < rows * kSide; r++)
        for (int c = 0; c < columns * kSide; c += kSide) {
          Vec sum = Vec::load(sums[r] + c);
          for (int i = 0; i < these; i++) {
            const Vec g = Vec::load(gradients[i][r] + c);
            sum = sum + (square ? g * g : g.abs());
          }
          sum.store(sums[r] + c);
        }
    };
    count == kTogether ? add(kTogether) : add(count);  // the first call is unrolled
  }
}

// The block's tiles of up to 32 by 32 sums, numbered. Columns change fastest, so that neighbouring tiles share output
// gradients.
struct Grid {
  int64_t rows, columns, taps, row_tiles, column_tiles;  // counts for a group
  explicit Grid(const ConvShape& s)
      : rows(s.out_channels / s.groups),
        columns(s.in_channels / s.groups),
        taps(s.taps()),
        row_tiles(ceil_div(rows, 2 * kSide)),
        column_tiles(ceil_div(columns, 2 * kSide)) {}
  int64_t count(int64_t groups) const { return groups * row_tiles * taps * column_tiles; }
};

void add_tile(const PerExampleBlock& b, const Grid& grid, int64_t tile) {
  static constexpr void (*kAdd[2][2][2])(const Operands&, Sums&) = {
      {{add_examples<1, 1, false>, add_examples<1, 1, true>}, {add_examples<1, 2, false>, add_examples<1, 2, true>}},
      {{add_examples<2, 1, false>, add_examples<2, 1, true>}, {add_examples<2, 2, false>, add_examples<2, 2, true>}}};
  const AmxLayout& layout = b.amx;
  const int64_t column = tile % grid.column_tiles * 2 * kSide;
  const int64_t tap = tile / grid.column_tiles % grid.taps;
  const int64_t row = tile / (grid.column_tiles * grid.taps) % grid.row_tiles * 2 * kSide;
  const int64_t group = tile / (grid.column_tiles * grid.taps * grid.row_tiles);
  const int64_t rows = grid.rows - row, columns = grid.columns - column;  // remaining
  const int64_t row_block = group * ceil_div(grid.rows, kSide) + row / kSide;
  const int64_t column_block = group * ceil_div(grid.columns, kSide) + column / kSide;
  const AmxLayout::Source source = layout.source(b.shape, tap);

  const int64_t column_blocks = b.shape.examples * layout.column(), row_blocks = b.shape.examples * layout.row();
  const bfloat16* inputs = reinterpret_cast<const bfloat16*>(b.inputs) +
                           (source.plane * layout.column_blocks + column_block) * column_blocks +
                           source.offset / 2 * 2 * kSide;
  const bfloat16* output_grad =
      reinterpret_cast<const bfloat16*>(b.output_grad) + row_block * row_blocks + layout.zeros - source.offset % 2;
  alignas(64) Sums sums = {};
  kAdd[rows > kSide][columns > kSide][b.transform == Transform::square](
      {inputs, output_grad, column_blocks, row_blocks, b.shape.examples, layout}, sums);

  float* to = b.sums + ((group * grid.rows + row) * grid.taps + tap) * grid.columns + column;
  for (int64_t r = 0; r < rows && r < 2 * kSide; r++, to += grid.taps * grid.columns)
    for (int64_t c = 0; c < columns && c < 2 * kSide; c += kSide) {
      const __mmask16 lanes = first(columns - c);
      _mm512_mask_storeu_ps(to + c, lanes, _mm512_maskz_loadu_ps(lanes, to + c) + Vec::load(sums[r] + c).v);
    }
}

int64_t tiles(const PerExampleBlock& b) {
  return b.amx.used ? Grid(b.shape).count(b.shape.groups) : avx512::kPerExample.tiles(b);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kSide, kSide, kSide, kSide, kSide, kSide, kSide, kSide};
};
static_assert(sizeof(TileConfig) == 64);

void accumulate(const PerExampleBlock& b, int64_t begin, int64_t end) {
  if (!b.amx.used) return avx512::kPerExample.accumulate(b, begin, end);
  static constexpr TileConfig kConfig;
  const Grid grid(b.shape);
  _tile_loadconfig(&kConfig);
  for (int64_t tile = begin; tile < end; tile++) add_tile(b, grid, tile);
  _tile_release();  // tiles in use would slow down every switch to another thread
}

void channel_dot(const ChannelDot& p, int64_t begin, int64_t end) { avx512::kPerExample.channel_dot(p, begin, end); }

void channel_sums(const ChannelSums& p, const ChannelSumsPlan& plan, double* workspace, int64_t begin, int64_t end) {
  avx512::kPerExample.channel_sums(p, plan, workspace, begin, end);
}

}  // namespace

const PerExampleKernels kPerExample = {pack, tiles, accumulate, channel_dot, channel_sums};

}  // namespace amx
}  // namespace delfast::cpu
