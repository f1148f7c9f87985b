// The gradients of a convolution as matrix products over the weight as it lies, fp32 arithmetic.
//
// Algorithm. Two products of cpu_gemm_packing.h. dx: its pixels are rows, taps x out_channels are
// K; of a stride s, for each of the s x s parities of dx's rows and columns the taps that meet it.
// dW: out_channels are rows, taps x channels columns, y's pixels are K. Bytes: images once a tap
// from cache, the weight once a block of rows. Limit: fused multiply-adds.
#pragma once

#include "conv2d_cpu.h"
#include "cpu_gemm_packing.h"

namespace sdfast::conv2d::direct {

// The pixels of dx of one parity: `stride` apart, from (first_y, first_x) on.
struct Parity {
  struct Tap {
    int64_t y, x;   // the pixel of dy from the one with the number of dx's
    int64_t index;  // in the kernel
  };
  std::vector<Tap> taps;
  int64_t rows, columns, first_y, first_x;
};

inline std::vector<Parity> parities_of(const Shape& s) {
  std::vector<Parity> parities;
  for (int64_t py = 0; py < std::min(s.stride, s.height); ++py) {
    for (int64_t px = 0; px < std::min(s.stride, s.width); ++px) {
      const int64_t rows = (s.height - py + s.stride - 1) / s.stride;
      const int64_t columns = (s.width - px + s.stride - 1) / s.stride;
      Parity parity{{}, rows, columns, py, px};
      for (int64_t a = 0; a < s.kernel_height; ++a) {
        for (int64_t b = 0; b < s.kernel_width; ++b) {
          const int64_t y = py + s.top - a, x = px + s.left - b;
          if (y % s.stride != 0 || x % s.stride != 0) continue;
          parity.taps.push_back({y / s.stride, x / s.stride, a * s.kernel_width + b});
        }
      }
      if (!parity.taps.empty()) parities.push_back(parity);
    }
  }
  return parities;
}

// Calls f(tap, channel, offset, count) for the runs of one tap in K = taps x channels.
template <typename F>
void for_each_run(int64_t channels, int64_t begin, int64_t count, const F& f) {
  for (int64_t done = 0; done < count;) {
    const int64_t tap = (begin + done) / channels, channel = (begin + done) % channels;
    const int64_t run = std::min(channels - channel, count - done);
    f(tap, channel, done, run);
    done += run;
  }
}

template <typename T>
void widen(const T* from, int64_t count, float* to) {
  simd::for_each_vector(0, count, [&](int64_t i, auto lanes) {
    simd::store(to + i, simd::load(from + i, lanes), lanes);
  });
}

// The weight that dx's pixels of one parity meet, taps x out_channels by channels.
template <typename T>
struct WeightPanels {
  const Shape& s;
  const Parity& parity;
  const T* weight;

