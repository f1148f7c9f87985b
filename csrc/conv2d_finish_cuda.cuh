// conv2d on CUDA where its channels were split among blocks: the sum of the partial sums, in their
// order, and what follows it.
//
// Algorithm. A block takes kFinishPixels pixels of a tile, a thread 16 bytes of y at a time. Bytes:
// 4 for each split of each value of y, from L2. Limit: the launch.
#pragma once

#include "conv2d_store_cuda.cuh"

namespace sdfast {

constexpr int kFinishPixels = 16, kFinishThreads = 128;  // as many as channels of a tile at most

// partials: (splits, blocks, plan.pixels, plan.channels). Grid: pixels / kFinishPixels for each
// block.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads, 6)
    conv2d_finish_kernel(Conv2d<T> call, Conv2dPlan plan, const float* partials,
                         ChannelMoments* moments) {
  constexpr int kPitch = kFinishThreads + kVector<T>;
  SDFAST_SHARED(T, results, kFinishPixels * kPitch);
  const int parts = plan.pixels / kFinishPixels;
  const int block = blockIdx.x / parts, part = blockIdx.x % parts;
  const Conv2dPlace place(call, plan, block);
  const int per_row = plan.channels / kVector<T>;
  const int channel = threadIdx.x % per_row * kVector<T>, o = place.channel + channel;
  const int64_t blocks = gridDim.x / parts;
  float added[kVector<T>];
#pragma unroll
  for (int k = 0; k < kVector<T>; ++k) added[k] = added_to(call, place.image, o + k);
  for (int i = threadIdx.x / per_row; i < kFinishPixels; i += kFinishThreads / per_row) {
    const int in_tile = part * kFinishPixels + i;
    if (!place.holds(call, plan, in_tile) || o >= call.out_channels) continue;
    float h[kVector<T>] = {};
    for (int split = 0; split < plan.splits; ++split) {
      const int64_t row = (split * blocks + block) * plan.pixels + in_tile;
      const float* const from = partials + row * plan.channels + channel;
#pragma unroll
      for (int k = 0; k < kVector<T>; k += 4) {
        float four[4];
        load(from + k, four);
#pragma unroll
        for (int n = 0; n < 4; ++n) h[k + n] += four[n];
      }
    }
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) h[k] += added[k];
    const int64_t at = place.pixel(call, plan, in_tile) * call.out_channels + o;
    T* const rounded = results + i * kPitch + channel;
    if (plan.out_vectors) {
      float residual[kVector<T>] = {};
      if (call.residual) load(call.residual + at, residual);
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) h[k] += residual[k];
      store(rounded, h);
      store(call.y + at, h);
    } else {
#pragma unroll
      for (int k = 0; k < kVector<T>; ++k) {
        if (o + k >= call.out_channels) break;
        if (call.residual) h[k] += to_float(call.residual[at + k]);
        rounded[k] = call.y[at + k] = from_float<T>(h[k]);
      }
    }
  }
  if (!moments) return;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= plan.channels) return;
  store_moments(call, plan, place, threadIdx.x, part, results + threadIdx.x, kPitch, moments);
}

}  // namespace sdfast
