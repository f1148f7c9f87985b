// What the algorithms of conv2d on CPU share: shapes and what follows the sums.
#pragma once

#include <vector>

#include "cpu_gemm.h"
#include "cpu_math.h"

namespace sdfast::conv2d {

using simd::Vec;

// x: (N, height, width, C), y: (N, out_height, out_width, out_channels), both dense.
struct Shape {
  int64_t images, height, width, channels;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width, stride;
  int64_t left, top;  // zeros
  bool upsample;      // x's pixels count four times each; 3x3, padding 1
  int64_t pixels() const { return out_height * out_width; }
  bool inside(int64_t y, int64_t x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  // Where the channels of a pixel begin in x.
  SDFAST_INLINE int64_t offset(int64_t image, int64_t y, int64_t x) const {
    return ((image * height + y) * width + x) * channels;
  }
};

// One of the convolutions that together give y: which of its pixels, and of which kernel.
struct Phase {
  int64_t rows, columns;             // of its pixels, `spread` apart in y
  int64_t first_y, first_x, spread;  // in y
  int64_t top, left;                 // in x, under its first pixel's first tap
  int64_t kernel_height, kernel_width;

  // Of pixel (row, column), counted over all images of y.
  int64_t pixel(const Shape& s, int64_t image, int64_t row, int64_t column) const {
    return image * s.pixels() + (first_y + row * spread) * s.out_width + first_x + column * spread;
  }
};

// One phase; or four of an upsampling convolution, one for each parity of y's rows and columns,
// whose 2x2 kernels are sums of the 3x3's: nearest-2x repeats what the others would multiply.
inline std::vector<Phase> phases_of(const Shape& s) {
  if (!s.upsample) {
    return {{s.out_height, s.out_width, 0, 0, 1, -s.top, -s.left, s.kernel_height, s.kernel_width}};
  }
  std::vector<Phase> phases;
  for (int64_t y = 0; y < 2; ++y) {
    for (int64_t x = 0; x < 2; ++x) {
      phases.push_back({s.out_height / 2, s.out_width / 2, y, x, 2, y - 1, x - 1, 2, 2});
    }
  }
  return phases;
}

// What is added to the sums before they are rounded to T. Any may be null.
template <typename T>
struct Added {
  const T* bias;            // (out_channels)
  const T* time_embedding;  // (N, out_channels)
  const T* residual;        // as y
};

// sum + bias + time embedding + residual for the lanes from `channel` on of one pixel; `pixel`
// counts over all images.
template <typename T, typename Lanes>
SDFAST_INLINE Vec finished(const Added<T>& added, const Shape& shape, Vec sum, int64_t image,
                           int64_t pixel, int64_t channel, Lanes lanes) {
  if (added.bias) sum += simd::load(added.bias + channel, lanes);
  if (added.time_embedding) {
    sum += simd::load(added.time_embedding + image * shape.out_channels + channel, lanes);
  }
  if (added.residual)
    sum += simd::load(added.residual + pixel * shape.out_channels + channel, lanes);
  return sum;
}

}  // namespace sdfast::conv2d
