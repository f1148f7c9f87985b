// Attention on CUDA, forward, by tensor cores: o = softmax(scale q kᵀ) v, per batch element and
// head.
//
// Algorithm. A block keeps some queries in registers (of wide heads in shared memory) and walks
// over the keys, 64 at a time: scores, their running maximum, weights as powers of two, products
// with the values (Dao 2023, "FlashAttention-2", algorithm 1). Keys and values come through a ring
// of tiles in shared memory, copied asynchronously. Products of the last keys go by 16, those that
// a causal query does not see are left out by 16. Where blocks are fewer than multiprocessors, the
// keys are shared out too, and a second kernel weights the fp32 results by their lse.
// Bytes: q, k, v, o once, k and v again from L2 for every block. Limit: tensor cores, 4 L S D
// flops; of narrow heads the L S powers of two as well, 16 a clock and multiprocessor. Registers
// decide the occupancy: 8 warps a multiprocessor where one takes 32 queries, or heads are wide, and
// 12, of up to 40 elements 16, where it takes 16 queries. A warp of 32 reads half as many bytes of
// keys and values from shared memory for a product, which is what limits one of 16.
#pragma once

#include <algorithm>

#include "attention_narrow_cuda.cuh"
#include "attention_wide_cuda.cuh"

namespace sdfast::attention {

constexpr int kCombineThreads = 256, kCombineLanes = 16;  // of a query

// o, and lse where it is asked for, from those of the splits: each has its share of Σ weights.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads, 4) attention_combine_kernel(Forward<T> call) {
  constexpr int kRows = kCombineThreads / kCombineLanes;
  const unsigned blocks = (call.queries + kRows - 1) / kRows;
  const int head = blockIdx.x / blocks;
  const int query = blockIdx.x % blocks * kRows + threadIdx.x / kCombineLanes;
  if (query >= call.queries) return;
  const int64_t rows = call.all_heads() * call.queries;
  const int64_t row = int64_t{head} * call.queries + query;
  float top = -kInfinity, total = 0;
  for (int split = 0; split < call.splits; ++split) {
    top = fmaxf(top, call.partial_lse[split * rows + row]);
  }
  for (int split = 0; split < call.splits; ++split) {
    total += exp2_fast(call.partial_lse[split * rows + row] - top);
  }
  const int lane = threadIdx.x % kCombineLanes;
  if (call.lse && lane == 0) call.lse[row] = top + log2f(total);
  T* const to =
      call.o.of_head(head / call.heads, head % call.heads) + int64_t{query} * call.o.row_stride;
  const float factor = 1.0f / total;
  for (int column = lane * 4; column < call.dim; column += kCombineLanes * 4) {
    float sum[4] = {};
#pragma unroll 2
    for (int split = 0; split < call.splits; ++split) {
      const float weight = exp2_fast(call.partial_lse[split * rows + row] - top);
      float part[4];
      load(call.partial + (split * rows + row) * call.dim + column, part);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += weight * part[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] *= factor;
    store_columns(to, column, call.o_dim, sum);
  }
}

template <typename T>
void combine(const Forward<T>& call, cudaStream_t stream) {
  const unsigned blocks =
      ceil_div(call.queries, kCombineThreads / kCombineLanes) * call.all_heads();
  launch(attention_combine_kernel<T>, {dim3(blocks), dim3(kCombineThreads)}, stream, call);
}

// How a call is cut: queries of a block, and keys of a split.
struct Plan {
  int rows, splits, split_keys;
};

inline Plan plan(int64_t heads, int queries, int keys, int dim, bool is_causal,
                 const Device& device) {
  Plan plan{64, 1, keys};
  if (dim > kWidestNarrow && shared_bytes_of_block(device) < Wide<__half, 2>::kSharedBytes) {
    plan.rows = 32;
  }
  // 128 queries read each key once for twice as many, where two blocks a multiprocessor remain.
  if (dim <= 80 && heads * ceil_div(queries, 128) >= 2 * device.multiprocessors) plan.rows = 128;
  const int64_t blocks = heads * ceil_div(queries, plan.rows);
  constexpr int kFewest = 256, kMost = 16;  // keys of a split, which are worth its results; splits
  const int seen = is_causal && queries < keys ? queries : keys;
  const int64_t wanted = std::min<int64_t>(device.multiprocessors / blocks, seen / kFewest);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, kMost);
  if (splits == 1) return plan;
  plan.split_keys = ceil_div(ceil_div(seen, splits), 64) * 64;
  plan.splits = ceil_div(seen, plan.split_keys);
  return plan;
}

template <typename T, int kColumns, int kRowTiles>
void attend_narrow(const Forward<T>& call, cudaStream_t stream) {
  using Block = Narrow<T, kColumns, kRowTiles>;
  const unsigned blocks = ceil_div(call.queries, Block::kRows) * call.splits * call.all_heads();
  launch(attention_narrow_kernel<T, kColumns, kRowTiles>,
         {dim3(blocks), dim3(Block::kThreads), Block::kSharedBytes}, stream, call);
}

template <typename T, int kRowTiles>
void attend_wide(const Forward<T>& call, cudaStream_t stream) {
  using Block = Wide<T, kRowTiles>;
  const unsigned blocks = ceil_div(call.queries, Block::kRows) * call.splits * call.all_heads();
  launch(attention_wide_kernel<T, kRowTiles>,
         {dim3(blocks), dim3(Block::kThreads), Block::kSharedBytes}, stream, call);
}

// `rows`, the call's splits and their room as planned.
template <typename T>
void attend(const Forward<T>& call, int rows, cudaStream_t stream) {
  const bool wide = rows == 128;
  if (call.dim <= 40) {
    wide ? attend_narrow<T, 40, 2>(call, stream) : attend_narrow<T, 40, 1>(call, stream);
  } else if (call.dim <= 64) {
    wide ? attend_narrow<T, 64, 2>(call, stream) : attend_narrow<T, 64, 1>(call, stream);
  } else if (call.dim <= 80) {
    wide ? attend_narrow<T, 80, 2>(call, stream) : attend_narrow<T, 80, 1>(call, stream);
  } else if (call.dim <= 128) {
    attend_narrow<T, 128, 1>(call, stream);
  } else if (call.dim <= kWidestNarrow) {
    attend_narrow<T, 160, 1>(call, stream);
  } else {
    rows == 64 ? attend_wide<T, 2>(call, stream) : attend_wide<T, 1>(call, stream);
  }
  if (call.splits > 1) combine(call, stream);
}

}  // namespace sdfast::attention
