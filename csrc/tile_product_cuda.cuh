// Tile products (tile_product_kernel_cuda.cuh): which calls they take, which tile and how many
// splits of K are expected to take the least time, and the launch.
#pragma once

#include <algorithm>
#include <cmath>

#include "tile_product_kernel_cuda.cuh"

namespace sdfast {

using ProductTiles =
    std::tuple<ProductTile<256, 1>, ProductTile<160, 1>, ProductTile<128, 2>, ProductTile<80, 2>>;
// Fitted to what was measured on an H100, in microseconds, so that the tile and splits that come
// out are the fastest or nearly so: a step of a tile, what comes before and after the steps, and
// what splits of K add: steps take longer, then come a barrier and others' sums by the cluster's
// slow network.
struct TileTimes {
  float step, ends;
};
constexpr TileTimes kTileTimes[] = {{.528f, 4.67f}, {.445f, 4.73f}, {.329f, 2.36f}, {.294f, 1.29f}};
inline float time_of_tile(const TileTimes& times, int columns, int splits, int steps) {
  if (splits == 1) return steps * times.step + times.ends;
  constexpr float kLongerSteps = 1.23f, kBarrier = 1.42f, kColumn = .0078f;
  return steps * times.step * kLongerSteps + times.ends + kBarrier +
         kColumn * columns * (splits - 1) / splits;
}

template <typename F>
void with_product_tile(int tile, const F& f) {
  with_element_of<ProductTiles>(tile, f);
}

// Whether this library holds the kernel's code for the current device.
template <typename T>
bool has_tile_products(const Device& device) {
  if (sizeof(T) != 2 || device.capability != 90) return false;
  return has_hopper_code(tile_product_kernel<T, ProductTile<128, 2>, false>);
}

// How many clusters of so many blocks run at once, a block on a multiprocessor: no more than whole
// ones in each of the GPU's parts; 0 where a part of it has no room for one.
inline int clusters_at_once(int blocks, const Device& device) {
#ifdef SDFAST_SIMT
  return std::max(device.multiprocessors / blocks, 1);
#else
  if (blocks == 1) return device.multiprocessors;
  constexpr int kDevices = 64;
  static int known[kDevices][kMostSplits + 1] = {};  // and one more; the same whoever writes them
  int index = 0;
  check_error(cudaGetDevice(&index), "device");
  int& count = known[index % kDevices][blocks];
  if (count > 0) return count - 1;
  using Tile = std::tuple_element_t<0, ProductTiles>;
  const auto kernel = tile_product_kernel<__nv_bfloat16, Tile, false>;
  const int shared_bytes = kLeastStages * Tile::kStageBytes;
  check_error(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
      "shared memory");
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(kProductThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &cluster, config.numAttrs = 1;
  int found = 0;
  check_error(cudaOccupancyMaxActiveClusters(&found, kernel, &config), "clusters");
  count = found + 1;
  return found;
#endif
}

// Whether it can compute such a convolution: what copies and stores of 16 bytes need.
template <typename T>
bool suits_tile_product(const Conv2d<T>& conv) {
  const int64_t pixels = int64_t{conv.images} * conv.out_height * conv.out_width * conv.phases;
  return pixels > 0 && pixels < int64_t{1} << 31 && conv.height > 0 && conv.width > 0 &&
         conv.channels > 0 && conv.out_channels > 0 && conv.channels % 8 == 0 &&
         conv.skip_channels % 8 == 0 && conv.out_channels % 8 == 0 && !conv.mean &&
         is_aligned(conv.x, 16) && is_aligned(conv.skip, 16) && is_aligned(conv.weight, 16) &&
         is_aligned(conv.y, 16) && is_aligned(conv.residual, 16) && is_aligned(conv.bias, 16) &&
         is_aligned(conv.time_embedding, 16) && conv.time_stride % 8 == 0;
}

// The rectangle of pixels that leaves the least of the tiles outside of the images.
template <typename T>
void plan_rectangle(const Conv2d<T>& conv, TileProductPlan& plan) {
  int64_t fewest = INT64_MAX;
  for (int width = 7; width >= 0; --width) {
    for (int height = 7 - width; height >= 0; --height) {
      const int64_t x = ceil_div(conv.out_width, 1 << width),
                    y = ceil_div(conv.out_height, 1 << height);
      const int64_t images = ceil_div(conv.images, kTilePixels >> (width + height));
      if (x * y * images >= fewest) continue;
      fewest = x * y * images;
      plan.width_log2 = width, plan.height_log2 = height;
      plan.tiles_x = Divisor(static_cast<int>(x)), plan.tiles_y = Divisor(static_cast<int>(y));
      plan.tiles_images = static_cast<int>(images);
    }
  }
}

// The tile and the number of splits that are expected to take the least time.
template <typename T>
TileProductPlan plan_tile_product(const Conv2d<T>& conv, int most_splits, const Device& device) {
  TileProductPlan plan = {}, best = {};
  plan.steps_x = conv.taps() * static_cast<int>(ceil_div(conv.channels, kTileK));
  plan.steps = plan.steps_x + conv.taps() * static_cast<int>(ceil_div(conv.skip_channels, kTileK));
  plan_rectangle(conv, plan);
  float least = INFINITY;
  for (plan.tile = 0; plan.tile < static_cast<int>(std::tuple_size_v<ProductTiles>); ++plan.tile) {
    with_product_tile(plan.tile, [&](auto tile) {
      using Tile = decltype(tile);
      plan.columns = Tile::kColumns;
      plan.column_blocks = Divisor(static_cast<int>(ceil_div(conv.out_channels, Tile::kColumns)));
      const int64_t tiles = plan.tiles(conv.phases);
      const TileTimes times = kTileTimes[plan.tile];
      for (int log2 = 0; 1 << log2 <= most_splits; ++log2) {
        plan.splits_log2 = log2;
        plan.steps_per_split = static_cast<int>(ceil_div(plan.steps, plan.splits()));
        if (log2 > 0 && plan.steps_per_split * (plan.splits() - 1) >= plan.steps)
          break;  // one would have none
        const int clusters = clusters_at_once(plan.splits(), device);
        if (clusters == 0) break;
        const int64_t rounds = ceil_div(tiles, clusters);
        const float cost =
            rounds * time_of_tile(times, Tile::kColumns, plan.splits(), plan.steps_per_split);
        if (cost >= least) continue;
        least = cost;
        best = plan;
        const bool alone =
            rounds == 1;  // on its multiprocessor: the ring may be as long as there is room
        const int barriers = static_cast<int>(2 * SharedMemory::bytes<uint64_t>(kMostStages));
        const int blocks = alone ? 1 : Tile::kBlocks;
        const int room = static_cast<int>(shared_bytes_of_block(device)) / blocks - 1024 - barriers;
        best.stages = std::clamp(room / Tile::kStageBytes, kLeastStages, kMostStages);
        best.shared_bytes = best.stages * Tile::kStageBytes + barriers;
      }
    });
  }
  return best;
}

template <bool kGated, typename T>
void tile_product(const Conv2d<T>& conv, const Device& device, cudaStream_t stream) {
  TileProduct<T> call = {};
  call.conv = conv;
  call.plan = plan_tile_product(conv, kGated ? 1 : kMostSplits, device);
  const TileProductPlan& plan = call.plan;
  const auto images = [&](const T* data, int channels) {
    const int64_t row = int64_t{conv.width} * channels;
    return tensor_map<T>({data,
                          4,
                          {channels, conv.width, conv.height, conv.images},
                          {1, channels, row, row * conv.height},
                          {kTileK, plan.width(), plan.height(), plan.images()},
                          {1, conv.stride, conv.stride, 1}});
  };
  call.x = images(conv.x, conv.channels);
  call.skip = conv.skip ? images(conv.skip, conv.skip_channels) : call.x;
  const int64_t all = conv.all_channels();
  call.weight = tensor_map<T>({conv.weight,
                               3,
                               {all, conv.taps(), int64_t{conv.phases} * conv.out_channels},
                               {1, all, all * conv.taps()},
                               {kTileK, 1, plan.columns / 2}});
  const int64_t grid = plan.tiles(conv.phases) * plan.splits();
  if (grid >= int64_t{1} << 31) throw std::runtime_error("x: too large");
  with_product_tile(plan.tile, [&](auto tile) {
    launch(tile_product_kernel<T, decltype(tile), kGated>,
           {dim3(static_cast<unsigned>(grid)), dim3(kProductThreads),
            static_cast<size_t>(plan.shared_bytes), static_cast<unsigned>(plan.splits())},
           stream, call);
  });
}

}  // namespace sdfast
