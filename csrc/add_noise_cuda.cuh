// add_noise on CUDA: noised samples, and in the same pass the velocity.
//
// Algorithm. A thread takes 16 bytes of a sample: alpha x0 + sigma noise, and alpha noise - sigma
// x0 where it is asked for, in fp32; each result is rounded once. alpha and sigma differ from
// sample to sample, which is the grid's y. Products and sums are rounded one by one: bit for bit
// what torch gives. Bytes: every input and result once. Limit: memory bandwidth.
#pragma once

#include "cuda_common.cuh"

namespace sdfast {

constexpr int kAddNoiseThreads = 256;

// Samples of `size` elements. Those of x0 and noise are `x0_stride` and `noise_stride` apart, the
// results' lie one after another; velocity may be null.
template <typename T>
struct AddNoise {
  const T *x0, *noise;
  const float *alpha, *sigma;
  T *x_t, *velocity;
  int64_t samples, size, x0_stride, noise_stride;
};

template <typename T, int N>
__global__ void __launch_bounds__(kAddNoiseThreads) add_noise_kernel(AddNoise<T> call) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (i >= call.size) return;
  for (int64_t n = blockIdx.y; n < call.samples; n += gridDim.y) {
    const float alpha = call.alpha[n], sigma = call.sigma[n];
    float x[N], e[N], result[N];
    load(call.x0 + n * call.x0_stride + i, x);
    load(call.noise + n * call.noise_stride + i, e);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      result[k] = __fadd_rn(__fmul_rn(alpha, x[k]), __fmul_rn(sigma, e[k]));
    }
    store(call.x_t + n * call.size + i, result);
    if (!call.velocity) continue;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      result[k] = __fadd_rn(__fmul_rn(alpha, e[k]), -__fmul_rn(sigma, x[k]));
    }
    store(call.velocity + n * call.size + i, result);
  }
}

template <typename T>
void add_noise(const AddNoise<T>& call, cudaStream_t stream) {
  if (call.samples == 0 || call.size == 0) return;
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const unsigned blocks = ceil_div(call.size, int64_t{kWidth} * kAddNoiseThreads);
    const unsigned rows = call.samples < 65535 ? call.samples : 65535;
    launch(add_noise_kernel<T, kWidth>, {dim3(blocks, rows), dim3(kAddNoiseThreads)}, stream, call);
  };
  constexpr int kWidest = kVector<T>;
  const bool whole = call.size % kWidest == 0 && call.x0_stride % kWidest == 0 &&
                     call.noise_stride % kWidest == 0 && is_aligned(call.x0, 16) &&
                     is_aligned(call.noise, 16);
  whole ? run(std::integral_constant<int, kWidest>()) : run(std::integral_constant<int, 1>());
}

}  // namespace sdfast
