// group_norm with SiLU and scale-shift on CPU, forward and backward, for fp32, bf16 and fp16.
//
// Algorithm. An image is cut into tiles that stay in L2. (1) Per tile and channel: the mean, then
// the squared deviations from it. (2) Per image: the tiles merged in a fixed order in fp64, which
// gives mean and rstd of each group and folds the formula into z = (x - center) * gain + offset per
// channel. (3) Per tile: y = act(z). Backward does the same over (x, dy), with sums of dz and dz *
// (x - center). Bytes: x and y once where the images of a round fit in cache, otherwise x twice;
// backward reads dy as often as x. Limit: memory bandwidth; in cache, with SiLU, the exponential.
// Tiles depend on the shape alone, so the result does not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "cpu_simd.h"

namespace sdfast::group_norm {

using simd::Vec;

constexpr int64_t kTileElements = 32768;
// Images go through the three steps in rounds of about this size, so that step 3 finds x in cache.
constexpr int64_t kRoundElements = 2 << 20;

// x is (N, C, S) in either layout. A tile is `rows` pixels: of all channels (channels last,
// contiguous as (rows, C)) or of one channel, a "line" (channels first, contiguous as (rows)).
struct Tiling {
  bool channels_last;
  int64_t images, channels, pixels, groups;
  int64_t lines;   // per image: 1 channels last, C channels first
  int64_t rows;    // pixels of every tile of a line but the last
  int64_t tiles;   // per line
  int64_t padded;  // C in whole vectors: the stride of per-channel arrays

