// Winograd's F(4x4, 3x3) for training, fp32: transforms of a weight that changes at every step, and
// the gradient of the weight.
//
// The gradient (the transpose of y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A in g):
//   dg = Gᵀ [Σ over tiles of (A dy Aᵀ) ⊙ (Bᵀ d B)] G.
// (1) A round of tiles of dy and of x is transformed into 36 numbers a channel. (2) For each of the
// 36 a matrix product over the tiles, out_channels x channels. (3) 36 sums become 3x3 weights. A
// quarter of the direct algorithm's multiplications. Threads take blocks of out_channels and panels
// of channels through (2) and (3) in L2. Bytes: both transforms once a block from L3, dW once a
// round. Limit: fused multiply-adds. Chains of additions end with the round.
#pragma once

#include "conv2d_winograd_cpu.h"
#include "cpu_gemm_packing.h"

namespace sdfast::conv2d::winograd {

constexpr int kTile = F4x4Of3x3::kTile, kPatch = F4x4Of3x3::kPatch, kPoints = F4x4Of3x3::kPoints;
constexpr int kSide = 3, kTaps = kSide * kSide;
constexpr int64_t kRoundTiles = 128;         // one chain of additions
constexpr int64_t kGroup = 4 * gemm::kRows;  // out_channels whose transforms lie side by side
static_assert(kGroup % simd::kLanes == 0);

// out = G g.
SDFAST_INLINE void transform_weight(const Vec (&g)[kSide], Vec (&out)[kPatch]) {
  const Vec ends = (g[0] + g[2]) * (-1.0f / 6), middle = g[1] * (1.0f / 6);
  const Vec near = g[0] * (1.0f / 24) + g[2] * (1.0f / 6), far = g[1] * (1.0f / 12);
  out[0] = g[0] * 0.25f;
  out[1] = ends - middle;
  out[2] = ends + middle;
  out[3] = near + far;
  out[4] = near - far;
  out[5] = g[2];
}

// out = Gᵀ m.
SDFAST_INLINE void transform_gradient(const Vec (&m)[kPatch], Vec (&out)[kSide]) {
  const Vec sum1 = m[1] + m[2], sum2 = m[3] + m[4];
  out[0] = m[0] * 0.25f - sum1 * (1.0f / 6) + sum2 * (1.0f / 24);
  out[1] = (m[2] - m[1]) * (1.0f / 6) + (m[3] - m[4]) * (1.0f / 12);
  out[2] = (sum2 - sum1) * (1.0f / 6) + m[5];
}

// out = A dy.
SDFAST_INLINE void transform_result(const Vec (&d)[kTile], Vec (&out)[kPatch]) {
  const Vec even = d[0] + d[2], odd = d[1] + d[3];
  const Vec near = d[0] + 4.0f * d[2], far = 2.0f * d[1] + 8.0f * d[3];
  out[0] = d[0];
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = near + far;
  out[4] = near - far;
  out[5] = d[3];
}

// All 36 points of a kernel; load(a, b) gives its weights, keep(p, v) takes the points.
template <typename Load, typename Keep>
SDFAST_INLINE void transform_weights(const Load& load, const Keep& keep) {
  Vec half[kPatch][kSide];
  for (int b = 0; b < kSide; ++b) {
    Vec g[kSide], out[kPatch];
    for (int a = 0; a < kSide; ++a) g[a] = load(a, b);
    transform_weight(g, out);
    for (int i = 0; i < kPatch; ++i) half[i][b] = out[i];
  }
  for (int i = 0; i < kPatch; ++i) {
    Vec out[kPatch];
    transform_weight(half[i], out);
    for (int j = 0; j < kPatch; ++j) keep(i * kPatch + j, out[j]);
  }
}

// Packs a weight (out_channels, 3, 3, channels) for `run`, as conv2d_pack does in fp64.
template <typename T>
void pack_weight(const T* weight, int64_t out_channels, int64_t channels, float* to) {
  using simd::kLanes;
  constexpr int64_t kGroups = gemm::kColumns / kLanes;
  const int64_t groups = (out_channels + gemm::kColumns - 1) / gemm::kColumns * kGroups;
  const int64_t point_stride = groups / kGroups * channels * gemm::kColumns;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const gemm::Scratch points(kPoints * kLanes * kLanes);  // of kLanes out_channels
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kLanes;
      float* panel = to + group / kGroups * channels * gemm::kColumns + group % kGroups * kLanes;
      simd::for_each_vector(0, channels, [&](int64_t c, auto lanes) {
        for (int l = 0; l < kLanes; ++l) {
          const int64_t o = std::min(first + l, out_channels - 1);
          transform_weights(
              [&](int a, int b) __attribute__((always_inline)) {
                return simd::load(weight + ((o * kSide + a) * kSide + b) * channels + c, lanes);
              },
              [&](int p, Vec v) __attribute__((always_inline)) {
                const Vec kept = first + l < out_channels ? v : Vec{};
                simd::store(points.get() + (p * kLanes + l) * kLanes, kept);
              });
        }
        for (int p = 0; p < kPoints; ++p) {
          Vec block[kLanes];
          for (int l = 0; l < kLanes; ++l) {
            block[l] = simd::load(points.get() + (p * kLanes + l) * kLanes);
          }
          simd::transpose(block);
          for (int l = 0; l < lanes; ++l) {
            simd::store(panel + p * point_stride + (c + l) * gemm::kColumns, block[l]);
          }
        }
      });
    }
  });
}

