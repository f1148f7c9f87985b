// conv2d on CUDA: an implicit GEMM over channels_last images, on tensor cores.
//
// Algorithm. A block computes a rectangle of pixels by 16 to 128 channels of y. Along K it goes
// chunk after chunk of channels: the rectangle of x that the chunk's products need, with its halo,
// is copied to shared memory once (and there normalised and SiLU'd once, where a GroupNorm
// precedes); every position of the kernel multiplies rows of that same tile, shifted, by a slice of
// the weight that streams through a ring of asynchronous copies. Bias, time embedding, residual and
// the statistics of the next GroupNorm follow on the results. Where tiles are fewer than
// multiprocessors K is split: partial sums are written and a second kernel adds them in order. A
// nearest-2x upsample is four 2x2 kernels over the small image. Bytes: x (18 rows by 10 for 16 by
// 8), weight, residual and y, the first two again from L2 for every tile in their column or row.
// Limit: tensor cores, by mma.sync; shared memory gives a warp of 64x64 its fragments in half of
// the time that a GPU of sm_80 multiplies them in.
#pragma once

#include <algorithm>
#include <cmath>
#include <tuple>

#include "conv2d_finish_cuda.cuh"
#include "conv2d_statistics_cuda.cuh"
#include "conv2d_store_cuda.cuh"

