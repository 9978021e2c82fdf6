// Sums over examples of |g| or g^2, where g is the weight gradient of a single example, which stays in registers.
// Included per instruction set like criticality.inl, after kTileRows and kTileVecs.
//
// A tile is kTileRows output channels by kTileVecs vectors of columns (input channels of one tap). For each example,
// the tile's part of the gradient is summed in registers over the positions, one product of a vector and a scalar at a
// time; its absolute value or square is then added to the tile's part of the sums. This takes no more arithmetic than
// the gradient of the whole batch. Positions whose source lies in the padding are skipped. Examples are processed in
// blocks that stay in the cache while all tiles read them.
//
// Numerics. Float32. Positions are added in row-major order and examples one after another, so a result depends only on
// the shape, not on threads. multiply_add rounds once or twice: instruction sets may differ in the last bits.

#include "cpu/score.inl"
#include "cpu/sum.inl"

#define DELFAST_INLINED __attribute__((always_inline))  // for lambdas; calls in a loop nest would spill registers

namespace {

// Maximum number of floats of the operands that one pass over all tiles reads: half of a 1 MiB second-level cache. Only
// one block of rows of the output gradients counts, because the tiles of the next block come after all others.
constexpr int64_t kCachedFloats = 1 << 17;

constexpr int kTileColumns = 16 * kTileVecs;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t pixels(const ConvShape& s) { return s.in[0] * s.in[1] * s.in[2]; }
bool is_depthwise(const ConvShape& s) { return s.groups > 1 && s.in_channels == s.groups; }

// Calls f(0), ..., f(count - 1) with constant arguments, so that arrays of vectors become registers.
template <int count, class F>
constexpr DELFAST_INLINED void unrolled(F f) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      DELFAST_INLINED { (f(std::integral_constant<int, i>{}), ...); }(std::make_integer_sequence<int, count>{});
}

// The positions at which one tap reads inside the input: a loop nest over both operands.
struct Walk {
  int64_t count[3];
  int64_t input_step[3], output_grad_step[3];
  int64_t input_start = 0, output_grad_start = 0;

  Walk(const ConvShape& s, int64_t tap) {
    int64_t at[3] = {tap / (s.kernel[1] * s.kernel[2]), tap / s.kernel[2] % s.kernel[1], tap % s.kernel[2]};
    int64_t input_pitch = s.in_channels, output_grad_pitch = s.out_channels;
    for (int i = 2; i >= 0; i--) {
      const int64_t source = at[i] * s.dilation[i] - s.padding[i];  // source of position 0
      const int64_t first = source < 0 ? ceil_div(-source, s.stride[i]) : 0;
      const int64_t past = source < s.in[i] ? (s.in[i] - 1 - source) / s.stride[i] + 1 : 0;
      count[i] = (past < s.out[i] ? past : s.out[i]) - first;
      if (count[i] <= 0) {
        count[i] = 0;  // the start would be outside
      } else {
        input_start += (source + first * s.stride[i]) * input_pitch;
        output_grad_start += first * output_grad_pitch;
      }
      input_step[i] = s.stride[i] * input_pitch;
      output_grad_step[i] = output_grad_pitch;
      input_pitch *= s.in[i];
      output_grad_pitch *= s.out[i];
    }
    for (int i = 1; i >= 0; i--) {  // merged into one long loop where the steps allow it
      if (input_step[i] != count[2] * input_step[2] || output_grad_step[i] != count[2] * output_grad_step[2]) break;
      count[2] *= count[i];
      count[i] = 1;
    }
  }

  // Calls f(input, output_grad) for each position.
  template <class F>
  DELFAST_INLINED void each(const float* input, const float* output_grad, F f) const {
    for (int64_t i = 0; i < count[0]; i++)
      for (int64_t j = 0; j < count[1]; j++) {
        const float* a = input + i * input_step[0] + j * input_step[1];
        const float* d = output_grad + i * output_grad_step[0] + j * output_grad_step[1];
        for (int64_t k = count[2]; k; k--, a += input_step[2], d += output_grad_step[2]) f(a, d);
      }
  }
};

// The examples of a block that one pass over all tiles adds.
struct Pass {
  int64_t first, examples;
};

// The sums that one tile of one tap adds to in a pass, and its operands.
struct Tile {
  Walk walk;
  int64_t examples, input_pitch, output_grad_pitch;  // between examples
  const float *inputs, *output_grad;                 // first example, at the tile's first column and row
  float* sums;
  int64_t sums_pitch;  // between rows
  int tail;            // lanes of the last vector, if not 16
  bool square;

