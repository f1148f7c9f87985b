// What conv2d's CUDA kernels are given: the convolution, and how a launch divides it.
#pragma once

#include "cuda_common.cuh"

namespace sdfast {

// y[oy P + a, ox P + b, o] = Σ_(i,j) Σ_c h[oy S - top + a + i, ox S - left + b + j, c] w[o, i, j,
// c]
//                            + bias[o] + time_embedding[o] + residual,
// h = silu?(GroupNorm(x)) or x. Usually P = 1, a = b = 0. After a nearest-2x upsample a 3x3
// convolution equals four 2x2 ones, phases 2 a + b with a kernel each: P = 2. Images are
// (N, height, width, channels), contiguous; the channels of `skip` follow those of x.
template <typename T>
struct Conv2d {
  int images, height, width;
  int channels, skip_channels;              // of x, of skip
  int out_channels, out_height, out_width;  // of one phase
  int phases;                               // 1 or 4
  int taps_y, taps_x, stride, top, left;
  const T *x, *skip, *weight;  // weight: (phases, out_channels, taps_y, taps_x, all channels)
  const T *bias, *time_embedding, *residual;  // (O), (N, O) and as y; may be null
  int64_t time_stride;                        // from one row of time_embedding to the next
  T* y;
  // GroupNorm of x and skip: (N, groups), and a weight and bias for every channel; mean may be
  // null.
  const float *mean, *rstd;
  const T *norm_weight, *norm_bias;
  int groups;
  bool silu;

  __host__ __device__ int all_channels() const { return channels + skip_channels; }
  __host__ __device__ int taps() const { return taps_y * taps_x; }
};

// Moments of one channel over some pixels of y. The mean is the sum of two, lest a large one be
// left with the error of its rounding when means are subtracted.
struct alignas(16) ChannelMoments {
  float count, mean, mean_rest, square;
};

// What a block computes: kPixels pixels of y by kChannels channels; each warp one part of them.
template <int pixels, int channels, int warp_rows, int warp_columns, int stages, int blocks>
struct ConvTile {
  static constexpr int kPixels = pixels, kChannels = channels;
  static constexpr int kWarpColumns = warp_columns;
  static constexpr int kThreads = kWarp * warp_rows * warp_columns;
  static constexpr int kWarpPixels = pixels / warp_rows;
  static constexpr int kWarpChannels = channels / warp_columns;
  // mma's: 16 pixels by 8 channels.
  static constexpr int kRows = kWarpPixels / 16, kColumns = kWarpChannels / 8;
  static constexpr int kStages = stages;  // of weights, in shared memory
  static constexpr int kBlocks = blocks;  // that registers are to suffice for, on a multiprocessor
};

// Along the channels of x a step takes 64 bytes: 4 units of 16, the rows that ldmatrix reads.
constexpr int kUnits = 4, kRowBytes = 16 * kUnits;
template <typename T>
constexpr int kChunk = kRowBytes / static_cast<int>(sizeof(T));

// How a launch divides the work. Tiles are rectangles of y, so that a block reads each pixel of x
// that it needs once: the halo tile.
struct Conv2dPlan {
  int tile;              // which ConvTile
  int pixels, channels;  // of it
  int tile_width_log2;   // its pixels are 2^this wide
  int tiles_x, tiles_y;  // of one image and phase
  int column_blocks;     // tiles along the channels of y
  int halo_width, halo_pixels,
      halo_inverse;  // the last to divide by the first: 2^16 / it, rounded up
  int halo_buffers;
  int chunks, chunks_of_x;  // in all, and those before skip's
  int splits, chunks_per_split;
  int parts;                  // of a tile's pixels, in the statistics: each has its moments
  bool vectors, out_vectors;  // whether 16 bytes can be read at once of x, skip and weight; of y
  int shared_bytes;
  float cost;

  int64_t tiles(int phases, int images) const {
    return int64_t{images} * phases * tiles_x * tiles_y * column_blocks;
  }
};

// Where the unit of a row lies. The 8 rows of an ldmatrix, consecutive ones, fall into 8 different
// groups of 4 banks: two rows make 128 bytes, and the exclusive or moves pairs of rows apart. That
// holds from any first row, hence for every shift of a 3x3 kernel. Rows two apart (a stride of 2)
// meet in pairs.
__host__ __device__ constexpr int unit_place(int row, int unit) {
  return row * kRowBytes + ((unit ^ (row >> 1 & 3)) << 4);
}
constexpr bool meets_no_bank_twice(int first_row, int unit) {
  int groups = 0;
  for (int row = first_row; row < first_row + 8; ++row)
    groups |= 1 << unit_place(row, unit) / 16 % 8;
  return groups == 0xff;
}
static_assert(meets_no_bank_twice(0, 0) && meets_no_bank_twice(1, 1) && meets_no_bank_twice(2, 2) &&
              meets_no_bank_twice(7, 3) && meets_no_bank_twice(18, 0));

// Which part of the result a block computes.
struct Conv2dPlace {
  int image, phase, tile, row, column, channel;  // row, column, channel: the tile's first in y

  template <typename T>
  __device__ Conv2dPlace(const Conv2d<T>& call, const Conv2dPlan& plan, int block) {
    // Blocks that read the same pixels follow each other.
    channel = block % plan.column_blocks * plan.channels;
    block /= plan.column_blocks;
    phase = block % call.phases;
    block /= call.phases;
    tile = block % (plan.tiles_x * plan.tiles_y);
    image = block / (plan.tiles_x * plan.tiles_y);
    column = tile % plan.tiles_x << plan.tile_width_log2;
    row = tile / plan.tiles_x * (plan.pixels >> plan.tile_width_log2);
  }

  // Whether the pixel `i` of the tile is one of y.
  template <typename T>
  __device__ bool holds(const Conv2d<T>& call, const Conv2dPlan& plan, int i) const {
    return row + (i >> plan.tile_width_log2) < call.out_height &&
           column + (i & ((1 << plan.tile_width_log2) - 1)) < call.out_width;
  }
  // Where it lies in y, counted in pixels.
  template <typename T>
  __device__ int64_t pixel(const Conv2d<T>& call, const Conv2dPlan& plan, int i) const {
    const int y = row + (i >> plan.tile_width_log2);
    const int x = column + (i & ((1 << plan.tile_width_log2) - 1));
    if (call.phases == 1) return (int64_t{image} * call.out_height + y) * call.out_width + x;
    const int64_t line = (int64_t{image} * call.out_height + y) * 2 + phase / 2;
    return (line * call.out_width + x) * 2 + phase % 2;
  }
};

}  // namespace sdfast