namespace sdfast {

using ConvTiles = std::tuple<ConvTile<128, 128, 2, 2, 3, 2>,  // registers: 128 of sums
                             ConvTile<128, 64, 2, 2, 4, 3>,   // 64
                             ConvTile<64, 64, 2, 2, 6, 4>,    // 32, for small images
                             ConvTile<128, 16, 4, 1, 4, 4>>;  // for a picture's 3 channels, or 4
// What of the peak each is assumed to reach, for the bytes that its fragments take of shared
// memory.
constexpr float kConvTileShare[] = {1.0f, 0.85f, 0.65f, 0.25f};
constexpr int kNarrowTile = 3;

template <typename F>
void with_conv_tile(int tile, const F& f) {
  with_element_of<ConvTiles>(tile, f);
}

// A kernel of one pixel meets all pixels of an image as those of one row.
template <typename T>
void flatten(Conv2d<T>& call) {
  const bool same = call.height == call.out_height && call.width == call.out_width;
  const bool is_product = call.taps() == 1 && call.stride == 1 && !call.top && !call.left && same;
  if (!is_product || int64_t{call.width} * call.height >= int64_t{1} << 30) return;
  call.width = call.out_width = call.width * call.height;
  call.height = call.out_height = 1;
}

// The width of tiles, as rectangles that cover an image with the least waste, and what follows.
template <typename T, typename Tile>
void plan_tiles(const Conv2d<T>& call, Conv2dPlan& plan) {
  int64_t fewest = INT64_MAX;
  for (int log2 = 3; 1 << log2 <= Tile::kPixels; ++log2) {
    const int width = 1 << log2, height = Tile::kPixels >> log2;
    const int64_t x = ceil_div(call.out_width, width), y = ceil_div(call.out_height, height);
    const int halo_width = (width - 1) * call.stride + call.taps_x;
    const int halo_pixels = ((height - 1) * call.stride + call.taps_y) * halo_width;
    if (x * y * halo_pixels >= fewest) continue;
    fewest = x * y * halo_pixels;
    plan.tile_width_log2 = log2;
    plan.tiles_x = static_cast<int>(x);
    plan.tiles_y = static_cast<int>(y);
    plan.halo_width = halo_width;
    plan.halo_pixels = halo_pixels;
  }
  plan.halo_inverse = static_cast<int>(ceil_div(1 << 16, plan.halo_width));
  plan.column_blocks = static_cast<int>(ceil_div(call.out_channels, Tile::kChannels));
}

// The time of the busiest multiprocessor, in products of a tensor core at its peak. Assumed, not
// measured: what share of the peak a tile reaches, how long a block that is alone waits in each
// step, and what splits cost.
template <typename Tile, typename T>
float cost_of(const Conv2d<T>& call, const Conv2dPlan& plan, const Device& device) {
  constexpr float kWait = 9600, kLaunch = 128000, kPartialSum = 10;
  const int by_memory =
      static_cast<int>(shared_bytes_of_block(device) / (plan.shared_bytes + 1024));
  const int resident = std::max(1, std::min(Tile::kBlocks, by_memory));
  const int64_t blocks =
      ceil_div(plan.tiles(call.phases, call.images) * plan.splits, device.multiprocessors);
  const float sums = Tile::kPixels * Tile::kChannels;
  const float work = sums / kConvTileShare[plan.tile];
  const float step = std::max(blocks * work, ceil_div(blocks, resident) * (work + kWait));
  const float cost = step * plan.chunks_per_split * call.taps();
  return plan.splits > 1 ? cost + kLaunch + kPartialSum * blocks * sums : cost;
}

template <typename T, typename Tile>
Conv2dPlan plan_of(const Conv2d<T>& call, const Device& device, int tile) {
  Conv2dPlan plan = {};
  plan.tile = tile;
  plan.pixels = Tile::kPixels;
  plan.channels = Tile::kChannels;
  plan_tiles<T, Tile>(call, plan);
  constexpr int64_t kVectorSize = kVector<T>;
  plan.vectors = call.channels % kVectorSize == 0 && call.skip_channels % kVectorSize == 0 &&
                 is_aligned(call.x, 16) && is_aligned(call.skip, 16) && is_aligned(call.weight, 16);
  plan.out_vectors = call.out_channels % kVectorSize == 0 && is_aligned(call.y, 16) &&
                     is_aligned(call.residual, 16);
  plan.chunks_of_x = static_cast<int>(ceil_div(call.channels, kChunk<T>));
  plan.chunks = plan.chunks_of_x + static_cast<int>(ceil_div(call.skip_channels, kChunk<T>));
  // While a buffer is filled the steps before it, one fewer than stages, read others.
  plan.halo_buffers = static_cast<int>(ceil_div(Tile::kStages - 1, call.taps())) + 1;
  const int weight_bytes = Tile::kStages * Tile::kChannels * kRowBytes;
  const int halo_bytes = plan.halo_buffers * plan.halo_pixels * kRowBytes;
  const int result_bytes = kResultBytes<T, Tile>;
  plan.shared_bytes = std::max(weight_bytes + halo_bytes, result_bytes);

  constexpr int64_t kMostSplits = 8, kLeastSteps = 16;
  constexpr float kWorthIt = 0.95f;  // of the time with fewer splits
  const int64_t most = std::min(
      {kMostSplits, int64_t{plan.chunks} * call.taps() / kLeastSteps, int64_t{plan.chunks}});
  plan.cost = INFINITY;
  for (int64_t splits = 1; splits <= std::max<int64_t>(most, 1); ++splits) {
    Conv2dPlan other = plan;
    other.chunks_per_split = static_cast<int>(ceil_div(plan.chunks, splits));
    other.splits =
        plan.chunks > 0 ? static_cast<int>(ceil_div(plan.chunks, other.chunks_per_split)) : 1;
    other.cost = cost_of<Tile>(call, other, device);
    if (other.cost < kWorthIt * plan.cost) plan = other;
  }
  plan.parts = plan.splits > 1 ? Tile::kPixels / kFinishPixels : kParts<Tile>;
  return plan;
}

// The tile and the division for which the busiest multiprocessor has the least to do.
template <typename T>
Conv2dPlan plan_conv2d(const Conv2d<T>& call, const Device& device) {
  Conv2dPlan best = {};
  best.tile = -1;
  const int tiles = static_cast<int>(std::tuple_size_v<ConvTiles>);
  for (int tile = 0; tile < tiles; ++tile) {
    if ((tile == kNarrowTile) != (call.out_channels <= 16)) continue;
    with_conv_tile(tile, [&](auto shape) {
      const Conv2dPlan plan = plan_of<T, decltype(shape)>(call, device, tile);
      const bool fits = static_cast<size_t>(plan.shared_bytes) <= shared_bytes_of_block(device) &&
                        plan.halo_pixels * plan.halo_width < 1 << 16;  // as the division wants it
      if (fits && (best.tile < 0 || plan.cost < best.cost)) best = plan;
    });
  }
  return best;
}

// How many fp32 partial sums a launch writes, and moments of a channel it leaves of an image.
template <typename T>
int64_t partial_sums(const Conv2d<T>& call, const Conv2dPlan& plan) {
  if (plan.splits == 1) return 0;
  return plan.tiles(call.phases, call.images) * plan.splits * plan.pixels * plan.channels;
}
template <typename T>
int64_t moment_entries(const Conv2d<T>& call, const Conv2dPlan& plan) {
  return int64_t{plan.tiles_x} * plan.tiles_y * call.phases * plan.parts;
}

// `partials` of partial_sums, null where these are none. `moments` (N, moment_entries, O), or null.
template <typename T>
void conv2d(const Conv2d<T>& call, const Conv2dPlan& plan, float* partials, ChannelMoments* moments,
            cudaStream_t stream) {
  const unsigned tiles = static_cast<unsigned>(plan.tiles(call.phases, call.images));
  with_conv_tile(plan.tile, [&](auto tile) {
    using Tile = decltype(tile);
    launch(conv2d_kernel<T, Tile>,
           {dim3(tiles, plan.splits), dim3(Tile::kThreads),
            SharedMemory::bytes<char>(plan.shared_bytes)},
           stream, call, plan, partials, moments);
  });
  if (!partials) return;
  launch(conv2d_finish_kernel<T>,
         {dim3(tiles * (plan.pixels / kFinishPixels)), dim3(kFinishThreads)}, stream, call, plan,
         static_cast<const float*>(partials), moments);
}

}  // namespace sdfast
