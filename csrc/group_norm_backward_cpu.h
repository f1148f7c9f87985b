// The backward half of group_norm on CPU: dx and the per-channel sums that give every other
// gradient.
//
// Algorithm. As forward: (1) per tile and channel the sums of dz and dz * (x - center), with
// dz = dy * act'(z) and z recomputed; (2) per image the tiles merged in fp64; (3) per tile
// dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)), dxhat = dz * weight * (1 + scale), the
// means over a group, which per channel is dz * gain - pull - (x - center) * slope. Bytes: x and dy
// once or twice, as x in forward, and dx once. Limit: memory bandwidth; with SiLU in cache, the
// exponential.
#pragma once

#include "group_norm_cpu.h"

namespace sdfast::group_norm {

// x - center and dz of the same lanes of `count` rows; what lies `count` rows further is fetched.
template <int count>
struct Gradients {
  simd::Vecs<count> deviation, dz;

  template <bool kSilu, bool kChannelsLast, typename T, typename Lanes>
  static SDFAST_INLINE Gradients of(const T* x, const T* dy, int64_t stride, Lanes lanes,
                                    const Normalize<kChannelsLast>& norm,
                                    std::bool_constant<kSilu>) {
    Gradients g;
    g.deviation = simd::make_vecs<count>([&](int j) {
      simd::prefetch(x + (j + count) * stride);
      return simd::load(x + j * stride, lanes);
    });
    g.dz = simd::make_vecs<count>([&](int j) {
      simd::prefetch(dy + (j + count) * stride);
      return simd::load(dy + j * stride, lanes);
    });
    g.deviation = g.deviation - norm.center;
    if (kSilu) g.dz = g.dz * simd::silu_gradient(g.deviation * norm.gain + norm.offset);
    return g;
  }
};

// Out: the sums of dz and of dz * (x - center); per channel added to what is there, for a line as
// they are.
template <bool kChannelsLast, bool kSilu, typename T>
void gradient_sums(const T* x, const T* dy, int64_t rows, int64_t width, const Coefficients& k,
                   const TileSums& out) {
  Vec line_sum{}, line_product{};
  for_each_strip(width, [&](int64_t begin, int64_t end) {
    for_each_block(rows, begin, end, [&](int64_t r, auto count, int64_t i, auto lanes) {
      const Normalize<kChannelsLast> norm(k, i);
      const auto g = Gradients<count>::of(x + r * width + i, dy + r * width + i, width, lanes, norm,
                                          std::bool_constant<kSilu>());
      Vec sum{}, product{};
      simd::for_each_of(g.dz, [&](int, Vec v) { sum += v; });
      simd::for_each_of(g.dz * g.deviation, [&](int, Vec v) { product += v; });
      if constexpr (kChannelsLast) {
        simd::store(out.sums + i, simd::load(out.sums + i) + sum);
        simd::store(out.products + i, simd::load(out.products + i) + product);
      } else {
        line_sum += sum;
        line_product += product;
      }
    });
  });
  if (!kChannelsLast) {
    *out.sums = simd::sum(line_sum);
    *out.products = simd::sum(line_product);
  }
}

template <bool kChannelsLast, bool kSilu, bool kStreams = false, typename T>
void apply_gradient(const T* x, const T* dy, int64_t rows, int64_t width, const Coefficients& k,
                    T* dx) {
  for_each_strip(width, [&](int64_t begin, int64_t end) {
    for_each_block(rows, begin, end, [&](int64_t r, auto count, int64_t i, auto lanes) {
      const Normalize<kChannelsLast> norm(k, i);
      const Vec pull = coefficient<kChannelsLast>(k.pull, i);
      const Vec slope = coefficient<kChannelsLast>(k.slope, i);
      const int64_t from = r * width + i;
      const auto g = Gradients<count>::of(x + from, dy + from, width, lanes, norm,
                                          std::bool_constant<kSilu>());
      const auto result = g.dz * norm.gain - pull - g.deviation * slope;
      simd::for_each_of(result, [&](int j, Vec v) {
        T* to = dx + from + j * width;
        if (kStreams) {
          simd::stream_part(to, v, lanes);
        } else {
          simd::prefetch_for_write(to + count * width);
          simd::store(to, v, lanes);
        }
      });
    });
  });
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
    const float *sums = partials + TileSums::kArrays * tile * t.padded, *products = sums + t.padded;
    for (int64_t c = 0; c < t.channels; ++c) {
      sum_dz[c] += sums[c];
      sum_dz_xhat[c] += products[c];
    }
  }
  const int64_t width = t.group_channels();
  const int64_t row = image * t.channels;  // of scale
  for (int64_t g = 0; g < t.groups; ++g) {
    const int64_t begin = g * width, end = begin + width;
    for (int64_t c = begin; c < end; ++c) sum_dz_xhat[c] *= rstd[g];
    const auto factor = [&](int64_t c) {
      return at(affine.weight, c, 1) * (1.0 + at(affine.scale, row + c, 0));
    };
    const double dxhat = sum_over(begin, end, [&](int64_t c) { return factor(c) * sum_dz[c]; });
    const double dxhat_xhat =
        sum_over(begin, end, [&](int64_t c) { return factor(c) * sum_dz_xhat[c]; });
    const double per_element = rstd[g] / t.group_size();
    std::fill_n(k.pull + begin, width, static_cast<float>(dxhat * per_element));
    std::fill_n(k.slope + begin, width, static_cast<float>(dxhat_xhat * per_element * rstd[g]));
  }
}

// sum_dz, sum_dz_xhat: (N, C).
template <bool kChannelsLast, bool kSilu, typename T>
void backward(const Tiling& t, const T* dy, const T* x, const Affine& affine, const float* mean,
              const float* rstd, T* dx, double* sum_dz, double* sum_dz_xhat) {
  const int64_t stride = Coefficients::kArrays * t.padded;
  const std::unique_ptr<float[]> coefficients(new float[t.images * stride]);
  const auto of = [&](int64_t image) {
    return Coefficients(coefficients.get() + image * stride, t.padded);
  };
  for (int64_t n = 0; n < t.images; ++n) {
    normalizing_coefficients(t, n, affine, mean + n * t.groups, rstd + n * t.groups, nullptr,
                             of(n));
  }
  const bool streams = streams_result<kChannelsLast>(t, dx);
  const auto shape_of = [&](const Tile& tile) {
    return kChannelsLast ? std::pair(tile.rows, t.channels)
                         : std::pair<int64_t, int64_t>(1, tile.rows);
  };
  run_steps(
      t,
      [&](const Tile& tile, const TileSums& out) {
        const auto [rows, width] = shape_of(tile);
        if (kChannelsLast) {
          std::fill_n(out.sums, t.padded, 0.0f);
          std::fill_n(out.products, t.padded, 0.0f);
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
        const Coefficients own = of(tile.image).from(tile.line);
        const T *from_x = x + tile.offset, *from_dy = dy + tile.offset;
        if (streams) {
          apply_gradient<kChannelsLast, kSilu, true>(from_x, from_dy, rows, width, own,
                                                     dx + tile.offset);
          simd::finish_streams();
        } else {
          apply_gradient<kChannelsLast, kSilu>(from_x, from_dy, rows, width, own, dx + tile.offset);
        }
      });
}

}  // namespace sdfast::group_norm
