// conv2d on CUDA, what is written: sums and what is added to them, rounded once, through shared
// memory to y in 16 bytes; or partial sums, where the channels of x are split among blocks.
#pragma once

#include "conv2d_multiply_cuda.cuh"

namespace sdfast {

// The rows of a tile of results in shared memory, a unit longer than needed: 8 rows of 4 lanes meet
// no bank twice.
template <typename T, typename Tile>
constexpr int kResultPitch = Tile::kChannels + kVector<T>;
template <typename T, typename Tile>
constexpr int kResultBytes = kResultPitch<T, Tile> * Tile::kPixels * static_cast<int>(sizeof(T));

// In the statistics a thread takes a channel and a part of the tile's pixels.
template <typename Tile>
constexpr int kParts = Tile::kThreads / Tile::kChannels;

// Calls body(pixel of the tile, its place in y, channel of the tile) for each 16 bytes of this
// thread's that are in the image.
template <typename T, typename Tile, typename Body>
__device__ __forceinline__ void for_each_unit(const Conv2d<T>& call, const Conv2dPlan& plan,
                                              const Conv2dPlace& place, const Body& body) {
  constexpr int kPerRow = Tile::kChannels / kVector<T>;
  const int channel = threadIdx.x % kPerRow * kVector<T>;
#pragma unroll 2
  for (int i = threadIdx.x / kPerRow; i < Tile::kPixels; i += Tile::kThreads / kPerRow) {
    if (place.holds(call, plan, i)) body(i, place.pixel(call, plan, i), channel);
  }
}

// 16 bytes, as far as y has channels from `o` on.
template <typename T>
__device__ __forceinline__ void copy_channels(const Conv2d<T>& call, const Conv2dPlan& plan, int o,
                                              const T* from, T* to) {
  if (!plan.out_vectors) {
#pragma unroll 1
    for (int k = 0; k < kVector<T> && o + k < call.out_channels; ++k) to[k] = from[k];
  } else if (o < call.out_channels) {
    using Unit = Vector<T, kVector<T>>;
    *reinterpret_cast<Unit*>(to) = *reinterpret_cast<const Unit*>(from);
  }
}

// The tile of `residual` to shared memory.
template <typename T, typename Tile>
__device__ __forceinline__ void load_residual(const Conv2d<T>& call, const Conv2dPlan& plan,
                                              const Conv2dPlace& place, T* results) {
  for_each_unit<T, Tile>(call, plan, place, [&](int i, int64_t pixel, int channel) {
    const int o = place.channel + channel;
    copy_channels(call, plan, o, call.residual + pixel * call.out_channels + o,
                  results + i * kResultPitch<T, Tile> + channel);
  });
}

// Results from shared memory to y.
template <typename T, typename Tile>
__device__ __forceinline__ void store_results(const Conv2d<T>& call, const Conv2dPlan& plan,
                                              const Conv2dPlace& place, const T* results) {
  for_each_unit<T, Tile>(call, plan, place, [&](int i, int64_t pixel, int channel) {
    const int o = place.channel + channel;
    copy_channels(call, plan, o, results + i * kResultPitch<T, Tile> + channel,
                  call.y + pixel * call.out_channels + o);
  });
}

// Moments of a channel of the rounded results over one part of the tile's pixels, whose values
// begin at `values`, `pitch` apart; in two passes. moments: (N, tiles, phases, parts, O).
template <typename T>
__device__ __forceinline__ void store_moments(const Conv2d<T>& call, const Conv2dPlan& plan,
                                              const Conv2dPlace& place, int channel, int part,
                                              const T* values, int pitch, ChannelMoments* moments) {
  const int o = place.channel + channel, count = plan.pixels / plan.parts;
  if (o >= call.out_channels) return;
  ChannelMoments found{0, 0, 0, 0};
  const auto for_each_pixel = [&](const auto& body) {
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      if (place.holds(call, plan, part * count + i)) body(to_float(values[i * pitch]));
    }
  };
  for_each_pixel([&](float value) {
    found.count += 1;
    found.mean += value;
  });
  if (found.count > 0) {
    found.mean /= found.count;
    for_each_pixel([&](float value) {
      const float off = value - found.mean;
      found.mean_rest += off;
      found.square += off * off;
    });
    found.mean_rest /= found.count;
  }
  const int tiles = plan.tiles_x * plan.tiles_y;
  const int64_t entry = (int64_t{place.image} * tiles + place.tile) * call.phases + place.phase;
  moments[(entry * plan.parts + part) * call.out_channels + o] = found;
}

