// Convolution of any kernel and stride as a matrix product, fp32 or pairs of bf16.
//
// Algorithm. y's pixels are rows, taps x channels are K. The rows of a block are gathered part by
// part of K into L2, a copy of C values a pixel and tap, and multiplied as in cpu_gemm.h; zeros
// stand for what lies outside. A 3x3 convolution after a nearest-2x upsample is four 2x2
// convolutions, one for each parity of y's rows and columns, whose weights are sums of the 3x3's:
// 4/9 of the multiplications. Bytes: x once a tap from cache, W and the residual read, y written.
// Limit: fused multiply-adds.
#pragma once

#include <vector>

#include "conv2d_cpu.h"

namespace sdfast::conv2d::direct {

// The taps of one product, and which of y's pixels it gives.
struct Phase {
  struct Tap {
    int64_t y, x;  // from the pixel of x under y's first one
  };
  std::vector<Tap> taps;
  int64_t rows, columns;  // of its pixels, a step of `spread` apart in y
  int64_t first_y, first_x, spread;
};

// One phase, or the four of an upsampling convolution (3x3, padding 1).
inline std::vector<Phase> phases_of(const Shape& s) {
  std::vector<Phase> phases;
  if (!s.upsample) {
    Phase whole{{}, s.out_height, s.out_width, 0, 0, 1};
    for (int64_t a = 0; a < s.kernel_height; ++a) {
      for (int64_t b = 0; b < s.kernel_width; ++b) whole.taps.push_back({a - s.top, b - s.left});
    }
    return {whole};
  }
  for (int64_t py = 0; py < 2; ++py) {
    for (int64_t px = 0; px < 2; ++px) {
      Phase phase{{}, s.out_height / 2, s.out_width / 2, py, px, 2};
      for (int64_t a = 0; a < 2; ++a) {
        for (int64_t b = 0; b < 2; ++b) phase.taps.push_back({a + py - 1, b + px - 1});
      }
      phases.push_back(phase);
    }
  }
  return phases;
}

// How K is laid out: parts of `taps` taps of `chunk` steps, or of one chunk of a tap's channels.
struct Depth {
  int64_t chunk, chunks, taps, parts;

  template <typename Operand>
  static Depth of(int64_t channels, int64_t taps) {
    const int64_t steps = gemm::steps_of(Operand::kDepth, channels);
    Depth d;
    d.chunks = (steps + gemm::kPartSteps - 1) / gemm::kPartSteps;
    d.chunk = (steps + d.chunks - 1) / d.chunks;
    const int64_t fit = std::max<int64_t>(1, gemm::kPartSteps / d.chunk);
    const int64_t groups = (taps + fit - 1) / fit;
    d.taps = d.chunks > 1 ? 1 : (taps + groups - 1) / groups;
    d.parts = d.chunks * ((taps + d.taps - 1) / d.taps);
    return d;
  }
  int64_t part() const { return taps * chunk; }
  int64_t steps() const { return parts * part(); }
};

template <typename Operand>
int64_t packed_size(int64_t out_channels, int64_t channels, int64_t taps) {
  const gemm::Shape shape{0, out_channels, Depth::of<Operand>(channels, taps).steps()};
  return gemm::packed_size<Operand>(shape);
}

// Packs one phase; value(o, c, t) is the weight of a channel pair and tap.
template <typename Operand, typename T, typename Value>
void pack(int64_t out_channels, int64_t channels, int64_t taps, const Value& value, Operand* out) {
  const Depth depth = Depth::of<Operand>(channels, taps);
  const int64_t panels = (out_channels + gemm::kColumns - 1) / gemm::kColumns;
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> row(channels);
    for (int64_t panel = begin; panel < end; ++panel) {
      Operand* to = out + panel * depth.steps() * gemm::kColumns;
      std::fill_n(to, depth.steps() * gemm::kColumns, Operand());
      for (int64_t j = 0; j < gemm::kColumns; ++j) {
        const int64_t o = panel * gemm::kColumns + j;
        for (int64_t t = 0; o < out_channels && t < taps; ++t) {
          for (int64_t c = 0; c < channels; ++c) row[c] = value(o, c, t);
          const int64_t steps = gemm::steps_of(Operand::kDepth, channels);
          for (int64_t step = 0; step < steps; ++step) {
            // chunks > 1 means one tap a part, so that both layouts agree: tap by tap.
            const int64_t at = t * depth.chunks * depth.chunk + step;
            gemm::set_operand(to[at * gemm::kColumns + j], row.data(), step, channels);
          }
        }
      }
    }
  });
}

