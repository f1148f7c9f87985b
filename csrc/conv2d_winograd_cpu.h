// 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3) in fp32.
//
// Algorithm (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks"). (1) Each 6x6
// patch of x, four apart, is transformed into 36 numbers a channel. (2) For each of the 36 a matrix
// product over the channels, tiles x out_channels. (3) 36 sums are transformed into 4x4 pixels of
// y. A quarter of the direct algorithm's multiplications. A round of tiles is transformed by all
// threads into a buffer that stays in L3; then threads take blocks of tiles and two panels of
// channels through (2) and (3) in L2. Bytes: x 2.25 times from cache, its transform written and
// read once a pair of panels, y once. Limit: fused multiply-adds. The transforms cancel, so it
// rounds more than the direct algorithm: tests/test_conv2d.py says how much.
#pragma once

#include "conv2d_cpu.h"

namespace sdfast::conv2d::winograd {

constexpr int kPoints = 36, kTile = 4, kPatch = 6;
constexpr int64_t kBlockTiles = 4 * gemm::kRows;  // as many sums as L2 holds
constexpr int64_t kBlockPanels = 2;
constexpr int64_t kRoundBytes = 12 << 20;  // of the transformed input

// The tiles of all images, row by row.
struct Tiling {
  int64_t rows, columns, count;
  explicit Tiling(const Shape& s)
      : rows((s.out_height + kTile - 1) / kTile),
        columns((s.out_width + kTile - 1) / kTile),
        count(s.images * rows * columns) {}
};

struct Position {
  int64_t image, y, x;  // of the tile's first output pixel
  Position(const Tiling& t, int64_t tile)
      : image(tile / (t.rows * t.columns)),
        y(tile / t.columns % t.rows * kTile),
        x(tile % t.columns * kTile) {}
};

// out = Bᵀ d, for six vectors.
SDFAST_INLINE void transform_input(const Vec (&d)[kPatch], Vec (&out)[kPatch]) {
  const Vec even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
  const Vec near = d[4] - d[2], far = 2.0f * (d[3] - d[1]);
  out[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = near + far;
  out[4] = near - far;
  out[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
}

// out = Aᵀ m.
SDFAST_INLINE void transform_output(const Vec (&m)[kPatch], Vec (&out)[kTile]) {
  const Vec sum1 = m[1] + m[2], difference1 = m[1] - m[2];
  const Vec sum2 = m[3] + m[4], difference2 = m[3] - m[4];
  out[0] = m[0] + sum1 + sum2;
  out[1] = difference1 + 2.0f * difference2;
  out[2] = sum1 + 4.0f * sum2;
  out[3] = difference1 + 8.0f * difference2 + m[5];
}

// The transform of a kernel, G g Gᵀ, in fp64. g: (3, 3), `stride` apart. out: (36).
template <typename Get>
void transform_kernel(const Get& g, double (&out)[kPoints]) {
  static const double kG[kPatch][3] = {{1.0 / 4, 0, 0},
                                       {-1.0 / 6, -1.0 / 6, -1.0 / 6},
                                       {-1.0 / 6, 1.0 / 6, -1.0 / 6},
                                       {1.0 / 24, 1.0 / 12, 1.0 / 6},
                                       {1.0 / 24, -1.0 / 12, 1.0 / 6},
                                       {0, 0, 1}};
  for (int i = 0; i < kPatch; ++i) {
    for (int j = 0; j < kPatch; ++j) {
      double sum = 0;
      for (int a = 0; a < 3; ++a) {
        for (int b = 0; b < 3; ++b) sum += kG[i][a] * g(a, b) * kG[j][b];
      }
      out[i * kPatch + j] = sum;
    }
  }
}

// Packed weights: (panels, 36, channels, kColumns).
inline int64_t packed_size(int64_t out_channels, int64_t channels) {
  const int64_t panels = (out_channels + gemm::kColumns - 1) / gemm::kColumns;
  return panels * kPoints * channels * gemm::kColumns;
}

// The 36 numbers of one tile for all channels. v: from one point to the next `point_stride`.
template <typename T>
void transform_tile(const Shape& s, const T* x, const Position& at, int64_t point_stride,
                    float* v) {
  const int64_t top = at.y - s.top, left = at.x - s.left;
  const bool inside = s.inside(top, left) && s.inside(top + kPatch - 1, left + kPatch - 1);
  const auto transform = [&](auto load) {
    simd::for_each_vector(0, s.channels, [&](int64_t c, auto lanes) {
      Vec half[kPatch][kPatch];  // transformed along the columns
      for (int j = 0; j < kPatch; ++j) {
        Vec d[kPatch], out[kPatch];
        for (int i = 0; i < kPatch; ++i) d[i] = load(i, j, c, lanes);
        transform_input(d, out);
        for (int i = 0; i < kPatch; ++i) half[i][j] = out[i];
      }
      for (int i = 0; i < kPatch; ++i) {
        Vec out[kPatch];
        transform_input(half[i], out);
        for (int j = 0; j < kPatch; ++j) {
          simd::store(v + (i * kPatch + j) * point_stride + c, out[j]);
        }
      }
    });
  };
  const auto value = [&](int i, int j, int64_t c, auto lanes) {
    return simd::load(x + s.offset(at.image, top + i, left + j) + c, lanes);
  };
  if (inside) return transform(value);
  transform([&](int i, int j, int64_t c, auto lanes) {
    return s.inside(top + i, left + j) ? value(i, j, c, lanes) : Vec{};
  });
}

// The pixels of one tile for one panel of channels. m: from one point to the next `point_stride`.
template <typename T>
void finish_tile(const Shape& s, const Position& at, int64_t first_channel, const float* m,
                 int64_t point_stride, const Added<T>& added, T* y) {
  const int64_t end = std::min<int64_t>(first_channel + gemm::kColumns, s.out_channels);
  const int64_t rows = std::min<int64_t>(kTile, s.out_height - at.y);
  const int64_t columns = std::min<int64_t>(kTile, s.out_width - at.x);
  simd::for_each_vector(first_channel, end, [&](int64_t c, auto lanes) {
    const float* from = m + (c - first_channel);
    Vec half[kTile][kPatch];
    for (int j = 0; j < kPatch; ++j) {
      Vec sums[kPatch], out[kTile];
      for (int i = 0; i < kPatch; ++i) sums[i] = simd::load(from + (i * kPatch + j) * point_stride);
      transform_output(sums, out);
      for (int i = 0; i < kTile; ++i) half[i][j] = out[i];
    }
    for (int i = 0; i < rows; ++i) {
      Vec out[kTile];
      transform_output(half[i], out);
      const int64_t pixel = at.image * s.pixels() + (at.y + i) * s.out_width + at.x;
      for (int j = 0; j < columns; ++j) {
        const Vec sum = finished(added, s, out[j], at.image, pixel + j, c, lanes);
        simd::store(y + (pixel + j) * s.out_channels + c, sum, lanes);
      }
    }
  });
}

template <typename T>
void run(const Shape& s, const T* x, const float* packed, const Added<T>& added, T* y) {
  using gemm::kColumns;
  const Tiling tiling(s);
  const int64_t channels = simd::round_up(s.channels);
  const int64_t panels = (s.out_channels + kColumns - 1) / kColumns;
  const int64_t tile_bytes = kPoints * channels * static_cast<int64_t>(sizeof(float));
  const int64_t round = std::min(
      tiling.count, std::max<int64_t>(1, kRoundBytes / tile_bytes / kBlockTiles) * kBlockTiles);
  const int64_t point_stride = round * channels + 3 * simd::kLanes;  // points in other cache sets
  const std::unique_ptr<float[]> transformed(new float[kPoints * point_stride]);
  const int64_t groups = (panels + kBlockPanels - 1) / kBlockPanels;
  for (int64_t first = 0; first < tiling.count; first += round) {
    const int64_t tiles = std::min(round, tiling.count - first);
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        transform_tile(s, x, Position(tiling, first + t), point_stride,
                       transformed.get() + t * channels);
      }
    });
    const int64_t blocks = (tiles + kBlockTiles - 1) / kBlockTiles;
    torch::stable::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
      constexpr int64_t kSumStride = kBlockTiles * kColumns;
      const std::unique_ptr<float[]> sums(new float[kBlockPanels * kPoints * kSumStride]);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t block = item % blocks * kBlockTiles, panel = item / blocks * kBlockPanels;
        const int64_t count = std::min(kBlockTiles, tiles - block);
        const int64_t panel_end = std::min(panel + kBlockPanels, panels);
        for (int64_t point = 0; point < kPoints; ++point) {
          const float* a = transformed.get() + point * point_stride + block * channels;
          for (int64_t p = panel; p < panel_end; ++p) {
            const float* b = packed + (p * kPoints + point) * s.channels * kColumns;
            gemm::multiply_panel<gemm::Float32>(
                count, s.channels, {reinterpret_cast<const gemm::Float32*>(a), channels},
                reinterpret_cast<const gemm::Float32*>(b),
                sums.get() + ((p - panel) * kPoints + point) * kSumStride, kColumns, false,
                [](int64_t, int64_t, const float*) {});
          }
        }
        for (int64_t p = panel; p < panel_end; ++p) {
          for (int64_t t = 0; t < count; ++t) {
            finish_tile(s, Position(tiling, first + block + t), p * kColumns,
                        sums.get() + (p - panel) * kPoints * kSumStride + t * kColumns, kSumStride,
                        added, y);
          }
        }
      }
    });
  }
}

}  // namespace sdfast::conv2d::winograd
