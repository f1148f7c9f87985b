// The forward half of group_norm on CPU.
//
// Where whole groups of an image fit in L2, they go through the three steps of group_norm_cpu.h
// before the next ones do (a slab), and x is read from memory once; larger images tile by tile.
#pragma once

#include <numeric>

#include "group_norm_cpu.h"

namespace sdfast::group_norm {

// Of x, beside as much of y.
constexpr int64_t kL1SlabBytes = 48 << 10, kL2SlabBytes = 384 << 10;
constexpr int64_t kSlabRowBytes = 256;  // narrower rows waste cache lines and prefetches

// Whether the squares about a center lose too many digits when they become those about the mean.
// False for NaN.
inline bool is_poor_center(float sum, float squares, float per_row) {
  return squares > 16.0f * (squares - sum * sum * per_row);
}

// x: (rows, channels), rows `stride` apart. The first rows give a center; should they be far from
// typical, the mean they led to is the center of a second attempt: the two-pass algorithm.
template <typename T>
void column_moments(const T* x, int64_t rows, int64_t channels, int64_t stride,
                    const TileSums& tile) {
  const float per_row = 1.0f / static_cast<float>(rows);
  const int64_t first_rows = std::min<int64_t>(rows, 8);
  for_each_strip(channels, [&](int64_t begin, int64_t end) {
    const TileSums out = tile.from(begin);
    const int64_t width = end - begin, padded = simd::round_up(width);
    simd::for_each_vector(0, width, [&](int64_t c, auto lanes) {
      Vec total{};
      for (int64_t r = 0; r < first_rows; ++r) {
        total += simd::load(x + r * stride + begin + c, lanes);
      }
      simd::store(out.center + c, total / static_cast<float>(first_rows));
    });
    for (int attempt = 0; attempt < 2; ++attempt) {
      std::fill_n(out.sums, padded, 0.0f);
      std::fill_n(out.products, padded, 0.0f);
      for_each_block<8>(rows, 0, width, [&](int64_t row, auto count, int64_t c, auto lanes) {
        const T* from = x + row * stride + begin + c;
        const Vec center = simd::load(out.center + c);
        Vec sum{}, squares{};  // of the block alone: shorter chains round less
        for (int j = 0; j < count; ++j) {
          simd::prefetch(from + (j + count) * stride);
          const Vec deviation = simd::load(from + j * stride, lanes) - center;
          sum += deviation;
          squares += deviation * deviation;
        }
        simd::store(out.sums + c, simd::load(out.sums + c) + sum);
        simd::store(out.products + c, simd::load(out.products + c) + squares);
      });
      int poor = 0;
      for (int64_t c = 0; c < width; ++c) {
        poor |= is_poor_center(out.sums[c], out.products[c], per_row);
      }
      if (!poor || attempt == 1) break;
      for (int64_t c = 0; c < width; ++c) out.center[c] += out.sums[c] * per_row;
    }
  });
}

// x: (size), all of one channel. As column_moments.
template <typename T>
void line_moments(const T* x, int64_t size, const TileSums& out) {
  const float per_element = 1.0f / static_cast<float>(size);
  const int first = static_cast<int>(std::min<int64_t>(size, simd::kLanes));
  *out.center = simd::sum(simd::load(x, first)) / static_cast<float>(first);
  for (int attempt = 0; attempt < 2; ++attempt) {
    const Vec center = simd::broadcast(*out.center);
    Vec sum{}, squares{};
    simd::for_each_vector(0, size, [&](int64_t i, auto lanes) {
      const Vec deviation = simd::keep_first(simd::load(x + i, lanes) - center, lanes);
      sum += deviation;
      squares += deviation * deviation;
    });
    *out.sums = simd::sum(sum);
    *out.products = simd::sum(squares);
    if (!is_poor_center(*out.sums, *out.products, per_element) || attempt == 1) break;
    *out.center += *out.sums * per_element;
  }
}
template <bool kChannelsLast, bool kSilu, bool kStreams = false, typename T>
void apply(const T* x, int64_t rows, int64_t width, int64_t stride, const Coefficients& k, T* y,
           int64_t ahead) {
  for_each_strip(width, [&](int64_t begin, int64_t end) {
    for_each_block(rows, begin, end, [&](int64_t r, auto count, int64_t i, auto lanes) {
      const Normalize<kChannelsLast> norm(k, i);
      const int64_t from = r * stride + i;
      auto z = simd::make_vecs<count>([&](int j) {
        simd::prefetch(x + from + j * stride + ahead);
        if (!kStreams) simd::prefetch_for_write(y + from + (j + count) * stride);
        return simd::load(x + from + j * stride, lanes);
      });
      z = (z - norm.center) * norm.gain + norm.offset;
      if (kSilu) z = simd::silu(z);
      simd::for_each_of(z, [&](int j, Vec v) {
        T* to = y + from + j * stride;
        if (kStreams) {
          simd::stream_part(to, v, lanes);
        } else {
          simd::store(to, v, lanes);
        }
      });
    });
  });
}

// What merge_moments needs of its own per group, kept from one image or slab to the next.
struct MergeScratch {
  std::vector<double> means, squares;
  std::vector<float> rest;
  explicit MergeScratch(const Tiling& t) : means(t.groups), squares(t.groups), rest(t.groups) {}
};

// From the tiles of one image to the mean of each group and the sum of squares about it, left in
// `scratch`.
inline void merge_tiles(const Tiling& t, const float* partials, MergeScratch& scratch) {
  const int64_t width = t.group_channels();
  // Adds term(c) summed over the tile's channels of each group, all tiles one after the other.
  const auto add_tiles = [&](std::vector<double>& totals, const auto& term_of) {
    std::fill(totals.begin(), totals.end(), 0.0);
    for (int64_t tile = 0; tile < t.tiles; ++tile) {
      const float* sums = partials + tile * TileSums::kArrays * t.padded;
      const double rows = t.rows_of(tile);
      for (int64_t g = 0; g < t.groups; ++g) {
        const auto term = term_of(g, rows, sums, sums + t.padded, sums + 2 * t.padded);
        totals[g] += sum_over(g * width, (g + 1) * width, term);
      }
    }
  };
  add_tiles(scratch.means,
            [](int64_t, double rows, const float* sums, const float*, const float* center) {
              return [=](int64_t c) { return rows * center[c] + sums[c]; };
            });
  for (double& total : scratch.means) total /= t.group_size();
  add_tiles(scratch.squares, [&](int64_t g, double rows, const float* sums, const float* products,
                                 const float* center) {
    // Squares about the mean, which is `shift` from the center.
    return [=, mean = scratch.means[g]](int64_t c) {
      const double shift = mean - center[c];
      return products[c] + shift * (rows * shift - 2.0 * sums[c]);
    };
  });
  // Rounding may leave a constant group just below zero; a NaN is kept.
  for (double& total : scratch.squares) total = total < 0 ? 0.0 : total;
}

// From the tiles of one image to mean and rstd of its groups and the coefficients of its channels.
inline void merge_moments(const Tiling& t, const float* partials, int64_t image,
                          const Affine& affine, double eps, float* mean, float* rstd,
                          const Coefficients& k, MergeScratch& scratch) {
  merge_tiles(t, partials, scratch);
  for (int64_t g = 0; g < t.groups; ++g) {
    const double variance = scratch.squares[g] / t.group_size();
    mean[g] = static_cast<float>(scratch.means[g]);
    scratch.rest[g] = static_cast<float>(scratch.means[g] - mean[g]);
    rstd[g] = static_cast<float>(1.0 / std::sqrt(variance + eps));
  }
  normalizing_coefficients(t, image, affine, mean, rstd, scratch.rest.data(), k);
}

// How many channels of one image to take through all steps at once, so that x is read from L1 or L2
// the second time: whole groups and whole vectors. 0 where the fewest possible exceed L2.
template <typename T>
int64_t slab_channels(const Tiling& t) {
  if (!t.channels_last) return 0;
  int64_t unit = std::lcm(t.group_channels(), int64_t{simd::kLanes});
  while (unit * static_cast<int64_t>(sizeof(T)) < kSlabRowBytes) unit *= 2;
  if (t.channels % unit != 0) return 0;
  const int64_t units = t.channels / unit, unit_bytes = unit * t.pixels * sizeof(T);
  if (unit_bytes > kL2SlabBytes) return 0;
  int64_t count = std::clamp<int64_t>(kL1SlabBytes / std::max<int64_t>(unit_bytes, 1), 1, units);
  while (units % count != 0) --count;
  return count * unit;
}

// The three steps slab by slab, `width` channels of an image each.
template <bool kSilu, typename T>
void forward_slabs(const Tiling& t, int64_t width, const T* x, const Affine& affine, double eps,
                   T* y, float* mean, float* rstd) {
  const int64_t slabs = t.channels / width, count = t.images * slabs;
  Tiling slab(true, 1, width, t.pixels, width / t.group_channels());
  slab.stride = t.channels;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  const int64_t partials_size = slab.tiles * TileSums::kArrays * slab.padded;
  const int64_t scratch_size = partials_size + Coefficients::kArrays * slab.padded;
  const std::unique_ptr<float[]> scratch(new float[threads * scratch_size]);
  const auto run = [&](int64_t image, int64_t channel, float* partials, MergeScratch& merging) {
    const Coefficients k(partials + partials_size, slab.padded);
    const int64_t base = image * t.channels * t.pixels + channel;
    const int64_t group = image * t.groups + channel / t.group_channels();
    const auto offset = [](const float* values, int64_t by) {
      return values ? values + by : values;
    };
    const int64_t row = image * t.channels + channel;  // of scale and shift
    const Affine own{offset(affine.weight, channel), offset(affine.bias, channel),
                     offset(affine.scale, row), offset(affine.shift, row)};
    for (int64_t tile = 0; tile < slab.tiles; ++tile) {
      const TileSums out(partials + tile * TileSums::kArrays * slab.padded, slab.padded);
      column_moments(x + base + tile * slab.rows * slab.stride, slab.rows_of(tile), width,
                     slab.stride, out);
    }
    merge_moments(slab, partials, 0, own, eps, mean + group, rstd + group, k, merging);
    for (int64_t tile = slab.tiles; tile-- > 0;) {
      const int64_t from = base + tile * slab.rows * slab.stride;
      apply<true, kSilu>(x + from, slab.rows_of(tile), width, slab.stride, k, y + from, width);
    }
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    MergeScratch merging(slab);
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = thread * count / threads; i < (thread + 1) * count / threads; ++i) {
        run(i / slabs, i % slabs * width, scratch.get() + thread * scratch_size, merging);
      }
    }
  });
}

