// Attention of heads of up to 512 elements: eight warps share the columns of the results.
#pragma once

#include "attention_parts_cuda.cuh"

namespace sdfast::attention {

// Two groups of four warps, each with kRowTiles times 16 queries. Of 64 keys a warp scores 16; its
// weights go to the other three through shared memory, and each multiplies all 64 with 128 columns
// of the values. q stays in shared memory. Keys come in chunks of 128 columns, then values 16 rows
// at a time, through a ring.
template <typename T, int kRowTiles>
struct Wide {
  static constexpr int kThreads = 8 * kWarp, kKeys = 64, kColumns = 512;
  static constexpr int kGroupRows = 16 * kRowTiles, kRows = 2 * kGroupRows;
  static constexpr int kChunk = 128, kChunkPitch = pitch_of(kChunk);  // of q k^T
  static constexpr int kStep = 16, kSteps = kKeys / kStep;            // of the values
  static constexpr int kPitch = pitch_of(kColumns), kWeightsPitch = pitch_of(kKeys);
  static constexpr int kRing = kRowTiles == 2 ? 4 : 3;
  static constexpr int kSlot = kKeys * kChunkPitch;  // holds kStep rows of values, too
  static_assert(kSlot >= kStep * kPitch);
  static constexpr size_t kSharedBytes =
      SharedMemory::bytes<T>(kRows * kPitch) + SharedMemory::bytes<T>(kRows * kWeightsPitch) +
      SharedMemory::bytes<float>(4 * kRows) + SharedMemory::bytes<T>(kRing * kSlot);
};

// s += q kᵀ of 16 keys and a chunk's columns. queries: the group's rows, keys: the warp's.
template <int kPitch, int kChunkPitch, typename T, int kRowTiles>
__device__ void score_chunk(const T* queries, const T* keys, float (&s)[kRowTiles][2][4]) {
  queries += row_major_offset<kPitch>();
  keys += column_major_offset<kChunkPitch>();
#pragma unroll
  for (int d = 0; d < 8; ++d) {
    uint32_t b[4];
    load_matrices(b, keys + d * 16);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      uint32_t a[4];
      load_matrices(a, queries + m * 16 * kPitch + d * 16);
      mma<T>(s[m][0], a, {b[0], b[1]});
      mma<T>(s[m][1], a, {b[2], b[3]});
    }
  }
}

// o += weights values, of 16 keys and 128 columns.
template <int kWeightsPitch, int kPitch, typename T, int kRowTiles>
__device__ void add_step(const T* weights, const T* values, float (&o)[kRowTiles][16][4]) {
  uint32_t a[kRowTiles][4];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    load_matrices(a[m], weights + m * 16 * kWeightsPitch + row_major_offset<kWeightsPitch>());
  }
  values += row_major_offset<kPitch>();
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    uint32_t b[4];
    load_matrices<true>(b, values + c * 16);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      mma<T>(o[m][2 * c], a[m], {b[0], b[1]});
      mma<T>(o[m][2 * c + 1], a[m], {b[2], b[3]});
    }
  }
}

