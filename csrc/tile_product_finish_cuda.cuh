// What follows the sums of a tile product: those of a cluster added up, bias, time embedding and
// residual, or GEGLU's gate; each result is rounded once and stored.
#pragma once

#include "tile_product_problem_cuda.cuh"

#if SDFAST_HOPPER

namespace sdfast {

// 8 numbers as they lie in memory.
template <typename T>
using Eight = Vector<T, 8>;

template <typename T>
__device__ inline void add(float (&h)[8], const Eight<T>& numbers) {
#pragma unroll
  for (int k = 0; k < 8; ++k) h[k] += to_float(numbers.values[k]);
}
// Null is zeros.
template <typename T>
__device__ inline Eight<T> eight_of(const T* from, int64_t at) {
  if (from) return *reinterpret_cast<const Eight<T>*>(from + at);
  const T zero = from_float<T>(0.0f);
  return {{zero, zero, zero, zero, zero, zero, zero, zero}};
}

// g Phi(g). 2 (1 - Phi(|g|)) = erfc(|g| / sqrt 2) within 1.5e-7: Abramowitz and Stegun, 7.1.26.
__device__ inline float gelu(float g) {
  constexpr float kLog2e = 1.4426950f;
  const float x = fabsf(g) * 0.70710678f;
  const float t = __fdividef(1.0f, __fmaf_rn(0.3275911f, x, 1.0f));
  float tail = __fmaf_rn(1.061405429f, t, -1.453152027f);
  tail = __fmaf_rn(tail, t, 1.421413741f);
  tail = __fmaf_rn(tail, t, -0.284496736f);
  tail = __fmaf_rn(tail, t, 0.254829592f);
  tail *= 0.5f * t * exp2_fast(-kLog2e * x * x);
  return g * (g < 0.0f ? tail : 1.0f - tail);
}

// GEGLU of a group's sums, each value beside its gate in one thread, stored from registers: that
// takes less time than rows of 16 bytes do, by way of shared memory.
template <typename Tile, typename T>
__device__ __forceinline__ void finish_gated(const TileProduct<T>& call, const TilePlace& place,
                                             int first_row,
                                             const float (&sums)[Tile::kColumns / 2]) {
  constexpr int kGates = Tile::kColumns / 4;  // from a value to its gate
  const Conv2d<T>& conv = call.conv;
  const int out_channels = conv.out_channels / 2;
#pragma unroll
  for (int j = 0; j < Tile::kColumns / 16; ++j) {
    const int o = place.column + 8 * j + threadIdx.x % 4 * 2;
    if (o >= out_channels) continue;
    float bias[2] = {}, gate_bias[2] = {};
    if (conv.bias) load(conv.bias + o, bias), load(conv.bias + o + out_channels, gate_bias);
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int row = place.x + first_row + lower * 8, i = 4 * j + 2 * lower;
      if (row >= conv.out_width) continue;
      const float y[2] = {(sums[i] + bias[0]) * gelu(sums[i + kGates] + gate_bias[0]),
                          (sums[i + 1] + bias[1]) * gelu(sums[i + kGates + 1] + gate_bias[1])};
      store(conv.y + int64_t{row} * out_channels + o, y);
    }
  }
}

// The rows of a tile that this block finishes, from the sums of its cluster. A thread has 8 columns
// of several rows, whose loads it issues together.
template <typename Tile, typename T>
__device__ void finish_rows(const TileProduct<T>& call, const TilePlace& place, float* sums,
                            int split) {
  constexpr int kVectors = Tile::kColumns / 8, kRowsAtOnce = kProductThreads / kVectors;
  constexpr int kBatch = 4 / Tile::kBlocks;
  const Conv2d<T>& conv = call.conv;
  const TileProductPlan& plan = call.plan;
  const int column = threadIdx.x % kVectors * 8, o = place.column + column;
  if (static_cast<int>(threadIdx.x) >= kRowsAtOnce * kVectors || o >= conv.out_channels) return;
  const int rows = kTilePixels / plan.splits, last = (split + 1) * rows;
  const int scale = conv.phases > 1 ? 2 : 1;
  const Eight<T> bias = eight_of(conv.bias, o);
  for (int first = split * rows + threadIdx.x / kVectors; first < last;
       first += kBatch * kRowsAtOnce) {
    int64_t at[kBatch];  // in y, -1 where there is no pixel
    Eight<T> time[kBatch], residual[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * kRowsAtOnce;
      const int x = place.x + (row & (plan.width() - 1));
      const int y = place.y + (row >> plan.width_log2 & (plan.height() - 1));
      const int image = place.image + (row >> (plan.width_log2 + plan.height_log2));
      at[i] = -1;
      if (row >= last || x >= conv.out_width || y >= conv.out_height || image >= conv.images)
        continue;
      const int64_t pixel =
          (int64_t{image} * conv.out_height * scale + y * scale + place.phase / 2) *
              conv.out_width * scale +
          x * scale + place.phase % 2;
      at[i] = pixel * conv.out_channels + o;
      time[i] = eight_of(conv.time_embedding, int64_t{image} * conv.out_channels + o);
      residual[i] = eight_of(conv.residual, at[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (at[i] < 0) continue;
      const int in_tile = (first + i * kRowsAtOnce) * Tile::kPitch + column;
      float h[8] = {};
      for (int other = 0; other < plan.splits; ++other) {
        const float* const from =
            (plan.splits > 1 ? in_block_of_cluster(sums, other) : sums) + in_tile;
        float part[4];
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
          load(from + k, part);
#pragma unroll
          for (int n = 0; n < 4; ++n) h[k + n] += part[n];
        }
      }
      add(h, bias), add(h, time[i]), add(h, residual[i]);
      store(conv.y + at[i], h);
    }
  }
}

}  // namespace sdfast

#endif  // SDFAST_HOPPER
