// The ways to compute per-example sums on tensor cores, and which of them suits a layer.
#pragma once

#include <cstdint>
#include <cstring>

#include "delfast/per_example.h"

namespace delfast::cuda {

// wmma: per_example_tiles, which takes every layer. The others are the tiles of per_example_segments; a warp's part of
// 64x192 is 32 x 32, of the others 64 x 32.
enum class Variant : int8_t { wmma, tile_64x64, tile_64x128, tile_128x128, tile_64x192 };
inline constexpr const char* kVariantNames[] = {"wmma", "64x64", "64x128", "128x128", "64x192"};
inline constexpr int kVariants = 5;

// Whether every position's source is that position: a linear layer, or a kernel of 1 without stride and padding.
inline bool is_direct(const ConvShape& s) {
  bool direct = true;
  for (int d = 0; d < 3; d++)
    direct &= s.kernel[d] == 1 && s.padding[d] == 0 && s.out[d] == s.in[d] && (s.stride[d] == 1 || s.out[d] == 1);
  return direct;
}

inline Variant fastest_variant(const PerExample& p) {
  return p.shape.out_channels > 64 && p.shape.positions() > 16 ? Variant::tile_128x128 : Variant::tile_64x64;
}

}  // namespace delfast::cuda
