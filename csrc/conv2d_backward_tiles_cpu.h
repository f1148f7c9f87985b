// The gradients of a convolution in bf16 on AMX tiles.
//
// Algorithm. dx: for each of the stride x stride parities of its rows and columns a convolution of
// dy with the taps that meet it, as conv2d_direct_cpu.h's. dW: of each parity of the taps the
// pixels of x that they meet and those of dy lie in grids of one pitch, with zeros at the right and
// below: a tap is a distance between them (cpu_tiles_gradient.h). dy is copied once a parity. What
// is not finite at the border of x reaches the taps that do not meet it, too: zeros times it are
// NaN. Limit: TDPBF16PS.
#pragma once

#include "conv2d_backward_direct_cpu.h"
#include "conv2d_direct_cpu.h"
#include "cpu_tiles_gradient.h"

#if defined(SDFAST_TILES)

namespace sdfast::conv2d::tiles {

using gemm::tiles::kStep;
using simd::BFloat16;

// dx as x lies. Pixels that no tap meets are not written.
inline void input_gradient(const Shape& s, const BFloat16* dy, const BFloat16* weight,
                           BFloat16* dx) {
  Shape turned = s;
  std::swap(turned.channels, turned.out_channels);
  std::swap(turned.height, turned.out_height);
  std::swap(turned.width, turned.out_width);
  turned.stride = 1;
  for (const direct::Parity& parity : direct::parities_of(s)) {
    const auto &first = parity.taps.front(), &last = parity.taps.back();
    const Phase phase{
        parity.rows, parity.columns, parity.first_y,       parity.first_x,      s.stride,
        first.y,     first.x,        last.y - first.y + 1, last.x - first.x + 1};
    const int64_t taps = static_cast<int64_t>(parity.taps.size());
    const int64_t values = (s.out_channels + kStep - 1) / kStep * kStep;  // of a tap
    gemm::tiles::Rows<BFloat16> rows(taps * values, s.channels);
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t o = 0; o < s.out_channels; ++o) {
        const int64_t tap = o * s.kernel_height * s.kernel_width + parity.taps[t].index;
        rows[t * values + o] = weight + tap * s.channels;
      }
    }
    direct::run_phase(turned, phase, dy, gemm::tiles::Columns<BFloat16>{rows.get()},
                      Added<BFloat16>{}, dx);
  }
}

// The taps of one parity, and where dW's rows for them lie.
struct ParityTaps {
  const Shape& s;
  int64_t first_y, first_x;
  BFloat16* dw;
  bool streamed;

  int64_t rows() const { return (s.kernel_height - first_y + s.stride - 1) / s.stride; }
  int64_t columns() const { return (s.kernel_width - first_x + s.stride - 1) / s.stride; }
  // Of the grids.
  int64_t pitch() const { return s.out_width + columns() - 1; }
  int64_t height() const { return s.out_height + rows() - 1; }

  // For the out_channels of a tap; makes a number of them of that of tap and out_channel.
  gemm::StoreRows<BFloat16> of(int64_t& token) const {
    const int64_t tap = token / s.out_channels, y = first_y + tap / columns() * s.stride;
    const int64_t x = first_x + tap % columns() * s.stride;
    token %= s.out_channels;
    const int64_t stride = s.kernel_height * s.kernel_width * s.channels;
    return {dw + (y * s.kernel_width + x) * s.channels, stride, streamed};
  }
  void fetch(int64_t token, int64_t count, int64_t row, int64_t rows) const {
    const auto store = of(token);
    store.fetch(token, count, row, rows);
  }
  void operator()(int64_t token, int64_t count, int64_t row, int64_t rows,
                  const gemm::Sums& sums) const {
    const auto store = of(token);
    store(token, count, row, rows, sums);
  }
};

inline void weight_gradient(const Shape& s, const ParityTaps& parity, const BFloat16* dy,
                            const BFloat16* x) {
  const gemm::tiles::Taps taps{parity.rows(), parity.columns(), parity.pitch()};
  const gemm::tiles::Product p{s.channels, s.images * parity.height() * parity.pitch()};
  const int64_t k = p.steps() * kStep;
  gemm::tiles::Rows<BFloat16> left(taps.steps(k) * kStep, s.out_channels), right(k, s.channels);
  for (int64_t image = 0, at = 0; image < s.images; ++image) {
    for (int64_t i = 0; i < parity.height(); ++i) {
      for (int64_t j = 0; j < parity.pitch(); ++j, ++at) {
        const int64_t row = i * s.stride + parity.first_y - s.top;
        const int64_t column = j * s.stride + parity.first_x - s.left;
        if (s.inside(row, column)) right[at] = x + s.offset(image, row, column);
        if (i >= s.out_height || j >= s.out_width) continue;
        const int64_t pixel = (image * s.out_height + i) * s.out_width + j;
        left[taps.before() + at] = dy + pixel * s.out_channels;
      }
    }
  }
  gemm::tiles::multiply_taps(p, taps, left.get(), s.out_channels, right.get(), parity);
}

// dW: (out_channels, kernel_height, kernel_width, channels).
inline void weight_gradient(const Shape& s, const BFloat16* dy, const BFloat16* x, BFloat16* dw) {
  const int64_t rows = s.out_channels * s.kernel_height * s.kernel_width;
  const bool streamed = simd::streams_gradient(dw, rows, s.channels);
  for (int64_t y = 0; y < std::min(s.stride, s.kernel_height); ++y) {
    for (int64_t x_ = 0; x_ < std::min(s.stride, s.kernel_width); ++x_) {
      weight_gradient(s, {s, y, x_, dw, streamed}, dy, x);
    }
  }
}

}  // namespace sdfast::conv2d::tiles

#endif
