// Attention of heads of up to 160 elements, whose results fit the registers of a warp.
#pragma once

#include "attention_parts_cuda.cuh"

namespace sdfast::attention {

// Four warps, each with kRowTiles times 16 queries. Tiles of keys and of values come one after the
// other through a ring in shared memory: k, v, k, v...
template <typename T, int kColumns, int kRowTiles>
struct Narrow {
  static constexpr int kThreads = 4 * kWarp, kWarpRows = 16 * kRowTiles, kRows = 4 * kWarpRows;
  // Scores of 64 keys beside two tiles of wider results are more than 255 registers.
  static constexpr int kKeys = kColumns * kRowTiles > 128 && kRowTiles > 1 ? 32 : 64;
  static constexpr int kDepth = (kColumns + 15) / 16 * 16, kPitch = pitch_of(kDepth);
  static constexpr int kRing = kColumns > 80 ? 2 : kRowTiles > 1 && kKeys == 64 ? 3 : 4;
  static constexpr int kSlot = kKeys * kPitch;
  // q waits in the ring's last slot, which is not filled at first, and behind it.
  static constexpr int kSharedRows = (kRing - 1) * kKeys + (kKeys > kRows ? kKeys : kRows);
  static constexpr size_t kSharedBytes = SharedMemory::bytes<T>(kSharedRows * kPitch);
  // On a multiprocessor, as registers allow.
  static constexpr int kBlocks = kRowTiles == 2 || kColumns > 80 ? 2 : kColumns > 40 ? 3 : 4;

  // A warp's queries and their results so far.
  uint32_t q[kRowTiles][kDepth / 16][4];
  float o[kRowTiles][kColumns / 8][4] = {};
  float top[kRowTiles][2], total[kRowTiles][2] = {};

  // rows: the warp's, in shared memory.
  __device__ void take_queries(const T* rows, bool negate) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      top[m][0] = top[m][1] = -kInfinity;
#pragma unroll
      for (int d = 0; d < kDepth / 16; ++d) {
        load_matrices(q[m][d], rows + m * 16 * kPitch + d * 16 + row_major_offset<kPitch>());
#pragma unroll
        for (int i = 0; i < 4; ++i) q[m][d][i] ^= negate ? 0x80008000u : 0u;
      }
    }
  }

  // s = q kᵀ of the first `count` keys, rounded up to 16; 0 of the others. All, if not kMasked.
  template <bool kMasked>
  __device__ void score(const T* keys, int count, float (&s)[kRowTiles][kKeys / 8][4]) const {
    const T* const mine = keys + column_major_offset<kPitch>();
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
    }
#pragma unroll
    for (int d = 0; d < kDepth / 16; ++d) {
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        if (kMasked && n * 16 >= count) break;
        uint32_t b[4];
        load_matrices(b, mine + n * 16 * kPitch + d * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma<T>(s[m][2 * n], q[m][d], {b[0], b[1]});
          mma<T>(s[m][2 * n + 1], q[m][d], {b[2], b[3]});
        }
      }
    }
  }

  // Turns scores into weights; what was added up before shrinks to the new maximum.
  template <bool kMasked>
  __device__ void weigh(float (&s)[kRowTiles][kKeys / 8][4], float factor) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float higher = top[m][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          higher = fmaxf(higher, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        higher = quad_max(higher);
        const float exponent = exponent_of(higher, factor);
        const float fading = fading_of(top[m][half], higher, factor);
        top[m][half] = higher;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = weight_of<kMasked>(s[m][n][i], factor, exponent);
            sum += s[m][n][i];
          }
        }
        total[m][half] = total[m][half] * fading + sum;
#pragma unroll
        for (int c = 0; c < kColumns / 8; ++c) {
          o[m][c][2 * half] *= fading;
          o[m][c][2 * half + 1] *= fading;
        }
      }
    }
  }

  // o += weights values, of the first `count` keys.
  template <bool kMasked>
  __device__ void add(const T* values, int count, const float (&s)[kRowTiles][kKeys / 8][4]) {
    const T* const mine = values + row_major_offset<kPitch>();
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      if (kMasked && n * 16 >= count) break;
      uint32_t p[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&pair)[4] = s[m][2 * n + i / 2];
          p[m][i] = pack<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int c = 0; c < kDepth / 16; ++c) {
        uint32_t b[4];
        load_matrices<true>(b, mine + n * 16 * kPitch + c * 16);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          mma<T>(o[m][2 * c], p[m], {b[0], b[1]});
          if (2 * c + 1 < kColumns / 8) mma<T>(o[m][2 * c + 1], p[m], {b[2], b[3]});
        }
      }
    }
  }
};

