// conv2d on CUDA, the products: a pipeline of copies, and the tensor cores behind it.
#pragma once

#include "conv2d_load_cuda.cuh"

namespace sdfast {

// The accumulators of a thread: of an mma of 16 pixels by 8 channels each, two channels of the
// pixel lane / 4 and two of the one 8 further.
template <typename Tile>
using ConvSums = float[Tile::kRows][Tile::kColumns][4];

// Products of one step: a row of the halo tile is a row of A, whichever position of the kernel it
// meets, and a row of the slice of the weight a column of B.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply_step(const unsigned char* halo,
                                              const unsigned char* weights,
                                              const int (&pixels)[Tile::kRows], int shift,
                                              int weight_row, ConvSums<Tile>& sums) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kUnits; k += 2) {
    uint32_t a[Tile::kRows][4], b[Tile::kColumns][2];
#pragma unroll
    for (int m = 0; m < Tile::kRows; ++m) {
      load_matrices(a[m], halo + unit_place(pixels[m] + shift, k + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < Tile::kColumns; n += 2) {
      uint32_t both[4];
      load_matrices(both, weights + unit_place(weight_row, k + lane / 8 % 2) + n * 8 * kRowBytes);
      b[n][0] = both[0], b[n][1] = both[1];
      b[n + 1][0] = both[2], b[n + 1][1] = both[3];
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (auto& fragment : a) round_to_tf32(fragment);
#pragma unroll
      for (auto& fragment : b) round_to_tf32(fragment);
    }
#pragma unroll
    for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
      for (int n = 0; n < Tile::kColumns; ++n) mma<T>(sums[m][n], a[m], b[n]);
    }
  }
}

// The sums of a block's part of K. Shared memory is free when it returns.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply(const Conv2d<T>& call, const Conv2dPlan& plan,
                                         const Conv2dPlace& place, unsigned char* memory,
                                         ConvSums<Tile>& sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_pixel = warp / Tile::kWarpColumns * Tile::kWarpPixels;
  const int weight_row = warp % Tile::kWarpColumns * Tile::kWarpChannels + lane / 16 * 8 + lane % 8;
  int pixels[Tile::kRows];  // of the halo tile, that meet the kernel's first position
#pragma unroll
  for (int m = 0; m < Tile::kRows; ++m) {
    const int i = first_pixel + m * 16 + lane % 16;
    const int y = i >> plan.tile_width_log2, x = i & ((1 << plan.tile_width_log2) - 1);
    pixels[m] = (y * plan.halo_width + x) * call.stride;
  }

  Conv2dLoader<T, Tile> loader(call, plan, place, memory);
  int chunk = static_cast<int>(blockIdx.y) * plan.chunks_per_split;
  const int last = chunk + plan.chunks_per_split;
  const int steps = ((last < plan.chunks ? last : plan.chunks) - chunk) * call.taps();
  constexpr int kAhead = Tile::kStages - 1;
  int i = 0, j = 0, stage = 0, buffer = 0;
  for (int step = -kAhead; step < steps; ++step) {
    if (step >= 0) {
      wait_for_copies<kAhead - 1>();
      if (call.mean && i == 0 && j == 0) loader.normalise(chunk, buffer);
      __syncthreads();  // the step's copies are there, and what the next ones overwrite was read
    }
    if (step + kAhead < steps) loader.load_step();
    commit_copies();
    if (step < 0) continue;
    multiply_step<T, Tile>(loader.halo(buffer), loader.weights(stage), pixels,
                           i * plan.halo_width + j, weight_row, sums);
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    if (++j < call.taps_x) continue;
    j = 0;
    if (++i < call.taps_y) continue;
    i = 0;
    ++chunk;
    buffer = buffer + 1 == plan.halo_buffers ? 0 : buffer + 1;
  }
  wait_for_copies<0>();
  __syncthreads();
}

}  // namespace sdfast
