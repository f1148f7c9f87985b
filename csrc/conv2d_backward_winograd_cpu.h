// The gradient of a 3x3 convolution's weight by Winograd's F(4x4, 3x3), fp32 arithmetic.
//
// Algorithm (the transpose of y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A in g):
//   dg = Gᵀ [Σ over tiles of (A dy Aᵀ) ⊙ (Bᵀ d B)] G.
// (1) A round of tiles of dy is transformed into 36 numbers a channel, in L3; threads then take a
// strip of out_channels and a panel of channels, whose tiles of x they transform into L2. (2) For
// each of the 36 a matrix product over the tiles, out_channels x channels, a few rows at a time.
// (3) 36 sums become 3x3 weights. A quarter of the direct algorithm's multiplications. Bytes: dy's
// transform once a panel, x once a strip; dW once a round. Limit: fused multiply-adds. Chains of
// additions end with the round.
#pragma once

#include "conv2d_winograd_unpacked_cpu.h"

namespace sdfast::conv2d::winograd {

constexpr int64_t kRoundTiles = 128;         // one chain of additions
constexpr int64_t kGroup = 4 * gemm::kRows;  // out_channels whose transforms lie side by side
static_assert(kGroup % simd::kLanes == 0);
// Of groups, whose weights' pages a thread visits again for the next panel: few enough for the TLB.
constexpr int64_t kStripGroups = 8;

// out = Gᵀ m.
SDFAST_INLINE void transform_gradient(const Vec (&m)[kPatch], Vec (&out)[kSide]) {
  const Vec sum1 = m[1] + m[2], sum2 = m[3] + m[4];
  out[0] = m[0] + sum1 + sum2;
  out[1] = m[1] - m[2] + 2.0f * (m[3] - m[4]);
  out[2] = sum1 + 4.0f * sum2 + m[5];
}

// out = A dy.
SDFAST_INLINE void transform_result(const Vec (&d)[kTile], Vec (&out)[kPatch]) {
  const Vec even = (d[0] + d[2]) * (-1.0f / 6), odd = (d[1] + d[3]) * (-1.0f / 6);
  const Vec near = d[0] * (1.0f / 24) + d[2] * (1.0f / 6);
  const Vec far = d[1] * (1.0f / 12) + d[3] * (1.0f / 3);
  out[0] = d[0] * 0.25f;
  out[1] = even + odd;
  out[2] = even - odd;
  out[3] = near + far;
  out[4] = near - far;
  out[5] = d[3];
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
// added to what an earlier round left, else stored past the caches if `streamed`. dw: (3, 3,
// channels) of the out_channel.
template <typename T>
void finish_weights(const float* sums, int64_t point_stride, int64_t column, int64_t channels,
                    bool accumulate, bool streamed, T* dw) {
  [[maybe_unused]] alignas(Vec) T lines[kTaps][gemm::kColumns];  // of what is narrower
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
        if (streamed && kInLines<T>) {
          simd::store(&lines[i * kSide + j][c - column], out[j], simd::FullVector());
        } else if (streamed) {
          simd::stream(to, out[j], lanes);
        } else {
          simd::store(to, accumulate ? simd::load(to, lanes) + out[j] : out[j], lanes);
        }
      }
    }
  });
  if (!kInLines<T> || !streamed) return;
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    Vec line;
    std::memcpy(&line, lines[tap], sizeof line);
    simd::stream(reinterpret_cast<float*>(dw + tap * channels + column), line, simd::FullVector());
  }
}

// dW: (out_channels, 3, 3, channels), the sum over rounds.
template <typename T, typename Sum>
void sum_rounds(const Shape& s, const T* dy, const T* x, Sum* dw) {
  using gemm::kColumns;
  const Phase phase = phases_of(s).front();
  const Tiling tiling(s, phase, kTile);
  const int64_t round = std::min(tiling.count, kRoundTiles);
  const int64_t groups = (s.out_channels + kGroup - 1) / kGroup;
  const int64_t panels = (s.channels + kColumns - 1) / kColumns;
  const int64_t enough = (4 * torch::stable::get_num_threads() + panels - 1) / panels;
  const int64_t least = (groups + kStripGroups - 1) / kStripGroups;
  const int64_t strips = std::clamp(enough, least, groups);
  const bool streamed =
      tiling.count <= round && simd::streams_gradient(dw, s.out_channels, kTaps * s.channels);
  // Points in other cache sets.
  const int64_t dy_stride = round * groups * kGroup + 3 * simd::kLanes;
  const Scratch<float> dy_points(kPoints * dy_stride);
  for (int64_t first = 0; first < tiling.count; first += round) {
    const int64_t tiles = std::min(round, tiling.count - first);
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        transform_result_tile(s, dy, Position(tiling, first + t), tiles, dy_stride,
                              dy_points.get() + t * kGroup);
      }
    });
    gemm::share(strips * panels, [&](const auto& next) {
      constexpr int64_t kSumsStride = gemm::kRows * kColumns + simd::kLanes;
      const int64_t x_stride = tiles * kColumns + simd::kLanes;
      // Columns past the last channel stay as they are: nothing reads their sums.
      const Scratch<float> sums(kPoints * kSumsStride), x_points(kPoints * x_stride);
      for (int64_t item; (item = next()) >= 0;) {
        const int64_t strip = item / panels, column = item % panels * kColumns;
        for (int64_t t = 0; t < tiles; ++t) {
          transform_tile<F4x4Of3x3>(s, phase, x, Position(tiling, first + t), column,
                                    std::min(column + kColumns, s.channels), x_stride,
                                    x_points.get() + t * kColumns);
        }
        const int64_t end = std::min((strip + 1) * groups / strips * kGroup, s.out_channels);
        for (int64_t o = strip * groups / strips * kGroup; o < end; o += gemm::kRows) {
          const float* a = dy_points.get() + o / kGroup * kGroup * tiles + o % kGroup;
          for (int64_t p = 0; p < kPoints; ++p) {  // of the last rows some may be padding
            gemm::multiply_tile<gemm::kRows, gemm::Float32, true>(
                tiles, reinterpret_cast<const gemm::Float32*>(a + p * dy_stride), kGroup,
                reinterpret_cast<const gemm::Float32*>(x_points.get() + p * x_stride),
                sums.get() + p * kSumsStride, false);
          }
          for (int64_t row = 0; row < std::min<int64_t>(gemm::kRows, end - o); ++row) {
            finish_weights(sums.get() + row * kColumns, kSumsStride, column, s.channels, first > 0,
                           streamed, dw + (o + row) * kTaps * s.channels);
          }
        }
      }
      if (streamed) simd::finish_streams();
    });
  }
}

// dW: (out_channels, 3, 3, channels). Rounds are summed in fp32, and the sum is rounded once.
template <typename T>
void weight_gradient(const Shape& s, const T* dy, const T* x, T* dw) {
  if constexpr (!std::is_same_v<T, float>) {
    if (Tiling(s, phases_of(s).front(), kTile).count > kRoundTiles) {
      const int64_t width = kTaps * s.channels;
      const Scratch<float> sums(s.out_channels * width);
      sum_rounds(s, dy, x, sums.get());
      torch::stable::parallel_for(0, s.out_channels, 1, [&](int64_t begin, int64_t end) {
        simd::for_each_vector(begin * width, end * width, [&](int64_t i, auto lanes) {
          simd::store(dw + i, simd::load(sums.get() + i, lanes), lanes);
        });
      });
      return;
    }
  }
  sum_rounds(s, dy, x, dw);
}

}  // namespace sdfast::conv2d::winograd
