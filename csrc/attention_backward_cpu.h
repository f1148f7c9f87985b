// Block of queries against one tile of keys, backward: the steps of attention_backward_cpu.cpp on
// raw pointers.
//
// The lanes are keys: scores, weights and their gradients are (queries, kColumns), so dvᵀ and dkᵀ
// (D, kColumns) take them as they are. For dqᵀ (D, queries) they are transposed.
#pragma once

#include "attention_tiles_cpu.h"

namespace sdfast::attention {

// A block of rows as the left operands of both kinds of product: `along_dim` (rows, steps of D) and
// `along_rows` (steps of rows, D), or both in tiles. fp32 needs one copy for both.
template <typename Operand>
struct Rows {
  Operand *along_dim, *along_rows;

  static constexpr int64_t size_along_dim(int64_t rows, int64_t dim) {
    return whole<Operand>(rows) * whole_steps<Operand>(dim);
  }
  static constexpr int64_t size(int64_t rows, int64_t dim) {
    if (Operand::kDepth == 1) return rows * dim;
    return size_along_dim(rows, dim) + whole_steps<Operand>(rows) * whole<Operand>(dim);
  }
  static Rows in(Operand* memory, int64_t rows, int64_t dim) {
    if (Operand::kDepth == 1) return {memory, memory};
    return {memory, memory + size_along_dim(rows, dim)};
  }
};

// How many rows ahead one is fetched, past the end those of the next block: a head's do not lie
// side by side.
constexpr int64_t kAhead = 16;

template <typename T>
SDFAST_INLINE void prefetch_row(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(T)) simd::prefetch(row + d);
}

// The values of `rows` rows: (steps of rows, D), or in tiles.
template <typename T, typename Operand>
void pack_along_rows(const T* from, int64_t row_stride, int64_t rows, int64_t dim, Operand* to) {
#if defined(SDFAST_TILES)
  if constexpr (kInTiles<Operand>) return pack_values_in_tiles(from, row_stride, rows, dim, to);
#endif
  for (int64_t row = 0; row < rows; row += Operand::kDepth) {
    pack_value(from + row * row_stride, row_stride, rows - row, dim,
               to + row / Operand::kDepth * dim);
  }
}

template <typename T, typename Operand>
void pack_rows(const T* from, int64_t row_stride, int64_t rows, int64_t dim,
               const Rows<Operand>& to) {
  const int64_t steps = gemm::steps_of(Operand::kDepth, dim);
  for (int64_t row = 0; row < rows; ++row) {
    prefetch_row(from + (row + kAhead) * row_stride, dim);
#if defined(SDFAST_TILES)
    if constexpr (kInTiles<Operand>) {
      pack_key_in_tiles(from + row * row_stride, dim, row, to.along_dim);
    } else
#endif
      pack_key(from + row * row_stride, dim, to.along_dim + row * steps);
  }
  if (to.along_rows != to.along_dim) pack_along_rows(from, row_stride, rows, dim, to.along_rows);
}

// to[row] = sum of a[row] b[row].
template <typename T>
void multiply_rowwise(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t rows,
                      int64_t dim, float* to) {
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t row = 0; row < rows; row += kLanes) {
    // A vector of partial sums for each of kLanes rows, transposed and added.
    Vec sums[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int64_t index = std::min(row + i, rows - 1);
      const T *x = a + index * a_stride, *y = b + index * b_stride;
      prefetch_row(x + kAhead * a_stride, dim);
      Vec sum{};
      for (int64_t d = 0; d < whole; d += kLanes) {
        sum += simd::load(x + d, simd::FullVector()) * simd::load(y + d, simd::FullVector());
      }
      if (whole < dim) {
        const int rest = static_cast<int>(dim - whole);
        sum += simd::load(x + whole, rest) * simd::load(y + whole, rest);
      }
      sums[i] = sum;
    }
    transpose(sums);
    Vec total = sums[0];
#pragma GCC unroll 16
    for (int i = 1; i < kLanes; ++i) total += sums[i];
    const int64_t there = std::min<int64_t>(kLanes, rows - row);
    std::memcpy(to + row, &total, there * sizeof(float));
  }
}

