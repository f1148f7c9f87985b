// Products and convolutions on Hopper's own units: 128 pixels (tokens) by 80 to 256 channels of y at a time.
//
// Algorithm. An implicit GEMM. One thread of a block asks the tensor memory accelerator for tiles: 64
// channels of a rectangle of pixels, shifted by the kernel's position, zeros beside the image, and the same
// channels of the rows of the weight. They arrive in a ring in shared memory; two groups of four warps
// multiply 64 pixels each (wgmma), and say when a tile was read. Where tiles are fewer than
// multiprocessors K is split among the blocks of a cluster, which add up each other's sums, read from
// shared memory, in order. Then bias, time embedding and residual, or GEGLU's gate, whose columns lie in
// the same tile; each result is rounded once. Bytes: x once for each of the kernel's positions and block
// of channels, from L2; weight once a tile. Limit: the tensor cores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "conv2d_problem_cuda.cuh"
#include "cuda_hopper.cuh"

namespace sdfast {

constexpr int kTilePixels = 128, kTileK = 64;                 // K: channels of x a step
constexpr int kProductThreads = 2 * kWarpgroup + kWarp;       // two that multiply, a warp that copies
constexpr int kMostStages = 8, kLeastStages = 3, kMostSplits = 8;

// How a launch divides the work.
struct TileProductPlan {
  int columns;                                          // of a tile
  int width_log2, height_log2;                          // of its pixels' rectangle; the rest is images
  int tiles_x, tiles_y, tiles_images, column_blocks;
  int steps_x, steps;                                   // along K: of x, and with those of skip
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
  CUtensorMap x, skip, weight;
  Conv2d<T> conv;
  TileProductPlan plan;
  bool gated;  // GEGLU: y has half of out_channels, the values; the others are their gates
};

// Bytes of one stage, and of the sums of a tile, a row of which is 8 numbers longer than it need be: rows
// then meet different banks.
template <int columns>
constexpr int kStageBytes = (kTilePixels + columns) * kTileRowBytes;
template <int columns>
constexpr int kSumsBytes = kTilePixels * (columns + 8) * 4;

#if SDFAST_HOPPER

// Which tile a block computes.
template <typename T>
struct TilePlace {
  int phase, x, y, image, column;  // of the first pixel and channel

