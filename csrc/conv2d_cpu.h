// What the algorithms of conv2d on CPU share: shapes and what follows the sums.
#pragma once

#include "cpu_gemm.h"
#include "cpu_math.h"

namespace sdfast::conv2d {

using simd::Vec;

// x: (N, H, W, C), y: (N, out_height, out_width, out_channels), both dense.
struct Shape {
  int64_t images, height, width, channels;  // height and width after the upsample
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width, stride;
  int64_t left, top;  // zeros
  int upsample;       // 1 where x is half as high and wide and each of its pixels counts four times
  int64_t pixels() const { return out_height * out_width; }
  // Where the channels of a pixel begin in x.
  SDFAST_INLINE int64_t offset(int64_t image, int64_t y, int64_t x) const {
    const int64_t row = image * (height >> upsample) + (y >> upsample);
    return (row * (width >> upsample) + (x >> upsample)) * channels;
  }
  bool inside(int64_t y, int64_t x) const { return y >= 0 && y < height && x >= 0 && x < width; }
};

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
