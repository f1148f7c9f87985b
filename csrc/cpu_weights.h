// Products with a weight that is read where it lies: y = x Wᵀ for W (rows, K), K contiguous.
//
// Algorithm. yᵀ = W xᵀ through the micro-kernel of cpu_gemm.h, which broadcasts its left operand
// from memory: W needs no packed copy, but where its rows crowd a set of L1 that cannot hold them.
// Panels of kColumns tokens are packed instead, as many as L2 holds, and all of W goes past them.
// Sums of kGroup rows of W and a panel of tokens are transposed in L1 and finished token by token.
// Limit: fused multiply-adds; W's bytes where tokens are few. Every element is one chain of
// additions over K, cut at fixed places: the result does not depend on the number of threads.
#pragma once

#include "cpu_gemm_rows.h"
#include "cpu_scratch.h"
#include "cpu_transpose.h"

namespace sdfast::gemm {

constexpr int64_t kGroup = 4 * kRows;        // rows of W finished at a time: whole vectors
constexpr int64_t kPackedBytes = 512 << 10;  // of tokens, beside a group of W in L2

// kLanes steps of a row, as the lanes of a vector.
template <typename T>
SDFAST_INLINE Vec load_whole(Float32, const T* row) {
  return simd::load(row, simd::FullVector());
}
#if defined(__AVX512BF16__)
SDFAST_INLINE Vec load_whole(BFloat16Pair, const simd::BFloat16* row) {
  Vec pairs;
  std::memcpy(&pairs, row, sizeof pairs);
  return pairs;
}
#endif

// Steps [step, step + kLanes) of a row of `dim` values; beyond them zeros.
template <typename T>
SDFAST_INLINE Vec load_steps(Float32, const T* row, int64_t step, int64_t dim) {
  if (step + kLanes <= dim) return load_whole(Float32(), row + step);
  return simd::load(row + step, static_cast<int>(dim - step));
}
#if defined(__AVX512BF16__)
SDFAST_INLINE Vec load_steps(BFloat16Pair, const simd::BFloat16* row, int64_t step, int64_t dim) {
  if (2 * (step + kLanes) <= dim) return load_whole(BFloat16Pair(), row + 2 * step);
  Vec pairs{};
  std::memcpy(&pairs, row + 2 * step, (dim - 2 * step) * sizeof *row);
  return pairs;
}
#endif

// `count` rows of `dim` values into columns: (steps, kColumns) operands. row_of(i) points to row i;
// columns beyond `count` repeat the last row.
template <typename T, typename Operand, typename RowOf>
void pack_columns(const RowOf& row_of, int64_t count, int64_t dim, Operand* to) {
  // Values ahead of what is read: so many rows the hardware does not follow.
  constexpr int64_t kAhead = 64;
  const int64_t steps = steps_of(Operand::kDepth, dim);
  for (int64_t first = 0; first < kColumns; first += kLanes) {
    const T* row[kLanes];
    for (int i = 0; i < kLanes; ++i) row[i] = row_of(std::min(first + i, count - 1));
    for (int64_t step = 0; step < steps; step += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = load_steps(Operand(), row[i], step, dim);
        simd::prefetch(row[i] + step * Operand::kDepth + kAhead);
      }
      simd::transpose(block);
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
      simd::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) simd::store(ct + (column + i) * to_stride + row, block[i]);
    }
  }
}

// Tokens, rows of W and the values of K, of which `part` are multiplied at a time and none across a
// multiple of `period`. A gated product pairs row i with row i + rows: W has twice the rows.
struct Product {
  int64_t tokens, rows, dim, part, period;
  bool gated = false;

  int64_t panels() const { return (tokens + kColumns - 1) / kColumns; }
  int64_t groups() const { return (rows + kGroup - 1) / kGroup; }
  int64_t parts_of_period() const { return (period + part - 1) / part; }
  int64_t parts() const { return (dim + period - 1) / period * parts_of_period(); }

  struct Piece {
    int64_t begin, count;  // values of K
  };
  Piece piece(int64_t index) const {
    const int64_t base = index / parts_of_period() * period;
    const int64_t from = index % parts_of_period() * part;
    return {base + from, std::min({part, period - from, dim - base - from})};
  }
};

// `dim` values in the fewest parts that keep a panel of tokens small, all of nearly the same size
// and of whole steps.
template <typename Operand>
int64_t even_part(int64_t dim) {
  constexpr int64_t kDepth = Operand::kDepth;
  const int64_t steps = steps_of(kDepth, dim), parts = (steps + kPartSteps - 1) / kPartSteps;
  return (steps + parts - 1) / parts * kDepth;
}

// How the tokens are cut in blocks of panels, and the groups of W in splits where blocks are few.
struct Cut {
  int64_t blocks, splits;

