// The gradients of a normalization's weight and bias, summed over the examples. Included by per_example.inl.
//
// A unit is a slab of examples by 16 channels. Output gradients and values are read once for both sums.
//
// Numerics. Sums of an example as in channel_dot: partial sums in float32, added in double. Its transform and the sum
// over the examples are in double. The mean is subtracted from every value, because sum(grad value) - mean sum(grad)
// would cancel where the mean is large relative to the deviation.

namespace {

struct LanePair {
  double weighted[16] = {}, plain[16] = {};
};

template <class OutputGrad, class Value>
struct Pairs {
  const OutputGrad* output_grad;
  const Value* values;  // null: only the plain sums are needed
  const float* mean;    // null: 0

  // Adds `channels` neighbours; positions are `pitch` elements apart.
  void add_columns(int64_t positions, int64_t pitch, int channels, int64_t at, int64_t channel, LanePair& sums) const {
    float first[16] = {};
    if (mean)
      for (int l = 0; l < channels; l++) first[l] = mean[channel + l];
    const Vec center = Vec::load(first);
    for (int64_t p = 0; p < positions; p += kRun) {
      const int64_t end = positions - p < kRun ? positions : p + kRun;
      Vec weighted = Vec::broadcast(0), plain = Vec::broadcast(0);
      for (int64_t q = p; q < end; q++) {
        const OutputGrad* const d = output_grad + at + q * pitch;
        const Vec grad = channels == 16 ? Vec::load(d) : Vec::load_first(d, channels);
        plain = plain + grad;
        if (!values) continue;
        const Value* const v = values + at + q * pitch;
        const Vec value = channels == 16 ? Vec::load(v) : Vec::load_first(v, channels);
        weighted = weighted + grad * (value - center);
      }
      float run[2][16];
      weighted.store(run[0]);
      plain.store(run[1]);
      for (int l = 0; l < 16; l++) {
        sums.weighted[l] += double(run[0][l]);
        sums.plain[l] += double(run[1][l]);
      }
    }
  }

  // Adds a row of contiguous positions.
  void add_row(int64_t positions, int64_t at, int64_t channel, double& weighted, double& plain) const {
    const Vec center = Vec::broadcast(mean ? mean[channel] : 0.0f);
    Sum products, alone;
    for (int64_t i = 0; i < positions; i += 16) {
      const int n = positions - i < 16 ? int(positions - i) : 16;
      const Vec grad = n == 16 ? Vec::load(output_grad + at + i) : Vec::load_first(output_grad + at + i, n);
      alone.add(grad);
      if (!values) continue;
      const Vec value = n == 16 ? Vec::load(values + at + i) : Vec::load_first(values + at + i, n);
      products.add(grad * (value - center));
    }
    plain = alone.total();
    if (values) weighted = products.total();
  }
};

template <class OutputGrad, class Value>
void add_unit(const ChannelSums& p, const ChannelSumsPlan& plan, int64_t unit, double* out) {
  const Pairs<OutputGrad, Value> pairs = {static_cast<const OutputGrad*>(p.output_grad),
                                          static_cast<const Value*>(p.values), p.mean};
  const int64_t slab = unit / plan.blocks, c = unit % plan.blocks * 16;
  const int channels = int(p.channels - c < 16 ? p.channels - c : 16);
  const int64_t first = slab * plan.slab_examples;
  const int64_t end = p.examples - first < plan.slab_examples ? p.examples : first + plan.slab_examples;
  double scale[16];
  for (int l = 0; l < 16; l++)
    scale[l] = p.variance && l < channels ? 1 / __builtin_sqrt(double(p.variance[c + l]) + p.eps) : 1;
  LanePair totals;
  for (int64_t x = first; x < end; x++) {
    LanePair sums;
    if (p.channels_last) {
      pairs.add_columns(p.positions, p.channels, channels, x * p.positions * p.channels + c, c, sums);
    } else {
      for (int l = 0; l < channels; l++)
        pairs.add_row(p.positions, (x * p.channels + c + l) * p.positions, c + l, sums.weighted[l], sums.plain[l]);
    }
    for (int l = 0; l < 16; l++) {
      const double weighted = sums.weighted[l] * scale[l], plain = sums.plain[l];
      totals.weighted[l] += p.transform == Transform::abs ? __builtin_fabs(weighted) : weighted * weighted;
      totals.plain[l] += p.transform == Transform::abs ? __builtin_fabs(plain) : plain * plain;
    }
  }
  for (int l = 0; l < 16; l++) {
    out[l] = totals.weighted[l];
    out[16 + l] = totals.plain[l];
  }
}

void channel_sums(const ChannelSums& p, const ChannelSumsPlan& plan, double* workspace, int64_t begin, int64_t end) {
  with_dtype(p.output_grad_dtype, [&]<class OutputGrad>(const OutputGrad*) {
    with_dtype(p.values_dtype, [&]<class Value>(const Value*) {
      for (int64_t unit = begin; unit < end; unit++)
        add_unit<OutputGrad, Value>(p, plan, unit, workspace + unit * 2 * ChannelSumsPlan::kLanes);
    });
  });
}

}  // namespace
