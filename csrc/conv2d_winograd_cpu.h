// 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3) or F(2x2, 3x3) in fp32; after a nearest-2x
// upsample, four 2x2 ones by F(4x4, 2x2) or F(2x2, 2x2).
//
// Algorithm (Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks"). (1) Each
// patch of x, 6x6 for F(4x4, 3x3), is transformed into as many numbers ("points") a channel. (2)
// For each point a matrix product over the channels, tiles x out_channels. (3) Its sums are
// transformed into 4x4 or 2x2 pixels of y. Multiplications: 1/4 or 1/2.25 of the direct
// algorithm's. Where L3 holds the weights beside all else and tiles are many, each thread takes
// rounds of its own through (1), (2) and (3), and what lies between the steps stays near its core.
// Elsewhere all threads take one round together; what lies between the steps stays in L3, and where
// the weights are larger than L3 a round holds more, for they are read once a round. Bytes: x, the
// packed weights once a round, y; the transforms written and read in L2 and L3. Limit: fused
// multiply-adds; the weights' bytes where tiles are few. The transforms cancel, so it rounds more
// than the direct algorithm, F(4x4) most: tests/test_conv2d.py says how much.
#pragma once

#include "conv2d_cpu.h"
#include "cpu_scratch.h"

namespace sdfast::conv2d::winograd {

// F(4x4, 3x3): interpolation at 0, 1, -1, 2, -2 and infinity. G is scaled to integers and A holds
// the divisors: where the weight is transformed at each call (conv2d_winograd_unpacked_cpu.h), that
// is most of what all transforms take.
struct F4x4Of3x3 {
  static constexpr int kTile = 4, kKernel = 3, kPatch = 6, kPoints = 36;
  static constexpr double kG[kPatch][kKernel] = {{1, 0, 0}, {1, 1, 1},  {1, -1, 1},
                                                 {1, 2, 4}, {1, -2, 4}, {0, 0, 1}};

  // out = Bᵀ d.
  static SDFAST_INLINE void transform_input(const Vec (&d)[kPatch], Vec (&out)[kPatch]) {
    const Vec even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1];
    const Vec near = d[4] - d[2], far = 2.0f * (d[3] - d[1]);
    out[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
    out[1] = even + odd;
    out[2] = even - odd;
    out[3] = near + far;
    out[4] = near - far;
    out[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
  }

  // out = Aᵀ m.
  static SDFAST_INLINE void transform_output(const Vec (&m)[kPatch], Vec (&out)[kTile]) {
    const Vec sum1 = (m[1] + m[2]) * (-1.0f / 6), difference1 = (m[1] - m[2]) * (-1.0f / 6);
    const Vec sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    out[0] = m[0] * 0.25f + sum1 + sum2 * (1.0f / 24);
    out[1] = difference1 + difference2 * (1.0f / 12);
    out[2] = sum1 + sum2 * (1.0f / 6);
    out[3] = difference1 + difference2 * (1.0f / 3) + m[5];
  }
};

// F(2x2, 3x3): interpolation at 0, 1, -1 and infinity.
struct F2x2Of3x3 {
  static constexpr int kTile = 2, kKernel = 3, kPatch = 4, kPoints = 16;
  static constexpr double kG[kPatch][kKernel] = {
      {1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};

  static SDFAST_INLINE void transform_input(const Vec (&d)[kPatch], Vec (&out)[kPatch]) {
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[3] - d[1];
  }

  static SDFAST_INLINE void transform_output(const Vec (&m)[kPatch], Vec (&out)[kTile]) {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] + m[3];
  }
};

// F(4x4, 2x2): interpolation at 0, 1, -1, 2 and infinity.
struct F4x4Of2x2 {
  static constexpr int kTile = 4, kKernel = 2, kPatch = 5, kPoints = 25;
  static constexpr double kG[kPatch][kKernel] = {
      {0.5, 0}, {-0.5, -0.5}, {-1.0 / 6, 1.0 / 6}, {1.0 / 6, 1.0 / 3}, {0, 1}};

  static SDFAST_INLINE void transform_input(const Vec (&d)[kPatch], Vec (&out)[kPatch]) {
    const Vec difference = d[3] - d[1];
    out[0] = 2.0f * (d[0] - d[2]) + difference;
    out[1] = d[3] - d[2] - 2.0f * d[1];
    out[2] = d[3] - 3.0f * d[2] + 2.0f * d[1];
    out[3] = difference;
    out[4] = d[4] - d[2] - 2.0f * difference;
  }