  Tiling(bool channels_last, int64_t images, int64_t channels, int64_t pixels, int64_t groups)
      : channels_last(channels_last),
        images(images),
        channels(channels),
        pixels(pixels),
        groups(groups) {
    lines = channels_last ? 1 : channels;
    // As many tiles as it takes, then all as equal as can be.
    const int64_t row_elements = channels_last ? channels : 1;
    tiles =
        std::clamp<int64_t>((pixels * row_elements + kTileElements - 1) / kTileElements, 1, pixels);
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
// dx = dz * norm.gain - pull - (x - center) * slope.
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

// Two sums per channel of a tile: (mean, squared deviations) forward,
// (sum of dz, sum of dz * (x - center)) backward.
struct ChannelPair {
  float *first, *second;
};

// Parameters of the formula in fp32; where absent, arrays that change nothing.
struct Affine {
  const float *weight, *bias;  // (C)
  const float *scale, *shift;  // (N, C)
};

// Calls body(first_row, count) with count a compile-time 4, then 1 for the rows left: what the rows
// share is loaded once for four, and four streams keep the prefetchers busy.
template <typename Body>
inline __attribute__((always_inline)) void for_each_row_block(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(r, std::integral_constant<int, 4>());
  for (; r < rows; ++r) body(r, std::integral_constant<int, 1>());
}

// x: (rows, channels). Out: the mean of each channel and its squared deviations from it. The second
// pass also sums the deviations themselves, which are what rounding took from the mean.
template <typename T>
void column_moments(const T* x, int64_t rows, int64_t channels, ChannelPair out) {
  const int64_t padded = simd::round_up(channels);
  std::fill_n(out.first, padded, 0.0f);
  std::fill_n(out.second, padded, 0.0f);
  for_each_row_block(rows, [&](int64_t r, auto count) {
    simd::for_each_vector(channels, [&](int64_t c, auto lanes) {
      Vec total = simd::load(out.first + c);
      for (int j = 0; j < count; ++j) total += simd::load(x + (r + j) * channels + c, lanes);
      simd::store(out.first + c, total);
    });
  });
  const auto residual = std::make_unique<float[]>(padded);
  const float per_row = 1.0f / static_cast<float>(rows);
  for (int64_t c = 0; c < padded; ++c) out.first[c] *= per_row;
  for_each_row_block(rows, [&](int64_t r, auto count) {
    simd::for_each_vector(channels, [&](int64_t c, auto lanes) {
      const Vec mean = simd::load(out.first + c);
      Vec total = simd::load(residual.get() + c), squares = simd::load(out.second + c);
      for (int j = 0; j < count; ++j) {
        const Vec deviation = simd::load(x + (r + j) * channels + c, lanes) - mean;
        total += deviation;
        squares += deviation * deviation;
      }
      simd::store(residual.get() + c, total);
      simd::store(out.second + c, squares);
    });
  });
  for (int64_t c = 0; c < padded; ++c) {
    out.first[c] += residual[c] * per_row;
    out.second[c] -= residual[c] * residual[c] * per_row;
  }
}

// x: (size), all of one channel. As column_moments.
template <typename T>
void line_moments(const T* x, int64_t size, ChannelPair out) {
  Vec total{}, squares{};
  simd::for_each_vector(size, [&](int64_t i, auto lanes) { total += simd::load(x + i, lanes); });
  const float mean = simd::sum(total) / static_cast<float>(size);
  total = Vec{};
  simd::for_each_vector(size, [&](int64_t i, auto lanes) {
    const Vec deviation = simd::keep_first(simd::load(x + i, lanes) - mean, lanes);
    total += deviation;
    squares += deviation * deviation;
  });
  const float residual = simd::sum(total);
  out.first[0] = mean + residual / static_cast<float>(size);
  out.second[0] = simd::sum(squares) - residual * residual / static_cast<float>(size);
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

template <bool kChannelsLast, bool kSilu, typename T>
void apply(const T* x, int64_t rows, int64_t width, const Coefficients& k, T* y) {
  for_each_row_block(rows, [&](int64_t r, auto count) {
    simd::for_each_vector(width, [&](int64_t i, auto lanes) {
      const Normalize<kChannelsLast> norm(k, i);
      for (int j = 0; j < count; ++j) {
        const int64_t at = (r + j) * width + i;
        simd::prefetch(x + at + count * width);
        simd::prefetch_for_write(y + at + count * width);
        const Vec z = (simd::load(x + at, lanes) - norm.center) * norm.gain + norm.offset;
        simd::store(y + at, kSilu ? simd::silu(z) : z, lanes);
      }
    });
  });
}

template <bool kSilu>
inline Vec gradient_of_z(Vec dy, Vec z) {
  return kSilu ? dy * simd::silu_gradient(z) : dy;
}

// Adds to out, per channel: the sums of dz and of dz * (x - center). For a line, to out's first
// lanes, which the caller adds up.
template <bool kChannelsLast, bool kSilu, typename T>
void gradient_sums(const T* x, const T* dy, int64_t rows, int64_t width, const Coefficients& k,
                   ChannelPair out) {
  Vec line_first{}, line_second{};
  for_each_row_block(rows, [&](int64_t r, auto count) {
    simd::for_each_vector(width, [&](int64_t i, auto lanes) {
      const Normalize<kChannelsLast> norm(k, i);
      Vec first = kChannelsLast ? simd::load(out.first + i) : line_first;
      Vec second = kChannelsLast ? simd::load(out.second + i) : line_second;
      for (int j = 0; j < count; ++j) {
        const int64_t at = (r + j) * width + i;
        const Vec deviation = simd::load(x + at, lanes) - norm.center;
        const Vec dz =
            gradient_of_z<kSilu>(simd::load(dy + at, lanes), deviation * norm.gain + norm.offset);
        first += dz;
        second += dz * deviation;
      }
      if constexpr (kChannelsLast) {
        simd::store(out.first + i, first);
        simd::store(out.second + i, second);
      } else {
        line_first = first;
        line_second = second;
      }
    });
  });
  if (!kChannelsLast) {
    out.first[0] = simd::sum(line_first);
    out.second[0] = simd::sum(line_second);
  }
}

template <bool kChannelsLast, bool kSilu, typename T>
void apply_gradient(const T* x, const T* dy, int64_t rows, int64_t width, const Coefficients& k,
                    T* dx) {
  for_each_row_block(rows, [&](int64_t r, auto count) {
    simd::for_each_vector(width, [&](int64_t i, auto lanes) {
      const Normalize<kChannelsLast> norm(k, i);
      const Vec pull = coefficient<kChannelsLast>(k.pull, i);
      const Vec slope = coefficient<kChannelsLast>(k.slope, i);
      for (int j = 0; j < count; ++j) {
        const int64_t at = (r + j) * width + i;
        const Vec deviation = simd::load(x + at, lanes) - norm.center;
        const Vec dz =
            gradient_of_z<kSilu>(simd::load(dy + at, lanes), deviation * norm.gain + norm.offset);
        simd::store(dx + at, dz * norm.gain - pull - deviation * slope, lanes);
      }
    });
  });
}

// term(i) summed over [begin, end) in four interleaved chains, as one chain of additions is slow.
template <typename Term>
double sum_over(int64_t begin, int64_t end, const Term& term) {
  double chains[4] = {};
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    for (int j = 0; j < 4; ++j) chains[j] += term(i + j);
  }
  for (; i < end; ++i) chains[0] += term(i);
  return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// The coefficients center, gain and offset of one image's channels. `rest`: what rounding took from
// the mean of each group, or null.
inline void normalizing_coefficients(const Tiling& t, int64_t image, const Affine& affine,
                                     const float* mean, const float* rstd, const float* rest,
                                     const Coefficients& k) {
  const int64_t width = t.group_channels();
  for (int64_t g = 0; g < t.groups; ++g) {
    std::fill_n(k.center + g * width, width, mean[g]);
    std::fill_n(k.gain + g * width, width, rstd[g]);
    std::fill_n(k.offset + g * width, width, rest ? -rest[g] : 0.0f);
  }
  const float *scale = affine.scale + image * t.channels,
              *shift = affine.shift + image * t.channels;
  for (int64_t c = 0; c < t.channels; ++c) {
    const float factor = 1.0f + scale[c], gain = k.gain[c] * affine.weight[c] * factor;
    k.gain[c] = gain;
    k.offset[c] = k.offset[c] * gain + (affine.bias[c] * factor + shift[c]);
  }
}

// From the tiles of one image to mean and rstd of its groups and the coefficients of its channels.
inline void merge_moments(const Tiling& t, const float* partials, int64_t image,
                          const Affine& affine, double eps, float* mean, float* rstd,
                          const Coefficients& k) {
  std::vector<double> means(t.channels), squares(t.channels);
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const float* tile_means = partials + 2 * tile * t.padded;
    const double share = static_cast<double>(t.rows_of(tile)) / t.pixels;
    for (int64_t c = 0; c < t.channels; ++c) means[c] += share * tile_means[c];
  }
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const float *tile_means = partials + 2 * tile * t.padded, *tile_squares = tile_means + t.padded;
    const double rows = t.rows_of(tile);
    for (int64_t c = 0; c < t.channels; ++c) {
      const double distance = tile_means[c] - means[c];
      squares[c] += tile_squares[c] + rows * distance * distance;
    }
  }
  const int64_t width = t.group_channels();
  std::vector<float> rest(t.groups);
  for (int64_t g = 0; g < t.groups; ++g) {
    const int64_t begin = g * width, end = begin + width;
    const double group_mean = sum_over(begin, end, [&](int64_t c) { return means[c]; }) / width;
    const double group_squares = sum_over(begin, end, [&](int64_t c) {
      const double distance = means[c] - group_mean;
      return squares[c] + t.pixels * distance * distance;
    });
    mean[g] = static_cast<float>(group_mean);
    rest[g] = static_cast<float>(group_mean - mean[g]);
    rstd[g] = static_cast<float>(1.0 / std::sqrt(group_squares / t.group_size() + eps));
  }
  normalizing_coefficients(t, image, affine, mean, rstd, rest.data(), k);
}

// From the tiles of one image to its sums of dz (sum_dz) and dz * xhat (sum_dz_xhat) per channel,
// and to the remaining coefficients of dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)),
// with dxhat = dz * weight * factor and the means over a group.
inline void merge_gradient_sums(const Tiling& t, const float* partials, int64_t image,
                                const Affine& affine, const float* rstd, double* sum_dz,
                                double* sum_dz_xhat, const Coefficients& k) {
  std::fill_n(sum_dz, t.channels, 0.0);
  std::fill_n(sum_dz_xhat, t.channels, 0.0);
  for (int64_t tile = 0; tile < t.tiles; ++tile) {
    const float *sums = partials + 2 * tile * t.padded, *products = sums + t.padded;
    for (int64_t c = 0; c < t.channels; ++c) {
      sum_dz[c] += sums[c];
      sum_dz_xhat[c] += products[c];
    }
  }
  const int64_t width = t.group_channels();
  const float* scale = affine.scale + image * t.channels;
  for (int64_t g = 0; g < t.groups; ++g) {
    const int64_t begin = g * width, end = begin + width;
    for (int64_t c = begin; c < end; ++c) sum_dz_xhat[c] *= rstd[g];
    const auto factor = [&](int64_t c) { return affine.weight[c] * (1.0 + scale[c]); };
    const double dxhat = sum_over(begin, end, [&](int64_t c) { return factor(c) * sum_dz[c]; });
    const double dxhat_xhat =
        sum_over(begin, end, [&](int64_t c) { return factor(c) * sum_dz_xhat[c]; });
    const double per_element = rstd[g] / t.group_size();
    std::fill_n(k.pull + begin, width, static_cast<float>(dxhat * per_element));
    std::fill_n(k.slope + begin, width, static_cast<float>(dxhat_xhat * per_element * rstd[g]));
  }
}

// gather(tile, pair) over all tiles of a round, merge(image, partials) over its images,
// apply(tile).
template <typename Gather, typename Merge, typename Apply>
void run_in_rounds(const Tiling& t, const Gather& gather, const Merge& merge, const Apply& apply) {
  using torch::stable::parallel_for;
  const int64_t image_tiles = t.lines * t.tiles, image_partials = 2 * t.tiles * t.padded;
  const int64_t round = std::clamp<int64_t>(kRoundElements / (t.channels * t.pixels), 1, t.images);
  const std::unique_ptr<float[]> partials(new float[round * image_partials]);
  for (int64_t first = 0; first < t.images; first += round) {
    const int64_t last = std::min(first + round, t.images);
    parallel_for(
        first * image_tiles, last * image_tiles, t.grain(), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const Tile tile(t, i);
            float* sums =
                partials.get() + (tile.image - first) * image_partials + 2 * tile.index * t.padded;
            gather(tile, ChannelPair{sums + tile.line, sums + t.padded + tile.line});
          }
        });
    const int64_t merge_grain = 1 + kTileElements / image_partials;
    parallel_for(first, last, merge_grain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) merge(n, partials.get() + (n - first) * image_partials);
    });
    // Backwards: what was read last is still in cache.
    parallel_for(first * image_tiles, last * image_tiles, t.grain(),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = end; i-- > begin;) apply(Tile(t, i));
                 });
  }
}