template <typename T, int kColumns, int kRowTiles>
__global__ void __launch_bounds__(128, Narrow<T, kColumns, kRowTiles>::kBlocks)
    attention_narrow_kernel(Forward<T> call) {
  using Block = Narrow<T, kColumns, kRowTiles>;
  constexpr int kKeys = Block::kKeys, kPitch = Block::kPitch, kRing = Block::kRing;
  constexpr int kSlot = Block::kSlot, kThreads = Block::kThreads, kRows = Block::kRows;
  SharedMemory memory;
  T* const ring = memory.array<T>(Block::kSharedRows * kPitch);
  const Part part(call, kRows);
  const int tiles = max(0, part.last_key - part.first_key + kKeys - 1) / kKeys;
  const T* const k = call.k.of_head(part.batch, part.head);
  const T* const v = call.v.of_head(part.batch, part.head);
  // Copies a tile to a slot of the ring; beyond the last there is nothing to copy.
  const auto copy = [&](bool is_value, int tile, int slot) {
    if (tile < tiles) {
      const int first = part.first_key + tile * kKeys;
      copy_rows<kThreads, kKeys, kColumns, kPitch>(ring + slot * kSlot, is_value ? v : k,
                                                   is_value ? call.v.row_stride : call.k.row_stride,
                                                   first, part.last_key, call.dim);
    }
    commit_copies();
  };
  if (kColumns < Block::kDepth) {  // the last product's other half: no one copies there
    for (int row = threadIdx.x; row < Block::kSharedRows; row += kThreads) {
      *reinterpret_cast<Vector<uint32_t, 4>*>(ring + row * kPitch + kColumns) = {0, 0, 0, 0};
    }
  }
  T* const queries = ring + (kRing - 1) * kSlot;
  copy_rows<kThreads, kRows, kColumns, kPitch>(queries, call.q.of_head(part.batch, part.head),
                                               call.q.row_stride, part.first_query, call.queries,
                                               call.dim);
  commit_copies();
#pragma unroll
  for (int i = 0; i < kRing - 1; ++i) copy(i % 2 == 1, i / 2, i);
  wait_for_copies<kRing - 1>();
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Block mine;
  mine.take_queries(queries + warp * Block::kWarpRows * kPitch, call.negate);

  int slot = 0;
  // Waits for the tile in `slot`; the one before it gives way to the last that the ring takes.
  const auto advance = [&](bool is_value, int tile) {
    wait_for_copies<kRing - 2>();
    __syncthreads();
    copy(is_value, tile, slot == 0 ? kRing - 1 : slot - 1);
    const T* const here = ring + slot * kSlot;
    slot = slot + 1 == kRing ? 0 : slot + 1;
    return here;
  };
  const int first_query = part.first_query + warp * Block::kWarpRows;
  const int query = first_query + lane / 4;
  const int last_key =
      call.is_causal ? min(part.last_key, first_query + Block::kWarpRows) : part.last_key;
  const int whole = call.is_causal ? min(last_key, first_query + 1) : last_key;
  for (int tile = 0; tile < tiles; ++tile) {
    const int key = part.first_key + tile * kKeys, count = last_key - key;
    const bool is_whole = key + kKeys <= whole;
    float s[kRowTiles][kKeys / 8][4];
    const T* const keys = advance((kRing - 1) % 2 == 1, tile + (kRing - 1) / 2);
    if (is_whole) {
      mine.template score<false>(keys, kKeys, s);
      mine.template weigh<false>(s, call.factor);
    } else if (count > 0) {
      mine.template score<true>(keys, count, s);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          hide(s[m][n], key + n * 8 + lane % 4 * 2, last_key, query + m * 16, call.is_causal);
        }
      }
      mine.template weigh<true>(s, call.factor);
    }
    const T* const values = advance(kRing % 2 == 1, tile + kRing / 2);
    if (is_whole) {
      mine.template add<false>(values, kKeys, s);
    } else if (count > 0) {
      mine.template add<true>(values, count, s);
    }
  }
  wait_for_copies<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    for (float& sum : mine.total[m]) sum = quad_sum(sum);
  }
  store_rows<kPitch>(call, part, ring + warp * Block::kWarpRows * kPitch, first_query, 0, mine.o,
                     mine.top, mine.total);
}

}  // namespace sdfast::attention