template <typename T, int kRowTiles>
__global__ void __launch_bounds__(256) attention_wide_kernel(Forward<T> call) {
  using Block = Wide<T, kRowTiles>;
  constexpr int kKeys = Block::kKeys, kPitch = Block::kPitch, kRing = Block::kRing;
  constexpr int kThreads = Block::kThreads, kRows = Block::kRows, kChunk = Block::kChunk;
  constexpr int kWeightsPitch = Block::kWeightsPitch, kSteps = Block::kSteps;
  SharedMemory memory;
  T* const queries = memory.array<T>(kRows * kPitch);
  T* const weights = memory.array<T>(kRows * kWeightsPitch);
  float* const of_warps = memory.array<float>(4 * kRows);  // maxima, in the end sums
  T* const ring = memory.array<T>(kRing * Block::kSlot);
  const Part part(call, kRows);
  const T* const k = call.k.of_head(part.batch, part.head);
  const T* const v = call.v.of_head(part.batch, part.head);
  const int chunks = (call.dim + kChunk - 1) / kChunk, steps = chunks + kSteps;
  const int tiles = max(0, part.last_key - part.first_key + kKeys - 1) / kKeys;

  // What is copied next: a step of a tile.
  int next_tile = 0, next_step = 0, next_slot = 0;
  const auto copy = [&] {
    if (next_tile < tiles) {
      T* const to = ring + next_slot * Block::kSlot;
      const int first = part.first_key + next_tile * kKeys, column = next_step * kChunk;
      if (next_step < chunks) {
        copy_rows<kThreads, kKeys, kChunk, Block::kChunkPitch>(
            to, k + column, call.k.row_stride, first, part.last_key, call.dim - column);
      } else {
        const int row = first + (next_step - chunks) * Block::kStep;
        copy_rows<kThreads, Block::kStep, Block::kColumns, kPitch, 16>(
            to, v, call.v.row_stride, row, part.last_key, call.dim);
      }
    }
    commit_copies();
    next_slot = next_slot + 1 == kRing ? 0 : next_slot + 1;
    if (++next_step == steps) next_step = 0, ++next_tile;
  };
  copy_rows<kThreads, kRows, Block::kColumns, kPitch, 16>(
      queries, call.q.of_head(part.batch, part.head), call.q.row_stride, part.first_query,
      call.queries, call.dim);
  commit_copies();
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

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, member = warp % 4;
  const int row = warp / 4 * Block::kGroupRows, first_query = part.first_query + row;
  const int last_key =
      call.is_causal ? min(part.last_key, first_query + Block::kGroupRows) : part.last_key;
  // Where this lane's row of a tile of 16, and of a half of it, has a warp's maximum or sum.
  const auto place = [&](int m, int half, int of) {
    return of_warps + of * kRows + row + m * 16 + half * 8 + lane / 4;
  };
  float o[kRowTiles][16][4] = {}, top[kRowTiles][2], total[kRowTiles][2] = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) top[m][0] = top[m][1] = -kInfinity;

  for (int tile = 0; tile < tiles; ++tile) {
    const int key = part.first_key + tile * kKeys;
    float s[kRowTiles][2][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      score_chunk<kPitch, Block::kChunkPitch>(queries + row * kPitch + chunk * kChunk,
                                              advance() + member * 16 * Block::kChunkPitch, s);
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (float& x : s[m][n]) x = call.negate ? -x : x;
        hide(s[m][n], key + member * 16 + n * 8 + lane % 4 * 2, last_key,
             first_query + m * 16 + lane / 4, call.is_causal);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
        const float high = fmaxf(s[m][1][2 * half], s[m][1][2 * half + 1]);
        const float most = quad_max(fmaxf(low, high));
        if (lane % 4 == 0) *place(m, half, member) = most;
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float higher = top[m][half];
#pragma unroll
        for (int of = 0; of < 4; ++of) higher = fmaxf(higher, *place(m, half, of));
        const float exponent = exponent_of(higher, call.factor);
        const float fading = fading_of(top[m][half], higher, call.factor);
        top[m][half] = higher;
        total[m][half] *= fading;
        T* const to = weights + (row + m * 16 + half * 8 + lane / 4) * kWeightsPitch + member * 16 +
                      lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float low = weight_of<true>(s[m][n][2 * half], call.factor, exponent);
          const float high = weight_of<true>(s[m][n][2 * half + 1], call.factor, exponent);
          total[m][half] += low + high;
          *reinterpret_cast<uint32_t*>(to + n * 8) = pack<T>(low, high);
        }
#pragma unroll
        for (int c = 0; c < 16; ++c) {
          o[m][c][2 * half] *= fading;
          o[m][c][2 * half + 1] *= fading;
        }
      }
    }
    for (int step = 0; step < kSteps; ++step) {
      const T* const values = advance();
      if (member * 128 >= call.dim || key + step * Block::kStep >= last_key) continue;
      add_step<kWeightsPitch, kPitch>(weights + row * kWeightsPitch + step * Block::kStep,
                                      values + member * 128, o);
    }
  }

#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(total[m][half]);
      if (lane % 4 == 0) *place(m, half, member) = sum;
    }
  }
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      total[m][half] = 0;
#pragma unroll
      for (int of = 0; of < 4; ++of) total[m][half] += *place(m, half, of);
    }
  }
  store_rows<Block::kChunkPitch>(call, part, ring + warp * Block::kGroupRows * Block::kChunkPitch,
                                 first_query, member * 128, o, top, total);
}

}  // namespace sdfast::attention
