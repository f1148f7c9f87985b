// What the kernels of tile_product_cuda.cuh are given, and how a launch divides it.
#pragma once

#include "conv2d_problem_cuda.cuh"
#include "cuda_hopper.cuh"

namespace sdfast {

constexpr int kTilePixels = 128, kTileK = 64;            // channels of x a step
constexpr int kProductThreads = 2 * kWarpgroup + kWarp;  // two that multiply, a warp that copies
constexpr int kMostStages = 8, kLeastStages = 3, kMostSplits = 8;

// How a launch divides the work.
struct TileProductPlan {
  int tile, columns;            // which ProductTile, and its channels of y
  int width_log2, height_log2;  // of its pixels' rectangle; the rest is images
  int tiles_x, tiles_y, tiles_images, column_blocks;
  int steps_x, steps;  // along K: of x, and with those of skip
  int splits, steps_per_split;
  int stages;
  int shared_bytes;

  __host__ __device__ int width() const { return 1 << width_log2; }
  __host__ __device__ int height() const { return 1 << height_log2; }
  __host__ __device__ int images() const { return kTilePixels >> (width_log2 + height_log2); }
  int64_t tiles(int phases) const {
    return int64_t{tiles_x} * tiles_y * tiles_images * column_blocks * phases;
  }
};

template <typename T>
struct TileProduct {
  TensorMap x, skip, weight;
  Conv2d<T> conv;
  TileProductPlan plan;
};

// What a block computes: channels of y for kTilePixels pixels.
template <int columns, int blocks>
struct ProductTile {
  static constexpr int kColumns = columns;
  static constexpr int kBlocks = blocks;  // on a multiprocessor
  static constexpr int kStageBytes = (kTilePixels + columns) * kTileRowBytes;
  static constexpr int kPitch =
      columns + 8;  // of sums in shared memory: rows then meet different banks
  static constexpr int kSumsBytes = kTilePixels * kPitch * 4;
  static_assert(kSumsBytes <= kLeastStages * kStageBytes);
};

#if SDFAST_HOPPER

// Which tile a block computes.
struct TilePlace {
  int phase, x, y, image, column;  // of the first pixel and channel

  template <typename T>
  __device__ TilePlace(const TileProduct<T>& call, int columns) {
    const TileProductPlan& plan = call.plan;
    int tile = blockIdx.x / plan.splits;
    column = tile % plan.column_blocks * columns;
    tile /= plan.column_blocks;
    phase = tile % call.conv.phases;
    tile /= call.conv.phases;
    x = tile % plan.tiles_x * plan.width();
    tile /= plan.tiles_x;
    y = tile % plan.tiles_y * plan.height();
    image = tile / plan.tiles_y * plan.images();
  }
};

#endif  // SDFAST_HOPPER

}  // namespace sdfast
