// Matrix products of operands that lie as tensors do, for training: c = a b, fp32 accumulation.
//
// A weight changes at every step of an optimiser, and a packed copy of it would serve two products:
// reading the weight, writing the copy and reading it again costs more than those. Here each thread
// packs what it is about to multiply, one chain of additions of a panel, into L1, and fetches the
// next one meanwhile; nothing lasts. Otherwise as cpu_gemm.h, with shorter chains: they run over
// tokens or pixels here, which are many.
#pragma once

#include "cpu_gemm_rows.h"
#include "cpu_scratch.h"
#include "cpu_transpose.h"

namespace sdfast::gemm {

constexpr int64_t kMostChain = 128, kPackedSteps = 640;
constexpr int64_t kGroupRows = 4 * kRows;  // of a, whole vectors

// Rows and columns of c, and the values of K. Whether a is multiplied where it lies, or packed.
struct Shape {
  int64_t rows, columns, dim;
  bool in_place = false;
  int64_t panels() const { return (columns + kColumns - 1) / kColumns; }
};

// How a product is cut: rows in the fewest blocks that fit in L2, for each block packs all of b; K
// in parts that depend on the shape alone; columns in `splits` where there are too few blocks to
// keep all threads busy to the end. Each split packs its block's rows, unless they are used in
// place.
struct Blocking {
  int64_t tiles, blocks, steps, splits;

  template <typename Operand>
  static Blocking of(const Shape& shape, int64_t threads) {
    const int64_t all = steps_of(Operand::kDepth, shape.dim);
    const int64_t parts = std::max<int64_t>(1, (all + kPackedSteps - 1) / kPackedSteps);
    const int64_t steps = std::max<int64_t>(1, (all + parts - 1) / parts);
    const int64_t fit = kBlockBytes / (steps * static_cast<int64_t>(sizeof(Operand)));
    const int64_t most_tiles = std::clamp<int64_t>(fit / kRows, 1, 64);
    const int64_t tiles = (shape.rows + kRows - 1) / kRows;
    const int64_t least = (tiles + most_tiles - 1) / most_tiles;
    const int64_t blocks =
        least <= threads ? least : std::min((least + threads - 1) / threads * threads, tiles);
    const int64_t enough = (shape.in_place ? 4 : 1) * threads;
    const int64_t splits = std::clamp((enough + blocks - 1) / blocks, int64_t{1}, shape.panels());
    return {tiles, blocks, steps, threads == 1 ? 1 : splits};
  }
  int64_t first_row(int64_t block) const { return block * tiles / blocks * kRows; }
  int64_t most_rows() const { return (tiles + blocks - 1) / blocks * kRows; }
};

// Steps of a panel from `values` rows that hold its columns, `stride` apart; zeros for columns
// beyond `columns`.
template <int64_t kWidth = kColumns, typename T, typename Operand>
void copy_panel(const T* from, int64_t stride, int64_t values, int64_t columns, Operand* to) {
  constexpr int kDepth = Operand::kDepth;
  const int64_t steps = steps_of(kDepth, values);
  if (columns < kWidth) std::memset(static_cast<void*>(to), 0, steps * kWidth * sizeof(Operand));
  for (int64_t step = 0; step < steps; ++step, from += kDepth * stride, to += kWidth) {
    const bool has_second = kDepth == 2 && kDepth * step + 1 < values;
    const auto copy = [&](int64_t j, auto lanes) {
      const Vec operands =
          load_step(Operand(), from + j, has_second ? from + stride + j : nullptr, lanes);
      store_operands(to + j, operands, simd::FullVector());
    };
    if (columns >= kWidth) {
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; j += simd::kLanes) copy(j, simd::FullVector());
    } else {
      simd::for_each_vector(0, columns, copy);
    }
  }
}

// Fetches what copy_panel will read: the rows may be pages apart, where nothing else does.
template <typename T>
void fetch_panel(const T* from, int64_t stride, int64_t values) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t value = 0; value < values; ++value, from += stride) {
    for (int64_t j = 0; j < kColumns; j += kLine) simd::prefetch(from + j);
    simd::prefetch(from + kColumns - 1);
  }
}

// The panels of b that a matrix of T holds, its columns contiguous.
template <typename T>
struct MatrixPanels {
  const T* data;
  int64_t stride, columns;

