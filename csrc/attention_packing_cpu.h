// Rows of queries, keys and values as operands of the products of attention: of a thread's
// instructions for vectors; AMX's are in attention_tiles_cpu.h.
#pragma once

#include "cpu_gemm_rows.h"
#include "cpu_transpose.h"

namespace sdfast::attention {

using gemm::kColumns;
using simd::kLanes;
using simd::transpose;
using simd::Vec;

// AMX's tiles are whole: rows, D and steps are completed with zeros.
using gemm::kInTiles;
template <typename Operand>
constexpr int64_t whole(int64_t size) {
  return kInTiles<Operand> ? simd::round_up(size) : size;
}
// Steps of K, in tiles whole ones.
template <typename Operand>
constexpr int64_t whole_steps(int64_t size) {
  return whole<Operand>(gemm::steps_of(Operand::kDepth, size));
}

// Operands [step, step + kLanes) of a row, of which `steps` exist, as the lanes of a vector.
template <typename T>
SDFAST_INLINE Vec load_operands(gemm::Float32, const T* row, int64_t step, int64_t dim) {
  if (step + kLanes <= dim) return simd::load(row + step, simd::FullVector());
  return simd::load(row + step, static_cast<int>(dim - step));
}
#if defined(__AVX512BF16__)
SDFAST_INLINE Vec load_operands(gemm::BFloat16Pair, const simd::BFloat16* row, int64_t step,
                                int64_t dim) {
  Vec pairs{};
  if (2 * (step + kLanes) <= dim) {
    std::memcpy(&pairs, row + 2 * step, sizeof pairs);
  } else {
    std::memcpy(&pairs, row + 2 * step, 2 * (dim - 2 * step));
  }
  return pairs;
}
#endif

// The first column of each group of kLanes out of `size`. The last group overlaps the one before
// it where size is no multiple: the same values are written twice.
template <typename F>
SDFAST_INLINE void for_each_group(int64_t size, const F& f) {
  for (int64_t i = 0; i < size; i += kLanes) {
    f(size < kLanes ? 0 : std::min(i, size - kLanes));
  }
}

// The same with how many lanes there are, of a row that is read and written as it lies: all of
// them but where the row is shorter than a vector.
template <typename F>
SDFAST_INLINE void for_each_part(int64_t size, const F& f) {
  if (size < kLanes) return f(0, static_cast<int>(size));
  for_each_group(size, [&](int64_t i) { f(i, simd::FullVector()); });
}

// A tile of queries into (whole steps, kColumns) operands. Beyond `count` the last one is repeated.
// With `negative`, -q.
template <typename T, typename Operand>
void pack_queries(const T* q, int64_t row_stride, int64_t count, int64_t dim, bool negative,
                  Operand* to) {
  const int64_t steps = gemm::steps_of(Operand::kDepth, dim);
  const uint32_t flip = negative ? (Operand::kDepth == 2 ? 0x80008000u : 0x80000000u) : 0;
  for (int64_t first = 0; first < kColumns; first += kLanes) {
    for_each_group(steps, [&](int64_t step) {
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const T* row = q + std::min(first + i, count - 1) * row_stride;
        rows[i] = simd::as_floats(simd::as_bits(load_operands(Operand(), row, step, dim)) ^ flip);
      }
      transpose(rows);
      const int64_t there = std::min<int64_t>(kLanes, steps - step);
      for (int64_t i = 0; i < there; ++i) {
        std::memcpy(static_cast<void*>(to + (step + i) * kColumns + first), &rows[i], sizeof(Vec));
      }
    });
  }
  std::fill(to + steps * kColumns, to + whole_steps<Operand>(dim) * kColumns, Operand{});
}

// One row of keys: (steps) operands.
template <typename T>
void pack_key(const T* k, int64_t dim, gemm::Float32* to) {
  for_each_part(dim, [&](int64_t i, auto lanes) {
    simd::store(&to[i].value, simd::load(k + i, lanes), lanes);
  });
}
// The values of one step: (D) operands.
template <typename T>
void pack_value(const T* v, int64_t, int64_t, int64_t dim, gemm::Float32* to) {
  pack_key(v, dim, to);
}
#if defined(__AVX512BF16__)
inline void pack_key(const simd::BFloat16* k, int64_t dim, gemm::BFloat16Pair* to) {
  if (dim % 2) to[dim / 2].bits = 0;
  std::memcpy(static_cast<void*>(to), k, dim * sizeof *k);
}
// Pairs of two rows, or of one and zeros.
template <typename Lanes>
SDFAST_INLINE Vec value_pairs(const simd::BFloat16* v, int64_t row_stride, int64_t rows,
                              Lanes lanes) {
  return gemm::load_step(gemm::BFloat16Pair(), v, rows > 1 ? v + row_stride : nullptr, lanes);
}
inline void pack_value(const simd::BFloat16* v, int64_t row_stride, int64_t rows, int64_t dim,
                       gemm::BFloat16Pair* to) {
  for_each_part(dim, [&](int64_t i, auto lanes) {
    const Vec pairs = value_pairs(v + i, row_stride, rows, lanes);
    std::memcpy(static_cast<void*>(to + i), &pairs, lanes * sizeof(float));
  });
}
#endif

}  // namespace sdfast::attention