  template <typename Operand>
  static Cut of(const Product& p) {
    const int64_t threads = torch::stable::get_num_threads(), panels = p.panels();
    const int64_t panel_bytes =
        steps_of(Operand::kDepth, p.part) * kColumns * static_cast<int64_t>(sizeof(Operand));
    const int64_t most = std::max<int64_t>(1, kPackedBytes / panel_bytes);
    const int64_t blocks = (panels + most - 1) / most;
    const int64_t even = std::min((blocks + threads - 1) / threads * threads, panels);
    return {even, std::min(even_splits(even, 2), p.groups())};
  }
};

// weight: (rows, dim), contiguous, twice the rows where gated. pack(token, count, piece, to) packs
// tokens into columns. finish(token, count, row, rows, sums) takes Sums of rows [row, row + rows).
// finish.fetch(token, count, row, rows) fetches what that will read and write.
template <typename Operand, typename T, typename Pack, typename Finish>
void multiply_weights(const Product& p, const T* weight, const Pack& pack, const Finish& finish) {
  constexpr int64_t kSums = kGroup * kColumns;
  const Cut cut = Cut::of<Operand>(p);
  const int64_t panels = p.panels(), groups = p.groups(), parts = p.parts();
  const int64_t halves = p.gated ? 2 : 1, most_steps = steps_of(Operand::kDepth, p.part);
  const int64_t most_panels = (panels + cut.blocks - 1) / cut.blocks;
  const int64_t most_groups = (groups + cut.splits - 1) / cut.splits;
  share(cut.blocks * cut.splits, [&](const auto& next) {
    const Scratch<Operand> packed(most_panels * most_steps * kColumns);
    const int64_t group_size = kGroup * (most_steps + kLanes);
    const Scratch<Operand> scratch(halves * group_size);
    // Sums wait for the next part of K, if there is one.
    const Scratch<float> sums(halves * kSums * (parts > 1 ? most_panels * most_groups : 1));
    const Scratch<float> transposed(halves * kSums);
    for (int64_t item; (item = next()) >= 0;) {
      // From the last one on: what does not divide evenly makes the last ones the largest.
      const int64_t left = cut.blocks * cut.splits - 1 - item;
      const int64_t block = left % cut.blocks, split = left / cut.blocks;
      const int64_t first = block * panels / cut.blocks, end = (block + 1) * panels / cut.blocks;
      const int64_t first_group = split * groups / cut.splits;
      const int64_t end_group = (split + 1) * groups / cut.splits;
      for (int64_t part = 0; part < parts; ++part) {
        const Product::Piece piece = p.piece(part);
        const int64_t steps = steps_of(Operand::kDepth, piece.count);
        for (int64_t panel = first; panel < end; ++panel) {
          const int64_t token = panel * kColumns;
          pack(token, std::min<int64_t>(kColumns, p.tokens - token), piece,
               packed.get() + (panel - first) * steps * kColumns);
        }
        for (int64_t group = first_group; group < end_group; ++group) {
          const int64_t row = group * kGroup, rows = std::min(kGroup, p.rows - row);
          const auto sums_of = [&](int64_t panel, int64_t half) {
            const int64_t index =
                parts > 1 ? (group - first_group) * most_panels + panel - first : 0;
            return sums.get() + (index * halves + half) * kSums;
          };
          Rows<Operand> a[2];
          Ahead next_group[2];
          for (int64_t half = 0; half < halves; ++half) {
            const T* from = weight + (row + half * p.rows) * p.dim + piece.begin;
            a[half] = rows_of(from, p.dim, rows, piece.count, scratch.get() + half * group_size);
            if (group + 1 == end_group) continue;
            next_group[half] = Ahead(from + rows * p.dim, kGroup, piece.count * sizeof(T),
                                     p.dim * sizeof(T), (end - first) * calls_of(rows, steps));
          }
          for (int64_t panel = first; panel < end; ++panel) {
            const int64_t token = panel * kColumns;
            const int64_t count = std::min<int64_t>(kColumns, p.tokens - token);
            if (part + 1 == parts) finish.fetch(token, count, row, rows);
            for (int64_t half = 0; half < halves; ++half) {
              multiply_panel(rows, steps, a[half],
                             packed.get() + (panel - first) * steps * kColumns,
                             sums_of(panel, half), part > 0, next_group[half], count);
              if (part + 1 == parts) {
                transpose_sums(sums_of(panel, half), rows, transposed.get() + half * kSums, kGroup);
              }
            }
            if (part + 1 == parts) {
              finish(token, count, row, rows,
                     Sums{transposed.get(), transposed.get() + kSums, kGroup});
            }
          }
        }
      }
    }
  });
}

}  // namespace sdfast::gemm
