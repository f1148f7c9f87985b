// Transposes of fp32 in registers, and of matrices in blocks of them.
#pragma once

#include <algorithm>

#include "cpu_simd.h"

namespace sdfast::simd {

// rows[i][j] to rows[j][i].
SDFAST_INLINE void transpose(Vec (&rows)[kLanes]) {
  Bits low, high;
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

// to[j * to_stride + i] = element (i, j) for i < rows and j < columns; load(i, j, lanes) gives
// elements (i, j), (i, j + 1), ...
template <typename Load>
void transpose(const Load& load, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    const int there = static_cast<int>(std::min<int64_t>(kLanes, rows - i));
    for_each_vector(0, columns, [&](int64_t j, auto lanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) block[l] = l < there ? load(i + l, j, lanes) : Vec{};
      transpose(block);
      for (int l = 0; l < lanes; ++l) {
        float* out = to + (j + l) * to_stride + i;
        if (there == kLanes) {
          store(out, block[l]);
        } else {
          store(out, block[l], there);
        }
      }
    });
  }
}

}  // namespace sdfast::simd
