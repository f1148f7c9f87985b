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

#include <algorithm>
#include <cmath>
#include <tuple>

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

// 8 numbers as they lie in memory.
template <typename T>
using Eight = Vector<T, 8>;

template <typename T>
__device__ inline void add(float (&h)[8], const Eight<T>& numbers) {
#pragma unroll
  for (int k = 0; k < 8; ++k) h[k] += to_float(numbers.values[k]);
}
// Null is zeros.
template <typename T>
__device__ inline Eight<T> eight_of(const T* from, int64_t at) {
  if (from) return *reinterpret_cast<const Eight<T>*>(from + at);
  const T zero = from_float<T>(0.0f);
  return {{zero, zero, zero, zero, zero, zero, zero, zero}};
}

// g Phi(g). 2 (1 - Phi(|g|)) = erfc(|g| / sqrt 2) within 1.5e-7: Abramowitz and Stegun, 7.1.26.
__device__ inline float gelu(float g) {
  constexpr float kLog2e = 1.4426950f;
  const float x = fabsf(g) * 0.70710678f;
  const float t = __fdividef(1.0f, __fmaf_rn(0.3275911f, x, 1.0f));
  float tail = __fmaf_rn(1.061405429f, t, -1.453152027f);
  tail = __fmaf_rn(tail, t, 1.421413741f);
  tail = __fmaf_rn(tail, t, -0.284496736f);
  tail = __fmaf_rn(tail, t, 0.254829592f);
  tail *= 0.5f * t * exp2_fast(-kLog2e * x * x);
  return g * (g < 0.0f ? tail : 1.0f - tail);
}

// GEGLU of a group's sums, each value beside its gate in one thread, stored from registers: that
// takes less time than rows of 16 bytes do, by way of shared memory.
template <typename Tile, typename T>
__device__ __forceinline__ void finish_gated(const TileProduct<T>& call, const TilePlace& place,
                                             int first_row,
                                             const float (&sums)[Tile::kColumns / 2]) {
  constexpr int kGates = Tile::kColumns / 4;  // from a value to its gate
  const Conv2d<T>& conv = call.conv;
  const int out_channels = conv.out_channels / 2;
#pragma unroll
  for (int j = 0; j < Tile::kColumns / 16; ++j) {
    const int o = place.column + 8 * j + threadIdx.x % 4 * 2;
    if (o >= out_channels) continue;
    float bias[2] = {}, gate_bias[2] = {};
    if (conv.bias) load(conv.bias + o, bias), load(conv.bias + o + out_channels, gate_bias);
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const int row = place.x + first_row + lower * 8, i = 4 * j + 2 * lower;
      if (row >= conv.out_width) continue;
      const float y[2] = {(sums[i] + bias[0]) * gelu(sums[i + kGates] + gate_bias[0]),
                          (sums[i + 1] + bias[1]) * gelu(sums[i + kGates + 1] + gate_bias[1])};
      store(conv.y + int64_t{row} * out_channels + o, y);
    }
  }
}