// Step 1 for one tile.
template <bool kChannelsLast, typename T>
void gather_tile(const Tiling& t, const Tile& tile, const T* x, const TileSums& out) {
  if constexpr (kChannelsLast) {
    column_moments(x + tile.offset, tile.rows, t.channels, t.stride, out);
  } else {
    line_moments(x + tile.offset, tile.rows, out);
  }
}

// Step 3 for one tile, `k` being its image's.
template <bool kChannelsLast, bool kSilu, typename T>
void apply_tile(const Tiling& t, const Tile& tile, const T* x, const Coefficients& k, bool streams,
                T* y) {
  const int64_t rows = kChannelsLast ? tile.rows : 1;
  const int64_t width = kChannelsLast ? t.channels : tile.rows;
  const Coefficients own = k.from(tile.line);
  const T* from = x + tile.offset;
  T* to = y + tile.offset;
  if (streams) {
    apply<kChannelsLast, kSilu, true>(from, rows, width, width, own, to, 4 * width);
    simd::finish_streams();
  } else {
    apply<kChannelsLast, kSilu>(from, rows, width, width, own, to, 4 * width);
  }
}

template <bool kChannelsLast, bool kSilu, typename T>
void forward(const Tiling& t, const T* x, const Affine& affine, double eps, T* y, float* mean,
             float* rstd) {
  if constexpr (kChannelsLast) {
    if (const int64_t width = slab_channels<T>(t)) {
      return forward_slabs<kSilu>(t, width, x, affine, eps, y, mean, rstd);
    }
  }
  const bool streams = streams_result<kChannelsLast>(t, y);
  const int64_t stride = Coefficients::kArrays * t.padded;
  const std::unique_ptr<float[]> coefficients(new float[t.images * stride]);
  const auto of = [&](int64_t image) {
    return Coefficients(coefficients.get() + image * stride, t.padded);
  };
  run_steps(
      t,
      [&](const Tile& tile, const TileSums& out) { gather_tile<kChannelsLast>(t, tile, x, out); },
      [&](int64_t n, const float* partials) {
        MergeScratch merging(t);
        merge_moments(t, partials, n, affine, eps, mean + n * t.groups, rstd + n * t.groups, of(n),
                      merging);
      },
      [&](const Tile& tile) {
        apply_tile<kChannelsLast, kSilu>(t, tile, x, of(tile.image), streams, y);
      });
}

