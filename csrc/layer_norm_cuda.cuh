// layer_norm on CUDA, forward: y = (x - mean) rstd weight + bias, row by row.
//
// Algorithm. A warp, of wide rows a block, takes a row into registers by 16 bytes a lane: the mean,
// then the sums of what differs from it and of its squares, so that what rounding left in the mean
// is known, too; then y. Rows beyond 8192, of odd widths beyond 4096, are read three times. Bytes:
// x and y once, weight and bias from cache. Limit: memory bandwidth, of few rows the launch. At
// 1280 columns a warp has 2.5 KiB on the way (bf16), and 16 of them hide memory's latency.
#pragma once

#include <initializer_list>

#include "cuda_common.cuh"

namespace sdfast {

constexpr int kRowWarps = 4;              // of a block, a row each
constexpr int kWideWarps = 8;             // of a row
constexpr int64_t kWidestHeldRow = 8192;  // kWideWarps * kWarp * 32 values

// (width), in the dtype of x or fp32; null: absent.
struct Parameter {
  const void* data = nullptr;
  bool is_float = false;
};

// N values of a parameter from i on, in accesses of 16 bytes at most; `absent` for each of none.
template <typename T, int N>
__device__ void load_parameter(const Parameter& parameter, int64_t i, float absent,
                               float (&to)[N]) {
  constexpr int kPart = N < 4 ? N : 4;
  if (!parameter.data) {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = absent;
  } else if (parameter.is_float) {
#pragma unroll
    for (int part = 0; part < N; part += kPart) {
      float values[kPart];
      load(static_cast<const float*>(parameter.data) + i + part, values);
#pragma unroll
      for (int j = 0; j < kPart; ++j) to[part + j] = values[j];
    }
  } else {
    load(static_cast<const T*>(parameter.data) + i, to);
  }
}

// Contiguous rows. mean and rstd, (rows), may be null.
template <typename T>
struct LayerNorm {
  const T* x;
  Parameter weight, bias;
  T* y;
  float *mean, *rstd;
  int64_t rows, width;
  float eps;
};

// Sums of each value over kWarps warps, in every thread of them. `shared`: kWarps * N, of this sum
// alone. Of several warps they are the block.
template <int kWarps, int N>
__device__ void sum_over_row(float (&values)[N], float* shared) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = warp_sum(values[i]);
  if constexpr (kWarps > 1) {
    const int warp = threadIdx.x / kWarp;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) shared[warp * N + i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = shared[i];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) values[i] += shared[other * N + i];
    }
  }
}

// From the sums of what differs from `mean` and of its squares: how far off that mean is, and rstd.
struct RowStatistics {
  float shift, rstd;
};
__device__ inline RowStatistics row_statistics(const float (&sums)[2], float width, float eps) {
  const float shift = sums[0] / width;
  const float squares = __fmaf_rn(-sums[0], shift, sums[1]);
  const float variance = (squares < 0 ? 0.0f : squares) / width;  // NaN stays NaN
  return {shift, 1.0f / sqrtf(variance + eps)};
}

template <int N, typename T>
__device__ void normalize(const LayerNorm<T>& call, const float (&x)[N], int64_t row,
                          int64_t column, float mean, const RowStatistics& statistics) {
  float weight[N], bias[N], y[N];
  load_parameter<T>(call.weight, column, 1, weight);
  load_parameter<T>(call.bias, column, 0, bias);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float xhat = ((x[j] - mean) - statistics.shift) * statistics.rstd;
    y[j] = __fmaf_rn(xhat, weight[j], bias[j]);
  }
  store(call.y + row * call.width + column, y);
}

template <typename T>
__device__ void keep_statistics(const LayerNorm<T>& call, int64_t row, float mean,
                                const RowStatistics& statistics) {
  if (!call.mean) return;
  call.mean[row] = mean + statistics.shift;
  call.rstd[row] = statistics.rstd;
}

