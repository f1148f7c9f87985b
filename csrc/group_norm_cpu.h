// group_norm with SiLU and scale-shift on CPU, for fp32, bf16 and fp16: what forward and backward,
// in files of their own, share.
//
// Algorithm. An image is cut into tiles that stay in L2. (1) Per tile and channel: the sums of
// deviations from a center near the mean and of their squares. (2) Per image: the tiles merged in a
// fixed order in fp64, which gives mean and rstd of each group and folds the formula into
// z = (x - center) * gain + offset per channel. (3) Per tile: y = act(z).
// Bytes: y once; x once where an image stays in cache between (1) and (3), otherwise twice.
// Limit: memory bandwidth; with SiLU in cache, the exponential.
// Tiles depend on the shape alone, so the result does not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "cpu_math.h"

namespace sdfast::group_norm {

using simd::Vec;

constexpr int64_t kTileElements = 65536;
constexpr int64_t kTileRows = 256;  // fp32 sums over more would round too much
constexpr int64_t kStrip = 512;
// Threads that share images take them through the steps in rounds of about this size, so that step
// 3 finds x in cache.
constexpr int64_t kRoundElements = 2 << 20;

// x is (N, C, S) in either layout. A tile is `rows` pixels: of all channels (channels last,
// contiguous as (rows, C)) or of one channel, a "line" (channels first, contiguous as (rows)).
struct Tiling {
  bool channels_last;
  int64_t images, channels, pixels, groups;
  int64_t lines;   // per image: 1 channels last, C channels first
  int64_t stride;  // channels last: from one pixel to the next
  int64_t rows;    // pixels of every tile of a line but the last
  int64_t tiles;   // per line
  int64_t padded;  // C in whole vectors: the stride of per-channel arrays

  Tiling(bool channels_last, int64_t images, int64_t channels, int64_t pixels, int64_t groups)
      : channels_last(channels_last),
        images(images),
        channels(channels),
        pixels(pixels),
        groups(groups),
        stride(channels) {
    lines = channels_last ? 1 : channels;
    // As many tiles as it takes, then all as equal as can be.
    const int64_t most = channels_last ? std::clamp<int64_t>(kTileElements / channels, 1, kTileRows)
                                       : kTileRows * simd::kLanes;
    tiles = (pixels + most - 1) / most;
    rows = (pixels + tiles - 1) / tiles;
    tiles = (pixels + rows - 1) / rows;
    padded = simd::round_up(channels);
  }
  int64_t rows_of(int64_t tile) const { return std::min(rows, pixels - tile * rows); }
  int64_t group_channels() const { return channels / groups; }
  double group_size() const { return static_cast<double>(group_channels() * pixels); }
  // How many tiles are worth a thread of their own.
  int64_t grain() const {
    return std::max<int64_t>(
        1, kTileElements / (std::min(rows, pixels) * (channels_last ? channels : 1)));
  }
};

// Whether a result is too large for the caches, and whole lines of it can go past them.
template <bool kChannelsLast, typename T>
bool streams_result(const Tiling& t, const T* to) {
  return kChannelsLast && simd::streams(to, t.images * t.pixels, t.channels, simd::kStreamedBytes);
}

struct Tile {
  int64_t image, line, index;
  int64_t rows;
  int64_t offset;  // of its first element

  Tile(const Tiling& t, int64_t i)
      : image(i / t.tiles / t.lines), line(i / t.tiles % t.lines), index(i % t.tiles) {
    rows = t.rows_of(index);
    const int64_t within =
        t.channels_last ? index * t.rows * t.channels : line * t.pixels + index * t.rows;
    offset = image * t.channels * t.pixels + within;
  }
};

// Per channel of one image: z = (x - center) * gain + offset, and for backward also
// dx = dz * gain - pull - (x - center) * slope.
struct Coefficients {
  static constexpr int64_t kArrays = 5;
  float *center, *gain, *offset, *pull, *slope;

  Coefficients(float* base, int64_t stride)
      : center(base),
        gain(base + stride),
        offset(base + 2 * stride),
        pull(base + 3 * stride),
        slope(base + 4 * stride) {}
  Coefficients from(int64_t channel) const { return Coefficients(center + channel, gain - center); }
};

// What step 1 leaves of a tile, per channel. Forward: a center and the sums of deviations from it
// and of their squares, as the mean itself would not fit in fp32. Backward: sums of dz and dz * (x
// - center).
struct TileSums {
  static constexpr int64_t kArrays = 3;
  float *sums, *products, *center;

  TileSums(float* base, int64_t stride)
      : sums(base), products(base + stride), center(base + 2 * stride) {}
  TileSums from(int64_t channel) const { return TileSums(sums + channel, products - sums); }
};

// Parameters of the formula in fp32; null where absent.
struct Affine {
  const float *weight, *bias;  // (C)
  const float *scale, *shift;  // (N, C)
};

// One value of a parameter, or what changes nothing where it is absent.
inline float at(const float* values, int64_t i, float neutral) {
  return values ? values[i] : neutral;
}
template <typename Lanes>
inline Vec at(const float* values, int64_t i, float neutral, Lanes lanes) {
  return values ? simd::load(values + i, lanes) : simd::broadcast(neutral);
}

// Calls body(row, count, i, lanes) over (rows, [begin, end)): `count` rows from `row` on, kRows at
// a time so that what they share is loaded once and their dependency chains overlap, then one at a
// time.
template <int kRows = 4, typename Body>
SDFAST_INLINE void for_each_block(int64_t rows, int64_t begin, int64_t end, const Body& body) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    simd::for_each_vector(begin, end, [&](int64_t i, auto lanes) {
      body(row, std::integral_constant<int, kRows>(), i, lanes);
    });
  }
  for (; row < rows; ++row) {
    simd::for_each_vector(begin, end, [&](int64_t i, auto lanes) {
      body(row, std::integral_constant<int, 1>(), i, lanes);
    });
  }
}

