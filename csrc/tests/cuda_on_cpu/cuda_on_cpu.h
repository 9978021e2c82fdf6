// Runs CUDA kernels on the CPU, for tests: `g++ -x c++ -include cuda_on_cpu/cuda_on_cpu.h` compiles the same .cu and
// .cuh text as nvcc, and a launch runs it at once, one fiber for each CUDA thread, one block after the other.
//
// What it checks, beyond results: barriers that not all threads reach, lanes of a warp that do not agree on an
// operation, misaligned access, reading shared memory that the block has not written (it is filled with NaN), launches
// that no GPU would accept; under AddressSanitizer, access beyond an array, shared memory included; under
// ThreadSanitizer, a missing
// __syncthreads or __syncwarp, whatever the schedule, since each fiber is a thread to it and only barriers order them.
// What it counts: the 32-byte sectors that the warps' loads and stores ask for (sectors.h).
//
// set_seed(n): 0 runs threads and blocks in order; any other number shuffles which runnable thread goes next, and
// blocks. A failure is an exception, cuda_on_cpu::KernelError, thrown by the launch.
//
// Limits. Blocks do not overlap, so races between them show only where the order of blocks changes a result. Warps are
// not in lockstep. No textures, inline PTX or cooperative groups. x86-64, GCC or Clang, Linux.
#pragma once

#define DELFAST_CUDA_ON_CPU 1

#include "cuda_on_cpu/language.h"
// after the words of the language
#include "cuda_on_cpu/intrinsics.h"
#include "cuda_on_cpu/sectors.h"