  static SDFAST_INLINE void transform_output(const Vec (&m)[kPatch], Vec (&out)[kTile]) {
    const Vec sum = m[1] + m[2], difference = m[1] - m[2];
    out[0] = m[0] + sum + m[3];
    out[1] = difference + 2.0f * m[3];
    out[2] = sum + 4.0f * m[3];
    out[3] = difference + 8.0f * m[3] + m[4];
  }
};

// F(2x2, 2x2): interpolation at 0, 1 and infinity.
struct F2x2Of2x2 {
  static constexpr int kTile = 2, kKernel = 2, kPatch = 3, kPoints = 9;
  static constexpr double kG[kPatch][kKernel] = {{1, 0}, {1, 1}, {0, 1}};

  static SDFAST_INLINE void transform_input(const Vec (&d)[kPatch], Vec (&out)[kPatch]) {
    out[0] = d[0] - d[1];
    out[1] = d[1];
    out[2] = d[2] - d[1];
  }

  static SDFAST_INLINE void transform_output(const Vec (&m)[kPatch], Vec (&out)[kTile]) {
    out[0] = m[0] + m[1];
    out[1] = m[1] + m[2];
  }
};

// The transform of a kernel, G g Gᵀ, in fp64.
template <typename F, typename Get>
void transform_kernel(const Get& g, double (&out)[F::kPoints]) {
  for (int i = 0; i < F::kPatch; ++i) {
    for (int j = 0; j < F::kPatch; ++j) {
      double sum = 0;
      for (int a = 0; a < F::kKernel; ++a) {
        for (int b = 0; b < F::kKernel; ++b) sum += F::kG[i][a] * g(a, b) * F::kG[j][b];
      }
      out[i * F::kPatch + j] = sum;
    }
  }
}

// Packed weights of one phase: (points, panels, channels, kColumns).
template <typename F>
int64_t packed_size(int64_t out_channels, int64_t channels) {
  const int64_t panels = (out_channels + gemm::kColumns - 1) / gemm::kColumns;
  return F::kPoints * panels * channels * gemm::kColumns;
}

// The tiles of a phase in all images, row by row.
struct Tiling {
  int64_t size, rows, columns, count;
  Tiling(const Shape& s, const Phase& phase, int64_t size)
      : size(size),
        rows((phase.rows + size - 1) / size),
        columns((phase.columns + size - 1) / size),
        count(s.images * rows * columns) {}
};

struct Position {
  int64_t image, row, column;  // of the tile's first pixel in its phase
  Position(const Tiling& t, int64_t tile)
      : image(tile / (t.rows * t.columns)),
        row(tile / t.columns % t.rows * t.size),
        column(tile % t.columns * t.size) {}
};

// The points of one tile for the channels [begin, end). v: of the first of them; from one point to
// the next `point_stride`.
template <typename F, typename T>
void transform_tile(const Shape& s, const Phase& phase, const T* x, const Position& at,
                    int64_t begin, int64_t end, int64_t point_stride, float* v) {
  constexpr int kPatch = F::kPatch;
  const int64_t top = at.row + phase.top, left = at.column + phase.left;
  const bool inside = s.inside(top, left) && s.inside(top + kPatch - 1, left + kPatch - 1);
  const T* first = x + s.offset(at.image, top, left);
  const auto transform = [&](auto load) {
    simd::for_each_vector(begin, end, [&](int64_t c, auto lanes) {
      Vec half[kPatch][kPatch];  // transformed along the columns
      for (int j = 0; j < kPatch; ++j) {
        Vec d[kPatch], out[kPatch];
        for (int i = 0; i < kPatch; ++i) {
          d[i] = load(i, j, c, lanes);
          // What the next tile reads beside it: rows too short for the hardware to see a stream.
          if (j < F::kTile) simd::prefetch(first + s.offset(0, i, kPatch + j) + c);
        }
        F::transform_input(d, out);
        for (int i = 0; i < kPatch; ++i) half[i][j] = out[i];
      }
      for (int i = 0; i < kPatch; ++i) {
        Vec out[kPatch];
        F::transform_input(half[i], out);
        for (int j = 0; j < kPatch; ++j) {
          float* to = v + (i * kPatch + j) * point_stride + c - begin;
          simd::store(to, out[j]);
          simd::prefetch_for_write(to + 4 * simd::kLanes);  // so many streams it does not see
        }
      }
    });
  };
  const auto value = [&](int i, int j, int64_t c, auto lanes) {
    return simd::load(first + s.offset(0, i, j) + c, lanes);
  };
  if (inside) return transform(value);
  transform([&](int i, int j, int64_t c, auto lanes) {
    return s.inside(top + i, left + j) ? value(i, j, c, lanes) : Vec{};
  });
}

// Whether a vector of T is half a line, so that a panel's two wait for each other to be streamed.
template <typename T>
constexpr bool kInLines = simd::kStreams<T> && sizeof(T) * gemm::kColumns == sizeof(Vec);

// The pixels of one tile for one panel of channels. m: from one point to the next `point_stride`.
template <typename F, typename T>
void finish_tile(const Shape& s, const Phase& phase, const Position& at, int64_t first_channel,
                 const float* m, int64_t point_stride, const Added<T>& added, T* y) {
  constexpr int kPatch = F::kPatch, kTile = F::kTile;
  const int64_t end = std::min<int64_t>(first_channel + gemm::kColumns, s.out_channels);
  const int64_t rows = std::min<int64_t>(kTile, phase.rows - at.row);
  const int64_t columns = std::min<int64_t>(kTile, phase.columns - at.column);
  const bool streams =
      simd::streams(y, s.images * s.pixels(), s.out_channels, simd::kStreamedBytes);
  [[maybe_unused]] alignas(Vec) T lines[kTile][kTile][gemm::kColumns];  // of what is narrower
  simd::for_each_vector(first_channel, end, [&](int64_t c, auto lanes) {
    const float* from = m + (c - first_channel);
    Vec half[kTile][kPatch];
    for (int j = 0; j < kPatch; ++j) {
      Vec sums[kPatch], out[kTile];
      for (int i = 0; i < kPatch; ++i) {
        const float* sum = from + (i * kPatch + j) * point_stride;
        sums[i] = simd::load(sum);
        simd::prefetch(sum + 2 * gemm::kColumns);  // of the next tile but one
      }
      F::transform_output(sums, out);
      for (int i = 0; i < kTile; ++i) half[i][j] = out[i];
    }
    for (int i = 0; i < rows; ++i) {
      Vec out[kTile];
      F::transform_output(half[i], out);
      const int64_t first = phase.pixel(s, at.image, at.row + i, at.column);
      for (int j = 0; j < columns; ++j) {
        const int64_t pixel = first + j * phase.spread;
        if (added.residual) {  // of the next tile
          simd::prefetch(added.residual + (pixel + kTile * phase.spread) * s.out_channels + c);
        }
        const Vec sum = finished(added, s, out[j], at.image, pixel, c, lanes);
        T* to = y + pixel * s.out_channels + c;
        if (!streams) {
          simd::store(to, sum, lanes);
        } else if constexpr (kInLines<T>) {
          simd::store(&lines[i][j][c - first_channel], sum, simd::FullVector());
        } else {
          simd::stream(to, sum, lanes);
        }
      }
    }
  });
  if constexpr (kInLines<T>) {
    if (!streams) return;
    for (int i = 0; i < rows; ++i) {
      const int64_t first = phase.pixel(s, at.image, at.row + i, at.column);
      for (int j = 0; j < columns; ++j) {
        Vec line;
        std::memcpy(&line, lines[i][j], sizeof line);
        const int64_t pixel = first + j * phase.spread;
        simd::stream(reinterpret_cast<float*>(y + pixel * s.out_channels + first_channel), line,
                     simd::FullVector());
      }
    }
  }
}

// How many tiles make a round, who takes it, how (2) is cut, and where its operands and sums lie.
struct Rounds {
  bool own;                           // each thread takes rounds of its own
  int64_t tiles, channels, panels;    // of a round; of x, a multiple of the lanes; of y
  int64_t input_stride, sums_stride;  // from one point to the next, never in the same cache set
  int64_t blocks;                     // of tiles, in L2

