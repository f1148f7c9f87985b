// Attention on Hopper's own units, forward, of heads of up to 64 elements, not causal.
//
// Algorithm. As attention_cuda.cuh says, by wgmma: four warps keep 64 queries in registers, as the
// left factor of the scores, and then the weights as that of the products with the values, which
// are read from shared memory as they lie, row by row. One thread of the block asks the tensor
// memory accelerator for tiles of 64 keys and values, zeros beyond the last, into a ring; a thread
// more would cost the others a quarter of their registers. Four such groups fill a multiprocessor,
// as one block where heads are narrow and there are enough of them, else as two: while some
// multiply, others compute powers of two. Bytes: q, k, v, o once, k and v again from L2 for every
// block. Limit: powers of two, 16 a clock and multiprocessor.
#pragma once

#include "attention_parts_cuda.cuh"
#include "cuda_hopper.cuh"

namespace sdfast::attention {

constexpr int kHopperKeys = 64, kHopperWidest = 64;
constexpr int kHopperLag = 2;  // how many tiles after one was read its place is filled again
constexpr int kKeyTileBytes = kHopperKeys * kTileRowBytes;

template <typename T>
struct HopperForward {
  TensorMap k, v;  // (dim, keys, heads, batch)
  Forward<T> call;
};

// So many groups of four warps are a block.
template <int groups>
struct HopperBlock {
  static constexpr int kGroups = groups, kQueries = 64 * groups, kThreads = kWarpgroup * groups;
  static constexpr int kStages = groups == 4 ? 10 : 5;
  static constexpr size_t kSharedBytes =
      kStages * 2 * kKeyTileBytes + 2 * SharedMemory::bytes<uint64_t>(kStages);
};

#if SDFAST_HOPPER

// A ring of tiles of keys, each followed by the values.
template <int kStages>
struct KeyRing {
  unsigned char* tiles;
  uint64_t *full, *empty;

  template <typename T>
  __device__ void copy(const HopperForward<T>& parameters, int tile, int batch, int head) const {
    const int stage = tile % kStages;
    unsigned char* const keys = tiles + stage * 2 * kKeyTileBytes;
    arrive_for_bytes(full + stage, 2 * kKeyTileBytes);
    copy_tile(keys, parameters.k, full + stage, 0, tile * kHopperKeys, head, batch);
    copy_tile(keys + kKeyTileBytes, parameters.v, full + stage, 0, tile * kHopperKeys, head, batch);
  }
};

// 64 queries of four warps. A thread has two rows of every product, 8 apart, and two columns in 8.
template <int kDim, int kStages, typename T>
__device__ __forceinline__ void attend_tiles(const HopperForward<T>& parameters, int first_query,
                                             int batch, int head, const KeyRing<kStages>& ring) {
  const Forward<T>& call = parameters.call;
  constexpr int kSteps = (kDim + 15) / 16;  // of the scores' sums
  const int lane = threadIdx.x % kWarp, column = lane % 4 * 2;
  const int row = first_query + threadIdx.x / kWarp * 16 + lane / 4;
  uint32_t q[kSteps][4];
  const T* const from = call.q.of_head(batch, head);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = row + i % 2 * 8;
      const int c = step * 16 + i / 2 * 8 + column;
      q[step][i] = at < call.queries && c < call.dim
                       ? *reinterpret_cast<const uint32_t*>(from + at * call.q.row_stride + c)
                       : 0;
    }
  }
  float o[kDim / 2] = {}, top[2] = {-kInfinity, -kInfinity}, total[2] = {};
  const uint64_t k0 = tile_descriptor(ring.tiles), v0 = tile_descriptor(ring.tiles + kKeyTileBytes);
  const int tiles = (call.keys + kHopperKeys - 1) / kHopperKeys;
  const auto place_of = [](int tile) {
    return uint64_t(tile % kStages) * (2 * kKeyTileBytes >> 4);
  };
  const auto ask_for_scores = [&](int tile, float (&s)[kHopperKeys / 2]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_rows<T>(s, q[step], k0 + place_of(tile) + 2 * step, step == 0);
    }
    commit_products();
  };
  uint32_t weights[kHopperKeys / 16][4];
  float scale[2];  // of what was summed up before
  const auto weigh = [&](int tile, float (&s)[kHopperKeys / 2]) {
    if ((tile + 1) * kHopperKeys > call.keys) {
#pragma unroll
      for (int i = 0; i < kHopperKeys / 2; ++i) {
        if (tile * kHopperKeys + i / 4 * 8 + column + i % 2 >= call.keys) s[i] = -kInfinity;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = top[r];
#pragma unroll
      for (int i = 2 * r; i < kHopperKeys / 2; i += 4)
        highest = fmaxf(highest, fmaxf(s[i], s[i + 1]));
      highest = quad_max(highest);
      const float subtracted = exponent_of(highest, call.factor);
      scale[r] = exp2_fast(top[r] * call.factor - subtracted);
      top[r] = highest;
      float sum = 0;
#pragma unroll
      for (int i = 2 * r; i < kHopperKeys / 2; i += 4) {
        s[i] = exp2_fast(__fmaf_rn(s[i], call.factor, -subtracted));
        s[i + 1] = exp2_fast(__fmaf_rn(s[i + 1], call.factor, -subtracted));
        sum += s[i] + s[i + 1];
      }
      total[r] = __fmaf_rn(total[r], scale[r], sum);
    }
  };
  const auto round_weights = [&](const float (&s)[kHopperKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kHopperKeys / 2; i += 2)
      weights[i / 8][i / 2 % 4] = pack<T>(s[i], s[i + 1]);
  };
  const auto add_values = [&](int tile) {
#pragma unroll
    for (int step = 0; step < kHopperKeys / 16; ++step) {
      constexpr int kRowsOf16 = 16 * kTileRowBytes >> 4;
      multiply_transposed<T, kDim>(o, weights[step], v0 + place_of(tile) + step * kRowsOf16);
    }
    commit_products();
  };
  float s[kHopperKeys / 2];
  wait(ring.full, 0);
  begin_products();
  ask_for_scores(0, s);
  wait_for_products<0>();
  hold(s);
  weigh(0, s);
  round_weights(s);
  for (int tile = 0; tile + 1 < tiles; ++tile) {
    if (const int later = tile - kHopperLag + kStages;
        threadIdx.x == 0 && tile >= kHopperLag && later < tiles) {
      wait(ring.empty + later % kStages, (later / kStages - 1) % 2);
      ring.copy(parameters, later, batch, head);
    }
    __syncwarp();
    wait(ring.full + (tile + 1) % kStages, (tile + 1) / kStages % 2);
    hold(o);
    begin_products();
    ask_for_scores(tile + 1, s);
    add_values(tile);
    wait_for_products<1>();
    hold(s);
    weigh(tile + 1, s);
    wait_for_products<0>();
    hold(o);
    if (lane == 0) arrive(ring.empty + tile % kStages);
    round_weights(s);
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] *= scale[i / 2 % 2];
  }
  hold(o);
  begin_products();
  add_values(tiles - 1);
  wait_for_products<0>();
  hold(o);
  T* const to = call.o.of_head(batch, head);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = row + 8 * r;
    total[r] = quad_sum(total[r]);
    if (query >= call.queries) continue;
    if (call.lse && lane % 4 == 0) {
      call.lse[(int64_t{batch} * call.heads + head) * call.queries + query] =
          top[r] * call.factor + log2f(total[r]);
    }
    const float factor = 1.0f / total[r];
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      if (8 * j + column >= call.dim) continue;
      *reinterpret_cast<uint32_t*>(to + int64_t{query} * call.o.row_stride + 8 * j + column) =
          pack<T>(o[4 * j + 2 * r] * factor, o[4 * j + 2 * r + 1] * factor);
    }
  }
}

