// The launchers of per_example_segments (per_example_segments.cu).
#pragma once

#include "cuda/per_example_stages.cuh"
#include "cuda/per_example_variants.h"
#include "delfast/cuda_launch.h"

namespace delfast::cuda {

struct SegmentsPlan {
  SegmentsLayer layer;  // without `partial`
  Variant variant;
  int blocks;
  int64_t workspace;  // bytes
};

// Returns false if these kernels do not support the layer, or if the GPU cannot run that tile. `variant` is not wmma.
template <class Operand>
bool plan_segments(const PerExample& p, Variant variant, SegmentsPlan& plan);

template <class Operand>
void launch_segments(const PerExample& p, const SegmentsPlan& plan, void* workspace, Stream stream);

}  // namespace delfast::cuda
