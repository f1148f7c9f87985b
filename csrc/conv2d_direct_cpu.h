// Convolution of any kernel and stride as a matrix product, fp32, split or not, or pairs of bf16.
//
// Algorithm. y's pixels are tokens, taps x channels are K (cpu_weights.h): a channels-last weight
// is read where it lies, and panels of pixels are gathered into L2, a copy of C values a pixel and
// tap; zeros stand for what lies outside. Many pixels of a 1x1 convolution are read where they lie
// (cpu_many_tokens.h). A 3x3 convolution after a nearest-2x upsample is four 2x2 convolutions, one
// for each parity of y's rows and columns, whose weights are sums of the 3x3's: 4/9 of the
// multiplications. With AMX bf16 and split fp32 are multiplied on tiles (cpu_tiles.h).
// Bytes: x once a tap from cache, W and the residual read, y written. Limit: fused multiply-adds.
#pragma once

#include "conv2d_cpu.h"
#include "cpu_many_tokens.h"
#include "cpu_tiles.h"

namespace sdfast::conv2d::direct {

// From sums of pixels of one phase to y.
template <typename T>
struct Epilogue {
  const Shape& shape;
  const Phase& phase;
  const Added<T>& added;
  T* y;
  bool streamed = false;  // whether y is written past the caches

  // Calls work(t, image, pixel of y) for t < count: divisions are slow, so that there are three.
  template <typename Work>
  void for_each_pixel(int64_t token, int64_t count, const Work& work) const {
    const int64_t pixels = phase.rows * phase.columns;
    int64_t image = token / pixels, row = token % pixels / phase.columns;
    int64_t column = token % phase.columns;
    for (int64_t t = 0; t < count; ++row, column = 0) {
      if (row == phase.rows) row = 0, ++image;
      int64_t pixel = phase.pixel(shape, image, row, column);
      for (; column < phase.columns && t < count; ++column, ++t, pixel += phase.spread) {
        work(t, image, pixel);
      }
    }
  }

  // Fetches what the sums of these rows will be added to and written to.
  void fetch(int64_t token, int64_t count, int64_t row, int64_t rows) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for_each_pixel(token, count, [&](int64_t, int64_t, int64_t pixel) {
      for (int64_t o = row; o < row + rows; o += kLine) {
        const int64_t at = pixel * shape.out_channels + o;
        if (!streamed) simd::prefetch_for_write(y + at);
        if (added.residual) simd::prefetch(added.residual + at);
      }
    });
  }

  void operator()(int64_t token, int64_t count, int64_t row, int64_t rows,
                  const gemm::Sums& sums) const {
    for_each_pixel(token, count, [&](int64_t t, int64_t image, int64_t pixel) {
      simd::for_each_vector(row, row + rows, [&](int64_t o, auto lanes) {
        const Vec sum = simd::load(sums.values + t * sums.stride + (o - row));
        const Vec value = finished(added, shape, sum, image, pixel, o, lanes);
        T* to = y + pixel * shape.out_channels + o;
        if (streamed) {
          simd::stream_part(to, value, lanes);
        } else {
          simd::store(to, value, lanes);
        }
      });
    });
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
                            channels, to);
      to += gemm::steps_of(Operand::kDepth, channels) * gemm::kColumns;
      piece = {piece.begin + channels, piece.count - channels};
    }
  }
};

// Whether y's pixels are products of the weight and x's own, in their order.
inline bool is_pixel_by_pixel(const Shape& s, const Phase& phase) {
  return phase.kernel_height * phase.kernel_width == 1 && s.stride == 1 && phase.rows == s.height &&
         phase.columns == s.width && phase.top == 0 && phase.left == 0;
}

#if defined(SDFAST_TILES)
// The pixels of a phase as tokens on AMX tiles: bands of rows of x are copied, with zeros for what
// lies outside, so that a tap is the same step away from every token.
template <typename T>
struct Bands {
  const Shape& shape;
  const Phase& phase;
  const T* x;

  int64_t tokens() const { return shape.images * phase.rows * phase.columns; }
  int64_t rows() const {
    constexpr int64_t kTokens = 512, kLeast = 4;
    return std::min(std::max((kTokens + phase.columns - 1) / phase.columns, kLeast), phase.rows);
  }
  int64_t image_blocks() const { return (phase.rows + rows() - 1) / rows(); }
  int64_t blocks() const { return shape.images * image_blocks(); }
  // In the copy: columns of a row, values from a pixel to the next.
  int64_t columns() const { return (phase.columns - 1) * shape.stride + phase.kernel_width; }
  int64_t pixel() const { return gemm::tiles::copied_values<T>(shape.channels); }
  int64_t copied() const {
    const int64_t height = (rows() - 1) * shape.stride + phase.kernel_height;
    return (height * columns() + gemm::tiles::kTileRows * shape.stride) * pixel();
  }
  // Rows that are no whole tiles are one line with the columns between them.
  bool by_row() const { return shape.stride > 1 || phase.columns % gemm::tiles::kTileRows == 0; }
  int64_t most_tiles() const { return band(0, rows(), nullptr).all_tiles(); }
  gemm::tiles::Product product() const {
    gemm::tiles::Product p{shape.out_channels, shape.channels,      phase.kernel_height,
                           phase.kernel_width, columns() * pixel(), pixel()};
    p.overlaps = p.taps() > 1;
    return std::is_same_v<T, float> ? p.splits() : p;
  }

