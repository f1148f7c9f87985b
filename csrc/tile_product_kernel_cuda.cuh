// Products and convolutions on Hopper's own units: 128 pixels (tokens) by 80 to 256 channels of y
// at a time.
//
// Algorithm. An implicit GEMM. One thread of a block asks the tensor memory accelerator for tiles:
// 64 channels of a rectangle of pixels, shifted by the kernel's position, zeros beside the image,
// and the same channels of the rows of the weight. They arrive in a ring in shared memory; two
// groups of four warps multiply 64 pixels each (wgmma), and say when a tile was read. Where tiles
// are fewer than multiprocessors K is split among the blocks of a cluster, which add up each
// other's sums, read from shared memory, in order, to bias and time embedding; then the residual.
// Or GEGLU's gate, whose columns lie in the same tile. Each result is rounded once, and stored by
// way of shared memory, whole lines at a time. Bytes: x once for each of the kernel's positions and
// block of channels, from L2; weight once a tile. Limit: the tensor cores, of 80 columns L2.
#pragma once

#include "tile_product_finish_cuda.cuh"

namespace sdfast {

#if SDFAST_HOPPER

// Asks for the tiles of a block's steps, one after the other.
template <typename Tile, bool kGated, typename T>
class TileCopies {
 public:
  __device__ TileCopies(const TileProduct<T>& call, const TilePlace& place, unsigned char* ring,
                        uint64_t* full, uint64_t* empty, int first)
      : call_(call), image_(place.image), ring_(ring), full_(full), empty_(empty) {
    const Conv2d<T>& conv = call.conv;
    x_ = place.x * conv.stride - conv.left + place.phase % 2;
    y_ = place.y * conv.stride - conv.top + place.phase / 2;
    row_ = place.phase * conv.out_channels + place.column;
    if (first == 0) return;
    of_skip_ = first >= call.plan.steps_x;
    const int before = of_skip_ ? first - call.plan.steps_x : first;
    const int chunks = (channels() + kTileK - 1) / kTileK;
    tap_ = before / chunks, c_ = before % chunks * kTileK;
    tap_y_ = tap_ / conv.taps_x, tap_x_ = tap_ % conv.taps_x;
  }

  __device__ void ask(int count) {
    const Conv2d<T>& conv = call_.conv;
    // To the second half of the weight's rows.
    const int rows = kGated ? conv.out_channels / 2 : Tile::kColumns / 2;
    for (; count > 0; --count) {
      wait(empty_ + stage_, parity_);
      arrive_for_bytes(full_ + stage_, Tile::kStageBytes);
      unsigned char* const tile = ring_ + stage_ * Tile::kStageBytes;
      unsigned char* const weights = tile + kTilePixels * kTileRowBytes;
      copy_tile(tile, of_skip_ ? call_.skip : call_.x, full_ + stage_, c_, x_ + tap_x_, y_ + tap_y_,
                image_);
      const int c = of_skip_ ? conv.channels + c_ : c_;
      copy_tile(weights, call_.weight, full_ + stage_, c, tap_, row_);
      copy_tile(weights + Tile::kColumns / 2 * kTileRowBytes, call_.weight, full_ + stage_, c, tap_,
                row_ + rows);
      next();
    }
  }

 private:
  __device__ int channels() const {
    return of_skip_ ? call_.conv.skip_channels : call_.conv.channels;
  }
  __device__ void next() {
    if (++stage_ == call_.plan.stages) stage_ = 0, parity_ ^= 1;
    c_ += kTileK;
    if (c_ < channels()) return;
    c_ = 0, ++tap_;
    if (++tap_x_ < call_.conv.taps_x) return;
    tap_x_ = 0;
    if (++tap_y_ < call_.conv.taps_y) return;
    tap_y_ = tap_ = 0, of_skip_ = true;
  }

  const TileProduct<T>& call_;
  int x_, y_, image_, row_;
  int c_ = 0, tap_ = 0, tap_x_ = 0, tap_y_ = 0;
  bool of_skip_ = false;
  unsigned char* ring_;
  uint64_t *full_, *empty_;
  int stage_ = 0;
  unsigned parity_ = 1;  // of a ring that is empty at first
};

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
  constexpr int kOutColumns = kGated ? Tile::kColumns / 2 : Tile::kColumns;
  const TileProductPlan& plan = call.plan;
  SharedMemory shared;
  unsigned char* const ring = shared.array<unsigned char>(plan.stages * Tile::kStageBytes);
  uint64_t* const full = shared.array<uint64_t>(kMostStages);
  uint64_t* const empty = shared.array<uint64_t>(kMostStages);
  const TilePlace place(call, kOutColumns);
  const int split = blockIdx.x & (plan.splits() - 1);
  const int first = split * plan.steps_per_split;
  const int count = min(plan.steps_per_split, plan.steps - first);
  const bool multiplies = threadIdx.x < 2 * kWarpgroup, copies = threadIdx.x == 2 * kWarpgroup;
  TileCopies<Tile, kGated, T> tiles(call, place, ring, full, empty, first);
  if (copies) {  // before all others wait: the first tile takes a microsecond to arrive
    prefetch(call.x), prefetch(call.weight);
    for (int stage = 0; stage < plan.stages; ++stage) {
      init_barrier(full + stage, 1);
      init_barrier(empty + stage, 2 * kWarpgroup / kWarp);
    }
    show_barriers();
    tiles.ask(1);
  }
  __syncthreads();
  float sums[Tile::kColumns / 2] = {};
  float added[8] = {};
  if (multiplies) {
    if constexpr (!kGated) load_added(call, place, column_of_thread<kOutColumns>(place), added);
    multiply_tiles<T, Tile>(sums, ring, full, empty, plan.stages, count);
    if constexpr (kGated) apply_gates(call, place, sums);
  } else if (copies) {
    tiles.ask(count - 1);
  }
  __syncthreads();  // both groups have read the ring
  float* const results = reinterpret_cast<float*>(ring);
  if (multiplies) lay_out<kOutColumns>(results, sums);
  if (plan.splits_log2 == 0) {
    __syncwarp();
    if (multiplies) finish_rows<kOutColumns, false>(call, place, results, 0, added);
    return;
  }
  cluster_barrier();
  if (multiplies) finish_rows<kOutColumns, true>(call, place, results, split, added);
  cluster_barrier();  // none leaves while others read its sums
#endif
}

}  // namespace sdfast
