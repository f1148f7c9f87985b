// layer_norm on CUDA, backward:
//
//   dx = rstd (g - mean(g) - xhat mean(g xhat)),  g = dy weight;  dweight = sum dy xhat,
//   dbias = sum dy over the rows
//
// Algorithm. A team of threads, a vector of a row each, walks through rows, the next one being
// loaded meanwhile (but where a thread has 16 values); its columns' shares of dweight and dbias
// stay in registers. Teams of a block are added in order, blocks by a second launch. Rows beyond
// 8192, of odd widths beyond 4096, take their two means from a launch before. Bytes: x, dy and dx
// once, and the shares, one for each multiprocessor, twice. Limit: memory bandwidth: a
// multiprocessor has one block of 512 threads, and it 16 KiB on the way.
#pragma once

#include "layer_norm_cuda.cuh"

namespace sdfast {

constexpr int kBackwardThreads = 512;
constexpr int kBackwardWarps = kBackwardThreads / kWarp;
constexpr int kShareGroups = 8;

// Contiguous rows.
template <typename T>
struct LayerNormBackward {
  const T *dy, *x;
  const float *mean, *rstd;  // (rows)
  Parameter weight;
  T* dx;
  float* means;  // (2, rows) of g and g xhat, of wide rows alone
  float* sums;   // (2, shares, width), this block's of dy xhat and of dy
  int64_t rows, width, shares, steps;
  int team;  // threads
};

// Rows of blocks of teams: share * steps to share * steps + steps - 1. blockIdx.y is the strip of
// columns, where rows are given their means. Of rows that are not, all columns are here.
template <typename T, int N, int kVectors, bool kGivenMeans>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    layer_norm_backward_kernel(LayerNormBackward<T> call) {
  constexpr int kValues = N * kVectors;
  constexpr bool kRoom = kValues <= 8;  // in registers, for the weight and for the next row
  using Values = Vector<T, N>;
  SDFAST_SHARED(float, row_sums, 2 * 2 * kBackwardWarps);
  SharedMemory dynamic;
  const int team = threadIdx.x / call.team, teams = blockDim.x / call.team;
  const int lane = threadIdx.x % call.team, warp = threadIdx.x / kWarp;
  const int columns = call.team * kValues;  // of this block
  float* const team_sums = dynamic.array<float>(static_cast<size_t>(teams) * columns);
  const int64_t strip = int64_t{blockIdx.y} * columns, share = blockIdx.x;
  const auto place = [&](int v) { return N * (lane + v * call.team); };  // in the strip

  float held_weight[kRoom ? kVectors : 1][N];
  float sum_dy_xhat[kVectors][N] = {}, sum_dy[kVectors][N] = {};
  if constexpr (kRoom) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const bool there = strip + place(v) < call.width;
      load_parameter<T>(there ? call.weight : Parameter{}, strip + place(v), 1, held_weight[v]);
    }
  }
  struct Row {
    Values x[kVectors], dy[kVectors];
    float mean, rstd;
  };
  const auto row_of = [&](int64_t step) { return (share * call.steps + step) * teams + team; };
  const auto load_row = [&](int64_t step) {
    Row row = {};
    const int64_t n = row_of(step);
    if (step >= call.steps || n >= call.rows) return row;
    row.mean = call.mean[n];
    row.rstd = call.rstd[n];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = strip + place(v);
      if (column >= call.width) continue;
      row.x[v] = *reinterpret_cast<const Values*>(call.x + n * call.width + column);
      row.dy[v] = *reinterpret_cast<const Values*>(call.dy + n * call.width + column);
    }
    return row;
  };

  Row next = load_row(0);
  for (int64_t step = 0; step < call.steps; ++step) {
    const Row row = next;
    if constexpr (kRoom) next = load_row(step + 1);
    const int64_t n = row_of(step);
    const bool present = n < call.rows;
    // dy, g and xhat of a vector; zero where there is nothing.
    const auto values_of = [&](int v, float (&dy)[N], float (&g)[N], float (&xhat)[N]) {
      float weight[N];
      const bool there = present && strip + place(v) < call.width;
      if constexpr (!kRoom) {
        load_parameter<T>(there ? call.weight : Parameter{}, strip + place(v), 1, weight);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        dy[j] = to_float(row.dy[v].values[j]);
        g[j] = dy[j] * (kRoom ? held_weight[kRoom ? v : 0][j] : weight[j]);
        xhat[j] = there ? (to_float(row.x[v].values[j]) - row.mean) * row.rstd : 0.0f;
      }
      return there;
    };

    float means[2] = {};
    if constexpr (kGivenMeans) {
      if (present) means[0] = call.means[n], means[1] = call.means[call.rows + n];
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float dy[N], g[N], xhat[N];
        values_of(v, dy, g, xhat);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          means[0] += g[j];
          means[1] = __fmaf_rn(g[j], xhat[j], means[1]);
        }
      }
      // Two places take turns, so that one barrier a row is enough.
      float* const sums = row_sums + step % 2 * 2 * kBackwardWarps;
      means[0] = warp_sum(means[0]);
      means[1] = warp_sum(means[1]);
      if (threadIdx.x % kWarp == 0) sums[2 * warp] = means[0], sums[2 * warp + 1] = means[1];
      __syncthreads();
      means[0] = means[1] = 0;
      const int first = team * call.team / kWarp;
      for (int other = first; other < first + call.team / kWarp; ++other) {
        means[0] += sums[2 * other];
        means[1] += sums[2 * other + 1];
      }
      const float width = static_cast<float>(call.width);
      means[0] /= width;
      means[1] /= width;
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float dy[N], g[N], xhat[N], dx[N];
      const bool there = values_of(v, dy, g, xhat);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        dx[j] = row.rstd * __fmaf_rn(-xhat[j], means[1], g[j] - means[0]);
        sum_dy_xhat[v][j] = __fmaf_rn(dy[j], xhat[j], sum_dy_xhat[v][j]);
        sum_dy[v][j] += dy[j];
      }
      if (there) store(call.dx + n * call.width + strip + place(v), dx);
    }
    if constexpr (!kRoom) next = load_row(step + 1);
  }