  gemm::tiles::Lines band(int64_t token, int64_t count, const simd::BFloat16* copy) const {
    const int64_t width = phase.columns, row = shape.stride * columns() * pixel();
    if (by_row()) {
      return {copy, count, width, row, shape.stride * pixel(), width, width, token};
    }
    return {copy, 1, (count - 1) * columns() + width, 0, pixel(), columns(), width, token};
  }

  gemm::tiles::Lines lines(int64_t block, simd::BFloat16* copy) const {
    const int64_t image = block / image_blocks(), part = block % image_blocks();
    const int64_t first = part * phase.rows / image_blocks();
    const int64_t count = (part + 1) * phase.rows / image_blocks() - first;
    simd::BFloat16* to = copy;
    for (int64_t y = 0; y < (count - 1) * shape.stride + phase.kernel_height; ++y) {
      const int64_t row = first * shape.stride + phase.top + y;
      for (int64_t x_ = 0; x_ < columns(); ++x_, to += pixel()) {
        const int64_t column = phase.left + x_;
        if (shape.inside(row, column)) {
          gemm::tiles::copy_values(x + shape.offset(image, row, column), shape.channels, to);
        } else {
          std::memset(static_cast<void*>(to), 0, pixel() * sizeof *to);
        }
      }
    }
    return band((image * phase.rows + first) * phase.columns, count, copy);
  }
};

// y's pixels of one phase. weight: as gemm::tiles::multiply_weights takes it.
template <typename T, typename W>
void run_phase(const Shape& s, const Phase& phase, const T* x, const W& weight,
               const Added<T>& added, T* y) {
  const bool streamed = gemm::tiles::streams(y, s.images * s.pixels(), s.out_channels);
  const Epilogue<T> epilogue{s, phase, added, y, streamed};
  const Bands<T> bands{s, phase, x};
  const gemm::tiles::Product p = bands.product();
  if (is_pixel_by_pixel(s, phase)) {
    const gemm::tiles::Tokens<T> tokens{x, bands.tokens(), s.channels, s.channels};
    gemm::tiles::multiply_weights(p, weight, tokens, epilogue);
  } else {
    gemm::tiles::multiply_weights(p, weight, bands, epilogue);
  }
}

// weight: for each phase (out_channels, taps, channels), or that packed.
template <typename T>
void run_tiles(const Shape& s, const T* x, gemm::tiles::Weight<T> weight, const Added<T>& added,
               T* y) {
  for (const Phase& phase : phases_of(s)) {
    run_phase(s, phase, x, weight, added, y);
    const gemm::tiles::Product p = Bands<T>{s, phase, x}.product();
    if (weight.packed) {
      weight.packed += p.packed();
    } else {
      weight.values += p.rows * p.dim();
    }
  }
}
#endif

// weight: for each phase (out_channels, taps, channels).
template <typename Operand, typename T>
void run(const Shape& s, const T* x, const T* weight, const Added<T>& added, T* y) {
#if defined(SDFAST_TILES)
  if constexpr (std::is_same_v<T, simd::BFloat16>) return run_tiles<T>(s, x, {weight}, added, y);
#endif
  const std::vector<T> zeros(s.channels);
  for (const Phase& phase : phases_of(s)) {
    const int64_t taps = phase.kernel_height * phase.kernel_width, dim = taps * s.channels;
    const int64_t chunk = gemm::even_part<Operand>(s.channels);
    const int64_t steps = gemm::steps_of(Operand::kDepth, s.channels);
    const int64_t fit = std::clamp<int64_t>(gemm::kPartSteps / steps, 1, taps);
    const int64_t part = fit > 1 ? fit * s.channels : chunk;
    const gemm::Product product{s.images * phase.rows * phase.columns, s.out_channels, dim, part,
                                std::max(part, s.channels)};
    Epilogue<T> epilogue{s, phase, added, y};
    if (is_pixel_by_pixel(s, phase) && gemm::are_many_tokens<Operand>(product, gemm::kManyTimes)) {
      epilogue.streamed = gemm::streams_past_l3(y, product.tokens, s.out_channels);
      const gemm::PackRows<T> pack{product, weight};
      gemm::multiply_many_tokens<Operand>(product, x, s.channels, pack, epilogue);
    } else {
      using Piece = gemm::Product::Piece;
      const Pixels<T> pixels{s, phase, x, zeros.data()};
      gemm::multiply_weights<Operand>(
          product, weight,
          [&](int64_t token, int64_t count, Piece piece, Operand* to) {
            pixels.pack(token, count, piece, to);
          },
          epilogue);
    }
    weight += s.out_channels * dim;
  }
}

}  // namespace sdfast::conv2d::direct
