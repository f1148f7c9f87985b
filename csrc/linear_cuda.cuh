// GEGLU's gate on CUDA, behind torch's matrix product: y = a gelu(g), (a, g) = split(h), and
//
//   da = dy gelu(g),  dg = dy a (Phi(g) + g phi(g))
//
// Algorithm. A thread takes 16 bytes of a and of g, and computes in fp32, GELU through erf; each
// result is rounded once, gelu(g) never. Bytes: h and y once; backward h, dy and dh. Limit: memory
// bandwidth, in 16 bits with erf's instructions close behind: its machine code has some 40 for an
// element forward, 60 backward.
#pragma once

#include "cuda_common.cuh"

namespace sdfast {

constexpr int kGateThreads = 256;

// h, dh: (rows, 2 columns). y, dy: (rows, columns). Contiguous.
template <typename T>
struct Gate {
  const T *h, *dy;  // dy, dh: backward
  T *y, *dh;        // y: forward
  int64_t rows, columns;
};

__device__ inline float normal_below(float g) { return 0.5f + 0.5f * erff(g * 0.70710678f); }

template <typename T, int N, bool kBackward>
__global__ void __launch_bounds__(kGateThreads) gate_kernel(Gate<T> call) {
  const int64_t vectors = call.columns / N, i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= call.rows * vectors) return;
  const int64_t row = i / vectors, at = i * N;                                          // at: in y
  const int64_t value_at = at + row * call.columns, gate_at = value_at + call.columns;  // in h
  float value[N], gate[N];
  load(call.h + value_at, value);
  load(call.h + gate_at, gate);
  if constexpr (!kBackward) {
    float y[N];
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = value[j] * (gate[j] * normal_below(gate[j]));
    store(call.y + at, y);
  } else {
    constexpr float kDensityAtZero = 0.39894228f;
    float dy[N], dvalue[N], dgate[N];
    load(call.dy + at, dy);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float below = normal_below(gate[j]);
      const float density = kDensityAtZero * expf(-0.5f * gate[j] * gate[j]);
      dvalue[j] = dy[j] * (gate[j] * below);
      dgate[j] = dy[j] * value[j] * __fmaf_rn(gate[j], density, below);
    }
    store(call.dh + value_at, dvalue);
    store(call.dh + gate_at, dgate);
  }
}

template <bool kBackward, typename T>
void gate(const Gate<T>& call, cudaStream_t stream) {
  if (call.rows == 0 || call.columns == 0) return;
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int64_t threads = call.rows * (call.columns / kWidth);
    launch(gate_kernel<T, kWidth, kBackward>,
           {dim3(ceil_div(threads, kGateThreads)), dim3(kGateThreads)}, stream, call);
  };
  constexpr int kWidest = kVector<T>;
  const bool whole =
      call.columns % kWidest == 0 && is_aligned(call.h, 16) && is_aligned(call.dy, 16);
  whole ? run(std::integral_constant<int, kWidest>()) : run(std::integral_constant<int, 1>());
}

}  // namespace sdfast
