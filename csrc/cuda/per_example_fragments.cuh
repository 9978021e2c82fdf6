// Per-example sums by mma.sync, part 2 (after per_example_stages.cuh): a warp's fragments from shared memory, their
// products, and the sums.
#pragma once

#include "cuda/per_example_stages.cuh"

namespace delfast::cuda {

// Adds to the sums if the segment has all of the tile's examples; otherwise writes to the segment's own tile.
template <class T, int kCount>
__device__ __forceinline__ void put_sums(const SegmentsLayer& p, const Segment& s, int m, int n,
                                         const float (&values)[kCount]) {
  float out[kCount];
  float* at;
  if (s.begin == 0 && s.end == p.examples) {
    const int column_tile = s.tile / p.m_tiles;
    const int channel = (s.tile - column_tile * p.m_tiles) * T::kM + m, column = column_tile * T::kN + n;
    if (channel >= p.out_channels || column >= p.row) return;
    at = p.sums + int64_t(channel) * p.row + column;
    load_pack<true>(at, out);
#pragma unroll
    for (int i = 0; i < kCount; i++) out[i] += values[i];
  } else {
    at = p.partial + int64_t(int(blockIdx.x) + s.tile) * (T::kM * T::kN) + m * T::kN + n;
#pragma unroll
    for (int i = 0; i < kCount; i++) out[i] = values[i];
  }
  store_pack(at, out);
}

template <class T>
struct Fragments {
  uint32_t output_grad[T::kFragmentsM][4], inputs[T::kFragmentsN][2];
};

// A warp's part of a block's tile.
template <class T>
class Consumer {
 public:
  using Sums = float[T::kFragmentsM][T::kFragmentsN][4];

  __device__ __forceinline__ Consumer()
      : first_m_(warp() % T::kWarpsM * T::kWarpM), first_n_(warp() / T::kWarpsM * T::kWarpN) {
    const int output_grad_chunk = first_m_ / T::kPack, input_chunk = first_n_ / T::kPack;
    if constexpr (T::kTf32) {
      const int group = lane() / 4, row = lane() % 4;
      for (int i = 0; i < kOutputGradLoads; i++)
        output_grad_at_[i] = row * T::kOutputGradPitch + T::swizzled(row, output_grad_chunk + 8 * i + group);
      input_at_[0] = T::kOutputGradBytes + row * T::kInputPitch + T::swizzled(row, input_chunk + group);
    } else {
      // Matrices 0 to 3, of 8 lanes each. Output gradients: (k, m), (k, m + 8), (k + 8, m), (k + 8, m + 8).
      // Inputs: (k, n), (k + 8, n), (k, n + 8), (k + 8, n + 8).
      const int output_grad_row = (lane() & 7) + (lane() >> 4) * 8, input_row = (lane() & 7) + (lane() >> 3 & 1) * 8;
      for (int i = 0; i < kOutputGradLoads; i++)
        output_grad_at_[i] = output_grad_row * T::kOutputGradPitch +
                             T::swizzled(output_grad_row, output_grad_chunk + 2 * i + (lane() >> 3 & 1));
      for (int j = 0; j < kInputLoads; j++)
        input_at_[j] = T::kOutputGradBytes + input_row * T::kInputPitch +
                       T::swizzled(input_row, input_chunk + 2 * j + (lane() >> 4));
    }
  }

  __device__ __forceinline__ void load(Fragments<T>& f, ptx::Shared stage, int step) const {
    const ptx::Shared output_grad = stage + step * (T::kStep * T::kOutputGradPitch),
                      inputs = stage + step * (T::kStep * T::kInputPitch);
    if constexpr (T::kTf32) {
      // 4 neighbouring channels of a row. Output gradients: rows `group` and `group` + 8 of fragments 2 i and 2 i + 1.
      // Inputs: column `group` of fragments 0 to 3. put() uses the same order of channels.
      uint32_t low[4], high[4];
#pragma unroll
      for (int i = 0; i < kOutputGradLoads; i++) {
        ptx::load_16_bytes(low, output_grad + output_grad_at_[i]);
        ptx::load_16_bytes(high, output_grad + output_grad_at_[i] + 4 * T::kOutputGradPitch);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          f.output_grad[2 * i + h][0] = low[2 * h];
          f.output_grad[2 * i + h][1] = low[2 * h + 1];
          f.output_grad[2 * i + h][2] = high[2 * h];
          f.output_grad[2 * i + h][3] = high[2 * h + 1];
        }
      }
      ptx::load_16_bytes(low, inputs + input_at_[0]);
      ptx::load_16_bytes(high, inputs + input_at_[0] + 4 * T::kInputPitch);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        f.inputs[j][0] = low[j];
        f.inputs[j][1] = high[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kOutputGradLoads; i++)
        ptx::load_matrices_transposed(f.output_grad[i], output_grad + output_grad_at_[i]);
#pragma unroll
      for (int j = 0; j < kInputLoads; j++) {
        uint32_t words[4];
        ptx::load_matrices_transposed(words, inputs + input_at_[j]);
        f.inputs[2 * j][0] = words[0];
        f.inputs[2 * j][1] = words[1];
        f.inputs[2 * j + 1][0] = words[2];
        f.inputs[2 * j + 1][1] = words[3];
      }
    }
  }

