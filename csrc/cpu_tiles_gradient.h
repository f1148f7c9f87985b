// Products for training on AMX tiles, whose operands lie with K from row to row: of bf16, and of
// fp32 as cpu_tiles.h splits it.
//
// Algorithm. A table points to the rows of K, so that pixels, taps and the tokens of a layer are
// one case; what lies outside an image is a row of zeros. The right operand's panels are pairs of
// rows, side by side. The left one's columns are copied as lines, once for all threads: the row
// that meets it under a tap is then the same distance away in every line, and all taps read one
// copy. Bytes: the operands read and copied, the copies from L2 for each group of columns of the
// result, which is written once. Limit: TDPBF16PS.
// Every element is one chain of additions over K in one order: the result does not depend on the
// number of threads.
#pragma once

#include "cpu_store_rows.h"
#include "cpu_tiles.h"

#if defined(SDFAST_TILES)

namespace sdfast::gemm::tiles {

constexpr int64_t kNearSteps = 10;  // of K: a panel of either operand, both in L1

template <typename T>
using Row = const T*;

// A table of rows of K, a step more than is multiplied: that one is fetched in vain.
template <typename T>
class Rows {
 public:
  // All are zeros, of so many values.
  Rows(int64_t count, int64_t values) : zeros_(values), rows_(count + kStep, zeros_.data()) {}
  Rows(const Rows&) = delete;
  Row<T>& operator[](int64_t index) { return rows_[index]; }
  const Row<T>* get() const { return rows_.data(); }

 private:
  std::vector<T> zeros_;
  std::vector<Row<T>> rows_;
};

SDFAST_INLINE void store_pairs(BFloat16* to, const simd::Bits& pairs) {
  std::memcpy(static_cast<void*>(to), &pairs, sizeof pairs);
}

// kStep rows, from `column` on kPanelRows values of each, of which `there` exist: pairs of rows by
// columns; of fp32 those of the upper parts, then those of the lower ones.
template <typename T>
void pair_rows(const Row<T>* rows, int64_t column, int64_t there, BFloat16* to) {
  constexpr int64_t kValues = kPanelStep * kParts<T>;
  if (there < kPanelRows) std::memset(static_cast<void*>(to), 0, kValues * sizeof *to);
  const auto pair = [&](int64_t i, int64_t j, auto lanes) {
    const Vec low = simd::load(rows[i] + column + j, lanes);
    const Vec high = simd::load(rows[i + 1] + column + j, lanes);
    BFloat16* at = to + i * kPanelRows + 2 * j;
    if constexpr (std::is_same_v<T, float>) {
      const simd::Parts first = simd::split(low), second = simd::split(high);
      store_pairs(at, simd::widen_bits(first.upper) | simd::widen_bits(second.upper) << 16);
      store_pairs(at + kPanelStep, simd::widen_bits(first.lower) | simd::widen_bits(second.lower)
                                                                       << 16);
    } else {
      store_pairs(at, simd::as_bits(low) >> 16 | simd::as_bits(high));
    }
  };
  for (int64_t i = 0; i < kStep; i += 2) {
    if (there < kPanelRows) {
      simd::for_each_vector(0, there, [&](int64_t j, auto lanes) { pair(i, j, lanes); });
      continue;
    }
    simd::prefetch(rows[i + kStep] + column);
    simd::prefetch(rows[i + kStep + 1] + column);
    pair(i, 0, simd::FullVector());
    pair(i, kLanes, simd::FullVector());
  }
}

// The right operand: for each tap the rows of all steps of K.
template <typename T>
struct Columns {
  const Row<T>* rows;

  // As Weight's.
  static const BFloat16* all_packed() { return nullptr; }
  void pack(const Product& p, int64_t group, int64_t chunk, BFloat16* to) const {
    const int64_t first = p.first_step(chunk), last = p.first_step(chunk + 1);
    for (int64_t panel = 0; panel < 2; ++panel) {
      const int64_t column = group * kGroupRows + panel * kPanelRows;
      const int64_t there = std::min(p.rows - column, kPanelRows);
      if (there <= 0) return;  // nothing reads that panel
      for (int64_t y = 0; y < p.tap_rows; ++y) {
        for (int64_t step = first; step < last; ++step) {
          for (int64_t x = 0; x < p.tap_columns; ++x, to += p.parts() * kPanelStep) {
            const int64_t tap = y * p.tap_columns + x;
            pair_rows(rows + (tap * p.steps() + step) * kStep, column, there, to);
          }
        }
      }
    }
  }
};

// Columns [column, column + there) of a step of rows, at most kPanelRows: each a line of `to`, the
// next one `apart` values further on; a step of lower parts follows one of upper parts.
template <typename T>
void copy_lines(const Row<T>* rows, int64_t column, int64_t there, int64_t apart, BFloat16* to) {
  alignas(64) BFloat16 pairs[kParts<T> * kPanelStep];
  pair_rows(rows, column, there, pairs);
  for (int64_t part = 0; part < kParts<T>; ++part) {
    for (int64_t half = 0; half < kPanelRows; half += kLanes) {
      const BFloat16* from = pairs + part * kPanelStep + 2 * half;
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        std::memcpy(&block[i], from + i * 2 * kPanelRows, sizeof(Vec));
      }
      simd::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        std::memcpy(to + (half + i) * apart + part * kStep, &block[i], sizeof(Vec));
      }
    }
  }
}

