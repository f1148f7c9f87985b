// 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3), fp32 arithmetic, whose weight was not
// packed: to train, where it changes at every step, and where there is no memory for a copy of four
// times the weight.
//
// Algorithm. As conv2d_winograd_cpu.h where tiles are many, its packed weight made first and
// dropped. Where they are few, making it costs more than the products: a thread takes a panel of
// out_channels and a block of tiles, and for a part of the channels at a time transforms the weight
// into L2 and multiplies all 36 points by it. Their sums stay in L2 until the last part, and become
// pixels there. Bytes: x, the weight once a block of tiles, y; the transformed tiles once a panel
// from L3. Limit: fused multiply-adds, and where tiles are few the transform of the weight.
#pragma once

#include "conv2d_winograd_cpu.h"
#include "cpu_gemm_packing.h"

namespace sdfast::conv2d::winograd {

constexpr int kTile = F4x4Of3x3::kTile, kPatch = F4x4Of3x3::kPatch, kPoints = F4x4Of3x3::kPoints;
constexpr int kSide = 3, kTaps = kSide * kSide;
constexpr int64_t kPartChannels = 32;  // one chain of additions
constexpr int64_t kBlockTiles = 72;    // whole tiles of the micro-kernel
constexpr int64_t kFewTiles = 256;     // up to which it was measured faster not to pack the weight
// From one point of a part of the weight to the next, in other cache sets.
constexpr int64_t kWeightStride = kPartChannels * gemm::kColumns + simd::kLanes;

// out = G g.
SDFAST_INLINE void transform_weight(const Vec (&g)[kSide], Vec (&out)[kPatch]) {
  const Vec near = g[0] + g[2], far = g[0] + 4.0f * g[2];
  out[0] = g[0];
  out[1] = near + g[1];
  out[2] = near - g[1];
  out[3] = far + 2.0f * g[1];
  out[4] = far - 2.0f * g[1];
  out[5] = g[2];
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

// A part of a weight for `run_packing`: channels [begin, begin + count) and a panel of out_channels
// from `column` on. W: (out_channels, 3, 3, channels).
template <typename T>
struct Weight {
  const T* data;
  int64_t out_channels, channels;

  // Fetches one of kPoints slices of what the operator will read. The same for TurnedWeight, whose
  // rows are pages apart: no hardware does it.
  void fetch(int64_t column, int64_t begin, int64_t slice) const {
    constexpr int64_t kRowsASlice = kTaps * gemm::kColumns / kPoints;
    const T* from = data + (column * kTaps + slice * kRowsASlice) * channels + begin;
    for (int64_t row = 0; row < kRowsASlice; ++row, from += channels) {
      for (int64_t c = 0; c < kPartChannels; c += simd::kLanes) simd::prefetch(from + c);
    }
  }

  void operator()(int64_t column, int64_t begin, int64_t count, int64_t point_stride,
                  float* to) const {
    using simd::kLanes;
    const Scratch<float> scratch(kTaps * kLanes * kLanes);
    float* taps = scratch.get();  // (3, 3, channels, out_channels)
    for (int64_t lane = 0; lane < gemm::kColumns; lane += kLanes) {
      const int64_t first = column + lane;
      const int64_t there = std::clamp<int64_t>(out_channels - first, 0, kLanes);
      simd::for_each_vector(0, count, [&](int64_t c, auto lanes) {
        for (int tap = 0; tap < kTaps; ++tap) {
          const T* from = data + (first * kTaps + tap) * channels + begin + c;
          Vec block[kLanes];
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) {
            block[l] = l < there ? simd::load(from + l * kTaps * channels, lanes) : Vec{};
          }
          simd::transpose(block);
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l)
            simd::store(taps + (tap * kLanes + l) * kLanes, block[l]);
        }
        for (int l = 0; l < lanes; ++l) {
          float* out = to + (c + l) * gemm::kColumns + lane;
          transform_weights(
              [&](int a, int b) __attribute__((always_inline)) {
                return simd::load(taps + ((a * kSide + b) * kLanes + l) * kLanes);
              },
              [&](int p, Vec v)
                  __attribute__((always_inline)) { simd::store(out + p * point_stride, v); });
        }
      });
    }
  }
};

// As Weight, of the convolution that gives dx from dy: turned, its channels exchanged.
template <typename T>
struct TurnedWeight {
  const T* data;
  int64_t out_channels, channels;

  void fetch(int64_t column, int64_t begin, int64_t slice) const {
    constexpr int64_t kRowsASlice = kTaps * kPartChannels / kPoints;
    const T* from = data + (begin * kTaps + slice * kRowsASlice) * channels + column;
    for (int64_t row = 0; row < kRowsASlice; ++row, from += channels) {
      for (int64_t c = 0; c < gemm::kColumns; c += simd::kLanes) simd::prefetch(from + c);
    }
  }

  void operator()(int64_t column, int64_t begin, int64_t count, int64_t point_stride,
                  float* to) const {
    for (int64_t o = begin; o < begin + count; ++o, to += gemm::kColumns) {
      const T* from = data + o * kTaps * channels + column;
      for (int64_t lane = 0; lane < gemm::kColumns; lane += simd::kLanes) {
        const auto pack = [&](auto lanes) __attribute__((always_inline)) {
          transform_weights(
              [&](int a, int b) __attribute__((always_inline)) {
                const int64_t tap = (2 - a) * kSide + 2 - b;
                return simd::load(from + tap * channels + lane, lanes);
              },
              [&](int p, Vec v)
                  __attribute__((always_inline)) { simd::store(to + p * point_stride + lane, v); });
        };
        if (column + lane + simd::kLanes <= channels) {
          pack(simd::FullVector());
        } else {
          pack(static_cast<int>(std::max<int64_t>(channels - column - lane, 0)));
        }
      }
    }
  }
};

