// Mean and rstd of y per group, out of the moments that conv2d's blocks left of its channels.
//
// Algorithm (Chan, Golub & LeVeque 1979). A block takes a group of an image: the mean of all
// moments' means, weighted, as differences from one of them; then Σ square + count (mean - that)^2.
// Every sum has a fixed order. Bytes: 16 for each channel of a tile, read twice, from L2. Limit:
// the launch.
#pragma once

#include "conv2d_problem_cuda.cuh"

namespace sdfast {

constexpr int kGroupThreads = 256;

struct GroupStatistics {
  const ChannelMoments* moments;  // (images, entries, channels)
  float *mean, *rstd;             // (images, groups)
  int images, groups, channels, entries;
  float values;  // of a group
  float eps;
};

// The sum over a block, in every thread.
__device__ inline float block_sum(float x, float* of_warps) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < kGroupThreads / kWarp; ++warp) sum += of_warps[warp];
  return sum;
}

__global__ void __launch_bounds__(kGroupThreads) conv2d_statistics_kernel(GroupStatistics call) {
  SDFAST_SHARED(float, of_warps, kGroupThreads / kWarp);
  const int size = call.channels / call.groups, all = call.entries * size;
  const int image = blockIdx.x / call.groups, group = blockIdx.x % call.groups;
  const ChannelMoments* const first =
      call.moments + int64_t{image} * call.entries * call.channels + group * size;
  const float pivot = first->mean;
  const auto moments_of = [&](int i) {
    return first[int64_t{i / size} * call.channels + i % size];
  };
  float off = 0;
  for (int i = threadIdx.x; i < all; i += kGroupThreads) {
    const ChannelMoments moments = moments_of(i);
    if (moments.count > 0) off += (moments.mean - pivot + moments.mean_rest) * moments.count;
  }
  off = block_sum(off, of_warps) / call.values;
  float square = 0;
  for (int i = threadIdx.x; i < all; i += kGroupThreads) {
    const ChannelMoments moments = moments_of(i);
    if (moments.count == 0) continue;
    const float distance = moments.mean - pivot + moments.mean_rest - off;
    square += moments.square + distance * distance * moments.count;
  }
  square = block_sum(square, of_warps);
  if (threadIdx.x != 0) return;
  call.mean[blockIdx.x] = pivot + off;
  call.rstd[blockIdx.x] = 1 / sqrtf(square / call.values + call.eps);
}

}  // namespace sdfast
