// The variants of the per-example sums on tensor cores, and the choice among them for a layer.
#pragma once

#include <cstdint>
#include <cstring>

#include "delfast/per_example.h"

namespace delfast::cuda {

// wmma: per_example_tiles, which supports every layer. The other variants are the tiles of per_example_segments; a
// warp's part is 32 x 32 in 64x192, 64 x 32 in the others.
enum class Variant : int8_t { wmma, tile_64x64, tile_64x128, tile_128x128, tile_64x192 };
inline constexpr const char* kVariantNames[] = {"wmma", "64x64", "64x128", "128x128", "64x192"};
inline constexpr int kVariants = 5;

// Returns true if the source of every position is that position: a linear layer, or a kernel of 1 without stride and
// padding.
inline bool is_direct(const ConvShape& s) {
  bool direct = true;
  for (int d = 0; d < 3; d++)
    direct &= s.kernel[d] == 1 && s.padding[d] == 0 && s.out[d] == s.in[d] && (s.stride[d] == 1 || s.out[d] == 1);
  return direct;
}

// The fastest variant of a measured layer. halves: operands of 16 bits; otherwise float32 as tf32.
struct MeasuredLayer {
  const char* card;
  bool halves, direct;
  int64_t out_channels, columns, positions;  // columns: of the weight, flattened
  Variant fastest;
};
inline constexpr MeasuredLayer kMeasuredLayers[] = {
#include "cuda/per_example_variants.inc"
};

// Returns the fastest variant of the nearest measured layer: on this GPU (or the table's first GPU if it was not
// measured), with operands of this kind, and direct if this layer is. Nearest: the product of the ratios of output
// channels, columns and positions (each ratio at least 1) is least.
inline Variant nearest_variant(const char* card, bool halves, const ConvShape& s) {
  const auto factor = [](int64_t a, int64_t b) { return a < b ? double(b) / double(a) : double(a) / double(b); };
  const bool direct = is_direct(s);
  for (const char* const of : {card, kMeasuredLayers[0].card}) {
    double least = 0;
    const MeasuredLayer* nearest = nullptr;
    for (const MeasuredLayer& layer : kMeasuredLayers) {
      if (std::strcmp(layer.card, of) || layer.halves != halves || layer.direct != direct) continue;
      const double distance = factor(layer.out_channels, s.out_channels) * factor(layer.columns, s.row()) *
                              factor(layer.positions, s.positions());
      if (!nearest || distance < least) nearest = &layer, least = distance;
    }
    if (nearest) return nearest->fastest;
  }
  return Variant::wmma;
}

}  // namespace delfast::cuda
