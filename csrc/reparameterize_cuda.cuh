// reparameterize on CUDA, forward and backward.
//
// Algorithm. A thread takes 16 bytes of a sample of each operand: mean + std noise with std =
// exp(logvar / 2), logvar clamped; backward dlogvar = dz noise std / 2, zero where logvar was
// clamped (dmean is dz itself). fp32 arithmetic; each result is rounded once. Bytes: every operand
// and the result once. Limit: memory bandwidth; for latents of a few images the launch.
#pragma once

#include "cuda_common.cuh"

namespace sdfast {

constexpr int kReparameterizeThreads = 256;
constexpr float kLowestLogvar = -30.0f, kHighestLogvar = 20.0f;

// Samples of `size` elements; those of an operand are its stride apart, the results' lie one after
// another. `first` is the mean, or dz.
template <typename T>
struct Reparameterize {
  const T *first, *logvar, *noise;
  T* result;
  int64_t samples, size, first_stride, logvar_stride, noise_stride;
};

template <typename T, int N, bool kBackward>
__global__ void __launch_bounds__(kReparameterizeThreads)
    reparameterize_kernel(Reparameterize<T> call) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (i >= call.size) return;
  for (int64_t n = blockIdx.y; n < call.samples; n += gridDim.y) {
    float first[N], logvar[N], noise[N], result[N];
    load(call.first + n * call.first_stride + i, first);
    load(call.logvar + n * call.logvar_stride + i, logvar);
    load(call.noise + n * call.noise_stride + i, noise);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const bool low = logvar[k]<kLowestLogvar, high = logvar[k]> kHighestLogvar;
      // Written so that NaN stays NaN.
      const float std = expf(0.5f * (low ? kLowestLogvar : high ? kHighestLogvar : logvar[k]));
      const bool moves = logvar[k] >= kLowestLogvar && logvar[k] <= kHighestLogvar;
      result[k] = kBackward ? (moves ? 0.5f * first[k] * noise[k] * std : 0.0f)
                            : __fmaf_rn(std, noise[k], first[k]);
    }
    store(call.result + n * call.size + i, result);
  }
}

template <bool kBackward, typename T>
void reparameterize(const Reparameterize<T>& call, cudaStream_t stream) {
  if (call.samples == 0 || call.size == 0) return;
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const unsigned blocks = ceil_div(call.size, int64_t{kWidth} * kReparameterizeThreads);
    const unsigned rows = call.samples < 65535 ? call.samples : 65535;
    launch(reparameterize_kernel<T, kWidth, kBackward>,
           {dim3(blocks, rows), dim3(kReparameterizeThreads)}, stream, call);
  };
  constexpr int kWidest = kVector<T>;
  const auto fits = [](const T* data, int64_t stride) {
    return stride % kWidest == 0 && is_aligned(data, 16);
  };
  const bool whole = call.size % kWidest == 0 && fits(call.first, call.first_stride) &&
                     fits(call.logvar, call.logvar_stride) && fits(call.noise, call.noise_stride);
  whole ? run(std::integral_constant<int, kWidest>()) : run(std::integral_constant<int, 1>());
}

}  // namespace sdfast