  // Calls f(rows of the weight, their number, the first one's place in [step, step + steps)).
  template <typename F>
  void for_each_tap(int64_t column, int64_t step, int64_t steps, const F& f) const {
    for_each_run(s.out_channels, step, steps, [&](int64_t t, int64_t o, int64_t at, int64_t run) {
      const int64_t tap = o * s.kernel_height * s.kernel_width + parity.taps[t].index;
      f(weight + tap * s.channels + column, run, at);
    });
  }
  int64_t stride() const { return s.kernel_height * s.kernel_width * s.channels; }
  void pack(int64_t column, int64_t step, int64_t steps, float* to) const {
    for_each_tap(column, step, steps, [&](const T* from, int64_t run, int64_t at) {
      gemm::copy_panel(from, stride(), run, s.channels - column, to + at * gemm::kColumns);
    });
  }
  void fetch(int64_t column, int64_t step, int64_t steps) const {
    for_each_tap(column, step, steps, [&](const T* from, int64_t run, int64_t) {
      gemm::fetch_panel(from, stride(), run);
    });
  }
};

// dx as x lies. Pixels that no tap meets are not written.
template <typename T>
void input_gradient(const Shape& s, const T* dy, const T* weight, T* dx) {
  for (const Parity& parity : parities_of(s)) {
    const int64_t pixels = parity.rows * parity.columns;
    const int64_t dim = static_cast<int64_t>(parity.taps.size()) * s.out_channels;
    gemm::multiply_packing(
        {s.images * pixels, s.channels, dim},
        [&](int64_t begin, int64_t count, int64_t step, int64_t steps, gemm::Float32* scratch) {
          const int64_t apart = gemm::scratch_stride<gemm::Float32>(steps);
          for (int64_t r = 0; r < count; ++r) {
            const int64_t image = (begin + r) / pixels, pixel = (begin + r) % pixels;
            const int64_t y = pixel / parity.columns, x = pixel % parity.columns;
            float* to = &scratch[r * apart].value;
            const auto gather = [&](int64_t t, int64_t o, int64_t at, int64_t run) {
              const int64_t row = y + parity.taps[t].y, column = x + parity.taps[t].x;
              if (row < 0 || row >= s.out_height || column < 0 || column >= s.out_width) {
                std::fill_n(to + at, run, 0.0f);
              } else {
                const int64_t from = (image * s.out_height + row) * s.out_width + column;
                widen(dy + from * s.out_channels + o, run, to + at);
              }
            };
            for_each_run(s.out_channels, step, steps, gather);
          }
          return gemm::Rows<gemm::Float32>{scratch, apart};
        },
        WeightPanels<T>{s, parity, weight},
        [&](int64_t begin, int64_t count, int64_t column, const float* c) {
          const int64_t end = std::min<int64_t>(column + gemm::kColumns, s.channels);
          for (int64_t r = 0; r < count; ++r) {
            const int64_t image = (begin + r) / pixels, pixel = (begin + r) % pixels;
            const int64_t y = parity.first_y + pixel / parity.columns * s.stride;
            const int64_t x = parity.first_x + pixel % parity.columns * s.stride;
            T* to = dx + s.offset(image, y, x);
            simd::for_each_vector(column, end, [&](int64_t i, auto lanes) {
              simd::store(to + i, simd::load(c + r * gemm::kColumns + (i - column)), lanes);
            });
          }
        });
  }
}

// The pixels of x that y's pixels meet, by taps x channels.
template <typename T>
struct PixelPanels {
  const Shape& s;
  const T* x;

  void pack(int64_t column, int64_t step, int64_t steps, float* to) const {
    const int64_t width = s.kernel_height * s.kernel_width * s.channels;
    const int64_t columns = std::min<int64_t>(gemm::kColumns, width - column);
    if (columns < gemm::kColumns) std::fill_n(to, steps * gemm::kColumns, 0.0f);
    for (int64_t at = 0; at < columns;) {
      const int64_t t = (column + at) / s.channels, c = (column + at) % s.channels;
      const int64_t run = std::min(s.channels - c, columns - at);
      const int64_t a = t / s.kernel_width - s.top, b = t % s.kernel_width - s.left;
      int64_t image = step / s.pixels(), row = step % s.pixels() / s.out_width;
      int64_t col = step % s.out_width;
      float* out = to + at;
      for (int64_t i = 0; i < steps; ++i, out += gemm::kColumns) {
        const int64_t from_row = row * s.stride + a, from_col = col * s.stride + b;
        if (s.inside(from_row, from_col)) {
          widen(x + s.offset(image, from_row, from_col) + c, run, out);
        } else {
          std::fill_n(out, run, 0.0f);
        }
        if (++col < s.out_width) continue;
        col = 0;
        if (++row < s.out_height) continue;
        row = 0;
        ++image;
      }
      at += run;
    }
  }
  void fetch(int64_t, int64_t, int64_t) const {}  // x, which all taps meet, stays in cache
};

// dW: (out_channels, kernel_height, kernel_width, channels).
template <typename T>
void weight_gradient(const Shape& s, const T* dy, const T* x, T* dw) {
  const int64_t width = s.kernel_height * s.kernel_width * s.channels;
  gemm::multiply_packing(
      {s.out_channels, width, s.images * s.pixels()},
      [&](int64_t begin, int64_t count, int64_t step, int64_t steps, gemm::Float32* scratch) {
        return gemm::step_rows(dy + step * s.out_channels + begin, s.out_channels, count, steps,
                               scratch);
      },
      PixelPanels<T>{s, x},
      gemm::store_to(dw, width, simd::streams_gradient(dw, s.out_channels, width)));
}

}  // namespace sdfast::conv2d::direct