  __device__ TilePlace(const TileProduct<T>& call, int columns) {
    const TileProductPlan& plan = call.plan;
    int tile = blockIdx.x / plan.splits;
    column = tile % plan.column_blocks * (call.gated ? columns / 2 : columns);
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
template <typename T, int columns>
__device__ void copy_tiles(const TileProduct<T>& call, const TilePlace<T>& place, unsigned char* ring,
                           uint64_t* full, uint64_t* empty, int first, int last) {
  const Conv2d<T>& conv = call.conv;
  const bool has_skip = call.plan.steps > call.plan.steps_x;
  prefetch(call.x), prefetch(call.weight);
  if (has_skip) prefetch(call.skip);
  const int x = place.x * conv.stride - conv.left + place.phase % 2;
  const int y = place.y * conv.stride - conv.top + place.phase / 2;
  const int rows = call.gated ? conv.out_channels / 2 : columns / 2;  // from the first half of w's to the second
  const int row = place.phase * conv.out_channels + place.column;
  bool of_skip = first >= call.plan.steps_x;
  const int before = of_skip ? first - call.plan.steps_x : first;
  int chunks = (of_skip ? conv.skip_channels + kTileK - 1 : conv.channels + kTileK - 1) / kTileK;
  int tap = before / chunks, c = before % chunks * kTileK;
  int stage = 0;
  unsigned parity = 1;  // of a ring that is empty at first
  for (int step = first; step < last; ++step) {
    wait(empty + stage, parity);
    arrive_for_bytes(full + stage, kStageBytes<columns>);
    unsigned char* const tile = ring + stage * kStageBytes<columns>;
    unsigned char* const weights = tile + kTilePixels * kTileRowBytes;
    copy_tile(tile, of_skip ? call.skip : call.x, full + stage, c, x + tap % conv.taps_x,
              y + tap / conv.taps_x, place.image);
    const int w_c = of_skip ? conv.channels + c : c;
    copy_tile(weights, call.weight, full + stage, w_c, tap, row);
    copy_tile(weights + columns / 2 * kTileRowBytes, call.weight, full + stage, w_c, tap, row + rows);
    if (++stage == call.plan.stages) stage = 0, parity ^= 1;
    c += kTileK;
    if (c >= (of_skip ? conv.skip_channels : conv.channels)) c = 0, ++tap;
    if (tap == conv.taps()) tap = 0, of_skip = true;
  }
}

// The sums of 64 pixels, in the registers of four warps, when `count` tiles have arrived.
template <typename T, int columns>
__device__ __forceinline__ void multiply_tiles(float (&sums)[columns / 2], const unsigned char* ring,
                                               uint64_t* full, uint64_t* empty, int stages, int count) {
  const int group = threadIdx.x / kWarpgroup;
  const uint64_t x0 = tile_descriptor(ring + group * 64 * kTileRowBytes);
  const uint64_t w0 = tile_descriptor(ring + kTilePixels * kTileRowBytes);
  int stage = 0, before = 0;
  unsigned parity = 0;
  for (int step = 0; step < count; ++step) {
    wait(full + stage, parity);
    const uint64_t offset = stage * (kStageBytes<columns> >> 4);
    hold(sums);
    begin_products();
#pragma unroll
    for (int k = 0; k < kTileK / 16; ++k) {
      multiply<T, columns>(sums, x0 + offset + 2 * k, w0 + offset + 2 * k);
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

// What is added to 8 numbers of y, and where they go.
template <typename T>
__device__ void finish_vector(const TileProduct<T>& call, float (&h)[8], int image, int o, int64_t at) {
  const Conv2d<T>& conv = call.conv;
  float added[8];
  if (conv.bias) {
    load(conv.bias + o, added);
#pragma unroll
    for (int k = 0; k < 8; ++k) h[k] += added[k];
  }
  if (conv.time_embedding) {
    load(conv.time_embedding + int64_t{image} * conv.out_channels + o, added);
#pragma unroll
    for (int k = 0; k < 8; ++k) h[k] += added[k];
  }
  if (conv.residual) {
    load(conv.residual + at, added);
#pragma unroll
    for (int k = 0; k < 8; ++k) h[k] += added[k];
  }
}

__device__ inline float gelu(float g) { return g * (0.5f + 0.5f * erff(g * 0.70710678f)); }

// The rows of a tile that this block finishes, from the sums of its cluster.
template <typename T, int columns>
__device__ void finish_rows(const TileProduct<T>& call, const TilePlace<T>& place, float* sums, int split) {
  constexpr int kPitch = columns + 8;
  const Conv2d<T>& conv = call.conv;
  const TileProductPlan& plan = call.plan;
  const int rows = kTilePixels / plan.splits;
  const int out_channels = call.gated ? conv.out_channels / 2 : conv.out_channels;
  const int vectors = (call.gated ? columns / 2 : columns) / 8;
  const int scale = conv.phases > 1 ? 2 : 1;
  for (int i = threadIdx.x; i < rows * vectors; i += kProductThreads) {
    const int row = split * rows + i / vectors, column = i % vectors * 8, o = place.column + column;
    const int x = place.x + (row & (plan.width() - 1));
    const int y = place.y + (row >> plan.width_log2 & (plan.height() - 1));
    const int image = place.image + (row >> (plan.width_log2 + plan.height_log2));
    if (x >= conv.out_width || y >= conv.out_height || image >= conv.images || o >= out_channels) continue;
    float h[8] = {}, gate[8] = {};
    for (int other = 0; other < plan.splits; ++other) {
      const float* const from =
          (plan.splits > 1 ? in_block_of_cluster(sums, other) : sums) + row * kPitch + column;
      float part[4];
#pragma unroll
      for (int k = 0; k < 8; k += 4) {
        load(from + k, part);
#pragma unroll
        for (int n = 0; n < 4; ++n) h[k + n] += part[n];
        if (!call.gated) continue;
        load(from + columns / 2 + k, part);
#pragma unroll
        for (int n = 0; n < 4; ++n) gate[k + n] += part[n];
      }
    }
    const int64_t pixel =
        (int64_t{image} * conv.out_height * scale + y * scale + place.phase / 2) * conv.out_width * scale +
        x * scale + place.phase % 2;
    finish_vector(call, h, image, o, pixel * conv.out_channels + o);
    if (call.gated) {
      finish_vector(call, gate, image, o + out_channels, pixel * conv.out_channels + o + out_channels);
#pragma unroll
      for (int k = 0; k < 8; ++k) h[k] *= gelu(gate[k]);
    }
    store(conv.y + pixel * out_channels + o, h);
  }
}

#endif  // SDFAST_HOPPER

// Grid: tiles by splits, those of a tile a cluster.
template <typename T, int columns, int blocks>
__global__ void __launch_bounds__(kProductThreads, blocks)
    tile_product_kernel(const __grid_constant__ TileProduct<T> call) {
#if SDFAST_HOPPER
  SharedMemory shared;
  unsigned char* const ring = shared.array<unsigned char>(call.plan.stages * kStageBytes<columns>);
  uint64_t* const full = shared.array<uint64_t>(kMostStages);
  uint64_t* const empty = shared.array<uint64_t>(kMostStages);
  float* const results = reinterpret_cast<float*>(ring);  // when the last tile was read
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < call.plan.stages; ++stage) {
      init_barrier(full + stage, 1);
      init_barrier(empty + stage, 2 * kWarpgroup / kWarp);
    }
    show_barriers();
  }
  __syncthreads();
  const TilePlace<T> place(call, columns);
  const int split = blockIdx.x % call.plan.splits;
  const int first = split * call.plan.steps_per_split;
  const int last = min(first + call.plan.steps_per_split, call.plan.steps);
  if (threadIdx.x >= 2 * kWarpgroup) {
    if (threadIdx.x == 2 * kWarpgroup) copy_tiles<T, columns>(call, place, ring, full, empty, first, last);
    __syncwarp();
    __syncthreads();
  } else {
    float sums[columns / 2] = {};
    multiply_tiles<T, columns>(sums, ring, full, empty, call.plan.stages, last - first);
    __syncthreads();  // the other group has read the ring, too
    const int row = threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4, column = threadIdx.x % 4 * 2;
    float* const at = results + row * (columns + 8) + column;
#pragma unroll
    for (int j = 0; j < columns / 8; ++j) {
      const float upper[2] = {sums[4 * j], sums[4 * j + 1]}, lower[2] = {sums[4 * j + 2], sums[4 * j + 3]};
      store(at + 8 * j, upper);
      store(at + 8 * (columns + 8) + 8 * j, lower);
    }
  }
  if (call.plan.splits > 1) cluster_barrier();
  else __syncthreads();
  finish_rows<T, columns>(call, place, results, split);
  if (call.plan.splits > 1) cluster_barrier();  // none leaves while others read its sums
#endif
}

// ---- the host's part

// Whether this library holds the kernel's code for the current device.
template <typename T>
bool has_tile_products(const Device& device) {
  if (sizeof(T) != 2 || device.capability != 90) return false;
  static const bool is_there = [] {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, tile_product_kernel<T, 128, 2>);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && attributes.ptxVersion == 90;
  }();
  return is_there;
}

// Whether it can compute such a convolution: what copies and stores of 16 bytes need.
template <typename T>
bool suits_tile_product(const Conv2d<T>& conv) {
  return conv.channels > 0 && conv.channels % 8 == 0 && conv.skip_channels % 8 == 0 &&
         conv.out_channels % 8 == 0 && !conv.mean && is_aligned(conv.x, 16) && is_aligned(conv.skip, 16) &&
         is_aligned(conv.weight, 16) && is_aligned(conv.y, 16) && is_aligned(conv.residual, 16) &&
         is_aligned(conv.bias, 16) && is_aligned(conv.time_embedding, 16);
}

// Calls f with the number of columns of a tile, and how many blocks of it a multiprocessor holds.
template <typename F>
void with_tile_columns(int columns, const F& f) {
  if (columns == 80) return f(std::integral_constant<int, 80>(), std::integral_constant<int, 2>());
  if (columns == 128) return f(std::integral_constant<int, 128>(), std::integral_constant<int, 2>());
  if (columns == 160) return f(std::integral_constant<int, 160>(), std::integral_constant<int, 1>());
  f(std::integral_constant<int, 256>(), std::integral_constant<int, 1>());
}

// The rectangle of pixels that leaves the least of the tiles outside of the images.
template <typename T>
void plan_rectangle(const Conv2d<T>& conv, TileProductPlan& plan) {
  int64_t fewest = INT64_MAX;
  for (int width = 7; width >= 0; --width) {
    for (int height = 7 - width; height >= 0; --height) {
      const int64_t x = ceil_div(conv.out_width, 1 << width), y = ceil_div(conv.out_height, 1 << height);
      const int64_t images = ceil_div(conv.images, kTilePixels >> (width + height));
      if (x * y * images >= fewest) continue;
      fewest = x * y * images;
      plan.width_log2 = width, plan.height_log2 = height;
      plan.tiles_x = static_cast<int>(x), plan.tiles_y = static_cast<int>(y);
      plan.tiles_images = static_cast<int>(images);
    }
  }
}

// The tile and the number of splits for which the busiest multiprocessor has the least to do. In columns and
// steps: what a block does before its first product and after its last is as long as `kEnds` of them.
template <typename T>
TileProductPlan plan_tile_product(const Conv2d<T>& conv, bool gated, const Device& device) {
  constexpr double kEnds = 1000, kEndsOfSplit = 500;
  TileProductPlan plan = {}, best = {};
  plan_rectangle(conv, plan);
  plan.steps_x = conv.taps() * static_cast<int>(ceil_div(conv.channels, kTileK));
  plan.steps = plan.steps_x + conv.taps() * static_cast<int>(ceil_div(conv.skip_channels, kTileK));
  double least = INFINITY;
  for (const int columns : {256, 160, 128, 80}) {
    const double step = columns == 80 ? 90 : columns == 128 ? 134 : columns;  // narrow ones read more of x
    plan.columns = columns;
    plan.column_blocks = static_cast<int>(ceil_div(conv.out_channels, columns));
    const int64_t tiles = plan.tiles(conv.phases);
    for (int splits = 1; splits <= kMostSplits; splits *= 2) {
      plan.steps_per_split = static_cast<int>(ceil_div(plan.steps, splits));
      plan.splits = splits;
      if (splits > 1 && plan.steps_per_split * (splits - 1) >= plan.steps) break;  // one would have none
      const double cost = ceil_div(tiles * splits, device.multiprocessors) *
                          (plan.steps_per_split * step + kEnds + (splits > 1 ? kEndsOfSplit : 0));
#ifdef SDFAST_TUNE
      if (const char* want = std::getenv("SDFAST_TILE")) {
        if (std::atoi(want) != columns * 10 + splits) continue;
      }
#endif
      if (cost >= least) continue;
      least = cost;
      best = plan;
    }
  }
#ifdef SDFAST_TUNE
  if (best.columns == 0) throw std::runtime_error("no such tile");
#endif
  with_tile_columns(best.columns, [&](auto width, auto blocks) {
    constexpr int kColumns = decltype(width)::value;
    const int64_t all = best.tiles(conv.phases) * best.splits;
    const int resident = all > device.multiprocessors ? decltype(blocks)::value : 1;
    const int barriers = static_cast<int>(2 * SharedMemory::bytes<uint64_t>(kMostStages));
    const int room = static_cast<int>(shared_bytes_of_block(device)) / resident - 1024 - barriers;
    best.stages = std::max(kLeastStages, std::min(kMostStages, room / kStageBytes<kColumns>));
    static_assert(kSumsBytes<kColumns> <= kLeastStages * kStageBytes<kColumns>);
    best.shared_bytes = best.stages * kStageBytes<kColumns> + barriers;
  });
  (void)gated;
  return best;
}

template <typename T>
void tile_product(const Conv2d<T>& conv, bool gated, const Device& device, cudaStream_t stream) {
  TileProduct<T> call = {};
  call.conv = conv, call.gated = gated;
  call.plan = plan_tile_product(conv, gated, device);
  const TileProductPlan& plan = call.plan;
  const auto images = [&](const T* data, int channels) {
    return tensor_map<T>({data, 4, {channels, conv.width, conv.height, conv.images},
                          {kTileK, plan.width(), plan.height(), plan.images()},
                          {1, conv.stride, conv.stride, 1}});
  };
  call.x = images(conv.x, conv.channels);
  call.skip = conv.skip ? images(conv.skip, conv.skip_channels) : call.x;
  call.weight = tensor_map<T>({conv.weight, 3,
                               {conv.all_channels(), conv.taps(), int64_t{conv.phases} * conv.out_channels, 1},
                               {kTileK, 1, plan.columns / 2, 1},
                               {1, 1, 1, 1}});
  const auto grid = static_cast<unsigned>(plan.tiles(conv.phases) * plan.splits);
  with_tile_columns(plan.columns, [&](auto columns, auto blocks) {
    launch(tile_product_kernel<T, decltype(columns)::value, decltype(blocks)::value>,
           {dim3(grid), dim3(kProductThreads), static_cast<size_t>(plan.shared_bytes),
            static_cast<unsigned>(plan.splits)},
           stream, call);
  });
}

}  // namespace sdfast
