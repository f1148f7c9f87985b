// Convolution of any kernel and stride as a matrix product, fp32 or pairs of bf16.
//
// Algorithm. y's pixels are tokens, taps x channels are K (cpu_weights.h): a channels-last weight
// is read where it lies, and panels of pixels are gathered into L2, a copy of C values a pixel and
// tap; zeros stand for what lies outside. A 3x3 convolution after a nearest-2x upsample is four 2x2
// convolutions, one for each parity of y's rows and columns, whose weights are sums of the 3x3's:
// 4/9 of the multiplications. Bytes: x once a tap from cache, W and the residual read, y written.
// Limit: fused multiply-adds.
#pragma once

#include "conv2d_cpu.h"
#include "cpu_weights.h"

namespace sdfast::conv2d::direct {

// From sums of pixels of one phase to y.
template <typename T>
struct Epilogue {
  const Shape& shape;
  const Phase& phase;
  const Added<T>& added;
  T* y;

  void operator()(int64_t token, int64_t count, int64_t row, int64_t rows, const float* c,
                  const float*) const {
    const int64_t pixels = phase.rows * phase.columns;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t image = (token + t) / pixels, i = (token + t) % pixels;
      const int64_t pixel = phase.pixel(shape, image, i / phase.columns, i % phase.columns);
      simd::for_each_vector(row, row + rows, [&](int64_t o, auto lanes) {
        const Vec sum = simd::load(c + t * gemm::kGroup + (o - row));
        simd::store(y + pixel * shape.out_channels + o,
                    finished(added, shape, sum, image, pixel, o, lanes), lanes);
      });
    }
  }
};

// The pixels of a phase as tokens, gathered tap by tap.
template <typename T>
struct Pixels {
  const Shape& shape;
  const Phase& phase;
  const T* x;
  const T* zeros;  // (channels)

  // Where the channels under a tap of output pixel `token` begin.
  const T* under(int64_t token, int64_t tap) const {
    const int64_t pixels = phase.rows * phase.columns, image = token / pixels, i = token % pixels;
    const int64_t row = i / phase.columns * shape.stride + phase.top + tap / phase.kernel_width;
    const int64_t column = i % phase.columns * shape.stride + phase.left + tap % phase.kernel_width;
    return shape.inside(row, column) ? x + shape.offset(image, row, column) : zeros;
  }

  template <typename Operand>
  void pack(int64_t token, int64_t count, gemm::Product::Piece piece, Operand* to) const {
    while (piece.count > 0) {
      const int64_t tap = piece.begin / shape.channels;
      const int64_t channel = piece.begin % shape.channels;
      const int64_t channels = std::min(shape.channels - channel, piece.count);
      gemm::pack_columns<T>([&](int64_t i) { return under(token + i, tap) + channel; }, count,
                            channels, 0, to);
      to += gemm::steps_of(Operand::kDepth, channels) * gemm::kColumns;
      piece = {piece.begin + channels, piece.count - channels};
    }
  }
};

// weight: for each phase (out_channels, taps, channels).
template <typename Operand, typename T>
void run(const Shape& s, const T* x, const T* weight, const Added<T>& added, T* y) {
  const std::vector<T> zeros(s.channels);
  for (const Phase& phase : phases_of(s)) {
    const int64_t taps = phase.kernel_height * phase.kernel_width, dim = taps * s.channels;
    const int64_t chunk = gemm::even_part<Operand>(s.channels);
    const int64_t steps = gemm::steps_of(Operand::kDepth, s.channels);
    const int64_t fit = std::clamp<int64_t>(gemm::kPartSteps / steps, 1, taps);
    const int64_t part = fit > 1 ? fit * s.channels : chunk;
    const gemm::Product product{s.images * phase.rows * phase.columns, s.out_channels, dim, part,
                                std::max(part, s.channels)};
    using Piece = gemm::Product::Piece;
    const Pixels<T> pixels{s, phase, x, zeros.data()};
    gemm::multiply_weights<Operand>(
        product, weight,
        [&](int64_t token, int64_t count, Piece piece, Operand* to) {
          pixels.pack(token, count, piece, to);
        },
        Epilogue<T>{s, phase, added, y});
    weight += s.out_channels * dim;
  }
}

}  // namespace sdfast::conv2d::direct