  // Starts at the tap's first column and row; move() goes to the tile's own.
  Tile(const PerExampleBlock& b, Pass pass, int64_t tap)
      : walk(b.shape, tap),
        examples(pass.examples),
        input_pitch(pixels(b.shape) * b.shape.in_channels),
        output_grad_pitch(b.shape.positions() * b.shape.out_channels),
        inputs(b.inputs + pass.first * input_pitch + walk.input_start),
        output_grad(b.output_grad + pass.first * output_grad_pitch + walk.output_grad_start),
        sums(b.sums + tap * b.columns),
        sums_pitch(b.shape.taps() * b.columns),
        tail(0),
        square(b.transform == Transform::square) {}
};

template <int vecs, bool has_tail>
struct Lanes {  // loads and stores whole vectors, except the last, which may have a tail
  int tail;
  template <class V>
  Vec load(const float* p, V v) const {
    if constexpr (has_tail && v == vecs - 1) return Vec::load_first(p + 16 * v, tail);
    return Vec::load(p + 16 * v);
  }
  template <class V>
  void store(Vec x, float* p, V v) const {
    if constexpr (has_tail && v == vecs - 1) return x.store_masked(p + 16 * v, (1u << tail) - 1);
    x.store(p + 16 * v);
  }
};

template <int rows, int vecs, bool has_tail>
void add_dense_tile(const Tile& t) {
  const Lanes<vecs, has_tail> lanes{t.tail};
  const auto each = [](auto f) DELFAST_INLINED {
    unrolled<rows>([&](auto r) DELFAST_INLINED { unrolled<vecs>([&](auto v) DELFAST_INLINED { f(r, v); }); });
  };
  // A copy: rows of sums a power of two apart would share few sets of the first-level cache, also with the operands,
  // and each example would evict them.
  alignas(64) float sums[rows][vecs][16];
  each([&](auto r, auto v) DELFAST_INLINED { lanes.load(t.sums + r * t.sums_pitch, v).store(sums[r][v]); });
  const float *inputs = t.inputs, *output_grad = t.output_grad;
  for (int64_t x = 0; x < t.examples; x++, inputs += t.input_pitch, output_grad += t.output_grad_pitch) {
    Vec gradient[rows][vecs];
    each([&](auto r, auto v) DELFAST_INLINED { gradient[r][v] = Vec::broadcast(0); });
    t.walk.each(inputs, output_grad, [&](const float* a, const float* d) DELFAST_INLINED {
      Vec input[vecs];
      unrolled<vecs>([&](auto v) DELFAST_INLINED { input[v] = lanes.load(a, v); });
      unrolled<rows>([&](auto r) DELFAST_INLINED {
        const Vec grad = Vec::broadcast_at(d + r);
        unrolled<vecs>([&](auto v)
                           DELFAST_INLINED { gradient[r][v] = Vec::multiply_add(input[v], grad, gradient[r][v]); });
      });
    });
    const auto add = [&](auto transform) DELFAST_INLINED {
      each([&](auto r, auto v)
               DELFAST_INLINED { (Vec::load(sums[r][v]) + transform(gradient[r][v])).store(sums[r][v]); });
    };
    if (t.square)
      add([](Vec g) DELFAST_INLINED { return g * g; });
    else
      add([](Vec g) DELFAST_INLINED { return g.abs(); });
  }
  each([&](auto r, auto v) DELFAST_INLINED { lanes.store(Vec::load(sums[r][v]), t.sums + r * t.sums_pitch, v); });
}

using AddTile = void (*)(const Tile&);

// [rows - 1][vecs - 1][has_tail]
struct TileTable {
  AddTile add[kTileRows][kTileVecs][2];
  constexpr TileTable() : add{} {
    unrolled<kTileRows>([&](auto r) {
      unrolled<kTileVecs>([&](auto v) {
        add[r][v][0] = add_dense_tile<r + 1, v + 1, false>;
        add[r][v][1] = add_dense_tile<r + 1, v + 1, true>;
      });
    });
  }
};
constexpr TileTable kTiles;

// The block's tiles, numbered. Columns change fastest, so that neighbouring tiles share output gradients.
struct Grid {
  int64_t row_blocks, taps, column_blocks, count;
  explicit Grid(const PerExampleBlock& b) : taps(b.shape.taps()) {
    row_blocks = ceil_div(b.shape.out_channels / b.shape.groups, kTileRows);
    column_blocks = ceil_div(b.columns, kTileColumns);
    count = b.shape.groups * row_blocks * taps * column_blocks;
  }
};