  template <typename Operand>
  void pack(int64_t column, int64_t value, int64_t values, Operand* to) const {
    copy_panel(data + value * stride + column, stride, values, columns - column, to);
  }
  void fetch(int64_t column, int64_t value, int64_t values) const {
    fetch_panel(data + value * stride + column, stride, values);
  }
};

// Rows of a by steps: (groups, steps, kGroupRows).
template <typename Operand>
struct StepRows {
  const Operand* data;
  int64_t steps;
};

// Rows of a that are columns of a matrix of T.
template <typename T, typename Operand>
StepRows<Operand> step_rows(const T* from, int64_t stride, int64_t count, int64_t values,
                            Operand* scratch) {
  const int64_t steps = steps_of(Operand::kDepth, values);
  for (int64_t row = 0; row < count; row += kGroupRows) {
    copy_panel<kGroupRows>(from + row, stride, values, count - row, scratch + row * steps);
  }
  return {scratch, steps};
}

// c (rows, kColumns) (+)= a b for at most kRows rows from `row`, a multiple, and `count` steps from
// `step` on.
template <typename Operand>
void multiply_rows(const Rows<Operand>& a, int64_t row, int64_t rows, int64_t step, int64_t count,
                   const Operand* b, float* c, bool accumulate) {
  multiply_panel<Operand>(rows, count, {a.data + row * a.stride + step, a.stride}, b, c,
                          accumulate);
}
template <typename Operand>
void multiply_rows(const StepRows<Operand>& a, int64_t row, int64_t, int64_t step, int64_t count,
                   const Operand* b, float* c, bool accumulate) {
  const int64_t in_group = row % kGroupRows;
  const Operand* from = a.data + (row - in_group) * a.steps + step * kGroupRows + in_group;
  multiply_tile<kRows, Operand, true>(count, from, kGroupRows, b, c, accumulate);
}

template<class O> int64_t chain_of(const Rows<O>&,int64_t){return kMostChain;}
template<class O> int64_t chain_of(const StepRows<O>&,int64_t steps){return steps<=kMostChain?kMostChain:kMostChain/2;}
// Fetches what multiply_rows will read.
template <typename Operand>
void fetch_rows(const Rows<Operand>& a, int64_t row, int64_t step, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(Operand);
  for (int64_t r = 0; r < kRows; ++r) {
    const Operand* from = a.data + (row + r) * a.stride + step;
    for (int64_t i = 0; i < count; i += kLine) simd::prefetch(from + i);
  }
}
template <typename Operand>
void fetch_rows(const StepRows<Operand>&, int64_t, int64_t, int64_t) {}

