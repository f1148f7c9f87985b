// Products and convolutions on Hopper's own units: 128 pixels (tokens) by 80 to 256 channels of y
// at a time.
//
// Algorithm. An implicit GEMM. One thread of a block asks the tensor memory accelerator for tiles:
// 64 channels of a rectangle of pixels, shifted by the kernel's position, zeros beside the image,
// and the same channels of the rows of the weight. They arrive in a ring in shared memory; two
// groups of four warps multiply 64 pixels each (wgmma), and say when a tile was read. Where tiles
// are fewer than multiprocessors K is split among the blocks of a cluster, which add up each
// other's sums, read from shared memory, in order. Then bias, time embedding and residual, or
// GEGLU's gate, whose columns lie in the same tile; each result is rounded once. Bytes: x once for
// each of the kernel's positions and block of channels, from L2; weight once a tile. Limit: the
// tensor cores.
#pragma once

#include "tile_product_finish_cuda.cuh"

namespace sdfast {

#if SDFAST_HOPPER

// Asks for the tiles of the steps [first, last).
template <typename Tile, bool kGated, typename T>
__device__ void copy_tiles(const TileProduct<T>& call, const TilePlace& place, unsigned char* ring,
                           uint64_t* full, uint64_t* empty, int first, int last) {
  const Conv2d<T>& conv = call.conv;
  const bool has_skip = call.plan.steps > call.plan.steps_x;
  prefetch(call.x), prefetch(call.weight);
  if (has_skip) prefetch(call.skip);
  const int x = place.x * conv.stride - conv.left + place.phase % 2;
  const int y = place.y * conv.stride - conv.top + place.phase / 2;
  const int rows =
      kGated ? conv.out_channels / 2 : Tile::kColumns / 2;  // to the second half of w's
  const int row = place.phase * conv.out_channels + place.column;
  bool of_skip = first >= call.plan.steps_x;
  const int before = of_skip ? first - call.plan.steps_x : first;
  int chunks = (of_skip ? conv.skip_channels + kTileK - 1 : conv.channels + kTileK - 1) / kTileK;
  int tap = before / chunks, c = before % chunks * kTileK;
  int stage = 0;
  unsigned parity = 1;  // of a ring that is empty at first
  for (int step = first; step < last; ++step) {
    wait(empty + stage, parity);
    arrive_for_bytes(full + stage, Tile::kStageBytes);
    unsigned char* const tile = ring + stage * Tile::kStageBytes;
    unsigned char* const weights = tile + kTilePixels * kTileRowBytes;
    copy_tile(tile, of_skip ? call.skip : call.x, full + stage, c, x + tap % conv.taps_x,
              y + tap / conv.taps_x, place.image);
    const int w_c = of_skip ? conv.channels + c : c;
    copy_tile(weights, call.weight, full + stage, w_c, tap, row);
    copy_tile(weights + Tile::kColumns / 2 * kTileRowBytes, call.weight, full + stage, w_c, tap,
              row + rows);
    if (++stage == call.plan.stages) stage = 0, parity ^= 1;
    c += kTileK;
    if (c >= (of_skip ? conv.skip_channels : conv.channels)) c = 0, ++tap;
    if (tap == conv.taps()) tap = 0, of_skip = true;
  }
}

// The sums of 64 pixels, in the registers of four warps, when `count` tiles have arrived.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply_tiles(float (&sums)[Tile::kColumns / 2],
                                               const unsigned char* ring, uint64_t* full,
                                               uint64_t* empty, int stages, int count) {
  const int group = threadIdx.x / kWarpgroup;
  const uint64_t x0 = tile_descriptor(ring + group * 64 * kTileRowBytes);
  const uint64_t w0 = tile_descriptor(ring + kTilePixels * kTileRowBytes);
  int stage = 0, before = 0;
  unsigned parity = 0;
  for (int step = 0; step < count; ++step) {
    wait(full + stage, parity);
    const uint64_t offset = stage * (Tile::kStageBytes >> 4);
    hold(sums);
    begin_products();
#pragma unroll
    for (int k = 0; k < kTileK / 16; ++k) {
      multiply<T, Tile::kColumns>(sums, x0 + offset + 2 * k, w0 + offset + 2 * k);
    }
    commit_products();
    hold(sums);
    wait_for_products<1>();
    if (step > 0 && threadIdx.x % kWarp == 0) arrive(empty + before);
    before = stage;
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  wait_for_products<0>();
  hold(sums);
}

#endif  // SDFAST_HOPPER

// Grid: tiles by splits, those of a tile a cluster. kGated is GEGLU: y has half of out_channels,
// the values; the others are their gates.
template <typename T, typename Tile, bool kGated>
__global__ void __launch_bounds__(kProductThreads, Tile::kBlocks)
    tile_product_kernel(const __grid_constant__ TileProduct<T> call) {
#if SDFAST_HOPPER
  const TileProductPlan& plan = call.plan;
  SharedMemory shared;
  unsigned char* const ring = shared.array<unsigned char>(plan.stages * Tile::kStageBytes);
  uint64_t* const full = shared.array<uint64_t>(kMostStages);
  uint64_t* const empty = shared.array<uint64_t>(kMostStages);
  float* const results = reinterpret_cast<float*>(ring);  // when the last tile was read
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < plan.stages; ++stage) {
      init_barrier(full + stage, 1);
      init_barrier(empty + stage, 2 * kWarpgroup / kWarp);
    }
    show_barriers();
  }
  __syncthreads();
  const TilePlace place(call, kGated ? Tile::kColumns / 2 : Tile::kColumns);
  const int split = blockIdx.x % plan.splits;
  const int first = split * plan.steps_per_split;
  const int last = min(first + plan.steps_per_split, plan.steps);
  const bool multiplies = threadIdx.x < 2 * kWarpgroup;
  const int row = threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4;  // and 8 more
  float sums[Tile::kColumns / 2] = {};
  if (multiplies) {
    multiply_tiles<T, Tile>(sums, ring, full, empty, plan.stages, last - first);
  } else if (threadIdx.x == 2 * kWarpgroup) {
    copy_tiles<Tile, kGated>(call, place, ring, full, empty, first, last);
  }
  if constexpr (kGated) {
    if (multiplies) finish_gated<Tile>(call, place, row, sums);
    return;
  }
  __syncthreads();  // both groups have read the ring
  if (multiplies) {
    float* const at = results + row * Tile::kPitch + threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j) {
      const float upper[2] = {sums[4 * j], sums[4 * j + 1]},
                  lower[2] = {sums[4 * j + 2], sums[4 * j + 3]};
      store(at + 8 * j, upper);
      store(at + 8 * Tile::kPitch + 8 * j, lower);
    }
  }
  if (plan.splits > 1)
    cluster_barrier();
  else
    __syncthreads();
  finish_rows<Tile>(call, place, results, split);
  if (plan.splits > 1) cluster_barrier();  // none leaves while others read its sums
#endif
}

}  // namespace sdfast