#pragma unroll
  for (int which = 0; which < 2; ++which) {
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        team_sums[team * columns + place(v) + j] = which ? sum_dy[v][j] : sum_dy_xhat[v][j];
      }
    }
    __syncthreads();
    float* const sums = call.sums + (which * call.shares + share) * call.width + strip;
    for (int i = threadIdx.x; i < columns && strip + i < call.width; i += blockDim.x) {
      float sum = 0;
      for (int t = 0; t < teams; ++t) sum += team_sums[t * columns + i];
      sums[i] = sum;
    }
  }
}

// Means of g and g xhat of a row of any width, by a block.
template <typename T>
__global__ void __launch_bounds__(kWideWarps* kWarp)
    layer_norm_means_kernel(LayerNormBackward<T> call) {
  SDFAST_SHARED(float, shared, kWideWarps * 2);
  const int64_t row = blockIdx.x, first = row * call.width;
  const float mean = call.mean[row], rstd = call.rstd[row];
  float sums[2] = {};
  for (int64_t i = threadIdx.x; i < call.width; i += blockDim.x) {
    float weight[1];
    load_parameter<T>(call.weight, i, 1, weight);
    const float g = to_float(call.dy[first + i]) * weight[0];
    sums[0] += g;
    sums[1] = __fmaf_rn(g, (to_float(call.x[first + i]) - mean) * rstd, sums[1]);
  }
  sum_over_row<kWideWarps>(sums, shared);
  if (threadIdx.x != 0) return;
  call.means[row] = sums[0] / static_cast<float>(call.width);
  call.means[call.rows + row] = sums[1] / static_cast<float>(call.width);
}

// The gradient of a parameter, (width), in the dtype of x or fp32; null: not asked for.
struct ParameterGradient {
  void* data = nullptr;
  bool is_float = false;
};

