// What the kernels of tile_product_cuda.cuh are given, and how a launch divides it.
#pragma once

#include "conv2d_problem_cuda.cuh"
#include "cuda_hopper.cuh"

namespace sdfast {

constexpr int kTilePixels = 128, kTileK = 64;            // channels of x a step
constexpr int kProductThreads = 2 * kWarpgroup + kWarp;  // two that multiply, a warp that copies
constexpr int kMostStages = 8, kLeastStages = 3, kMostSplits = 4;

// How a launch divides the work.
struct TileProductPlan {
  int tile, columns;            // which ProductTile, and its channels of y
  int width_log2, height_log2;  // of its pixels' rectangle; the rest is images
  Divisor tiles_x, tiles_y, column_blocks;
  int tiles_images;
  int steps_x, steps;  // along K: of x, and with those of skip
  int splits_log2, steps_per_split;
  int stages;
  int shared_bytes;

  __host__ __device__ int width() const { return 1 << width_log2; }
  __host__ __device__ int height() const { return 1 << height_log2; }
  __host__ __device__ int images() const { return kTilePixels >> (width_log2 + height_log2); }
  __host__ __device__ int splits() const { return 1 << splits_log2; }
  int64_t tiles(int phases) const {
    return int64_t{tiles_x.by} * tiles_y.by * tiles_images * column_blocks.by * phases;
  }
};

template <typename T>
struct TileProduct {
  TensorMap x, skip, weight;
  Conv2d<T> conv;
  TileProductPlan plan;
};

// How sums of so many columns lie in shared memory: of a row the first four of every 8 columns, and
// kHalves further on the other four. Then neither 8 threads that read 16 bytes each of a row meet
// a bank twice, nor those of 4 rows that write 8.
template <int columns>
struct SumsLayout {
  static constexpr int kVectors = columns / 8;
  static constexpr int kHalves = (4 * kVectors + 15) / 32 * 32 + 16;
  static constexpr int kPitch = kHalves + 4 * kVectors + (kVectors % 2 ? 8 : 4);
  static constexpr int kBytes = kTilePixels * kPitch * 4;
  static_assert(kHalves >= 4 * kVectors && kPitch % 8 == 4);
};

// What a block computes: channels of y for kTilePixels pixels.
template <int columns, int blocks>
struct ProductTile {
  static constexpr int kColumns = columns;
  static constexpr int kBlocks = blocks;  // on a multiprocessor
  static constexpr int kStageBytes = (kTilePixels + columns) * kTileRowBytes;
  static_assert(SumsLayout<columns>::kBytes <= kLeastStages * kStageBytes);
};

#if SDFAST_HOPPER

// Which tile a block computes.
struct TilePlace {
  int phase, x, y, image, column;  // of the first pixel and channel

  template <typename T>
  __device__ TilePlace(const TileProduct<T>& call, int columns) {
    const TileProductPlan& plan = call.plan;
    int rest = blockIdx.x >> plan.splits_log2;
    int tile = plan.column_blocks.divide(rest);
    column = rest * columns;
    phase = call.conv.phases == 1 ? 0 : tile % 4;
    if (call.conv.phases != 1) tile /= 4;
    int line = plan.tiles_x.divide(tile);
    x = tile << plan.width_log2;
    image = plan.tiles_y.divide(line) * plan.images();
    y = line << plan.height_log2;
  }
};

#endif  // SDFAST_HOPPER

}  // namespace sdfast
