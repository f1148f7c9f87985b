// Convolution and its gradients as matrix products over the weight as it lies, fp32 arithmetic.
//
// Algorithm. Three products of cpu_gemm_packing.h. y: its pixels are rows, taps x channels are K.
// dx: the same with dy for x and the weight's channels exchanged; of a stride s, for each of the
// s x s parities of dx's rows and columns the taps that meet it. dW: out_channels are rows, taps x
// channels columns, y's pixels are K. After a nearest-2x upsample y is four 2x2 convolutions of x,
// one a parity, whose weights are sums of the 3x3's, and dx the sum of their gradients: 4/9 of the
// multiplications. Bytes: images once a tap from cache, the weight once a block of rows.
// Limit: fused multiply-adds.
#pragma once

#include <vector>

#include "conv2d_cpu.h"
#include "cpu_gemm_packing.h"

namespace sdfast::conv2d::direct {

// Rows [top, bottom) and columns [left, right) of the kernel: their weights are summed.
struct Window {
  int64_t top, bottom, left, right;
};

// A pixel of the source, from the one under the result's first pixel, and its weight.
struct SourceTap {
  int64_t y, x;
  Window window;
};

// A product over the pixels of `result`: y, or dx.
struct Sweep {
  std::vector<SourceTap> taps;
  int64_t rows, columns;  // of the result's pixels, `spread` apart
  int64_t first_y, first_x, spread;
  int64_t step;  // from one to the next in the source
};

// The rows (or columns) of a 3x3 kernel that meet the same pixel under tap `tap` of a parity:
// nearest-2x repeats each pixel, so kernel rows -1, 0, 1 meet pixels -1, 0, 0 at even outputs, 0,
// 0, 1 at odd ones.
struct Fold {
  int64_t begin, end;
  Fold(int64_t parity, int64_t tap)
      : begin(tap == 0      ? 0
              : parity == 0 ? 1
                            : 2),
        end(tap == 1      ? 3
            : parity == 0 ? 1
                          : 2) {}
};

inline std::vector<Sweep> sweeps_of_result(const Shape& s) {
  std::vector<Sweep> sweeps;
  if (!s.upsample) {
    Sweep whole{{}, s.out_height, s.out_width, 0, 0, 1, s.stride};
    for (int64_t a = 0; a < s.kernel_height; ++a) {
      for (int64_t b = 0; b < s.kernel_width; ++b) {
        whole.taps.push_back({a - s.top, b - s.left, {a, a + 1, b, b + 1}});
      }
    }
    return {whole};
  }
  for (int64_t parity = 0; parity < 4; ++parity) {
    const int64_t py = parity / 2, px = parity % 2;
    Sweep sweep{{}, s.out_height / 2, s.out_width / 2, py, px, 2, 1};
    for (int64_t t = 0; t < 4; ++t) {
      const Fold y(py, t / 2), x(px, t % 2);
      sweep.taps.push_back({t / 2 + py - 1, t % 2 + px - 1, {y.begin, y.end, x.begin, x.end}});
    }
    sweeps.push_back(sweep);
  }
  return sweeps;
}

inline std::vector<Sweep> sweeps_of_input_gradient(const Shape& s) {
  if (s.upsample) {
    Sweep sweep{{}, s.height / 2, s.width / 2, 0, 0, 1, 2};
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t py = i / 8, ty = i / 4 % 2, px = i / 2 % 2, tx = i % 2;
      const Fold y(py, ty), x(px, tx);
      sweep.taps.push_back({2 - 2 * ty - py, 2 - 2 * tx - px, {y.begin, y.end, x.begin, x.end}});
    }
    return {sweep};
  }
  std::vector<Sweep> sweeps;
  for (int64_t py = 0; py < s.stride; ++py) {
    for (int64_t px = 0; px < s.stride; ++px) {
      const int64_t rows = (s.height - py + s.stride - 1) / s.stride;
      const int64_t columns = (s.width - px + s.stride - 1) / s.stride;
      Sweep sweep{{}, std::max<int64_t>(rows, 0), std::max<int64_t>(columns, 0), py, px, s.stride,
                  1};
      for (int64_t a = 0; a < s.kernel_height; ++a) {
        for (int64_t b = 0; b < s.kernel_width; ++b) {
          const int64_t y = py + s.top - a, x = px + s.left - b;
          if (y % s.stride != 0 || x % s.stride != 0) continue;
          sweep.taps.push_back({y / s.stride, x / s.stride, {a, a + 1, b, b + 1}});
        }
      }
      sweeps.push_back(sweep);
    }
  }
  return sweeps;
}