  Rounds(const Shape& s, const Tiling& tiling, int points, int64_t weight_bytes)
      : channels(simd::round_up(s.channels)),
        panels((s.out_channels + gemm::kColumns - 1) / gemm::kColumns) {
    constexpr int64_t kLeastBytes = 4 << 20, kMostBytes = 64 << 20, kFloat = sizeof(float);
    // Of a thread's own: near its core; read once a round by each, so from L3; to share evenly.
    constexpr int64_t kOwnBytes = 2 << 20, kMostWeightBytes = 12 << 20, kOwnRounds = 4;
    const int64_t tile_bytes = points * (channels + panels * gemm::kColumns) * kFloat;
    const auto rounds_of = [&](int64_t bytes) {
      return (tiling.count * tile_bytes + bytes - 1) / bytes;
    };
    const int64_t threads = torch::stable::get_num_threads();
    own = weight_bytes <= kMostWeightBytes && rounds_of(kOwnBytes) >= kOwnRounds * threads &&
          threads * (kOwnBytes + gemm::kRows * tile_bytes) <= kMostBytes;
    const int64_t rounds =
        rounds_of(own ? kOwnBytes : std::clamp(weight_bytes / 3, kLeastBytes, kMostBytes));
    tiles = gemm::padded_rows((tiling.count + rounds - 1) / rounds);
    input_stride = tiles * channels + 3 * simd::kLanes;
    sums_stride = tiles * panels * gemm::kColumns + 3 * simd::kLanes;
    blocks = (tiles * channels * kFloat + gemm::kBlockBytes - 1) / gemm::kBlockBytes;
  }
};

// (2) for one round of `tiles` tiles.
inline void multiply(const Rounds& r, int points, int64_t tiles, int64_t channels,
                     const float* input, const float* packed, float* sums) {
  const int64_t rows = gemm::padded_rows((tiles + r.blocks - 1) / r.blocks);
  const int64_t blocks = (tiles + rows - 1) / rows;
  const int64_t enough = 4 * torch::stable::get_num_threads();
  const int64_t splits = std::clamp<int64_t>(enough / (points * blocks), 1, r.panels);
  gemm::share(points * splits * blocks, [&](const auto& next) {
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t first = item % blocks * rows, split = item / blocks % splits;
      const int64_t point = item / blocks / splits;
      const int64_t panel_end = (split + 1) * r.panels / splits;
      const float* a = input + point * r.input_stride + first * r.channels;
      for (int64_t panel = split * r.panels / splits; panel < panel_end; ++panel) {
        const float* b = packed + (point * r.panels + panel) * channels * gemm::kColumns;
        const int64_t count = std::min(rows, tiles - first);
        const int64_t calls = gemm::calls_of(count, channels);
        const int64_t piece = channels * gemm::kColumns * sizeof(float) / calls;
        gemm::Ahead next_panel(b + channels * gemm::kColumns, calls, piece, piece, calls);
        gemm::multiply_panel<gemm::Float32>(
            count, channels, {reinterpret_cast<const gemm::Float32*>(a), r.channels},
            reinterpret_cast<const gemm::Float32*>(b),
            sums + point * r.sums_stride + (panel * r.tiles + first) * gemm::kColumns, false,
            next_panel);
      }
    }
  });
}

// The tiles [first, first + tiles) of a phase, through (1), (2) and (3).
template <typename F, typename T>
void run_round(const Shape& s, const Phase& phase, const Tiling& tiling, const Rounds& r,
               int64_t first, int64_t tiles, const T* x, const float* packed, const Added<T>& added,
               float* input, float* sums, T* y) {
  constexpr int64_t kPart = 8;  // tiles transformed by one thread at a time
  const auto for_each_part = [&](const auto& work) {
    gemm::share((tiles + kPart - 1) / kPart, [&](const auto& next) {
      for (int64_t part; (part = next()) >= 0;) {
        work(part * kPart, std::min((part + 1) * kPart, tiles));
      }
    });
  };
  for_each_part([&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      transform_tile<F>(s, phase, x, Position(tiling, first + t), 0, s.channels, r.input_stride,
                        input + t * r.channels);
    }
  });
  multiply(r, F::kPoints, tiles, s.channels, input, packed, sums);
  for_each_part([&](int64_t begin, int64_t end) {
    for (int64_t panel = 0; panel < r.panels; ++panel) {
      for (int64_t t = begin; t < end; ++t) {
        finish_tile<F>(s, phase, Position(tiling, first + t), panel * gemm::kColumns,
                       sums + (panel * r.tiles + t) * gemm::kColumns, r.sums_stride, added, y);
      }
    }
    simd::finish_streams();
  });
}

// packed: of each phase, one after the other.
template <typename F, typename T>
void run(const Shape& s, const T* x, const float* packed, const Added<T>& added, T* y) {
  const std::vector<Phase> phases = phases_of(s);  // all of one size
  const Tiling tiling(s, phases[0], F::kTile);
  const int64_t weights = packed_size<F>(s.out_channels, s.channels);
  const Rounds r(s, tiling, F::kPoints, weights * sizeof(float));
  const int64_t rounds = (tiling.count + r.tiles - 1) / r.tiles;
  const int64_t items = rounds * static_cast<int64_t>(phases.size());
  const auto work = [&](const auto& next) {
    const Scratch<float> input(F::kPoints * r.input_stride), sums(F::kPoints * r.sums_stride);
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t first = item % rounds * r.tiles, phase = item / rounds;
      run_round<F>(s, phases[phase], tiling, r, first, std::min(r.tiles, tiling.count - first), x,
                   packed + phase * weights, added, input.get(), sums.get(), y);
    }
  };
  if (r.own) return gemm::share(items, work);  // within which nothing is shared again
  int64_t taken = 0;
  work([&] { return taken < items ? taken++ : -1; });
}

}  // namespace sdfast::conv2d::winograd