// Steps 1 and 2 alone. means, squares about them: (N, G).
template <bool kChannelsLast, typename T>
void moments(const Tiling& t, const T* x, double* means, double* squares) {
  const int64_t image_partials = t.tiles * TileSums::kArrays * t.padded;
  const std::unique_ptr<float[]> partials(new float[t.images * image_partials]);
  torch::stable::parallel_for(
      0, t.images * t.lines * t.tiles, t.grain(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Tile tile(t, i);
          float* sums = partials.get() + tile.image * image_partials +
                        tile.index * TileSums::kArrays * t.padded;
          gather_tile<kChannelsLast>(t, tile, x, TileSums(sums, t.padded).from(tile.line));
        }
      });
  MergeScratch merging(t);
  for (int64_t n = 0; n < t.images; ++n) {
    merge_tiles(t, partials.get() + n * image_partials, merging);
    std::copy_n(merging.means.data(), t.groups, means + n * t.groups);
    std::copy_n(merging.squares.data(), t.groups, squares + n * t.groups);
  }
}

// Step 3 alone. means, rstds: (N, G).
template <bool kChannelsLast, bool kSilu, typename T>
void apply_known(const Tiling& t, const T* x, const Affine& affine, const double* means,
                 const double* rstds, T* y) {
  const int64_t stride = Coefficients::kArrays * t.padded;
  const std::unique_ptr<float[]> coefficients(new float[t.images * stride]);
  const auto of = [&](int64_t image) {
    return Coefficients(coefficients.get() + image * stride, t.padded);
  };
  std::vector<float> mean(t.groups), rstd(t.groups), rest(t.groups);
  for (int64_t n = 0; n < t.images; ++n) {
    for (int64_t g = 0; g < t.groups; ++g) {
      const double exact = means[n * t.groups + g];
      mean[g] = static_cast<float>(exact);
      rest[g] = static_cast<float>(exact - mean[g]);
      rstd[g] = static_cast<float>(rstds[n * t.groups + g]);
    }
    normalizing_coefficients(t, n, affine, mean.data(), rstd.data(), rest.data(), of(n));
  }
  torch::stable::parallel_for(
      0, t.images * t.lines * t.tiles, t.grain(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Tile tile(t, i);
          apply_tile<kChannelsLast, kSilu>(t, tile, x, of(tile.image), false, y);
        }
      });
}

}  // namespace sdfast::group_norm