void add_dense(const PerExampleBlock& b, const Grid& grid, Pass pass, int64_t tile) {
  const ConvShape& s = b.shape;
  const int64_t column = tile % grid.column_blocks * kTileColumns;
  const int64_t tap = tile / grid.column_blocks % grid.taps;
  const int64_t block = tile / (grid.column_blocks * grid.taps) % grid.row_blocks;
  const int64_t group = tile / (grid.column_blocks * grid.taps * grid.row_blocks);
  // blocks of rows of about equal size: in a much smaller one the multipliers would wait for each other
  const int64_t group_rows = s.out_channels / s.groups;
  const int64_t begin = group_rows * block / grid.row_blocks, end = group_rows * (block + 1) / grid.row_blocks;
  const int64_t row = group * group_rows + begin;
  const int64_t columns = b.columns - column < kTileColumns ? b.columns - column : kTileColumns;

  Tile t(b, pass, tap);
  t.inputs += group * (s.in_channels / s.groups) + column;
  t.output_grad += row;
  t.sums += row * t.sums_pitch + column;
  t.tail = int(columns % 16);
  kTiles.add[end - begin - 1][ceil_div(columns, 16) - 1][t.tail != 0](t);
}

// Depthwise layers have one input channel for each group, so vectors extend across groups, and a tile is some channels
// of one tap.

constexpr int kDepthwiseVecs = 4;

template <int vecs, bool has_tail>
void add_depthwise_tile(const Tile& t) {
  const Lanes<vecs, has_tail> lanes{t.tail};
  Vec sums[vecs];
  unrolled<vecs>([&](auto v) DELFAST_INLINED { sums[v] = Vec::broadcast(0); });
  const float *inputs = t.inputs, *output_grad = t.output_grad;
  for (int64_t x = 0; x < t.examples; x++, inputs += t.input_pitch, output_grad += t.output_grad_pitch) {
    Vec gradient[vecs];
    unrolled<vecs>([&](auto v) DELFAST_INLINED { gradient[v] = Vec::broadcast(0); });
    t.walk.each(inputs, output_grad, [&](const float* a, const float* d) DELFAST_INLINED {
      unrolled<vecs>([&](auto v) DELFAST_INLINED {
        gradient[v] = Vec::multiply_add(lanes.load(a, v), lanes.load(d, v), gradient[v]);
      });
    });
    unrolled<vecs>([&](auto v) DELFAST_INLINED {
      sums[v] = sums[v] + (t.square ? gradient[v] * gradient[v] : gradient[v].abs());
    });
  }
  float added[16 * vecs];
  unrolled<vecs>([&](auto v) DELFAST_INLINED { sums[v].store(added + 16 * v); });
  const int channels = has_tail ? 16 * (vecs - 1) + t.tail : 16 * vecs;
  for (int c = 0; c < channels; c++) t.sums[c * t.sums_pitch] += added[c];
}

void add_depthwise(const PerExampleBlock& b, Pass pass, int64_t tile) {
  static constexpr AddTile kAdd[kDepthwiseVecs][2] = {{add_depthwise_tile<1, false>, add_depthwise_tile<1, true>},
                                                      {add_depthwise_tile<2, false>, add_depthwise_tile<2, true>},
                                                      {add_depthwise_tile<3, false>, add_depthwise_tile<3, true>},
                                                      {add_depthwise_tile<4, false>, add_depthwise_tile<4, true>}};
  const ConvShape& s = b.shape;
  const int64_t multiplier = s.out_channels / s.groups, taps = s.taps();
  const int64_t tap = tile % taps, j = tile / taps % multiplier;
  const int64_t channel = tile / (taps * multiplier) * (16 * kDepthwiseVecs);
  const int64_t channels = s.groups - channel < 16 * kDepthwiseVecs ? s.groups - channel : 16 * kDepthwiseVecs;

  Tile t(b, pass, tap);
  t.inputs += channel;
  t.output_grad += j * s.groups + channel;
  t.sums += (channel * multiplier + j) * taps;
  t.sums_pitch *= multiplier;  // from one group to the next
  t.tail = int(channels % 16);
  kAdd[ceil_div(channels, 16) - 1][t.tail != 0](t);
}

int64_t tiles(const PerExampleBlock& b) {
  const ConvShape& s = b.shape;
  if (is_depthwise(s)) return ceil_div(s.groups, 16 * kDepthwiseVecs) * (s.out_channels / s.groups) * s.taps();
  return Grid(b).count;
}

void accumulate(const PerExampleBlock& b, int64_t begin, int64_t end) {
  const ConvShape& s = b.shape;
  const Grid grid(b);
  const int64_t rows = s.out_channels < 32 ? s.out_channels : 32;  // rows of output gradients, in whole cache lines
  const int64_t example = pixels(s) * s.in_channels + s.positions() * rows;
  const int64_t cached = example < kCachedFloats && example ? kCachedFloats / example : 1;
  for (int64_t x = 0; x < s.examples; x += cached) {
    const Pass pass{x, s.examples - x < cached ? s.examples - x : cached};
    for (int64_t tile = begin; tile < end; tile++)
      is_depthwise(s) ? add_depthwise(b, pass, tile) : add_dense(b, grid, pass, tile);
  }
}