// Hides from each of the first queries the keys after its own position. Row 0 sees key 0 alone.
// scale: what scores will be multiplied by.
inline void hide_later_keys(int64_t rows, float scale, float* scores, float* gradients) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t row = 0; row < std::min<int64_t>(rows, kColumns - 1); ++row) {
    const int64_t begin = row * kColumns + row + 1, end = (row + 1) * kColumns;
    std::fill(scores + begin, scores + end, scale < 0 ? kInfinity : -kInfinity);
    std::fill(gradients + begin, gradients + end, 0.0f);
  }
}

// The statistics of a block's queries.
struct Statistics {
  const float *lse, *delta;  // lse: base 2; delta = rowsum(do * o)
};

// scores to weights P = 2^(scale score - lse), as operands in place; gradients dP to P (dP -
// delta), in place, and as operands where those are pairs. Rows of both: kColumns apart, of which
// the first kV vectors count. rows: even.
template <int kV, typename Operand>
void differentiate(int64_t rows, float scale, const Statistics& statistics, float* scores,
                   float* gradients, Operand* gradient_operands) {
  constexpr bool kPairs = Operand::kDepth == 2;
  Operand* weights = reinterpret_cast<Operand*>(scores);
  for (int64_t row = 0; row < rows; row += 2) {
    const auto row_pair = [&](const float* from) {
      return simd::make_vecs<2 * kV>(
          [&](int i) { return simd::load(from + (row + i / kV) * kColumns + i % kV * kLanes); });
    };
    const auto of_rows = [&](const float* from) {
      return simd::make_vecs<2 * kV>([&](int i) { return simd::broadcast(from[row + i / kV]); });
    };
    const auto weight = power_of_two<kPairs>(row_pair(scores) * scale - of_rows(statistics.lse));
    const auto gradient = weight * (row_pair(gradients) - of_rows(statistics.delta));
    simd::for_each_of(gradient, [&](int i, Vec v) {
      simd::store(gradients + (row + i / kV) * kColumns + i % kV * kLanes, v);
    });
    store_row_pair<kV>(weights + row / Operand::kDepth * kColumns, weight);
    if (kPairs) store_row_pair<kV>(gradient_operands + row / 2 * kColumns, gradient);
  }
}

// c (rows, kColumns) (+)= a b, of b's columns kV vectors. a: Rows' along_dim, `lda` steps of D, or
// with kTransposed its along_rows, `lda` rows of D.
template <typename Operand, bool kTransposed, int kV = gemm::kVecs>
void multiply_block(int64_t rows, int64_t steps, const Operand* a, int64_t lda, const Operand* b,
                    float* c, bool accumulate) {
#if defined(SDFAST_TILES)
  if constexpr (kInTiles<Operand>) {
    const int64_t next_rows = kTransposed ? kTile : amx::kTileRows * lda;
    const int64_t next_step = kTransposed ? lda * kLanes : kTile;
    const int64_t tiles = whole<Operand>(steps) / kLanes;
    RowsProduct{a, b, next_rows, next_step, tiles, whole<Operand>(rows), c, accumulate}.run();
  } else
#endif
    multiply_rows<Operand, kTransposed, kV>(rows, steps, a, lda, b, c, accumulate);
}

// kLanes operands along a row.
SDFAST_INLINE Vec load_along_row(gemm::Float32, const float* from) { return simd::load(from); }
#if defined(__AVX512BF16__)
SDFAST_INLINE Vec load_along_row(gemm::BFloat16Pair, const float* from) {
  return reinterpret_cast<Vec>(
      _mm512_maskz_cvtne2ps_pbh(~0u, reinterpret_cast<__m512>(simd::load(from + kLanes)),
                                reinterpret_cast<__m512>(simd::load(from))));
}
#endif

// (rows, keys), kColumns apart, to operands (steps of keys, kColumns of rows), a tile of kColumns
// rows `tile_stride` after the other. Rows are read up to a whole vector of them.
template <int kV, typename Operand>
void transpose_tile(int64_t rows, const float* from, Operand* to, int64_t tile_stride) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    Operand* tile = to + row / kColumns * tile_stride + row % kColumns;
    for (int64_t step = 0; step < kV * kLanes / Operand::kDepth; step += kLanes) {
      Vec vecs[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        vecs[i] = load_along_row(Operand(), from + (row + i) * kColumns + step * Operand::kDepth);
      }
      transpose(vecs);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        std::memcpy(static_cast<void*>(tile + (step + i) * kColumns), &vecs[i], sizeof(Vec));
      }
    }
  }
}

}  // namespace sdfast::attention