  static __device__ __forceinline__ void round(Fragments<T>& f) {
    if constexpr (T::kTf32) {
#pragma unroll
      for (int i = 0; i < T::kFragmentsM; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) f.output_grad[i][e] = round_to_tf32(f.output_grad[i][e]);
#pragma unroll
      for (int j = 0; j < T::kFragmentsN; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) f.inputs[j][e] = round_to_tf32(f.inputs[j][e]);
    }
  }
  // gradient = the products, added to the gradient unless it is fresh (the first product of an example).
  static __device__ __forceinline__ void multiply(Sums& gradient, const Fragments<T>& f, bool fresh) {
    const float zeros[4] = {};
    if (fresh) {
#pragma unroll
      for (int j = 0; j < T::kFragmentsN; j++)
#pragma unroll
        for (int i = 0; i < T::kFragmentsM; i++)
          ptx::multiply<typename T::Operand>(gradient[i][j], f.output_grad[i], f.inputs[j], zeros);
    } else {
#pragma unroll
      for (int j = 0; j < T::kFragmentsN; j++)
#pragma unroll
        for (int i = 0; i < T::kFragmentsM; i++)
          ptx::multiply<typename T::Operand>(gradient[i][j], f.output_grad[i], f.inputs[j], gradient[i][j]);
    }
  }
  static __device__ __forceinline__ void end_example(Transform transform, Sums& sums, const Sums& gradient) {
    const auto add = [&](auto one) {
#pragma unroll
      for (int j = 0; j < T::kFragmentsN; j++)
#pragma unroll
        for (int i = 0; i < T::kFragmentsM; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) sums[i][j][e] = one(sums[i][j][e], gradient[i][j][e]);
    };
    if (transform == Transform::abs)
      add([](float sum, float g) { return sum + fabsf(g); });
    else
      add([](float sum, float g) { return fmaf(g, g, sum); });
  }

  // Adds a segment's sums to the result, or writes them to its tile of the workspace, and sets them to 0.
  __device__ __forceinline__ void put(const SegmentsLayer& p, const Segment& s, Sums& sums) const {
    const int group = lane() / 4, in_group = lane() % 4;
#pragma unroll
    for (int i = 0; i < T::kFragmentsM; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if constexpr (T::kTf32) {
          const int m = first_m_ + 32 * (i / 2) + 4 * group + 2 * (i % 2) + h, n = first_n_ + 8 * in_group;
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float values[4] = {sums[i][0][2 * h + e], sums[i][1][2 * h + e], sums[i][2][2 * h + e],
                                     sums[i][3][2 * h + e]};
            put_sums<T>(p, s, m, n + 4 * e, values);
          }
        } else {
          const int m = first_m_ + 16 * i + group + 8 * h;
#pragma unroll
          for (int j = 0; j < T::kFragmentsN; j++) {
            const float values[2] = {sums[i][j][2 * h], sums[i][j][2 * h + 1]};
            put_sums<T>(p, s, m, first_n_ + 8 * j + 2 * in_group, values);
          }
        }
      }
#pragma unroll
    for (int i = 0; i < T::kFragmentsM; i++)
#pragma unroll
      for (int j = 0; j < T::kFragmentsN; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[i][j][e] = 0;
  }

 private:
  static constexpr int kOutputGradLoads = T::kTf32 ? T::kFragmentsM / 2 : T::kFragmentsM,
                       kInputLoads = T::kTf32 ? 1 : T::kFragmentsN / 2;
  static_assert(T::kFragmentsN == 4 && (!T::kTf32 || T::kFragmentsM % 2 == 0));

  // addresses that this lane reads, in bytes from the start of a stage
  int output_grad_at_[kOutputGradLoads], input_at_[kInputLoads];
  int first_m_, first_n_;
};

}  // namespace delfast::cuda