// How the left operand of a weight's gradient meets the right one: once, or under several taps.
struct Taps {
  int64_t rows = 1, columns = 1, pitch = 0;  // rows of K from a row of taps to the next

  int64_t count() const { return rows * columns; }
  // Row k of the right operand meets row k - shift(tap) of the left one.
  int64_t shift(int64_t tap) const { return tap / columns * pitch + tap % columns; }
  int64_t before() const { return shift(count() - 1); }
  int64_t steps(int64_t k) const { return (before() + k + kStep - 1) / kStep; }  // of the left one
};

// c (taps, columns, p.rows) = leftᵀ right, K in p.channels. left: rows of `columns` values,
// taps.before() of zeros and then K. right: rows of whole steps of K. finish as multiply_weights',
// token: tap * columns + column. fp32 has one tap: a distance would cross steps of parts.
template <typename T, typename Finish>
void multiply_taps(Product p, const Taps& taps, const Row<T>* left, int64_t columns,
                   const Row<T>* right, const Finish& finish) {
  p.overlaps = taps.count() > 1;
  if (p.overlaps) p.chunk_steps = kNearSteps;
  if constexpr (std::is_same_v<T, float>) p = p.splits();
  const int64_t k = p.steps() * kStep, steps = taps.steps(k),
                apart = (steps * kParts<T> | 1) * kStep;
  const int64_t panels = (columns + kPanelRows - 1) / kPanelRows;
  const Scratch<BFloat16> packed(p.packed()), copies(panels * kPanelRows * apart);
  pack_all(p, Columns<T>{right}, packed.get());
  torch::stable::parallel_for(0, panels * steps, kNearSteps, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / steps * kPanelRows, value = i % steps * kStep;
      copy_lines(left + value, column, std::min(columns - column, kPanelRows), apart,
                 copies.get() + column * apart + value * kParts<T>);
    }
  });

  // Under several taps a panel of columns is a block, else as many as fit in L2 over a chunk of K.
  // Where blocks are few, groups of the right operand are split, then taps.
  const int64_t threads = torch::stable::get_num_threads(), chunks = p.chunks();
  const int64_t line_bytes = apart / chunks * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t fit = std::max<int64_t>(1, kBlockBytes / (line_bytes * kPanelRows));
  const int64_t most = p.overlaps ? 1 : fit, blocks = (panels + most - 1) / most;
  const int64_t groups = p.groups(), wanted = threads == 1 ? 1 : 4 * threads;
  const int64_t splits = std::min((wanted + blocks - 1) / blocks, groups), parts = blocks * splits;
  const int64_t tap_splits = std::min((wanted + parts - 1) / parts, taps.count());
  const int64_t most_pairs = (panels + blocks - 1) / blocks * taps.count();
  share(parts * tap_splits, [&](const auto& next) {
    const amx::Tiles tiles;
    const Scratch<float> sums(p.sums(most_pairs));
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t block = item / tap_splits / splits, split = item / tap_splits % splits;
      const int64_t first_tap = item % tap_splits * taps.count() / tap_splits;
      const int64_t end_tap = (item % tap_splits + 1) * taps.count() / tap_splits;
      const int64_t first = block * panels / blocks * kPanelRows;
      const int64_t end = std::min((block + 1) * panels / blocks * kPanelRows, columns);
      std::vector<Lines> lines;
      for (int64_t tap = first_tap; tap < end_tap; ++tap) {
        const BFloat16* from = copies.get() + first * apart + taps.before() - taps.shift(tap);
        const int64_t count = end - first;
        lines.push_back({from, 1, count, 0, apart, count, count, tap * columns + first});
      }
      const std::vector<Pair> pairs = pairs_of(lines);
      for (int64_t group = split * groups / splits; group < (split + 1) * groups / splits;
           ++group) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const BFloat16* b = packed.get() + p.packed_at(group, chunk);
          multiply_groups(p, pairs, {group, group + 1, chunk, b}, sums.get(), 0, finish);
        }
      }
    }
  });
}

}  // namespace sdfast::gemm::tiles

#endif