// The rows of a tile that this block finishes, from the sums of its cluster. A thread has 8 columns
// of several rows, whose loads it issues together.
template <typename Tile, typename T>
__device__ void finish_rows(const TileProduct<T>& call, const TilePlace& place, float* sums,
                            int split) {
  constexpr int kVectors = Tile::kColumns / 8, kRowsAtOnce = kProductThreads / kVectors;
  constexpr int kBatch = 4 / Tile::kBlocks;
  const Conv2d<T>& conv = call.conv;
  const TileProductPlan& plan = call.plan;
  const int column = threadIdx.x % kVectors * 8, o = place.column + column;
  if (static_cast<int>(threadIdx.x) >= kRowsAtOnce * kVectors || o >= conv.out_channels) return;
  const int rows = kTilePixels / plan.splits, last = (split + 1) * rows;
  const int scale = conv.phases > 1 ? 2 : 1;
  const Eight<T> bias = eight_of(conv.bias, o);
  for (int first = split * rows + threadIdx.x / kVectors; first < last;
       first += kBatch * kRowsAtOnce) {
    int64_t at[kBatch];  // in y, -1 where there is no pixel
    Eight<T> time[kBatch], residual[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * kRowsAtOnce;
      const int x = place.x + (row & (plan.width() - 1));
      const int y = place.y + (row >> plan.width_log2 & (plan.height() - 1));
      const int image = place.image + (row >> (plan.width_log2 + plan.height_log2));
      at[i] = -1;
      if (row >= last || x >= conv.out_width || y >= conv.out_height || image >= conv.images)
        continue;
      const int64_t pixel =
          (int64_t{image} * conv.out_height * scale + y * scale + place.phase / 2) *
              conv.out_width * scale +
          x * scale + place.phase % 2;
      at[i] = pixel * conv.out_channels + o;
      time[i] = eight_of(conv.time_embedding, int64_t{image} * conv.out_channels + o);
      residual[i] = eight_of(conv.residual, at[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (at[i] < 0) continue;
      const int in_tile = (first + i * kRowsAtOnce) * Tile::kPitch + column;
      float h[8] = {};
      for (int other = 0; other < plan.splits; ++other) {
        const float* const from =
            (plan.splits > 1 ? in_block_of_cluster(sums, other) : sums) + in_tile;
        float part[4];
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
          load(from + k, part);
#pragma unroll
          for (int n = 0; n < 4; ++n) h[k + n] += part[n];
        }
      }
      add(h, bias), add(h, time[i]), add(h, residual[i]);
      store(conv.y + at[i], h);
    }
  }
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

// ---- the host's part

using ProductTiles =
    std::tuple<ProductTile<256, 1>, ProductTile<160, 1>, ProductTile<128, 2>, ProductTile<80, 2>>;
// What was measured on an H100, in microseconds: a step of a tile, and what comes before and after
// the steps.
struct TileTimes {
  float step, ends;
};
constexpr TileTimes kTileTimes[] = {{.634f, 7.9f}, {.428f, 5.5f}, {.422f, 3.1f}, {.379f, 1.8f}};
constexpr float kMicrosecondsOfSplits = 1.35f;  // for each doubling of their number

template <int index = 0, typename F>
void with_product_tile(int tile, const F& f) {
  if constexpr (index < std::tuple_size_v<ProductTiles>) {
    if (tile == index) return f(std::tuple_element_t<index, ProductTiles>());
    with_product_tile<index + 1>(tile, f);
  }
}

// Whether this library holds the kernel's code for the current device.
template <typename T>
bool has_tile_products(const Device& device) {
  if (sizeof(T) != 2 || device.capability != 90) return false;
  return has_hopper_code(tile_product_kernel<T, ProductTile<128, 2>, false>);
}

// How many clusters of so many blocks run at once, a block on a multiprocessor: no more than whole
// ones in each of the GPU's parts.
inline int clusters_at_once(int blocks, const Device& device) {
#ifdef SDFAST_SIMT
  return std::max(device.multiprocessors / blocks, 1);
#else
  if (blocks == 1) return device.multiprocessors;
  static int known[kMostSplits + 1] = {};  // the same values whoever writes them first
  int& count = known[blocks];
  if (count > 0) return count;
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
  return count = std::max(found, 1);
#endif
}

// Whether it can compute such a convolution: what copies and stores of 16 bytes need.
template <typename T>
bool suits_tile_product(const Conv2d<T>& conv) {
  return conv.images > 0 && conv.height > 0 && conv.width > 0 && conv.channels > 0 &&
         conv.out_channels > 0 && conv.channels % 8 == 0 && conv.skip_channels % 8 == 0 &&
         conv.out_channels % 8 == 0 && !conv.mean && is_aligned(conv.x, 16) &&
         is_aligned(conv.skip, 16) && is_aligned(conv.weight, 16) && is_aligned(conv.y, 16) &&
         is_aligned(conv.residual, 16) && is_aligned(conv.bias, 16) &&
         is_aligned(conv.time_embedding, 16);
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
      plan.tiles_x = static_cast<int>(x), plan.tiles_y = static_cast<int>(y);
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
      plan.column_blocks = static_cast<int>(ceil_div(conv.out_channels, Tile::kColumns));
      const int64_t tiles = plan.tiles(conv.phases);
      const TileTimes times = kTileTimes[plan.tile];
      for (int log2 = 0; 1 << log2 <= most_splits; ++log2) {
        plan.splits = 1 << log2;
        plan.steps_per_split = static_cast<int>(ceil_div(plan.steps, plan.splits));
        if (log2 > 0 && plan.steps_per_split * (plan.splits - 1) >= plan.steps)
          break;  // one would have none
        const int64_t rounds = ceil_div(tiles, clusters_at_once(plan.splits, device));
        const float cost = rounds * (plan.steps_per_split * times.step + times.ends +
                                     log2 * kMicrosecondsOfSplits);
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
  const auto grid = static_cast<unsigned>(plan.tiles(conv.phases) * plan.splits);
  with_product_tile(plan.tile, [&](auto tile) {
    launch(tile_product_kernel<T, decltype(tile), kGated>,
           {dim3(grid), dim3(kProductThreads), static_cast<size_t>(plan.shared_bytes),
            static_cast<unsigned>(plan.splits)},
           stream, call);
  });
}

}  // namespace sdfast