// Adds the shares, (2, shares, width): groups of threads take turns, and are added in order.
// blockIdx.y: dweight or dbias.
template <typename T>
__global__ void __launch_bounds__(kShareGroups* kWarp)
    layer_norm_parameters_kernel(const float* sums, ParameterGradient dweight,
                                 ParameterGradient dbias, int64_t shares, int64_t width) {
  SDFAST_SHARED(float, shared, kShareGroups* kWarp);
  const ParameterGradient gradient = blockIdx.y ? dbias : dweight;
  const int group = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  const bool there = column < width && gradient.data;
  float sum = 0;
  if (there) {
    const float* const from = sums + blockIdx.y * shares * width + column;
#pragma unroll 4
    for (int64_t share = group; share < shares; share += kShareGroups) sum += from[share * width];
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (!there || group > 0) return;
  for (int other = 1; other < kShareGroups; ++other) sum += shared[other * kWarp + lane];
  if (gradient.is_float) {
    static_cast<float*>(gradient.data)[column] = sum;
  } else {
    static_cast<T*>(gradient.data)[column] = from_float<T>(sum);
  }
}

// How the rows of a backward pass are shared out.
struct BackwardPlan {
  int values, vectors;  // of an access, and of a thread
  int team, teams;      // threads, and teams of a block
  int64_t strips, shares, steps;
  bool given_means;
};

template <typename T>
BackwardPlan plan_backward(int64_t rows, int64_t width, bool takes_vectors) {
  BackwardPlan plan;
  const int64_t most_held = takes_vectors ? kWidestHeldRow : kWidestHeldRow / 2;
  plan.given_means = width > most_held;
  plan.values = takes_vectors && !plan.given_means ? kVector<T> : 1;
  const int64_t vectors = width / plan.values;  // of a row
  plan.vectors = plan.given_means ? 4 : 1;
  if (vectors > kBackwardThreads && !plan.given_means) {
    plan.vectors = static_cast<int>(most_held / (kBackwardThreads * plan.values));
  }
  const int64_t threads = ceil_div(ceil_div(vectors, plan.vectors), kWarp) * kWarp;
  plan.team = static_cast<int>(threads < kBackwardThreads ? threads : kBackwardThreads);
  plan.teams = plan.given_means ? 1 : kBackwardThreads / plan.team;
  plan.strips = ceil_div(width, int64_t{plan.team} * plan.vectors * plan.values);
  const int64_t blocks = ceil_div(rows, plan.teams);
  const int64_t most = ceil_div(current_device().multiprocessors, plan.strips);
  plan.steps = ceil_div(blocks, blocks < most ? blocks : most);
  plan.shares = ceil_div(blocks, plan.steps);
  return plan;
}

// call.shares, steps and team are the plan's.
template <typename T>
void layer_norm_backward(const LayerNormBackward<T>& call, const BackwardPlan& plan,
                         ParameterGradient dweight, ParameterGradient dbias, cudaStream_t stream) {
  const auto run = [&](auto* kernel) {
    const size_t values = static_cast<size_t>(plan.team) * plan.teams * plan.values * plan.vectors;
    launch(kernel,
           {dim3(plan.shares, plan.strips), dim3(plan.team * plan.teams),
            SharedMemory::bytes<float>(values)},
           stream, call);
  };
  constexpr int N = kVector<T>;
  if (plan.given_means) {
    launch(layer_norm_means_kernel<T>, {dim3(call.rows), dim3(kWideWarps * kWarp)}, stream, call);
    run(layer_norm_backward_kernel<T, 1, 4, true>);
  } else if (plan.values == 1) {
    plan.vectors == 1 ? run(layer_norm_backward_kernel<T, 1, 1, false>)
                      : run(layer_norm_backward_kernel<T, 1, 8, false>);
  } else {
    plan.vectors == 1 ? run(layer_norm_backward_kernel<T, N, 1, false>)
                      : run(layer_norm_backward_kernel<T, N, 16 / N, false>);
  }
  if (!dweight.data && !dbias.data) return;
  launch(layer_norm_parameters_kernel<T>,
         {dim3(ceil_div(call.width, kWarp), 2), dim3(kShareGroups * kWarp)}, stream,
         static_cast<const float*>(call.sums), dweight, dbias, call.shares, call.width);
}

}  // namespace sdfast
