// The gradients of a convolution as matrix products over the weight as it lies.
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
  std::vector<Tap> taps;  // a whole rectangle of pixels of dy, row by row, y and x ascending
  int64_t rows, columns, first_y, first_x;
};

inline std::vector<Parity> parities_of(const Shape& s) {
  std::vector<Parity> parities;
  for (int64_t py = 0; py < std::min(s.stride, s.height); ++py) {
    for (int64_t px = 0; px < std::min(s.stride, s.width); ++px) {
      const int64_t rows = (s.height - py + s.stride - 1) / s.stride;
      const int64_t columns = (s.width - px + s.stride - 1) / s.stride;
      Parity parity{{}, rows, columns, py, px};
      for (int64_t a = s.kernel_height - 1; a >= 0; --a) {
        for (int64_t b = s.kernel_width - 1; b >= 0; --b) {
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

// Values along K into a row of operands.
template <typename T>
void put_values(const T* from, int64_t count, float* to) {
  simd::for_each_vector(0, count, [&](int64_t i, auto lanes) {
    simd::store(to + i, simd::load(from + i, lanes), lanes);
  });
}
inline void put_values(const simd::BFloat16* from, int64_t count, simd::BFloat16* to) {
  std::memcpy(static_cast<void*>(to), from, count * sizeof *to);
}

// The weight that dx's pixels of one parity meet, taps x out_channels by channels.
template <typename T>
struct WeightPanels {
  const Shape& s;
  const Parity& parity;
  const T* weight;

  // Calls f(rows of the weight, their number, the first one's place in [value, value + values)).
  template <typename F>
  void for_each_tap(int64_t column, int64_t value, int64_t values, const F& f) const {
    for_each_run(s.out_channels, value, values, [&](int64_t t, int64_t o, int64_t at, int64_t run) {
      const int64_t tap = o * s.kernel_height * s.kernel_width + parity.taps[t].index;
      f(weight + tap * s.channels + column, run, at);
    });
  }
  int64_t stride() const { return s.kernel_height * s.kernel_width * s.channels; }
  template <typename Operand>
  void pack(int64_t column, int64_t value, int64_t values, Operand* to) const {
    for_each_tap(column, value, values, [&](const T* from, int64_t run, int64_t at) {
      gemm::copy_panel(from, stride(), run, s.channels - column,
                       to + at / Operand::kDepth * gemm::kColumns);
    });
  }
  void fetch(int64_t column, int64_t value, int64_t values) const {
    for_each_tap(column, value, values, [&](const T* from, int64_t run, int64_t) {
      gemm::fetch_panel(from, stride(), run);
    });
  }
};

// dx as x lies. Pixels that no tap meets are not written. Pairs need an even number of
// out_channels.
template <typename Operand, typename T>
void input_gradient(const Shape& s, const T* dy, const T* weight, T* dx) {
  for (const Parity& parity : parities_of(s)) {
    const int64_t pixels = parity.rows * parity.columns;
    const int64_t dim = static_cast<int64_t>(parity.taps.size()) * s.out_channels;
    gemm::multiply_packing<Operand>(
        {s.images * pixels, s.channels, dim},
        [&](int64_t begin, int64_t count, int64_t value, int64_t values, Operand* scratch) {
          using Value = std::conditional_t<Operand::kDepth == 1, float, T>;
          const int64_t apart =
              gemm::scratch_stride<Operand>(gemm::steps_of(Operand::kDepth, values));
          for (int64_t r = 0; r < count; ++r) {
            const int64_t image = (begin + r) / pixels, pixel = (begin + r) % pixels;
            const int64_t y = pixel / parity.columns, x = pixel % parity.columns;
            Value* to = reinterpret_cast<Value*>(scratch + r * apart);
            const auto gather = [&](int64_t t, int64_t o, int64_t at, int64_t run) {
              const int64_t row = y + parity.taps[t].y, column = x + parity.taps[t].x;
              if (row < 0 || row >= s.out_height || column < 0 || column >= s.out_width) {
                std::fill_n(to + at, run, Value{});
              } else {
                const int64_t from = (image * s.out_height + row) * s.out_width + column;
                put_values(dy + from * s.out_channels + o, run, to + at);
              }
            };
            for_each_run(s.out_channels, value, values, gather);
          }
          return gemm::Rows<Operand>{scratch, apart};
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

  template <typename Operand>
  void pack(int64_t column, int64_t value, int64_t values, Operand* to) const {
    constexpr int64_t kDepth = Operand::kDepth;
    static constexpr T kOutside[gemm::kColumns] = {};
    const int64_t steps = gemm::steps_of(kDepth, values);
    const int64_t width = s.kernel_height * s.kernel_width * s.channels;
    const int64_t columns = std::min<int64_t>(gemm::kColumns, width - column);
    if (columns < gemm::kColumns) {
      std::memset(static_cast<void*>(to), 0, steps * gemm::kColumns * sizeof(Operand));
    }
    for (int64_t at = 0; at < columns;) {
      const int64_t t = (column + at) / s.channels, c = (column + at) % s.channels;
      const int64_t run = std::min(s.channels - c, columns - at);
      const int64_t a = t / s.kernel_width - s.top, b = t % s.kernel_width - s.left;
      int64_t image = value / s.pixels(), row = value % s.pixels() / s.out_width;
      int64_t col = value % s.out_width, left = values;
      const auto next_pixel = [&]() -> const T* {
        if (left-- <= 0) return kOutside;  // completes the last pair
        const int64_t from_row = row * s.stride + a, from_col = col * s.stride + b;
        const T* pixel =
            s.inside(from_row, from_col) ? x + s.offset(image, from_row, from_col) + c : kOutside;
        if (++col == s.out_width) {
          col = 0;
          if (++row == s.out_height) {
            row = 0;
            ++image;
          }
        }
        return pixel;
      };
      Operand* out = to + at;
      for (int64_t i = 0; i < steps; ++i, out += gemm::kColumns) {
        const T* first = next_pixel();
        const T* second = kDepth == 2 ? next_pixel() : first;
        simd::for_each_vector(0, run, [&](int64_t j, auto lanes) {
          gemm::store_operands(out + j, gemm::load_step(Operand(), first + j, second + j, lanes),
                               lanes);
        });
      }
      at += run;
    }
  }
  void fetch(int64_t, int64_t, int64_t) const {}  // x, which all taps meet, stays in cache
};

// dW: (out_channels, kernel_height, kernel_width, channels).
template <typename Operand, typename T>
void weight_gradient(const Shape& s, const T* dy, const T* x, T* dw) {
  const int64_t width = s.kernel_height * s.kernel_width * s.channels;
  gemm::multiply_packing<Operand>(
      {s.out_channels, width, s.images * s.pixels()},
      [&](int64_t begin, int64_t count, int64_t value, int64_t values, Operand* scratch) {
        return gemm::step_rows(dy + value * s.out_channels + begin, s.out_channels, count, values,
                               scratch);
      },
      PixelPanels<T>{s, x},
      gemm::store_to(dw, width, simd::streams_gradient(dw, s.out_channels, width)));
}

}  // namespace sdfast::conv2d::direct