// Packs the weight of the convolution that gives dx from dy: turned, its channels exchanged.
template <typename T>
void pack_turned_weight(const T* weight, int64_t out_channels, int64_t channels, float* to) {
  constexpr int64_t kGroups = gemm::kColumns / simd::kLanes;
  const int64_t panels = (channels + gemm::kColumns - 1) / gemm::kColumns;
  torch::stable::parallel_for(0, panels * out_channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t panel = item / out_channels, o = item % out_channels;
      for (int64_t group = 0; group < kGroups; ++group) {
        const int64_t c = panel * gemm::kColumns + group * simd::kLanes;
        float* out = to + (panel * out_channels + o) * gemm::kColumns + group * simd::kLanes;
        const auto pack = [&](auto lanes) __attribute__((always_inline)) {
          transform_weights(
              [&](int a, int b) __attribute__((always_inline)) {
                const int64_t tap = (o * kSide + 2 - a) * kSide + 2 - b;
                return simd::load(weight + tap * channels + c, lanes);
              },
              [&](int p, Vec v) __attribute__((always_inline)) {
                simd::store(out + p * panels * out_channels * gemm::kColumns, v);
              });
        };
        if (c + simd::kLanes <= channels) {
          pack(simd::FullVector());
        } else {
          pack(static_cast<int>(std::max<int64_t>(channels - c, 0)));
        }
      }
    }
  });
}

// The 36 numbers of a tile of dy for all out_channels. v: groups of kGroup channels, each (tiles,
// kGroup), kGroup * tiles apart; from one point to the next `point_stride`.
template <typename T>
void transform_result_tile(const Shape& s, const T* dy, const Position& at, int64_t tiles,
                           int64_t point_stride, float* v) {
  const int64_t rows = std::min<int64_t>(kTile, s.out_height - at.row);
  const int64_t columns = std::min<int64_t>(kTile, s.out_width - at.column);
  const T* first = dy + (at.image * s.pixels() + at.row * s.out_width + at.column) * s.out_channels;
  simd::for_each_vector(0, s.out_channels, [&](int64_t o, auto lanes) {
    Vec half[kPatch][kTile];
    for (int j = 0; j < kTile; ++j) {
      Vec d[kTile], out[kPatch];
      for (int i = 0; i < kTile; ++i) {
        const T* pixel = first + (i * s.out_width + j) * s.out_channels + o;
        d[i] = i < rows && j < columns ? simd::load(pixel, lanes) : Vec{};
      }
      transform_result(d, out);
      for (int i = 0; i < kPatch; ++i) half[i][j] = out[i];
    }
    float* to = v + o / kGroup * kGroup * tiles + o % kGroup;
    for (int i = 0; i < kPatch; ++i) {
      Vec out[kPatch];
      transform_result(half[i], out);
      for (int j = 0; j < kPatch; ++j) simd::store(to + (i * kPatch + j) * point_stride, out[j]);
    }
  });
}