// The tiles of a round, whose transforms wait in L3, and of a block, whose sums wait in L2.
struct Blocks {
  int64_t round, rows, panels;
  // Transforms: (points, parts of the channels, tiles of the round, kPartChannels). What is
  // multiplied at a time is one piece, for it comes from L3 each time.
  int64_t parts, stride;
  int64_t at(int64_t part, int64_t tile) const { return (part * round + tile) * kPartChannels; }

  Blocks(const Shape& s, const Tiling& tiling) {
    constexpr int64_t kRoundBytes = 16 << 20;
    parts = (s.channels + kPartChannels - 1) / kPartChannels;
    const int64_t tile_bytes =
        kPoints * parts * kPartChannels * static_cast<int64_t>(sizeof(float));
    const int64_t most = std::max(kRoundBytes / tile_bytes, kBlockTiles);
    const int64_t rounds = (tiling.count + most - 1) / most;
    round = (tiling.count + rounds - 1) / rounds;
    panels = (s.out_channels + gemm::kColumns - 1) / gemm::kColumns;
    stride = parts * round * kPartChannels + 3 * simd::kLanes;
    // More blocks than fill L2 only where threads would go without.
    const int64_t least = (round + kBlockTiles - 1) / kBlockTiles;
    const int64_t most_blocks = std::max(least, round / gemm::kRows);
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t blocks = std::clamp((2 * threads + panels - 1) / panels, least, most_blocks);
    rows = gemm::padded_rows((round + blocks - 1) / blocks);
  }
};

template <typename T, typename PackWeight>
void run_packing(const Shape& s, const T* x, const PackWeight& pack_weight, const Added<T>& added,
                 T* y) {
  using gemm::Float32;
  const Phase phase = phases_of(s).front();
  const Tiling tiling(s, phase, kTile);
  const Blocks cut(s, tiling);
  constexpr int64_t kTileBytes = gemm::kRows * kPartChannels * sizeof(float);
  const Scratch<float> points(kPoints * cut.stride);
  for (int64_t first = 0; first < tiling.count; first += cut.round) {
    const int64_t tiles = std::min(cut.round, tiling.count - first);
    gemm::share(tiles, [&](const auto& next) {
      for (int64_t t; (t = next()) >= 0;) {
        for (int64_t part = 0; part < cut.parts; ++part) {
          const int64_t c = part * kPartChannels;
          transform_tile<F4x4Of3x3>(s, phase, x, Position(tiling, first + t), c,
                                    std::min(c + kPartChannels, s.channels), cut.stride,
                                    points.get() + cut.at(part, t));
        }
      }
    });
    const int64_t blocks = (tiles + cut.rows - 1) / cut.rows;
    gemm::share(cut.panels * blocks, [&](const auto& next) {
      const int64_t sums_stride = cut.rows * gemm::kColumns + simd::kLanes;
      const Scratch<float> weight(kPoints * kWeightStride), sums(kPoints * sums_stride);
      for (int64_t item; (item = next()) >= 0;) {
        const int64_t column = item / blocks * gemm::kColumns, row = item % blocks * cut.rows;
        const int64_t rows = std::min(cut.rows, tiles - row);
        for (int64_t part = 0; part < cut.parts; ++part) {
          const int64_t c = part * kPartChannels, count = std::min(kPartChannels, s.channels - c);
          pack_weight(column, c, count, kWeightStride, weight.get());
          for (int64_t p = 0; p < kPoints; ++p) {
            if (part + 1 < cut.parts) pack_weight.fetch(column, c + kPartChannels, p);
            const float* a = points.get() + p * cut.stride + cut.at(part, row);
            const bool last = p + 1 == kPoints;
            const float* next_a = last ? points.get() + cut.at(part + 1, row) : a + cut.stride;
            const int64_t calls = gemm::calls_of(rows, count);
            gemm::Ahead ahead(next_a, last && part + 1 == cut.parts ? 0 : calls, kTileBytes,
                              kTileBytes, calls);
            gemm::multiply_panel<Float32>(
                rows, count, {reinterpret_cast<const Float32*>(a), kPartChannels},
                reinterpret_cast<const Float32*>(weight.get() + p * kWeightStride),
                sums.get() + p * sums_stride, part > 0, ahead);
          }
        }
        for (int64_t r = 0; r < rows; ++r) {
          finish_tile<F4x4Of3x3>(s, phase, Position(tiling, first + row + r), column,
                                 sums.get() + r * gemm::kColumns, sums_stride, added, y);
        }
      }
      simd::finish_streams();
    });
  }
}

// y = conv(x, weight), the weight given by Weight or TurnedWeight.
template <typename T, typename PackWeight>
void run_unpacked(const Shape& s, const T* x, const PackWeight& pack_weight, const Added<T>& added,
                  T* y) {
  const bool few = Tiling(s, phases_of(s).front(), kTile).count <= kFewTiles;
  if (few) return run_packing(s, x, pack_weight, added, y);
  const int64_t panels = (s.out_channels + gemm::kColumns - 1) / gemm::kColumns;
  const int64_t parts = (s.channels + kPartChannels - 1) / kPartChannels;
  const Scratch<float> packed(packed_size<F4x4Of3x3>(s.out_channels, s.channels));
  gemm::share(panels * parts, [&](const auto& next) {
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t panel = item / parts, c = item % parts * kPartChannels;
      pack_weight(panel * gemm::kColumns, c, std::min(kPartChannels, s.channels - c),
                  panels * s.channels * gemm::kColumns,
                  packed.get() + (panel * s.channels + c) * gemm::kColumns);
    }
  });
  run<F4x4Of3x3>(s, x, packed.get(), added, y);
}

}  // namespace sdfast::conv2d::winograd