// c = a b. rows_of(begin, count, value, values, scratch) gives Rows or StepRows of a, of the values
// of K from `value` on; scratch holds `count` rows, rounded up to whole groups, of these values'
// steps and kLanes more. panels.pack(column, value, values, to) writes the steps of the panel of b
// that begins with this column, panels.fetch(column, value, values) fetches what that will read.
// finish(begin, count, column, c) takes c: (count, kColumns), columns from `column` on. Pieces of K
// begin with a whole step.
template <typename Operand, typename RowsOf, typename Panels, typename Finish>
void multiply_packing(const Shape& shape, const RowsOf& rows_of, const Panels& panels,
                      const Finish& finish) {
  constexpr int64_t kDepth = Operand::kDepth;
  const Blocking cut = Blocking::of<Operand>(shape, torch::stable::get_num_threads());
  const int64_t count = shape.panels(), most_panels = (count + cut.splits - 1) / cut.splits;
  const int64_t all_steps = steps_of(kDepth, shape.dim);
  const int64_t parts = (all_steps + cut.steps - 1) / cut.steps;
  const int64_t sums_size = cut.most_rows() * kColumns;
  const int64_t scratch_rows = (cut.most_rows() + kGroupRows - 1) / kGroupRows * kGroupRows;
  const auto values_of = [&](int64_t step, int64_t steps) {
    return std::min(steps * kDepth, shape.dim - step * kDepth);
  };
  share(cut.blocks * cut.splits, [&](const auto& next) {
    const Scratch<float> c(sums_size * (parts > 1 ? most_panels : 1));
    const Scratch<Operand> rows_scratch(scratch_rows * (cut.steps + kLanes));
    const Scratch<Operand> b(kMostChain * kColumns);
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t block = item / cut.splits, split = item % cut.splits;
      const int64_t first = cut.first_row(block);
      const int64_t rows = std::min(cut.first_row(block + 1), shape.rows) - first;
      const int64_t tiles = (rows + kRows - 1) / kRows;
      const int64_t panel_begin = split * count / cut.splits;
      const int64_t panel_end = (split + 1) * count / cut.splits;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t step = part * cut.steps;
        const int64_t steps = std::min(cut.steps, all_steps - step);
        const auto a =
            rows_of(first, rows, step * kDepth, values_of(step, steps), rows_scratch.get());
        const int64_t longest = chain_of(a, steps);
        for (int64_t p = panel_begin; p < panel_end; ++p) {
          float* sums = c.get() + (parts > 1 ? p - panel_begin : 0) * sums_size;
          for (int64_t done = 0; done < steps; done += longest) {
            const int64_t from = step + done, chain = std::min(longest, steps - done);
            panels.pack(p * kColumns, from * kDepth, values_of(from, chain), b.get());
            // The next chain is this panel's, or the first of the next panel.
            const bool last = done + chain == steps;
            const int64_t next_panel = last ? p + 1 : p, next_done = last ? 0 : done + chain;
            const int64_t next_chain =
                next_panel < panel_end ? std::min(longest, steps - next_done) : 0;
            const bool finishes = last && part + 1 == parts;
            for (int64_t tile = 0; tile < tiles; ++tile) {
              const int64_t fetched = tile * next_chain / tiles;
              const int64_t to_fetch = (tile + 1) * next_chain / tiles - fetched;
              const int64_t ahead = step + next_done + fetched;
              panels.fetch(next_panel * kColumns, ahead * kDepth, values_of(ahead, to_fetch));
              if (p == panel_begin) fetch_rows(a, (tile + 1) * kRows, done, chain);
              const int64_t row = tile * kRows, row_count = std::min<int64_t>(kRows, rows - row);
              float* to = sums + row * kColumns;
              multiply_rows(a, row, row_count, done, chain, b.get(), to, part > 0 || done > 0);
              if (finishes) finish(first + row, row_count, p * kColumns, to);
            }
          }
        }
      }
    }
    simd::finish_streams();
  });
}

// Writes c to y: (rows, columns), rounded; past the caches if `streamed`.
template <typename T>
auto store_to(T* y, int64_t columns, bool streamed = false) {
  return [=](int64_t begin, int64_t count, int64_t column, const float* c) {
    const int64_t end = std::min<int64_t>(column + kColumns, columns);
    for (int64_t r = 0; r < count; ++r) {
      simd::for_each_vector(column, end, [&](int64_t j, auto lanes) {
        const Vec sum = simd::load(c + r * kColumns + (j - column));
        T* to = y + (begin + r) * columns + j;
        if (streamed) {
          simd::stream(to, sum, lanes);
        } else {
          simd::store(to, sum, lanes);
          simd::prefetch_for_write(to + kRows * columns);  // of the next tile
        }
      });
    }
  };
}

// Sums over the rows of each group: x (groups, rows, columns) to sums (groups, columns).
template <typename T>
void sum_rows(const T* x, int64_t groups, int64_t rows, int64_t columns, T* sums) {
  constexpr int64_t kChunk = 4 * simd::kLanes, kAddends = 16;  // in fp32, then in fp64
  const int64_t chunks = (columns + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, groups * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / chunks, first = item % chunks * kChunk;
      const int64_t last = std::min(first + kChunk, columns);
      double total[kChunk] = {};
      for (int64_t row = 0; row < rows; row += kAddends) {
        float sum[kChunk] = {};
        const int64_t stop = std::min(row + kAddends, rows);
        for (int64_t r = row; r < stop; ++r) {
          const T* from = x + (group * rows + r) * columns;
          simd::for_each_vector(first, last, [&](int64_t j, auto lanes) {
            float* to = sum + (j - first);
            simd::store(to, simd::load(to) + simd::load(from + j, lanes));
          });
        }
        for (int64_t j = 0; j < kChunk; ++j) total[j] += sum[j];
      }
      float rounded[kChunk];
      for (int64_t j = 0; j < kChunk; ++j) rounded[j] = static_cast<float>(total[j]);
      simd::for_each_vector(first, last, [&](int64_t j, auto lanes) {
        simd::store(sums + group * columns + j, simd::load(rounded + (j - first)), lanes);
      });
    }
  });
}

}  // namespace sdfast::gemm