// The weight as it lies, (out_channels, kernel_height, kernel_width, channels).
template <typename T>
struct Weight {
  const T* data;
  int64_t kernel_height, kernel_width, channels;
  template <typename Lanes>
  SDFAST_INLINE Vec load(int64_t o, const Window& w, int64_t c, Lanes lanes) const {
    Vec sum{};
    for (int64_t a = w.top; a < w.bottom; ++a) {
      for (int64_t b = w.left; b < w.right; ++b) {
        const int64_t tap = (o * kernel_height + a) * kernel_width + b;
        sum += simd::load(data + tap * channels + c, lanes);
      }
    }
    return sum;
  }
};

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

// One sweep. source: (images, height, width, channels). pack_run(tap, channel, column, count, to)
// writes steps of a panel; finish(image, y, x, column, sums) takes kColumns sums of a pixel.
template <typename T, typename PackRun, typename Finish>
void multiply_sweep(const Sweep& sweep, const T* source, int64_t images, int64_t height,
                    int64_t width, int64_t channels, int64_t result_channels,
                    const PackRun& pack_run, const Finish& finish) {
  const int64_t taps = static_cast<int64_t>(sweep.taps.size()), pixels = sweep.rows * sweep.columns;
  const bool in_place = taps == 1 && sweep.taps[0].y == 0 && sweep.taps[0].x == 0 &&
                        sweep.step == 1 && sweep.rows == height && sweep.columns == width;
  gemm::multiply_packing(
      {images * pixels, result_channels, taps * channels},
      [&](int64_t begin, int64_t count, int64_t step, int64_t steps, gemm::Float32* scratch) {
        if (in_place) {
          return gemm::plain_rows(source + begin * channels + step, channels, count, steps,
                                  scratch);
        }
        for (int64_t r = 0; r < count; ++r) {
          const int64_t image = (begin + r) / pixels, pixel = (begin + r) % pixels;
          const int64_t y = pixel / sweep.columns * sweep.step;
          const int64_t x = pixel % sweep.columns * sweep.step;
          float* to = &scratch[r * steps].value;
          for_each_run(channels, step, steps, [&](int64_t t, int64_t c, int64_t at, int64_t run) {
            const int64_t row = y + sweep.taps[t].y, column = x + sweep.taps[t].x;
            if (row < 0 || row >= height || column < 0 || column >= width) {
              std::fill_n(to + at, run, 0.0f);
            } else {
              widen(source + ((image * height + row) * width + column) * channels + c, run,
                    to + at);
            }
          });
        }
        return gemm::Rows<gemm::Float32>{scratch, steps};
      },
      [&](int64_t column, int64_t step, int64_t steps, float* to) {
        if (result_channels - column < gemm::kColumns)
          std::fill_n(to, steps * gemm::kColumns, 0.0f);
        for_each_run(channels, step, steps, [&](int64_t t, int64_t c, int64_t at, int64_t run) {
          pack_run(sweep.taps[t].window, c, column, run, to + at * gemm::kColumns);
        });
      },
      [&](int64_t begin, int64_t count, int64_t column, const float* c) {
        for (int64_t r = 0; r < count; ++r) {
          const int64_t image = (begin + r) / pixels, pixel = (begin + r) % pixels;
          finish(image, sweep.first_y + pixel / sweep.columns * sweep.spread,
                 sweep.first_x + pixel % sweep.columns * sweep.spread, column,
                 c + r * gemm::kColumns);
        }
      });
}