// Copies the `depth.part()` steps of one pixel that begin with this part.
template <typename T, typename Operand>
void gather(const Shape& s, const Phase& phase, const Depth& depth, const T* x, int64_t image,
            int64_t y, int64_t column, int64_t part, Operand* to) {
  constexpr int kDepth = Operand::kDepth;
  const int64_t first_tap = part / depth.chunks * depth.taps;
  const int64_t from = part % depth.chunks * depth.chunk * kDepth;  // channel
  const int64_t count = std::min(depth.chunk * kDepth, s.channels - from);
  for (int64_t i = 0; i < depth.taps; ++i, to += depth.chunk) {
    const int64_t t = first_tap + i;
    const bool there = t < static_cast<int64_t>(phase.taps.size());
    // The coordinates before the upsample, where there is one.
    const int64_t height = s.height >> s.upsample, width = s.width >> s.upsample;
    const int64_t row = there ? y * s.stride + phase.taps[t].y : -1;
    const int64_t col = there ? column * s.stride + phase.taps[t].x : -1;
    if (row < 0 || row >= height || col < 0 || col >= width) {
      std::fill_n(to, depth.chunk, Operand());
      continue;
    }
    const T* values = x + ((image * height + row) * width + col) * s.channels + from;
    std::fill(to + count / kDepth, to + depth.chunk, Operand());
    if constexpr (sizeof(T) * kDepth == sizeof(Operand)) {
      std::memcpy(static_cast<void*>(to), values, count * sizeof(T));
    } else {
      simd::for_each_vector(0, count, [&](int64_t c, auto lanes) {
        simd::store(&to[c].value, simd::load(values + c, lanes), lanes);
      });
    }
  }
}

// packed: the phases one after the other.
// From sums of pixels of one phase to y.
template <typename T>
struct Epilogue {
  const Shape& shape;
  const Phase& phase;
  const Added<T>& added;
  T* y;

  struct Pixel {
    int64_t image, index;  // over all images
  };
  Pixel pixel(int64_t row) const {
    const int64_t pixels = phase.rows * phase.columns, image = row / pixels, i = row % pixels;
    const int64_t y = phase.first_y + i / phase.columns * phase.spread;
    const int64_t x = phase.first_x + i % phase.columns * phase.spread;
    return {image, image * shape.pixels() + y * shape.out_width + x};
  }

  void operator()(int64_t begin, int64_t count, int64_t column, const float* c) const {
    const int64_t end = std::min<int64_t>(column + gemm::kColumns, shape.out_channels);
    for (int64_t r = 0; r < count; ++r) {
      const Pixel to = pixel(begin + r);
      simd::for_each_vector(column, end, [&](int64_t o, auto lanes) {
        const Vec sum = simd::load(c + r * gemm::kColumns + (o - column));
        simd::store(y + to.index * shape.out_channels + o,
                    finished(added, shape, sum, to.image, to.index, o, lanes), lanes);
      });
    }
  }
};

template <typename T, typename Operand>
void run(const Shape& s, const T* x, const Operand* packed, const Added<T>& added, T* y) {
  for (const Phase& phase : phases_of(s)) {
    const int64_t taps = static_cast<int64_t>(phase.taps.size());
    const Depth depth = Depth::of<Operand>(s.channels, taps);
    const int64_t pixels = phase.rows * phase.columns;
    const gemm::Shape shape{s.images * pixels, s.out_channels, depth.steps(), depth.part()};
    // A 1x1 convolution's rows lie in x as they are needed.
    const bool in_place = taps == 1 && s.stride == 1 && s.left == 0 && s.top == 0 &&
                          pixels == s.height * s.width && s.channels % Operand::kDepth == 0 &&
                          sizeof(T) * Operand::kDepth == sizeof(Operand);
    const auto rows_of = [&](int64_t begin, int64_t count, int64_t step, int64_t steps,
                             Operand* scratch) {
      if (in_place && step + steps <= s.channels / Operand::kDepth) {
        const T* row = x + begin * s.channels + step * Operand::kDepth;
        return gemm::Rows<Operand>{reinterpret_cast<const Operand*>(row),
                                   s.channels / Operand::kDepth};
      }
      for (int64_t r = 0; r < count; ++r) {
        const int64_t image = (begin + r) / pixels, pixel = (begin + r) % pixels;
        gather(s, phase, depth, x, image, pixel / phase.columns, pixel % phase.columns,
               step / depth.part(), scratch + r * steps);
      }
      return gemm::Rows<Operand>{scratch, steps};
    };
    gemm::multiply<Operand>(shape, packed, rows_of, Epilogue<T>{s, phase, added, y});
    packed += gemm::packed_size<Operand>(shape);
  }
}

}  // namespace sdfast::conv2d::direct
