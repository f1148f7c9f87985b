// What of attention's gradients goes once over rows: delta = Σ do o, and results of splits.
//
// Sixteen threads take a row. Bytes: every tensor once; the limit is memory bandwidth.
#pragma once

#include "attention_parts_cuda.cuh"

namespace sdfast::attention {

// One of the two passes. Rows that stay: keys (k, v) or queries (q, do). Rows walked over: the
// others. `dim`, of the inputs, is a multiple of 8.
template <typename T>
struct Pass {
  Rows<const T> a, b;        // k, v or q, do
  Rows<const T> x, y;        // q, do or k, v
  Rows<T> da, db;            // dk, dv or dq and nothing; rows of out_dim
  float* partial;            // (1 or 2, splits, B, heads, rows, dim), where splits > 1
  const float *lse, *delta;  // (B, heads, L)
  int batch, heads, rows, others, dim, out_dim;
  int splits, split_others;  // the latter a multiple of 32
  float scale;
  bool is_causal;

  __host__ __device__ int64_t all_heads() const { return int64_t{batch} * heads; }
};

constexpr int kRowThreads = 256, kRowLanes = 16;

inline unsigned row_blocks(int rows, int64_t heads) {
  return ceil_div(rows, kRowThreads / kRowLanes) * heads;
}

// Which row of which head a thread is at.
struct RowOfHead {
  int batch, head, row, lane;
  int64_t index;  // of all rows
  bool inside;

  __device__ RowOfHead(int rows, int heads) {
    constexpr int kRows = kRowThreads / kRowLanes;
    const unsigned blocks = (rows + kRows - 1) / kRows, which = blockIdx.x / blocks;
    row = blockIdx.x % blocks * kRows + threadIdx.x / kRowLanes;
    lane = threadIdx.x % kRowLanes;
    batch = which / heads;
    head = which % heads;
    index = int64_t{which} * rows + row;
    inside = row < rows;
  }
};

// delta: (B, heads, L), from do and o, rows of `dim`, a multiple of 8.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    attention_delta_kernel(Rows<const T> d_o, Rows<const T> o, float* delta, int heads, int queries,
                           int dim) {
  const RowOfHead at(queries, heads);
  const T* const a = d_o.of_head(at.batch, at.head) + int64_t{at.row} * d_o.row_stride;
  const T* const b = o.of_head(at.batch, at.head) + int64_t{at.row} * o.row_stride;
  float sum = 0;
  for (int column = at.lane * 8; at.inside && column < dim; column += kRowLanes * 8) {
    float x[8], y[8];
    load(a + column, x);
    load(b + column, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
  }
#pragma unroll
  for (int distance = kRowLanes / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (at.inside && at.lane == 0) delta[at.index] = sum;
}

// The results of splits, one after the other: (splits, B, heads, rows, dim), added up.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
    attention_sum_kernel(const float* partial, Rows<T> to, int64_t split_size, int splits,
                         int heads, int rows, int dim, int out_dim) {
  const RowOfHead at(rows, heads);
  if (!at.inside) return;
  T* const row = to.of_head(at.batch, at.head) + int64_t{at.row} * to.row_stride;
  for (int column = at.lane * 4; column < dim; column += kRowLanes * 4) {
    float sum[4] = {};
#pragma unroll 2
    for (int split = 0; split < splits; ++split) {
      float part[4];
      load(partial + split * split_size + at.index * dim + column, part);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part[i];
    }
    store_columns(row, column, out_dim, sum);
  }
}

template <typename T>
void add_up(const Pass<T>& pass, bool both, cudaStream_t stream) {
  const int64_t split_size = pass.all_heads() * pass.rows * pass.dim;
  const unsigned blocks = row_blocks(pass.rows, pass.all_heads());
  for (int which = 0; which < (both ? 2 : 1); ++which) {
    const float* const from = pass.partial + which * pass.splits * split_size;
    launch(attention_sum_kernel<T>, {dim3(blocks), dim3(kRowThreads)}, stream, from,
           which == 0 ? pass.da : pass.db, split_size, pass.splits, pass.heads, pass.rows, pass.dim,
           pass.out_dim);
  }
}

}  // namespace sdfast::attention