// y, from a weight that is not packed.
template <typename T>
void forward(const Shape& s, const T* x, const T* weight, const Added<T>& added, T* y) {
  const Weight<T> w{weight, s.kernel_height, s.kernel_width, s.channels};
  for (const Sweep& sweep : sweeps_of_result(s)) {
    multiply_sweep(
        sweep, x, s.images, s.height >> s.upsample, s.width >> s.upsample, s.channels,
        s.out_channels,
        [&](const Window& window, int64_t channel, int64_t column, int64_t count, float* to) {
          const auto load = [&](int64_t i, int64_t j, auto lanes) __attribute__((always_inline)) {
            return w.load(column + i, window, channel + j, lanes);
          };
          simd::transpose(load, std::min<int64_t>(gemm::kColumns, s.out_channels - column), count,
                          to, gemm::kColumns);
        },
        [&](int64_t image, int64_t row, int64_t col, int64_t column, const float* sums) {
          const int64_t end = std::min<int64_t>(column + gemm::kColumns, s.out_channels);
          const int64_t pixel = image * s.pixels() + row * s.out_width + col;
          simd::for_each_vector(column, end, [&](int64_t o, auto lanes) {
            const Vec sum = simd::load(sums + (o - column));
            simd::store(y + pixel * s.out_channels + o,
                        finished(added, s, sum, image, pixel, o, lanes), lanes);
          });
        });
  }
}

// dx as x lies. Pixels that no tap meets are not written.
template <typename T>
void input_gradient(const Shape& s, const T* dy, const T* weight, T* dx) {
  const Weight<T> w{weight, s.kernel_height, s.kernel_width, s.channels};
  const int64_t height = s.height >> s.upsample, width = s.width >> s.upsample;
  for (const Sweep& sweep : sweeps_of_input_gradient(s)) {
    if (sweep.taps.empty()) continue;
    multiply_sweep(
        sweep, dy, s.images, s.out_height, s.out_width, s.out_channels, s.channels,
        [&](const Window& window, int64_t channel, int64_t column, int64_t count, float* to) {
          if (window.bottom - window.top == 1 && window.right - window.left == 1) {
            const int64_t tap = window.top * s.kernel_width + window.left;
            const int64_t stride = s.kernel_height * s.kernel_width * s.channels;
            return gemm::copy_panel(weight + channel * stride + tap * s.channels + column, stride,
                                    count, s.channels - column, to);
          }
          const int64_t end = std::min<int64_t>(column + gemm::kColumns, s.channels);
          for (int64_t o = channel; o < channel + count; ++o, to += gemm::kColumns) {
            simd::for_each_vector(column, end, [&](int64_t c, auto lanes) {
              simd::store(to + (c - column), w.load(o, window, c, lanes));
            });
          }
        },
        [&](int64_t image, int64_t row, int64_t col, int64_t column, const float* sums) {
          const int64_t end = std::min<int64_t>(column + gemm::kColumns, s.channels);
          T* pixel = dx + ((image * height + row) * width + col) * s.channels;
          simd::for_each_vector(column, end, [&](int64_t c, auto lanes) {
            simd::store(pixel + c, simd::load(sums + (c - column)), lanes);
          });
        });
  }
}

// dW: (out_channels, kernel_height, kernel_width, channels).
template <typename T>
void weight_gradient(const Shape& s, const T* dy, const T* x, T* dw) {
  const int64_t width = s.kernel_height * s.kernel_width * s.channels;
  gemm::multiply_packing(
      {s.out_channels, width, s.images * s.pixels()},
      [&](int64_t begin, int64_t count, int64_t step, int64_t steps, gemm::Float32* scratch) {
        return gemm::transposed_rows(dy + step * s.out_channels + begin, s.out_channels, count,
                                     steps, scratch);
      },
      [&](int64_t column, int64_t step, int64_t steps, float* to) {
        const int64_t columns = std::min<int64_t>(gemm::kColumns, width - column);
        if (columns < gemm::kColumns) std::fill_n(to, steps * gemm::kColumns, 0.0f);
        for_each_run(
            s.channels, column, columns, [&](int64_t t, int64_t c, int64_t at, int64_t run) {
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
            });
      },
      gemm::store_to(dw, width));
}

}  // namespace sdfast::conv2d::direct
