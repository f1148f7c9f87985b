// Matrix products on CPU: c = a b for a of M rows and a packed b of N columns, fp32 accumulation.
//
// Algorithm. b is packed once into panels of kColumns columns, so that each step of the inner loop
// reads one contiguous piece. The micro-kernel keeps kRows x kColumns sums in registers and reads a
// where it lies, row-major: broadcasting needs no packing. A thread takes a block of rows that fits
// in L2 through all panels; of K, as much at a time as keeps a panel in L2 as well.
// Limit: fused multiply-adds, 24 of them against 14 loads a step with AVX-512.
// Every element is one chain of additions over K, cut at fixed places: the result does not depend
// on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu_simd.h"

namespace sdfast::gemm {

using simd::Vec;

constexpr int kVecs = 2, kColumns = kVecs * simd::kLanes;
// As many sums as the registers hold beside two vectors of b and one of a.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif
constexpr int64_t kBlockBytes = 768 << 10;  // of a
constexpr int64_t kChain = 128;             // steps: a longer chain of additions rounds too much
constexpr int64_t kPartSteps = 1280;        // a panel of b beside them

// What one step multiplies: an fp32, or two bf16 that lie side by side along K.
struct Float32 {
  float value;
  static constexpr int kDepth = 1;
};
struct BFloat16Pair {
  typedef uint32_t Bits __attribute__((may_alias, aligned(2)));  // read where two bf16 were written
  Bits bits;
  static constexpr int kDepth = 2;
};

SDFAST_INLINE Vec multiply_add(Vec sum, Vec a, Vec b, Float32) { return sum + a * b; }
SDFAST_INLINE Vec broadcast(const Float32& a) { return simd::broadcast(a.value); }

#if defined(__AVX512BF16__)
SDFAST_INLINE Vec multiply_add(Vec sum, Vec a, Vec b, BFloat16Pair) {
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
SDFAST_INLINE Vec broadcast(const BFloat16Pair& a) {
  return reinterpret_cast<Vec>(_mm512_set1_epi32(static_cast<int>(a.bits)));
}
#endif

// The operand a storage type is multiplied as.
template <typename T>
struct OperandOf {
  using Type = Float32;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<simd::BFloat16> {
  using Type = BFloat16Pair;
};
#endif

// The operand of one step of a row of k values.
template <typename T>
inline void set_operand(Float32& operand, const T* row, int64_t step, int64_t) {
  operand.value = simd::load(row + step, 1)[0];
}
inline void set_operand(BFloat16Pair& operand, const simd::BFloat16* row, int64_t step, int64_t k) {
  const uint32_t low = row[2 * step].bits, high = 2 * step + 1 < k ? row[2 * step + 1].bits : 0;
  operand.bits = low | high << 16;
}

constexpr int64_t steps_of(int64_t depth, int64_t k) { return (k + depth - 1) / depth; }

// c[r][j] (+)= sum over steps of a[r] * b[j]. a: rows `lda` operands apart, steps adjacent; with
// kTransposed steps `lda` apart, rows adjacent. b: (steps, kColumns). c: (kR, kColumns) dense. Of
// the columns kV vectors are computed, from the left.
template <int kR, typename Operand, bool kTransposed = false, int kV = kVecs>
inline __attribute__((noinline)) void multiply_tile(int64_t steps, const Operand* a, int64_t lda,
                                                    const Operand* b, float* c, bool accumulate) {
  Vec sums[kR][kV];
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) sums[r][v] = Vec{};
  }
  const int64_t next_row = kTransposed ? 1 : lda, next_step = kTransposed ? lda : 1;
  // Rows are addressed from a pointer each three: base, base + lda, base + 2 lda.
  const Operand* base[(kR + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (kR + 2) / 3; ++i) base[i] = a + 3 * i * next_row;
  for (int64_t step = 0; step < steps; ++step) {
    Vec columns[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      std::memcpy(&columns[v], b + v * simd::kLanes, sizeof(Vec));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const Vec row = broadcast(base[r / 3][(r % 3) * next_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        sums[r][v] = multiply_add(sums[r][v], row, columns[v], Operand());
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < (kR + 2) / 3; ++i) base[i] += next_step;
    b += kColumns;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      float* to = c + r * kColumns + v * simd::kLanes;
      simd::store(to, accumulate ? simd::load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// Rows of a as the micro-kernel reads them.
template <typename Operand>
struct Rows {
  const Operand* data;
  int64_t stride;  // from one row to the next, in operands
};

// Rows and columns of c, and K in steps.
struct Shape {
  int64_t rows, columns, steps;
  int64_t part = 0;  // steps that `rows_of` gives at a time, where not any number will do
  int64_t panels() const { return (columns + kColumns - 1) / kColumns; }
};

// A multiple of kRows, for `rows` rows of which any may be missing at the end.
constexpr int64_t padded_rows(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

template <typename Operand>
int64_t packed_size(const Shape& shape) {
  return shape.panels() * shape.steps * kColumns;
}

// c for one block of rows and one panel: all tiles, the last one narrower where rows end.
template <typename Operand>
void multiply_panel(int64_t rows, int64_t steps, const Rows<Operand>& a, const Operand* panel,
                    float* c, bool accumulate) {
  int64_t row = 0;
  const auto tile = [&](auto count) {
    int64_t step = 0;
    do {
      multiply_tile<count>(std::min(kChain, steps - step), a.data + row * a.stride + step, a.stride,
                           panel + step * kColumns, c + row * kColumns, accumulate || step > 0);
      step += kChain;
    } while (step < steps);
    row += count;
  };
  while (row + kRows <= rows) tile(std::integral_constant<int, kRows>());
  for (; row + 4 <= rows;) tile(std::integral_constant<int, 4>());
  for (; row < rows;) tile(std::integral_constant<int, 1>());
}

// How a product is cut. Rows in blocks and K in parts that depend on the shape alone; columns in
// `splits` only where there are fewer blocks than threads could share.
struct Blocking {
  int64_t rows, steps, splits;

  template <typename Operand>
  static Blocking of(const Shape& shape, int64_t threads) {
    const int64_t parts = std::max<int64_t>(1, (shape.steps + kPartSteps - 1) / kPartSteps);
    const int64_t steps =
        shape.part ? shape.part : std::max<int64_t>(1, (shape.steps + parts - 1) / parts);
    const int64_t fit = kBlockBytes / (steps * static_cast<int64_t>(sizeof(Operand)));
    const int64_t most_rows = std::clamp<int64_t>(fit / kRows, 1, 64) * kRows;
    int64_t blocks = (shape.rows + most_rows - 1) / most_rows;
    if (blocks < threads) blocks = std::min(threads, (shape.rows + 4 * kRows - 1) / (4 * kRows));
    blocks = std::max<int64_t>(blocks, 1);
    const int64_t rows = padded_rows((shape.rows + blocks - 1) / blocks);
    const int64_t splits =
        blocks < 4 * threads ? std::clamp<int64_t>(4 * threads / blocks, 1, shape.panels()) : 1;
    return {rows, steps, threads == 1 ? 1 : splits};
  }
};

// c = a b. `rows_of(begin, count, first_step, steps, scratch)` gives Rows of a; scratch holds
// count * steps operands, for rows that do not lie in memory as they are needed.
// `finish(begin, count, column, c)` takes c: (count, kColumns), columns from `column` on.
template <typename Operand, typename RowsOf, typename Finish>
void multiply(const Shape& shape, const Operand* b, const RowsOf& rows_of, const Finish& finish) {
  const int64_t threads = torch::stable::get_num_threads();
  const Blocking blocking = Blocking::of<Operand>(shape, threads);
  const int64_t blocks = (shape.rows + blocking.rows - 1) / blocking.rows, panels = shape.panels();
  const int64_t items = blocks * blocking.splits;
  const int64_t parts = std::max<int64_t>(1, (shape.steps + blocking.steps - 1) / blocking.steps);
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    const int64_t most_panels = (panels + blocking.splits - 1) / blocking.splits;
    const std::unique_ptr<float[]> c(
        new float[blocking.rows * kColumns * (parts > 1 ? most_panels : 1)]);
    const std::unique_ptr<Operand[]> scratch(new Operand[blocking.rows * blocking.steps]);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / blocking.splits * blocking.rows;
      const int64_t rows = std::min(blocking.rows, shape.rows - first);
      const int64_t split = item % blocking.splits;
      const int64_t panel_begin = split * panels / blocking.splits;
      const int64_t panel_end = (split + 1) * panels / blocking.splits;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t step = part * blocking.steps;
        const int64_t steps = std::min(blocking.steps, shape.steps - step);
        const Rows<Operand> a = rows_of(first, rows, step, steps, scratch.get());
        for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
          float* sums = c.get() + (parts > 1 ? panel - panel_begin : 0) * blocking.rows * kColumns;
          multiply_panel(rows, steps, a, b + (panel * shape.steps + step) * kColumns, sums,
                         part > 0);
          if (part + 1 == parts) finish(first, rows, panel * kColumns, sums);
        }
      }
    }
  });
}

}  // namespace sdfast::gemm
