// What the kernels of attention's gradients share, and what goes once over rows: delta = Σ do o,
// and results of splits. Of these sixteen threads take a row; bytes: every tensor once; limit:
// memory bandwidth.
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

// What a block of threads computes: some rows of a head, over the others of a split.
struct Walk {
  int first_row, split, batch, head_of_batch;
  int64_t head;
  int first, last;  // of the others, to before the latter

  template <typename T>
  __device__ Walk(const Pass<T>& call, int rows, bool of_keys) {
    const unsigned blocks = (call.rows + rows - 1) / rows, rest = blockIdx.x / blocks;
    const unsigned which = rest / call.splits;
    first_row = blockIdx.x % blocks * rows;
    split = rest % call.splits;
    head = which;
    batch = which / call.heads;
    head_of_batch = which % call.heads;
    first = split * call.split_others;
    last = min(call.others - first, call.split_others) + first;
    if (call.is_causal && of_keys) first = max(first, first_row);
    if (call.is_causal && !of_keys) last = min(last, first_row + rows);
  }

  // Of the queries walked over from `query` on: lse for the first kCount threads, delta for the
  // next. Beyond the last p is to be 0.
  template <int kCount, typename T>
  __device__ float statistic(const Pass<T>& call, int query) const {
    const bool is_lse = threadIdx.x < kCount;
    query += threadIdx.x % kCount;
    if (threadIdx.x >= 2 * kCount || query >= last) return is_lse ? kInfinity : 0.0f;
    return (is_lse ? call.lse : call.delta)[head * call.others + query];
  }
  // Of the queries that stay, `row` and row + 8. Those beyond the last are left as they are.
  template <typename T>
  __device__ void load_statistics(const Pass<T>& call, int row, float (&lse)[2],
                                  float (&delta)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 >= call.rows) continue;
      lse[half] = call.lse[head * call.rows + row + half * 8];
      delta[half] = call.delta[head * call.rows + row + half * 8];
    }
  }
};

// q k to p, do v to ds, of a fragment: rows row and row + 8 against others other and other + 1.
template <bool kOfKeys, typename T>
__device__ void weigh(const Pass<T>& call, const Walk& walk, int row, int other, float factor,
                      const float (&lse)[2], const float (&delta)[2], float (&p)[4],
                      float (&ds)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int of_query = kOfKeys ? i % 2 : i / 2;
    const int mine = row + i / 2 * 8, its = other + i % 2;
    const int key = kOfKeys ? mine : its, query = kOfKeys ? its : mine;
    const float weight = exp2_fast(fmaf(p[i], factor, -lse[of_query]));
    const bool seen = (kOfKeys || key < walk.last) && (!call.is_causal || key <= query);
    p[i] = seen ? weight : 0.0f;
    ds[i] = p[i] * (ds[i] - delta[of_query]);
  }
}

// Stores a warp's `scale` times x: 16 rows from `row` of the block on, columns from `column` on.
// which: 0 for da, 1 for db.
template <int kPitch, typename T, int kCount>
__device__ void store_pass(const Pass<T>& call, const Walk& walk, const Rows<T>& tensor, int which,
                           float scale, int row, int column, T* stage, float (&x)[1][kCount][4]) {
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (float& value : x[0][c]) value *= scale;
  }
  row += walk.first_row;
  const int rows = call.rows - row;
  if (call.splits > 1) {
    const int64_t head = (which * call.splits + walk.split) * call.all_heads() + walk.head;
    float* const to = call.partial + (head * call.rows + row) * call.dim + column;
    store_partial(to, call.dim, rows, call.dim - column, x);
  } else {
    T* const to =
        tensor.of_head(walk.batch, walk.head_of_batch) + int64_t{row} * tensor.row_stride + column;
    store_results<kPitch>(to, tensor.row_stride, rows, call.out_dim - column, call.out_dim % 8 == 0,
                          stage, x);
  }
}

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
