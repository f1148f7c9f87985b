// Rows into the lanes of vectors: transposed operands for the micro-kernel.
#pragma once

#include "cpu_gemm.h"

namespace sdfast::gemm {

using simd::kLanes;

// rows[i][j] to rows[j][i].
SDFAST_INLINE void transpose(Vec (&rows)[kLanes]) {
  simd::Bits low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + (i % 2) * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  // log2(kLanes) times row i is interleaved with row i + kLanes / 2.
#pragma GCC unroll 4
  for (int distance = 1; distance < kLanes; distance *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Steps [step, step + kLanes) of a row of `dim` values, as the lanes of a vector.
template <typename T>
SDFAST_INLINE Vec load_steps(Float32, const T* row, int64_t step, int64_t dim) {
  if (step + kLanes <= dim) return simd::load(row + step, simd::FullVector());
  return simd::load(row + step, static_cast<int>(dim - step));
}
#if defined(__AVX512BF16__)
SDFAST_INLINE Vec load_steps(BFloat16Pair, const simd::BFloat16* row, int64_t step, int64_t dim) {
  Vec pairs{};
  const int64_t there = std::min<int64_t>(2 * kLanes, dim - 2 * step);
  std::memcpy(&pairs, row + 2 * step, there * sizeof *row);
  return pairs;
}
#endif

// `count` rows of `dim` values into columns: (steps, kColumns) operands. row_of(i) points to row i;
// columns beyond `count` repeat the last row. What lies `ahead` values further on is fetched.
template <typename T, typename Operand, typename RowOf>
void pack_columns(const RowOf& row_of, int64_t count, int64_t dim, int64_t ahead, Operand* to) {
  const int64_t steps = steps_of(Operand::kDepth, dim);
  for (int64_t first = 0; first < kColumns; first += kLanes) {
    const T* row[kLanes];
    for (int i = 0; i < kLanes; ++i) row[i] = row_of(std::min(first + i, count - 1));
    for (int64_t step = 0; step < steps; step += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = load_steps(Operand(), row[i], step, dim);
        simd::prefetch(row[i] + step * Operand::kDepth + ahead);
      }
      transpose(block);
      const int64_t there = std::min<int64_t>(kLanes, steps - step);
      for (int64_t i = 0; i < there; ++i) {
        std::memcpy(static_cast<void*>(to + (step + i) * kColumns + first), &block[i], sizeof(Vec));
      }
    }
  }
}

// c (rows, kColumns) to ct (kColumns, to_stride), `rows` rounded up to whole vectors.
inline void transpose_sums(const float* c, int64_t rows, float* ct, int64_t to_stride) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t column = 0; column < kColumns; column += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = simd::load(c + (row + i) * kColumns + column);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) simd::store(ct + (column + i) * to_stride + row, block[i]);
    }
  }
}

}  // namespace sdfast::gemm
