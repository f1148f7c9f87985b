// What follows the sums of a tile product: GEGLU's gate, those of a cluster added up, bias, time
// embedding and residual; each result is rounded once and stored.
#pragma once

#include "tile_product_problem_cuda.cuh"

#if SDFAST_HOPPER

namespace sdfast {

// 8 numbers as they lie in memory.
template <typename T>
using Eight = Vector<T, 8>;
template <typename T>
__device__ inline const Eight<T>& eight_at(const T* from) {
  return *reinterpret_cast<const Eight<T>*>(from);
}
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
template <typename T, int count>
__device__ __forceinline__ void apply_gates(const TileProduct<T>& call, const TilePlace& place,
                                            float (&sums)[count]) {
  const int out_channels = call.conv.out_channels / 2;
  const T* const bias = call.conv.bias;
#pragma unroll
  for (int j = 0; j < count / 8; ++j) {
    const int o = place.column + 8 * j + threadIdx.x % 4 * 2;
    float of_values[2] = {}, of_gates[2] = {};
    if (bias && o < out_channels)
      load(bias + o, of_values), load(bias + out_channels + o, of_gates);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& value = sums[4 * j + i];
      value = (value + of_values[i % 2]) * gelu(sums[4 * j + i + count / 2] + of_gates[i % 2]);
    }
  }
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

template <typename T>
__device__ inline void add(float (&h)[8], const Eight<T>& numbers) {
#pragma unroll
  for (int k = 0; k < 8; ++k) h[k] += to_float(numbers.values[k]);
}

// The first of the 8 channels that a thread stores.
template <int columns>
__device__ inline int column_of_thread(const TilePlace& place) {
  return place.column + threadIdx.x % kWarp % SumsLayout<columns>::kVectors * 8;
}

// Bias and time embedding of 8 channels, none beyond the last. Where a tile has pixels of several
// images the latter is of each pixel instead.
template <typename T>
__device__ __forceinline__ void load_added(const TileProduct<T>& call, const TilePlace& place,
                                           int o, float (&added)[8]) {
  const Conv2d<T>& conv = call.conv;
#pragma unroll
  for (int k = 0; k < 8; ++k) added[k] = 0;
  if (o >= conv.out_channels) return;
  if (conv.bias) add(added, eight_at(conv.bias + o));
  if (conv.time_embedding && call.plan.images() == 1) {
    add(added, eight_at(conv.time_embedding + place.image * conv.time_stride + o));
  }
}

// What a warp stores of its 16 pixels: all of them, or where K is split this block's share. A
// thread has 8 channels of every kRows-th; it asks for all that it needs of several together.
template <int columns, bool kSplit, typename T>
__device__ __forceinline__ void finish_rows(const TileProduct<T>& call, const TilePlace& place,
                                            float* results, int split, const float (&added)[8]) {
  using Layout = SumsLayout<columns>;
  constexpr int kVectors = Layout::kVectors, kRows = kWarp / kVectors;
  constexpr int kRounds = (16 + kRows - 1) / kRows, kBatch = kSplit ? 2 : kRounds / 2;
  const Conv2d<T>& conv = call.conv;
  const TileProductPlan& plan = call.plan;
  const int blocks = kSplit ? plan.splits() : 1, rows = 16 / blocks;
  const int out_channels = columns == plan.columns ? conv.out_channels : conv.out_channels / 2;
  const int lane = threadIdx.x % kWarp, first_row = threadIdx.x / kWarp * 16;
  const int o = column_of_thread<columns>(place);
  const bool has_channels = lane < kRows * kVectors && o < out_channels;
  const int pixel_of_lane = pixel_of_row(call, place, first_row + lane % 16);
  float* const from = results + first_row * Layout::kPitch + lane % kVectors * 4;
  const T* const residuals = conv.residual + o;
  const bool has_times = conv.time_embedding && plan.images() > 1;
  T* const y = conv.y + o;
  const int begin = split * rows, end = begin + rows;
  for (int first = begin; first < end; first += kBatch * kRows) {
    int pixels[kBatch];
    Eight<T> residual[kBatch];
    float h[kBatch][8];
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
#pragma unroll
      for (int k = 0; k < 8; ++k) h[i][k] = added[k];
    }
#pragma unroll(kSplit ? 2 : 1)
    for (int block = 0; block < blocks; ++block) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = (first + i * kRows + lane / kVectors) % 16;
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
          float* const half = from + row * Layout::kPitch + (k == 0 ? 0 : Layout::kHalves);
          float part[4];
          const bool is_own = block == split || pixels[i] < 0;  // or not wanted
          load(is_own ? half : in_block_of_cluster(half, block), part);
#pragma unroll
          for (int n = 0; n < 4; ++n) h[i][k + n] += part[n];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (pixels[i] < 0) continue;
      if (has_times) {
        const int row = first_row + first + i * kRows + lane / kVectors;
        const int image = place.image + (row >> (plan.width_log2 + plan.height_log2));
        add(h[i], eight_at(conv.time_embedding + image * conv.time_stride + o));
      }
      if (conv.residual) add(h[i], residual[i]);
      Eight<T> rounded;
#pragma unroll
      for (int k = 0; k < 8; ++k) rounded.values[k] = from_float<T>(h[i][k]);
      *vector_of(y, pixels[i], out_channels) = rounded;
    }
  }
}

}  // namespace sdfast

#endif  // SDFAST_HOPPER