template <bool kChannelsLast, bool kSilu, typename T>
void forward(const Tiling& t, const T* x, const Affine& affine, double eps, T* y, float* mean,
             float* rstd) {
  const int64_t stride = Coefficients::kArrays * t.padded;
  std::vector<float> coefficients(t.images * stride);
  const auto of = [&](int64_t image) {
    return Coefficients(coefficients.data() + image * stride, t.padded);
  };
  run_in_rounds(
      t,
      [&](const Tile& tile, ChannelPair out) {
        if constexpr (kChannelsLast) {
          column_moments(x + tile.offset, tile.rows, t.channels, out);
        } else {
          line_moments(x + tile.offset, tile.rows, out);
        }
      },
      [&](int64_t n, const float* partials) {
        merge_moments(t, partials, n, affine, eps, mean + n * t.groups, rstd + n * t.groups, of(n));
      },
      [&](const Tile& tile) {
        const int64_t rows = kChannelsLast ? tile.rows : 1,
                      width = kChannelsLast ? t.channels : tile.rows;
        apply<kChannelsLast, kSilu>(x + tile.offset, rows, width, of(tile.image).from(tile.line),
                                    y + tile.offset);
      });
}

// sum_dz, sum_dz_xhat: (N, C).
template <bool kChannelsLast, bool kSilu, typename T>
void backward(const Tiling& t, const T* dy, const T* x, const Affine& affine, const float* mean,
              const float* rstd, T* dx, double* sum_dz, double* sum_dz_xhat) {
  const int64_t stride = Coefficients::kArrays * t.padded;
  std::vector<float> coefficients(t.images * stride);
  const auto of = [&](int64_t image) {
    return Coefficients(coefficients.data() + image * stride, t.padded);
  };
  for (int64_t n = 0; n < t.images; ++n) {
    normalizing_coefficients(t, n, affine, mean + n * t.groups, rstd + n * t.groups, nullptr,
                             of(n));
  }
  const auto shape_of = [&](const Tile& tile) {
    return kChannelsLast ? std::pair(tile.rows, t.channels)
                         : std::pair<int64_t, int64_t>(1, tile.rows);
  };
  run_in_rounds(
      t,
      [&](const Tile& tile, ChannelPair out) {
        const auto [rows, width] = shape_of(tile);
        if (kChannelsLast) {
          std::fill_n(out.first, t.padded, 0.0f);
          std::fill_n(out.second, t.padded, 0.0f);
        }
        gradient_sums<kChannelsLast, kSilu>(x + tile.offset, dy + tile.offset, rows, width,
                                            of(tile.image).from(tile.line), out);
      },
      [&](int64_t n, const float* partials) {
        merge_gradient_sums(t, partials, n, affine, rstd + n * t.groups, sum_dz + n * t.channels,
                            sum_dz_xhat + n * t.channels, of(n));
      },
      [&](const Tile& tile) {
        const auto [rows, width] = shape_of(tile);
        apply_gradient<kChannelsLast, kSilu>(x + tile.offset, dy + tile.offset, rows, width,
                                             of(tile.image).from(tile.line), dx + tile.offset);
      });
}

}  // namespace sdfast::group_norm