// A row in the registers of kWarps warps, kVectors of N values a lane.
template <typename T, int N, int kVectors, int kWarps>
__global__ void __launch_bounds__(kWarp*(kWarps > 1 ? kWarps : kRowWarps))
    layer_norm_kernel(LayerNorm<T> call) {
  SDFAST_SHARED(float, shared, kWarps * 3);
  constexpr int kLanes = kWarps * kWarp;
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (row >= call.rows) return;  // whole warps, each with a row of its own
  const int lane = threadIdx.x % kLanes;
  const auto column = [&](int v) { return int64_t{N} * (lane + v * kLanes); };

  Vector<T, N> values[kVectors] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (column(v) >= call.width) continue;
    values[v] = *reinterpret_cast<const Vector<T, N>*>(call.x + row * call.width + column(v));
  }
  float sum[1] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum[0] += to_float(values[v].values[j]);
  }
  sum_over_row<kWarps>(sum, shared);
  const float width = static_cast<float>(call.width), mean = sum[0] / width;

  float sums[2] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (column(v) >= call.width) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float away = to_float(values[v].values[j]) - mean;
      sums[0] += away;
      sums[1] = __fmaf_rn(away, away, sums[1]);
    }
  }
  sum_over_row<kWarps>(sums, shared + kWarps);
  const RowStatistics statistics = row_statistics(sums, width, call.eps);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (column(v) >= call.width) continue;
    float x[N];
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = to_float(values[v].values[j]);
    normalize(call, x, row, column(v), mean, statistics);
  }
  if (lane == 0) keep_statistics(call, row, mean, statistics);
}

// A row of any width by a block, which reads it three times.
template <typename T>
__global__ void __launch_bounds__(kWideWarps* kWarp) layer_norm_wide_kernel(LayerNorm<T> call) {
  SDFAST_SHARED(float, shared, kWideWarps * 3);
  const int64_t row = blockIdx.x;
  const T* const x = call.x + row * call.width;
  float sum[1] = {};
  for (int64_t i = threadIdx.x; i < call.width; i += blockDim.x) sum[0] += to_float(x[i]);
  sum_over_row<kWideWarps>(sum, shared);
  const float width = static_cast<float>(call.width), mean = sum[0] / width;
  float sums[2] = {};
  for (int64_t i = threadIdx.x; i < call.width; i += blockDim.x) {
    const float away = to_float(x[i]) - mean;
    sums[0] += away;
    sums[1] = __fmaf_rn(away, away, sums[1]);
  }
  sum_over_row<kWideWarps>(sums, shared + kWideWarps);
  const RowStatistics statistics = row_statistics(sums, width, call.eps);
  for (int64_t i = threadIdx.x; i < call.width; i += blockDim.x) {
    const float value[1] = {to_float(x[i])};
    normalize(call, value, row, i, mean, statistics);
  }
  if (threadIdx.x == 0) keep_statistics(call, row, mean, statistics);
}

// Whether rows can be taken by vectors of 16 bytes.
template <typename T>
bool takes_vectors(int64_t width, std::initializer_list<const void*> pointers) {
  bool whole = width % kVector<T> == 0;
  for (const void* pointer : pointers) whole = whole && is_aligned(pointer, 16);
  return whole;
}

template <typename T>
void layer_norm(const LayerNorm<T>& call, cudaStream_t stream) {
  if (call.rows == 0 || call.width == 0) return;
  const auto by_blocks = [&](auto* kernel) {
    launch(kernel, {dim3(call.rows), dim3(kWideWarps * kWarp)}, stream, call);
  };
  const auto by_warps = [&](auto* kernel) {
    // Few rows go to many multiprocessors.
    const bool many = call.rows >= int64_t{2} * kRowWarps * current_device().multiprocessors;
    const int rows = many ? kRowWarps : 1;
    launch(kernel, {dim3(ceil_div(call.rows, rows)), dim3(kWarp * rows)}, stream, call);
  };
  constexpr int N = kVector<T>, kHeld = kWidestHeldRow / (kWideWarps * kWarp);
  if (!takes_vectors<T>(call.width, {call.x, call.weight.data, call.bias.data, call.y})) {
    if (call.width <= 16 * kWarp) return by_warps(layer_norm_kernel<T, 1, 16, 1>);
    if (call.width > kWidestHeldRow / 2) return by_blocks(layer_norm_wide_kernel<T>);
    return by_blocks(layer_norm_kernel<T, 1, kHeld / 2, kWideWarps>);
  }
  if (call.width > kWidestHeldRow) return by_blocks(layer_norm_wide_kernel<T>);
  const int64_t vectors = ceil_div(call.width, N * kWarp);  // of a lane, by one warp
  if (vectors <= 2) return by_warps(layer_norm_kernel<T, N, 2, 1>);
  if (vectors <= 3) return by_warps(layer_norm_kernel<T, N, 3, 1>);
  if (vectors <= 5) return by_warps(layer_norm_kernel<T, N, 5, 1>);
  if constexpr (N == 4) {
    if (vectors <= 10) return by_warps(layer_norm_kernel<T, N, 10, 1>);
  }
  by_blocks(layer_norm_kernel<T, N, kHeld / N, kWideWarps>);
}

}  // namespace sdfast