// 36 sums to nine weights, for one out_channel and a panel of channels. With `accumulate` they are
// added to what an earlier round left. dw: (3, 3, channels) of the out_channel.
template <typename T>
void finish_weights(const float* sums, int64_t point_stride, int64_t column, int64_t channels,
                    bool accumulate, T* dw) {
  const int64_t end = std::min<int64_t>(column + gemm::kColumns, channels);
  simd::for_each_vector(column, end, [&](int64_t c, auto lanes) {
    Vec half[kSide][kPatch];
    for (int j = 0; j < kPatch; ++j) {
      Vec m[kPatch], out[kSide];
      for (int i = 0; i < kPatch; ++i) {
        m[i] = simd::load(sums + (i * kPatch + j) * point_stride + (c - column));
      }
      transform_gradient(m, out);
      for (int i = 0; i < kSide; ++i) half[i][j] = out[i];
    }
    for (int i = 0; i < kSide; ++i) {
      Vec out[kSide];
      transform_gradient(half[i], out);
      for (int j = 0; j < kSide; ++j) {
        T* to = dw + (i * kSide + j) * channels + c;
        simd::store(to, accumulate ? simd::load(to, lanes) + out[j] : out[j], lanes);
      }
    }
  });
}

// dW: (out_channels, 3, 3, channels).
template <typename T>
void weight_gradient(const Shape& s, const T* dy, const T* x, T* dw) {
  using gemm::kColumns;
  const Phase phase = phases_of(s).front();
  const Tiling tiling(s, phase, kTile);
  const int64_t round = std::min(tiling.count, kRoundTiles);
  const int64_t channels = simd::round_up(s.channels);
  const int64_t groups = (s.out_channels + kGroup - 1) / kGroup;
  const int64_t panels = (s.channels + kColumns - 1) / kColumns;
  // Points in other cache sets.
  const int64_t x_stride = round * channels + 3 * simd::kLanes;
  const int64_t dy_stride = round * groups * kGroup + 3 * simd::kLanes;
  const gemm::Scratch x_points(kPoints * x_stride + kColumns), dy_points(kPoints * dy_stride);
  for (int64_t first = 0; first < tiling.count; first += round) {
    const int64_t tiles = std::min(round, tiling.count - first);
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const Position at(tiling, first + t);
        transform_tile<F4x4Of3x3>(s, phase, x, at, x_stride, x_points.get() + t * channels);
        transform_result_tile(s, dy, at, tiles, dy_stride, dy_points.get() + t * kGroup);
      }
    });
    torch::stable::parallel_for(0, groups * panels, 1, [&](int64_t begin, int64_t end) {
      constexpr int64_t kSums = kGroup * kColumns;
      const gemm::Scratch sums(kPoints * kSums), panel(tiles * kColumns);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t group = item % groups, column = item / groups * kColumns;
        const int64_t rows = std::min(kGroup, s.out_channels - group * kGroup);
        for (int64_t p = 0; p < kPoints; ++p) {
          gemm::copy_panel(x_points.get() + p * x_stride + column, channels, tiles,
                           channels - column, panel.get());
          const float* a = dy_points.get() + p * dy_stride + group * kGroup * tiles;
          for (int64_t row = 0; row < rows; row += gemm::kRows) {  // the last may be padding
            gemm::multiply_tile<gemm::kRows, gemm::Float32, true>(
                tiles, reinterpret_cast<const gemm::Float32*>(a + row), kGroup,
                reinterpret_cast<const gemm::Float32*>(panel.get()),
                sums.get() + p * kSums + row * kColumns, false);
          }
        }
        for (int64_t row = 0; row < rows; ++row) {
          finish_weights(sums.get() + row * kColumns, kSums, column, s.channels, first > 0,
                         dw + (group * kGroup + row) * kTaps * s.channels);
        }
      }
    });
  }
}

}  // namespace sdfast::conv2d::winograd
