// Convolution to few channels, as the last ones of a decoder and of a U-Net are.
//
// Algorithm. A panel of the micro-kernel of cpu_gemm.h would hold these few channels and else
// nothing. Here the lanes go along K: what a row of the kernel covers, taps x channels, is one
// piece of x and one of the weight. Some pixels by up to four channels of y are summed in
// registers, and at the end of each chain a sum's lanes are added up. Where the kernel reaches
// beyond the image, its pieces are shorter. Bytes: x once from memory, and once a row of the kernel
// from L2; y. Limit: fused multiply-adds. Every element is added up in one order: the result does
// not depend on the number of threads.
#pragma once

#include "conv2d_cpu.h"
#include "cpu_weights.h"

namespace sdfast::conv2d::few {

using simd::kLanes;

constexpr int64_t kFewChannels = 8;  // of y
// As many sums as the registers hold beside a vector of each kernel and one of x.
constexpr int kPixels = kLanes == 16 ? 6 : 2, kKernels = 4;

// Whether this serves: it is faster where a kernel's row fills vectors.
inline bool suit(const Shape& s) {
  return !s.upsample && s.out_channels <= kFewChannels && s.kernel_width * s.channels >= 2 * kLanes;
}

// What the kernels cover of x: `rows` pieces of `values`.
template <typename T>
struct Cover {
  const T *x, *weight;  // of the first pixel and kernel
  int64_t rows, values;
  int64_t x_row, weight_row;  // from one piece to the next
  int64_t pixel, kernel;      // from one pixel and kernel to the next
};

// sums[p * kFewChannels + o] += kernel o over pixel p, for kP pixels and kO kernels.
template <int kP, int kO, typename Operand, typename T>
inline __attribute__((noinline)) void multiply(Cover<T> c, float* sums) {
  constexpr int64_t kStepValues = kLanes * Operand::kDepth;
  constexpr int64_t kChainValues = gemm::kChain * kStepValues;
  Vec chains[kP][kO] = {};
  int64_t chained = 0;  // values
  const auto add_up = [&]() __attribute__((always_inline)) {
    for (int p = 0; p < kP; ++p) {
      for (int o = 0; o < kO; ++o) {
        sums[p * kFewChannels + o] += simd::sum(chains[p][o]);
        chains[p][o] = Vec{};
      }
    }
    chained = 0;
  };
  const auto step = [&](const auto& load) __attribute__((always_inline)) {
    Vec kernels[kO];
    for (int o = 0; o < kO; ++o) kernels[o] = load(c.weight + o * c.kernel);
    for (int p = 0; p < kP; ++p) {
      const Vec x = load(c.x + p * c.pixel);
      for (int o = 0; o < kO; ++o) {
        chains[p][o] = gemm::multiply_add(chains[p][o], x, kernels[o], Operand());
      }
    }
  };
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t k = 0; k < c.values;) {
      const int64_t end = std::min(c.values, k + kChainValues);
      if (chained + end - k > kChainValues) add_up();
      chained += end - k;
      for (; k + kStepValues <= end; k += kStepValues) {
        step([&](const T* from)
                 __attribute__((always_inline)) { return gemm::load_whole(Operand(), from + k); });
      }
      if (k < end) {
        step([&](const T* from) { return gemm::load_steps(Operand(), from + k, 0, end - k); });
        k = end;
      }
    }
    c.x += c.x_row;
    c.weight += c.weight_row;
  }
  add_up();
}

// All kernels, kKernels at a time.
template <int kP, typename Operand, typename T>
void multiply_all(Cover<T> c, int64_t kernels, float* sums) {
  for (; kernels >= kKernels; kernels -= kKernels) {
    multiply<kP, kKernels, Operand>(c, sums);
    c.weight += kKernels * c.kernel;
    sums += kKernels;
  }
  if (kernels == 3) multiply<kP, 3, Operand>(c, sums);
  if (kernels == 2) multiply<kP, 2, Operand>(c, sums);
  if (kernels == 1) multiply<kP, 1, Operand>(c, sums);
}

// One row of y.
template <typename Operand, typename T>
void run_row(const Shape& s, int64_t image, int64_t row, const T* x, const T* weight,
             const Added<T>& added, T* y) {
  const int64_t top = row * s.stride - s.top;
  const int64_t first_row = std::clamp<int64_t>(-top, 0, s.kernel_height);
  const int64_t end_row = std::clamp(s.height - top, first_row, s.kernel_height);
  const int64_t kernel_row = s.kernel_width * s.channels;
  const int64_t first_pixel = (image * s.out_height + row) * s.out_width;
  for (int64_t column = 0; column < s.out_width;) {
    const int64_t left = column * s.stride - s.left;
    const int64_t last = left + (kPixels - 1) * s.stride;
    const bool whole = left >= 0 && last + s.kernel_width <= s.width;
    // Columns of the kernel that lie inside the image.
    const int64_t first_column = std::clamp<int64_t>(-left, 0, s.kernel_width);
    const int64_t end_column = std::clamp(s.width - left, first_column, s.kernel_width);
    const int64_t inside = (end_column - first_column) * s.channels;
    const Cover<T> cover{x + s.offset(image, top + first_row, left + first_column),
                         weight + first_row * kernel_row + first_column * s.channels,
                         end_row - first_row,
                         inside,
                         s.width * s.channels,
                         kernel_row,
                         s.stride * s.channels,
                         s.kernel_height * kernel_row};
    float sums[kPixels * kFewChannels] = {};
    if (whole) {
      multiply_all<kPixels, Operand>(cover, s.out_channels, sums);
    } else {
      multiply_all<1, Operand>(cover, s.out_channels, sums);
    }
    const int64_t count = whole ? kPixels : 1;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t pixel = first_pixel + column + p;
      simd::for_each_vector(0, s.out_channels, [&](int64_t o, auto lanes) {
        const Vec sum = simd::load(sums + p * kFewChannels + o, lanes);
        simd::store(y + pixel * s.out_channels + o, finished(added, s, sum, image, pixel, o, lanes),
                    lanes);
      });
    }
    column += count;
  }
}

// weight: (out_channels, kernel_height, kernel_width, channels).
template <typename Operand, typename T>
void run(const Shape& s, const T* x, const T* weight, const Added<T>& added, T* y) {
  constexpr int64_t kBand = 16;  // rows: what one reads, the next finds in L2
  const int64_t rows = s.images * s.out_height;
  const int64_t even = rows / (4 * torch::stable::get_num_threads());
  const int64_t band = std::clamp<int64_t>(even, 1, kBand);
  gemm::share((rows + band - 1) / band, [&](const auto& next) {
    for (int64_t item; (item = next()) >= 0;) {
      for (int64_t i = item * band; i < std::min((item + 1) * band, rows); ++i) {
        run_row<Operand>(s, i / s.out_height, i % s.out_height, x, weight, added, y);
      }
    }
  });
}

}  // namespace sdfast::conv2d::few
