// What a tile product's sums begin with, bias and time embedding, and what follows them: GEGLU's
// gate, those of a cluster added up, the residual; each result is rounded once and stored.
#pragma once

#include "tile_product_problem_cuda.cuh"

#if SDFAST_HOPPER

namespace sdfast {

// 8 numbers as they lie in memory.
template <typename T>
using Eight = Vector<T, 8>;
// Those of a pixel; counted in bytes, so that it takes one instruction to find them.
template <typename T>
__device__ inline const Eight<T>* vector_of(const T* image, int pixel, int channels) {
  const uint32_t bytes = static_cast<uint32_t>(channels) * sizeof(T);
  return reinterpret_cast<const Eight<T>*>(reinterpret_cast<const char*>(image) +
                                           uint64_t{static_cast<uint32_t>(pixel)} * bytes);
}
template <typename T>
__device__ inline Eight<T>* vector_of(T* image, int pixel, int channels) {
  return const_cast<Eight<T>*>(vector_of(const_cast<const T*>(image), pixel, channels));
}

// The pixel of row `row` of a tile in y, -1 where there is none.
template <typename T>
__device__ inline int pixel_of_row(const TileProduct<T>& call, const TilePlace& place, int row) {
  const Conv2d<T>& conv = call.conv;
  const TileProductPlan& plan = call.plan;
  const int x = place.x + (row & (plan.width() - 1));
  const int y = place.y + (row >> plan.width_log2 & (plan.height() - 1));
  const int image = place.image + (row >> (plan.width_log2 + plan.height_log2));
  if (x >= conv.out_width || y >= conv.out_height || image >= conv.images) return -1;
  if (conv.phases == 1) return (image * conv.out_height + y) * conv.out_width + x;
  const int line = (image * conv.out_height + y) * 2 + place.phase / 2;
  return (line * conv.out_width + x) * 2 + place.phase % 2;
}

// The first of a thread's two rows of a tile, the second 8 further on.
__device__ inline int row_of_thread() { return threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4; }

// Bias and time embedding, of the first of a cluster's blocks; elsewhere zeros. They are read while
// the first tiles are on their way.
template <typename Tile, bool kGated, typename T>
__device__ __forceinline__ void begin_sums(const TileProduct<T>& call, const TilePlace& place,
                                           bool is_first, float (&sums)[Tile::kColumns / 2]) {
  const Conv2d<T>& conv = call.conv;
  const int out_channels = kGated ? conv.out_channels / 2 : conv.out_channels;
  const int o = place.column + threadIdx.x % 4 * 2;
  const int left = is_first ? out_channels - o : 0;  // channels from here on
  const int left_of_bias = conv.bias ? left : 0;
  const int left_of_time = !kGated && conv.time_embedding ? left : 0;
  const auto time_of = [&](int row) {
    const int image = place.image + (row >> (call.plan.width_log2 + call.plan.height_log2));
    return conv.time_embedding + int64_t{min(image, conv.images - 1)} * out_channels + o;
  };
  const T* const bias = conv.bias + o;
  const T* const upper_time = time_of(row_of_thread());
  const T* const lower_time = time_of(row_of_thread() + 8);
#pragma unroll
  for (int j = 0; j < Tile::kColumns / 8; ++j) {
    const bool is_gate = kGated && j >= Tile::kColumns / 16;
    const int next = 8 * j - (is_gate ? Tile::kColumns / 2 : 0);
    float of_both[2] = {}, upper[2] = {}, lower[2] = {};
    if (next < left_of_bias) load(bias + (is_gate ? out_channels : 0) + next, of_both);
    if (next < left_of_time) load(upper_time + next, upper), load(lower_time + next, lower);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      sums[4 * j + n] = of_both[n] + upper[n], sums[4 * j + 2 + n] = of_both[n] + lower[n];
    }
  }
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

// GEGLU: the first half of the sums, of the values, becomes the result.
template <int count>
__device__ __forceinline__ void apply_gates(float (&sums)[count]) {
#pragma unroll
  for (int i = 0; i < count / 2; ++i) sums[i] *= gelu(sums[i + count / 2]);
}

// Lays the sums of a warp's 16 pixels out in shared memory, as SumsLayout says.
template <int columns, int count>
__device__ __forceinline__ void lay_out(float* results, const float (&sums)[count]) {
  using Layout = SumsLayout<columns>;
  const int column = threadIdx.x % 4 * 2;
  float* const at = results + row_of_thread() * Layout::kPitch +
                    (column < 4 ? column : Layout::kHalves + column - 4);
#pragma unroll
  for (int j = 0; j < Layout::kVectors; ++j) {
    const float upper[2] = {sums[4 * j], sums[4 * j + 1]},
                lower[2] = {sums[4 * j + 2], sums[4 * j + 3]};
    store(at + 4 * j, upper);
    store(at + 8 * Layout::kPitch + 4 * j, lower);
  }
}

// 8 sums of a row; of a cluster those of all its blocks, in order.
template <int columns, bool kSplit>
__device__ __forceinline__ void sums_of(float (&h)[8], float* from, int blocks) {
#pragma unroll
  for (int k = 0; k < 8; k += 4) {
    float* const half = from + (k == 0 ? 0 : SumsLayout<columns>::kHalves);
    float part[4];
    load(kSplit ? in_block_of_cluster(half, 0) : half, part);
#pragma unroll
    for (int n = 0; n < 4; ++n) h[k + n] = part[n];
    if constexpr (kSplit) {
      for (int other = 1; other < blocks; ++other) {
        load(in_block_of_cluster(half, other), part);
#pragma unroll
        for (int n = 0; n < 4; ++n) h[k + n] += part[n];
      }
    }
  }
}

// What a warp stores of its 16 pixels: all of them, or where K is split this block's share. A
// thread has 8 channels of every kRows-th; it asks for their residuals together.
template <int columns, bool kSplit, typename T>
__device__ __forceinline__ void finish_rows(const TileProduct<T>& call, const TilePlace& place,
                                            float* results, int split) {
  using Layout = SumsLayout<columns>;
  constexpr int kVectors = Layout::kVectors, kRows = kWarp / kVectors;
  constexpr int kRounds = (16 + kRows - 1) / kRows, kBatch = kSplit ? 2 : kRounds / 2;
  const Conv2d<T>& conv = call.conv;
  const int blocks = kSplit ? call.plan.splits() : 1, rows = 16 / blocks;
  const int out_channels = columns == call.plan.columns ? conv.out_channels : conv.out_channels / 2;
  const int lane = threadIdx.x % kWarp, first_row = threadIdx.x / kWarp * 16;
  const int o = place.column + lane % kVectors * 8;
  const bool has_channels = lane < kRows * kVectors && o < out_channels;
  const int pixel_of_lane = pixel_of_row(call, place, first_row + lane % 16);
  float* const from = results + first_row * Layout::kPitch + lane % kVectors * 4;
  const T* const residuals = conv.residual + o;
  T* const y = conv.y + o;
  const int begin = split * rows, end = begin + rows;
  for (int first = begin; first < end; first += kBatch * kRows) {
    int pixels[kBatch];
    Eight<T> residual[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * kRows + lane / kVectors;
      const int pixel = __shfl_sync(kAllLanes, pixel_of_lane, row % 16);
      pixels[i] = has_channels && row < end ? pixel : -1;
    }
    if (conv.residual) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (pixels[i] >= 0) residual[i] = *vector_of(residuals, pixels[i], out_channels);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (pixels[i] < 0) continue;
      const int row = first + i * kRows + lane / kVectors;
      float h[8];
      sums_of<columns, kSplit>(h, from + row * Layout::kPitch, blocks);
      if (conv.residual) {
#pragma unroll
        for (int k = 0; k < 8; ++k) h[k] += to_float(residual[i].values[k]);
      }
      Eight<T> rounded;
#pragma unroll
      for (int k = 0; k < 8; ++k) rounded.values[k] = from_float<T>(h[k]);
      *vector_of(y, pixels[i], out_channels) = rounded;
    }
  }
}

}  // namespace sdfast

#endif  // SDFAST_HOPPER