// Calls body(begin, end) for strips of a width whose per-channel arrays stay in L1.
template <typename Body>
inline void for_each_strip(int64_t width, const Body& body) {
  for (int64_t begin = 0; begin < width; begin += kStrip)
    body(begin, std::min(begin + kStrip, width));
}

// A coefficient for the lanes from i on: one per channel along a row, or the same all along a line.
template <bool kChannelsLast>
inline Vec coefficient(const float* values, int64_t i) {
  return kChannelsLast ? simd::load(values + i) : simd::broadcast(*values);
}

template <bool kChannelsLast>
struct Normalize {
  Vec center, gain, offset;
  Normalize(const Coefficients& k, int64_t i)
      : center(coefficient<kChannelsLast>(k.center, i)),
        gain(coefficient<kChannelsLast>(k.gain, i)),
        offset(coefficient<kChannelsLast>(k.offset, i)) {}
};

// term(i) summed over [begin, end) in interleaved chains, as one chain of additions is slow.
template <typename Term>
double sum_over(int64_t begin, int64_t end, const Term& term) {
  constexpr int kChains = 8;
  double chains[kChains] = {};
  int64_t i = begin;
  for (; i + kChains <= end; i += kChains) {
    for (int j = 0; j < kChains; ++j) chains[j] += term(i + j);
  }
  for (; i < end; ++i) chains[0] += term(i);
  return ((chains[0] + chains[1]) + (chains[2] + chains[3])) +
         ((chains[4] + chains[5]) + (chains[6] + chains[7]));
}

// The coefficients center, gain and offset of one image's channels. mean, rstd: (G). `rest`: what
// rounding took from each mean, or null.
inline void normalizing_coefficients(const Tiling& t, int64_t image, const Affine& affine,
                                     const float* mean, const float* rstd, const float* rest,
                                     const Coefficients& k) {
  const int64_t width = t.group_channels();
  for (int64_t g = 0; g < t.groups; ++g) {
    std::fill_n(k.center + g * width, width, mean[g]);
    std::fill_n(k.gain + g * width, width, rstd[g]);
    std::fill_n(k.offset + g * width, width, rest ? rest[g] : 0.0f);
  }
  const int64_t row = image * t.channels;  // of scale and shift
  simd::for_each_vector(0, t.channels, [&](int64_t c, auto lanes) {
    const Vec factor = at(affine.scale, row + c, 0, lanes) + 1.0f;
    const Vec gain = simd::load(k.gain + c) * (at(affine.weight, c, 1, lanes) * factor);
    const Vec bias = at(affine.bias, c, 0, lanes) * factor + at(affine.shift, row + c, 0, lanes);
    const Vec offset = bias - simd::load(k.offset + c) * gain;
    simd::store(k.gain + c, gain);
    simd::store(k.offset + c, offset);
  });
}

// gather(tile, sums) over all tiles of an image, merge(image, partials), then apply(tile) over its
// tiles.
template <typename Gather, typename Merge, typename Apply>
void run_steps(const Tiling& t, const Gather& gather, const Merge& merge, const Apply& apply) {
  using torch::stable::parallel_for;
  const int64_t image_tiles = t.lines * t.tiles;
  const int64_t tile_partials = TileSums::kArrays * t.padded,
                image_partials = t.tiles * tile_partials;
  const auto gather_tiles = [&](int64_t begin, int64_t end, int64_t first_image, float* partials) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile tile(t, i);
      float* sums =
          partials + (tile.image - first_image) * image_partials + tile.index * tile_partials;
      gather(tile, TileSums(sums, t.padded).from(tile.line));
    }
  };
  // Backwards: what was read last is still in cache.
  const auto apply_tiles = [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) apply(Tile(t, i));
  };
  // Images that divide among the threads need no step to wait for another thread.
  const int64_t threads = torch::stable::get_num_threads();
  if (t.images % threads == 0) {
    const std::unique_ptr<float[]> scratch(new float[threads * image_partials]);
    parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        float* partials = scratch.get() + thread * image_partials;
        for (int64_t n = thread * t.images / threads; n < (thread + 1) * t.images / threads; ++n) {
          gather_tiles(n * image_tiles, (n + 1) * image_tiles, n, partials);
          merge(n, partials);
          apply_tiles(n * image_tiles, (n + 1) * image_tiles);
        }
      }
    });
    return;
  }
  const int64_t round = std::clamp<int64_t>(kRoundElements / (t.channels * t.pixels), 1, t.images);
  const std::unique_ptr<float[]> partials(new float[round * image_partials]);
  for (int64_t first = 0; first < t.images; first += round) {
    const int64_t last = std::min(first + round, t.images);
    parallel_for(
        first * image_tiles, last * image_tiles, t.grain(),
        [&](int64_t begin, int64_t end) { gather_tiles(begin, end, first, partials.get()); });
    const int64_t merge_grain = 1 + kTileElements / image_partials;
    parallel_for(first, last, merge_grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) merge(n, partials.get() + (n - first) * image_partials);
    });
    parallel_for(first * image_tiles, last * image_tiles, t.grain(), apply_tiles);
  }
}

}  // namespace sdfast::group_norm
