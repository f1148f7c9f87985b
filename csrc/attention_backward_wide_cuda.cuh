// Gradients of attention of heads of up to 512 elements: eight warps share the columns of the
// results.
#pragma once

#include "attention_backward_rows_cuda.cuh"
#include "attention_wide_cuda.cuh"

namespace sdfast::attention {

// Two groups of four warps, each with 16 rows. Of 64 others a warp computes p and ds of 16, which
// go to the other three through shared memory; each multiplies all 64 with 128 columns. Through a
// ring come, for a xᵀ and then for b yᵀ, chunks of 128 columns, those of the rows that stay too:
// kept whole they would leave most GPUs no room; then y, for keys, and x, 16 rows at a time.
template <typename T>
struct WideBackward {
  static constexpr int kThreads = 8 * kWarp, kRows = 32, kOthers = 64, kColumns = 512;
  static constexpr int kChunk = 128, kChunkPitch = pitch_of(kChunk);
  static constexpr int kStep = 16, kSteps = kOthers / kStep;
  static constexpr int kPitch = pitch_of(kColumns), kWeightsPitch = pitch_of(kOthers);
  static constexpr int kRing = 3, kSlot = (kRows + kOthers) * kChunkPitch;
  static_assert(kSlot >= kStep * kPitch);
  static constexpr size_t kSharedBytes = SharedMemory::bytes<T>(kRing * kSlot) +
                                         2 * SharedMemory::bytes<T>(kRows * kWeightsPitch) +
                                         SharedMemory::bytes<float>(2 * kOthers);
};

// kOfKeys: dk and dv, else dq.
template <typename T, bool kOfKeys>
__global__ void __launch_bounds__(256) attention_wide_backward_kernel(Pass<T> call) {
  using Block = WideBackward<T>;
  constexpr int kThreads = Block::kThreads, kRows = Block::kRows, kOthers = Block::kOthers;
  constexpr int kChunk = Block::kChunk, kChunkPitch = Block::kChunkPitch, kRing = Block::kRing;
  constexpr int kPitch = Block::kPitch, kWeightsPitch = Block::kWeightsPitch;
  constexpr int kStep = Block::kStep, kSteps = Block::kSteps;
  SharedMemory memory;
  T* const ring = memory.array<T>(kRing * Block::kSlot);
  T* const weights = memory.array<T>(kRows * kWeightsPitch);  // p
  T* const slopes = memory.array<T>(kRows * kWeightsPitch);   // ds
  float* const of_others = memory.array<float>(2 * kOthers);  // lse, delta of queries walked over

  const Walk walk(call, kRows, kOfKeys);
  const T* const a = call.a.of_head(walk.batch, walk.head_of_batch);
  const T* const b = call.b.of_head(walk.batch, walk.head_of_batch);
  const T* const x = call.x.of_head(walk.batch, walk.head_of_batch);
  const T* const y = call.y.of_head(walk.batch, walk.head_of_batch);
  const int chunks = (call.dim + kChunk - 1) / kChunk;
  const int scores = 2 * chunks, steps = scores + (kOfKeys ? 2 : 1) * kSteps;
  const int tiles = max(0, walk.last - walk.first + kOthers - 1) / kOthers;

  // What is copied next: a step of a tile.
  int next_tile = 0, next_step = 0, next_slot = 0;
  const auto copy = [&] {
    if (next_tile < tiles) {
      T* const to = ring + next_slot * Block::kSlot;
      const int other = walk.first + next_tile * kOthers;
      if (next_step < scores) {
        const bool is_second = next_step >= chunks;
        const int column = (is_second ? next_step - chunks : next_step) * kChunk;
        copy_rows<kThreads, kRows, kChunk, kChunkPitch>(
            to, (is_second ? b : a) + column, (is_second ? call.b : call.a).row_stride,
            walk.first_row, call.rows, call.dim - column);
        copy_rows<kThreads, kOthers, kChunk, kChunkPitch>(
            to + kRows * kChunkPitch, (is_second ? y : x) + column,
            (is_second ? call.y : call.x).row_stride, other, walk.last, call.dim - column);
      } else {
        const int step = next_step - scores;
        const bool is_y = kOfKeys && step < kSteps;
        copy_rows<kThreads, kStep, Block::kColumns, kPitch, 16>(
            to, is_y ? y : x, (is_y ? call.y : call.x).row_stride, other + step % kSteps * kStep,
            walk.last, call.dim);
      }
    }
    commit_copies();
    next_slot = next_slot + 1 == kRing ? 0 : next_slot + 1;
    if (++next_step == steps) next_step = 0, ++next_tile;
  };
#pragma unroll
  for (int i = 0; i < kRing - 1; ++i) copy();
  int slot = 0;
  // Waits for the step in `slot`; the one before it gives way to the last that the ring takes.
  const auto advance = [&] {
    wait_for_copies<kRing - 2>();
    __syncthreads();
    copy();
    const T* const here = ring + slot * Block::kSlot;
    slot = slot + 1 == kRing ? 0 : slot + 1;
    return here;
  };

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, pair = lane % 4 * 2;
  const int member = warp % 4, group_row = warp / 4 * 16, first_column = member * kChunk;
  const int row = walk.first_row + group_row + lane / 4;
  float lse[2] = {kInfinity, kInfinity}, delta[2] = {};
  if (!kOfKeys) walk.load_statistics(call, row, lse, delta);
  const float factor = call.scale * static_cast<float>(kLog2E);
  float da[1][16][4] = {}, db[1][16][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    const int other = walk.first + tile * kOthers;
    const float statistic = kOfKeys ? walk.template statistic<kOthers>(call, other) : 0.0f;
    float s[1][2][4] = {}, d_weights[1][2][4] = {};
    const auto score = [&](float (&to)[1][2][4]) {
      const T* const here = advance();
      score_chunk<kChunkPitch, kChunkPitch>(here + group_row * kChunkPitch,
                                            here + (kRows + member * 16) * kChunkPitch, to);
    };
    for (int chunk = 0; chunk < chunks; ++chunk) score(s);
    if (kOfKeys && threadIdx.x < 2 * kOthers) of_others[threadIdx.x] = statistic;
    for (int chunk = 0; chunk < chunks; ++chunk) score(d_weights);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = member * 16 + n * 8 + pair;
      if (kOfKeys) load(of_others + column, lse), load(of_others + kOthers + column, delta);
      weigh<kOfKeys>(call, walk, row, other + column, factor, lse, delta, s[0][n], d_weights[0][n]);
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int at = (group_row + lane / 4 + i * 4) * kWeightsPitch + column;
        if (kOfKeys) {
          *reinterpret_cast<uint32_t*>(weights + at) = pack<T>(s[0][n][i], s[0][n][i + 1]);
        }
        *reinterpret_cast<uint32_t*>(slopes + at) =
            pack<T>(d_weights[0][n][i], d_weights[0][n][i + 1]);
      }
    }
    const auto add_up = [&](const T* of_group, float (&to)[1][16][4]) {
      for (int step = 0; step < kSteps; ++step) {
        const T* const here = advance();
        if (first_column >= call.dim || other + step * kStep >= walk.last) continue;
        add_step<kWeightsPitch, kPitch>(of_group + step * kStep, here + first_column, to);
      }
    };
    if (kOfKeys) add_up(weights + group_row * kWeightsPitch, db);
    add_up(slopes + group_row * kWeightsPitch, da);
  }
  wait_for_copies<0>();
  __syncthreads();
  T* const stage = ring + warp * 2 * 16 * kChunkPitch;
  store_pass<kChunkPitch>(call, walk, call.da, 0, call.scale, group_row, first_column, stage, da);
  if (kOfKeys) {
    store_pass<kChunkPitch>(call, walk, call.db, 1, 1.0f, group_row, first_column,
                            stage + 16 * kChunkPitch, db);
  }
}

}  // namespace sdfast::attention