// Packing.

float transformed(float x, Transform transform) {
  if (transform == Transform::none) return x;
  return transform == Transform::abs ? bits_float(float_bits(x) & 0x7fffffff) : x * x;
}

Vec transformed(Vec x, Transform transform) {
  if (transform == Transform::none) return x;
  return transform == Transform::abs ? x.abs() : x * x;
}

template <class T>
void pack_row(const T* from, float* to, const Packing& p) {
  if (p.groups > 1) {
    const int64_t each = p.length / p.groups;
    for (int64_t g = 0; g < p.groups; g++)
      for (int64_t j = 0; j < each; j++) to[j * p.groups + g] = transformed(to_float(from[g * each + j]), p.transform);
    return;
  }
  int64_t i = 0;
  for (; i + 16 <= p.length; i += 16) transformed(Vec::load(from + i), p.transform).store(to + i);
  for (; i < p.length; i++) to[i] = transformed(to_float(from[i]), p.transform);
}

void pack(const PerExampleBlock&, const Packing& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&]<class T>(const T*) {
    float* to = p.to + begin * (p.before + p.length + p.after);
    for (int64_t row = begin; row < end; row++) {
      for (int64_t i = 0; i < p.before; i++) *to++ = 0;
      pack_row(static_cast<const T*>(p.from) + row * p.length, to, p);
      to += p.length;
      for (int64_t i = 0; i < p.after; i++) *to++ = 0;
    }
  });
}

// channel_dot. sum.inl defines the order of a row's sum. Channels-last, each channel has one partial sum in float32 for
// kRun consecutive positions, which is then added to a sum in double.

constexpr int64_t kRun = kBlock / 16;  // as many as a partial sum of a row adds

template <class OutputGrad, class Value>
struct Products {
  const OutputGrad* output_grad;
  const Value* values;
  Vec at(int64_t i) const { return Vec::load(output_grad + i) * Vec::load(values + i); }
  Vec first(int64_t i, int n) const { return Vec::load_first(output_grad + i, n) * Vec::load_first(values + i, n); }
  Products from(int64_t i) const { return {output_grad + i, values + i}; }
};

template <class OutputGrad>
struct Plain {
  const OutputGrad* output_grad;
  Vec at(int64_t i) const { return Vec::load(output_grad + i); }
  Vec first(int64_t i, int n) const { return Vec::load_first(output_grad + i, n); }
  Plain from(int64_t i) const { return {output_grad + i}; }
};

// Up to 16 channels; positions are `pitch` elements apart.
template <class Terms>
void dot_columns(const Terms& terms, int64_t positions, int64_t pitch, int channels, float* out) {
  double lanes[16] = {};
  for (int64_t p = 0; p < positions; p += kRun) {
    const int64_t end = positions - p < kRun ? positions : p + kRun;
    Vec sum = Vec::broadcast(0);
    for (int64_t q = p; q < end; q++)
      sum = sum + (channels == 16 ? terms.at(q * pitch) : terms.first(q * pitch, channels));
    float run[16];
    sum.store(run);
    for (int l = 0; l < 16; l++) lanes[l] += double(run[l]);
  }
  for (int l = 0; l < channels; l++) out[l] = float(lanes[l]);
}

template <class Terms>
void dot(const Terms& terms, const ChannelDot& p, int64_t begin, int64_t end) {
  if (!p.channels_last) {
    for (int64_t row = begin; row < end; row++) p.out[row] = float(sum_row(terms.from(row * p.positions), p.positions));
    return;
  }
  for (int64_t i = begin; i < end;) {
    const int64_t x = i / p.channels, c = i % p.channels;
    const int64_t left = p.channels - c < end - i ? p.channels - c : end - i, channels = left < 16 ? left : 16;
    dot_columns(terms.from(x * p.positions * p.channels + c), p.positions, p.channels, int(channels), p.out + i);
    i += channels;
  }
}

void channel_dot(const ChannelDot& p, int64_t begin, int64_t end) {
  with_dtype(p.output_grad_dtype, [&]<class OutputGrad>(const OutputGrad*) {
    const OutputGrad* output_grad = static_cast<const OutputGrad*>(p.output_grad);
    if (!p.values) return dot(Plain<OutputGrad>{output_grad}, p, begin, end);
    with_dtype(p.values_dtype, [&]<class Value>(const Value*) {
      dot(Products<OutputGrad, Value>{output_grad, static_cast<const Value*>(p.values)}, p, begin, end);
    });
  });
}

}  // namespace

#include "cpu/channel_sums.inl"

extern const PerExampleKernels kPerExample;
const PerExampleKernels kPerExample = {pack, tiles, accumulate, channel_dot, channel_sums};

#undef DELFAST_INLINED
