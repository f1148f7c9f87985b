// Gradients of attention on CUDA by tensor cores.
//
//   p = 2^(scale log2 e q kᵀ - lse),  dv = pᵀ do,  dp = do vᵀ,  delta = Σ do o,
//   ds = p (dp - delta),  dq = scale ds k,  dk = scale dsᵀ q      (Dao 2023, "FlashAttention-2")
//
// Algorithm. One kernel keeps dk and dv of 64 keys in registers and walks over the queries, another
// keeps dq of 64 queries and walks over the keys; both compute p and ds, so that nothing is added
// to in memory and results repeat. Where blocks are fewer than multiprocessors what they walk over
// is shared out, and a further kernel adds up the fp32 results in order. Of wide heads, 32 rows to
// a block, all but the results comes through shared memory again and again.
// Bytes: all tensors once, those walked over again from L2 for every block. Limit: tensor cores,
// 14 L S D flops. Occupancy: 8 warps a multiprocessor or more.
#pragma once

#include <algorithm>

#include "attention_backward_rows_cuda.cuh"
#include "attention_backward_wide_cuda.cuh"

namespace sdfast::attention {

template <typename T, int kColumns>
struct Backward {
  static constexpr int kThreads = 4 * kWarp, kRows = 64;
  static constexpr int kStep = kColumns > 128 ? 16 : 32;  // others, as registers allow
  static constexpr int kDepth = (kColumns + 15) / 16 * 16, kPitch = pitch_of(kDepth);
  static constexpr int kStage = 2 * kStep * kPitch;  // x, y
  static constexpr int kSharedRows = 2 * kRows + 4 * kStep;
  static constexpr size_t kSharedBytes =
      SharedMemory::bytes<T>(kSharedRows * kPitch) + SharedMemory::bytes<float>(4 * kStep);
  static constexpr int kBlocks = kColumns > 40 ? 2 : 3;  // on a multiprocessor, as registers allow
};

// s += a xᵀ, 16 rows against 8 kCount others.
template <typename T, int kDepth, int kPitch, int kCount>
__device__ void multiply(const T* a, const T* x, float (&s)[kCount][4]) {
  a += row_major_offset<kPitch>();
  x += column_major_offset<kPitch>();
#pragma unroll
  for (int d = 0; d < kDepth; d += 16) {
    uint32_t left[4];
    load_matrices(left, a + d);
#pragma unroll
    for (int n = 0; n < kCount / 2; ++n) {
      uint32_t right[4];
      load_matrices(right, x + n * 16 * kPitch + d);
      mma<T>(s[2 * n], left, {right[0], right[1]});
      mma<T>(s[2 * n + 1], left, {right[2], right[3]});
    }
  }
}

// d += s x, of 8 kCount others.
template <typename T, int kColumns, int kPitch, int kCount>
__device__ void add(const float (&s)[kCount][4], const T* x, float (&d)[1][kColumns / 8][4]) {
  x += row_major_offset<kPitch>();
#pragma unroll
  for (int n = 0; n < kCount / 2; ++n) {
    const uint32_t left[4] = {pack<T>(s[2 * n][0], s[2 * n][1]), pack<T>(s[2 * n][2], s[2 * n][3]),
                              pack<T>(s[2 * n + 1][0], s[2 * n + 1][1]),
                              pack<T>(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
    for (int c = 0; c < kColumns / 8; c += 2) {
      uint32_t right[4];
      load_matrices<true>(right, x + n * 16 * kPitch + c * 8);
      mma<T>(d[0][c], left, {right[0], right[1]});
      if (c + 1 < kColumns / 8) mma<T>(d[0][c + 1], left, {right[2], right[3]});
    }
  }
}

// kOfKeys: dk and dv, else dq.
template <typename T, int kColumns, bool kOfKeys>
__global__ void __launch_bounds__(128, Backward<T, kColumns>::kBlocks)
    attention_backward_kernel(Pass<T> call) {
  using Block = Backward<T, kColumns>;
  constexpr int kThreads = Block::kThreads, kRows = Block::kRows, kStep = Block::kStep;
  constexpr int kPitch = Block::kPitch, kDepth = Block::kDepth;
  SharedMemory memory;
  T* const a = memory.array<T>(Block::kSharedRows * kPitch);
  T *const b = a + kRows * kPitch, *const stages = b + kRows * kPitch;
  float* const of_others = memory.array<float>(4 * kStep);  // lse, delta of the queries walked over

  const Walk walk(call, kRows, kOfKeys);
  const int steps = max(0, walk.last - walk.first + kStep - 1) / kStep;
  if (kColumns < kDepth) {  // the last product's other half: no one copies there
    for (int row = threadIdx.x; row < Block::kSharedRows; row += kThreads) {
      *reinterpret_cast<Vector<uint32_t, 4>*>(a + row * kPitch + kColumns) = {0, 0, 0, 0};
    }
  }
  const int batch = walk.batch, head = walk.head_of_batch;
  const T* const x = call.x.of_head(batch, head);
  const T* const y = call.y.of_head(batch, head);
  const auto copy = [&](int step) {
    if (step < steps) {
      T* const to = stages + step % 2 * Block::kStage;
      const int row = walk.first + step * kStep;
      copy_rows<kThreads, kStep, kColumns, kPitch>(to, x, call.x.row_stride, row, walk.last,
                                                   call.dim);
      copy_rows<kThreads, kStep, kColumns, kPitch>(to + kStep * kPitch, y, call.y.row_stride, row,
                                                   walk.last, call.dim);
    }
    commit_copies();
  };
  // What the first 2 kStep threads bring of the queries walked over.
  const auto statistic = [&](int step) {
    return walk.template statistic<kStep>(call, walk.first + step * kStep);
  };
  const auto keep = [&](int step, float value) {
    if (threadIdx.x < 2 * kStep) of_others[step % 2 * 2 * kStep + threadIdx.x] = value;
  };
  copy_rows<kThreads, kRows, kColumns, kPitch>(a, call.a.of_head(batch, head), call.a.row_stride,
                                               walk.first_row, call.rows, call.dim);
  copy_rows<kThreads, kRows, kColumns, kPitch>(b, call.b.of_head(batch, head), call.b.row_stride,
                                               walk.first_row, call.rows, call.dim);
  copy(0);
  if (kOfKeys) keep(0, statistic(0));

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, pair = lane % 4 * 2;
  const int warp_row = walk.first_row + warp * 16, row = warp_row + lane / 4;
  T *const mine_a = a + warp * 16 * kPitch, *const mine_b = b + warp * 16 * kPitch;
  float lse[2] = {kInfinity, kInfinity}, delta[2] = {};
  if (!kOfKeys) walk.load_statistics(call, row, lse, delta);
  const float factor = call.scale * static_cast<float>(kLog2E);
  float da[1][kColumns / 8][4] = {}, db[1][kColumns / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();
    copy(step + 1);
    const float ahead = kOfKeys ? statistic(step + 1) : 0.0f;
    const T* const here = stages + step % 2 * Block::kStage;
    const int other = walk.first + step * kStep;
    // Of a causal call: which steps a warp's rows do not see at all.
    const bool hidden =
        call.is_causal && (kOfKeys ? other + kStep <= warp_row : other >= warp_row + 16);
    if (!hidden) {
      float p[kStep / 8][4] = {}, ds[kStep / 8][4] = {};
      multiply<T, kDepth, kPitch>(mine_a, here, p);
      multiply<T, kDepth, kPitch>(mine_b, here + kStep * kPitch, ds);
      const float* const statistics = of_others + step % 2 * 2 * kStep + pair;
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
        if (kOfKeys) load(statistics + n * 8, lse), load(statistics + kStep + n * 8, delta);
        weigh<kOfKeys>(call, walk, row, other + n * 8 + pair, factor, lse, delta, p[n], ds[n]);
      }
      if (kOfKeys) add<T, kColumns, kPitch>(p, here + kStep * kPitch, db);
      add<T, kColumns, kPitch>(ds, here, da);
    }
    if (kOfKeys) keep(step + 1, ahead);
  }
  wait_for_copies<0>();
  __syncthreads();
  store_pass<kPitch>(call, walk, call.da, 0, call.scale, warp * 16, 0, mine_a, da);
  if (kOfKeys) store_pass<kPitch>(call, walk, call.db, 1, 1.0f, warp * 16, 0, mine_b, db);
}

// In how many splits the others of a pass are walked over, and how many of them each takes.
template <typename T>
void plan(Pass<T>& pass, const Device& device) {
  constexpr int kFewest = 256, kMost = 16;  // others that are worth a split's results; splits
  const int64_t blocks =
      ceil_div(pass.rows, pass.dim <= kWidestNarrow ? 64 : 32) * pass.all_heads();
  const int64_t wanted = std::min<int64_t>(device.multiprocessors / blocks, pass.others / kFewest);
  const int64_t splits = std::max<int64_t>(1, std::min<int64_t>(wanted, kMost));
  pass.split_others = ceil_div(ceil_div(pass.others, splits), 32) * 32;
  pass.splits = ceil_div(pass.others, pass.split_others);
}

template <typename T, bool kOfKeys>
void run_wide(const Pass<T>& pass, cudaStream_t stream) {
  using Block = WideBackward<T>;
  const unsigned blocks = ceil_div(pass.rows, Block::kRows) * pass.splits * pass.all_heads();
  launch(attention_wide_backward_kernel<T, kOfKeys>,
         {dim3(blocks), dim3(Block::kThreads), Block::kSharedBytes}, stream, pass);
}

template <typename T, int kColumns, bool kOfKeys>
void run_narrow(const Pass<T>& pass, cudaStream_t stream) {
  using Block = Backward<T, kColumns>;
  const unsigned blocks = ceil_div(pass.rows, Block::kRows) * pass.splits * pass.all_heads();
  launch(attention_backward_kernel<T, kColumns, kOfKeys>,
         {dim3(blocks), dim3(Block::kThreads), Block::kSharedBytes}, stream, pass);
}

// As planned, with room for the results of splits.
template <bool kOfKeys, typename T>
void run(const Pass<T>& pass, cudaStream_t stream) {
  if (pass.dim <= 40) {
    run_narrow<T, 40, kOfKeys>(pass, stream);
  } else if (pass.dim <= 64) {
    run_narrow<T, 64, kOfKeys>(pass, stream);
  } else if (pass.dim <= 80) {
    run_narrow<T, 80, kOfKeys>(pass, stream);
  } else if (pass.dim <= 128) {
    run_narrow<T, 128, kOfKeys>(pass, stream);
  } else if (pass.dim <= kWidestNarrow) {
    run_narrow<T, 160, kOfKeys>(pass, stream);
  } else {
    run_wide<T, kOfKeys>(pass, stream);
  }
  if (pass.splits > 1) add_up(pass, kOfKeys, stream);
}

}  // namespace sdfast::attention