#endif  // SDFAST_HOPPER

// Grid: blocks of queries of every head.
template <typename T, int kDim, typename Block>
__global__ void __launch_bounds__(Block::kThreads, 4 / Block::kGroups)
    attention_hopper_kernel(const __grid_constant__ HopperForward<T> parameters) {
#if SDFAST_HOPPER
  const Forward<T>& call = parameters.call;
  SharedMemory shared;
  constexpr int kStages = Block::kStages;
  const KeyRing<kStages> ring{shared.array<unsigned char>(kStages * 2 * kKeyTileBytes),
                              shared.array<uint64_t>(kStages), shared.array<uint64_t>(kStages)};
  const int blocks = (call.queries + Block::kQueries - 1) / Block::kQueries;
  const int first_query = blockIdx.x % blocks * Block::kQueries;
  const int batch = blockIdx.x / blocks / call.heads, head = blockIdx.x / blocks % call.heads;
  if (threadIdx.x == 0) {
    prefetch(parameters.k), prefetch(parameters.v);
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(ring.full + stage, 1);
      init_barrier(ring.empty + stage, Block::kThreads / kWarp);
    }
    show_barriers();
    const int tiles = (call.keys + kHopperKeys - 1) / kHopperKeys;
    for (int tile = 0; tile < min(tiles, kStages); ++tile) ring.copy(parameters, tile, batch, head);
  }
  __syncthreads();
  attend_tiles<kDim>(parameters, first_query, batch, head, ring);
#endif
}

// ---- the host's part

// Whether it can compute such a call, and is expected to be faster than the others: of fewer blocks
// they share the keys out.
template <typename T>
bool suits_hopper(const Forward<T>& call, const Device& device) {
  const auto can_copy = [&](const Rows<const T>& rows) {
    const bool same =
        (rows.batch_stride == 0 && call.batch > 1) || (rows.head_stride == 0 && call.heads > 1);
    return !same && (rows.row_stride >= call.dim || call.keys == 1);
  };
  const int64_t blocks = call.all_heads() * ceil_div(call.queries, HopperBlock<2>::kQueries);
  return device.capability == 90 && call.dim == call.o_dim && call.dim <= kHopperWidest &&
         !call.is_causal && !call.negate && call.factor > 0 &&
         blocks >= device.multiprocessors / 2 && can_copy(call.k) && can_copy(call.v) &&
         has_hopper_code(attention_hopper_kernel<T, 64, HopperBlock<2>>);
}

template <typename T, int kDim>
void attend_on_hopper(const Forward<T>& call, const Device& device, cudaStream_t stream) {
  const auto map = [&](const Rows<const T>& rows) {
    return tensor_map<T>({rows.data,
                          4,
                          {call.dim, call.keys, call.heads, call.batch},
                          {1, rows.row_stride, rows.head_stride, rows.batch_stride},
                          {kTileRowBytes / 2, kHopperKeys, 1, 1}});
  };
  const HopperForward<T> parameters{map(call.k), map(call.v), call};
  const auto run = [&](auto block) {
    using Block = decltype(block);
    const int64_t blocks = call.all_heads() * ceil_div(call.queries, Block::kQueries);
    launch(attention_hopper_kernel<T, kDim, Block>,
           {dim3(static_cast<unsigned>(blocks)), dim3(Block::kThreads), Block::kSharedBytes},
           stream, parameters);
  };
  if constexpr (kDim <= 40) {  // as measured on an H100
    const int64_t blocks = call.all_heads() * ceil_div(call.queries, HopperBlock<4>::kQueries);
    if (blocks >= device.multiprocessors) return run(HopperBlock<4>());
  }
  run(HopperBlock<2>());
}

}  // namespace sdfast::attention