// What every pixel of an image has added to its channel o.
template <typename T>
__device__ __forceinline__ float added_to(const Conv2d<T>& call, int image, int o) {
  if (o >= call.out_channels) return 0;
  float added = call.bias ? to_float(call.bias[o]) : 0;
  if (call.time_embedding) {
    added += to_float(call.time_embedding[image * call.time_stride + o]);
  }
  return added;
}

// A split's sums: (splits, blocks, kPixels, kChannels).
template <typename Tile>
__device__ __forceinline__ void store_partials(float* partials, const ConvSums<Tile>& sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_pixel = warp / Tile::kWarpColumns * Tile::kWarpPixels + lane / 4;
  const int first_channel = warp % Tile::kWarpColumns * Tile::kWarpChannels + lane % 4 * 2;
  const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  float* const to =
      partials + (block * Tile::kPixels + first_pixel) * Tile::kChannels + first_channel;
#pragma unroll
  for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kColumns; ++n) {
      const float upper[2] = {sums[m][n][0], sums[m][n][1]};
      const float lower[2] = {sums[m][n][2], sums[m][n][3]};
      store(to + m * 16 * Tile::kChannels + n * 8, upper);
      store(to + (m * 16 + 8) * Tile::kChannels + n * 8, lower);
    }
  }
}

// What follows the products. `results` is shared memory of kResultBytes.
template <typename T, typename Tile>
__device__ __forceinline__ void finish(const Conv2d<T>& call, const Conv2dPlan& plan,
                                       const Conv2dPlace& place, T* results, ConvSums<Tile>& sums,
                                       ChannelMoments* moments) {
  if (call.residual) {
    load_residual<T, Tile>(call, plan, place, results);
    __syncthreads();
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int first_pixel = warp / Tile::kWarpColumns * Tile::kWarpPixels + lane / 4;
  const int first_channel = warp % Tile::kWarpColumns * Tile::kWarpChannels + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < Tile::kColumns; ++n) {
    const int channel = first_channel + n * 8, o = place.channel + channel;
    const float added[2] = {added_to(call, place.image, o), added_to(call, place.image, o + 1)};
#pragma unroll
    for (int m = 0; m < Tile::kRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = first_pixel + m * 16 + half * 8;
        T* const at = results + i * kResultPitch<T, Tile> + channel;
        float h[2] = {sums[m][n][2 * half] + added[0], sums[m][n][2 * half + 1] + added[1]};
        if (call.residual && o < call.out_channels && place.holds(call, plan, i)) {
          h[0] += to_float(at[0]);
          if (o + 1 < call.out_channels) h[1] += to_float(at[1]);
        }
        store(at, h);
      }
    }
  }
  __syncthreads();
  store_results<T, Tile>(call, plan, place, results);
  if (!moments) return;
  const int channel_of_thread = threadIdx.x % Tile::kChannels;
  const int part = threadIdx.x / Tile::kChannels;
  const T* const values =
      results + part * (Tile::kPixels / kParts<Tile>)*kResultPitch<T, Tile> + channel_of_thread;
  store_moments(call, plan, place, channel_of_thread, part, values, kResultPitch<T, Tile>, moments);
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv2d_kernel(Conv2d<T> call, Conv2dPlan plan, float* partials, ChannelMoments* moments) {
  SharedMemory shared;
  unsigned char* const memory = shared.array<unsigned char>(plan.shared_bytes);
  const Conv2dPlace place(call, plan, blockIdx.x);
  ConvSums<Tile> sums = {};
  multiply<T, Tile>(call, plan, place, memory, sums);
  if (partials == nullptr) {
    finish<T, Tile>(call, plan, place, reinterpret_cast<T*>(memory), sums, moments);
  } else {
    store_partials<Tile>(partials, sums);
  }
}

}  // namespace sdfast
