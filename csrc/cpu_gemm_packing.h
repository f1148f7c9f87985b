// Matrix products of operands that lie as tensors do, for training: c = a b, fp32 accumulation.
//
// A weight changes at every step of an optimiser, and a packed copy of it would serve two products:
// but for many tokens (cpu_many_tokens.h) reading the weight, writing the copy and reading it again
// costs more than those. Here each thread packs what it is about to multiply, some steps of a panel
// or of a few, into L1, and fetches what follows meanwhile; nothing lasts. Each tile of sums is
// finished while it is in L1. Otherwise as cpu_gemm.h, its chains of additions as long as what is
// packed at a time.
#pragma once

#include "cpu_gemm_rows.h"
#include "cpu_scratch.h"
#include "cpu_transpose.h"

namespace sdfast::gemm {

constexpr int64_t kShortChain = 64;
// Panels that are packed together, of up to so many rows.
constexpr int64_t kPackedPanels = 4, kFewPackedRows = 4 * kRows;
constexpr int64_t kPackedSize = kColumns * std::max(kChain, kPackedPanels* kShortChain);
constexpr int64_t kPartOfPacked = 640;     // steps, whose sums of most panels stay in L2 beside a
constexpr int64_t kGroupRows = 4 * kRows;  // of a, whole vectors

// Rows and columns of c, and the values of K. Whether a is multiplied where it lies, or packed.
struct Shape {
  int64_t rows, columns, dim;
  bool in_place = false;
  int64_t panels() const { return (columns + kColumns - 1) / kColumns; }
};

// How a product is cut: rows in the fewest blocks that fit in L2, for each block packs all of b; K
// in parts that depend on the shape alone; columns in `splits` where there are too few blocks for
// all threads. Each split packs its block's rows; where they are used in place there are more, so
// that a thread that is held up takes fewer.
struct Blocking {
  int64_t tiles, blocks, steps, splits;

  template <typename Operand>
  static Blocking of(const Shape& shape, int64_t threads) {
    const int64_t all = steps_of(Operand::kDepth, shape.dim);
    const int64_t parts = std::max<int64_t>(1, (all + kPartOfPacked - 1) / kPartOfPacked);
    const int64_t steps = std::max<int64_t>(1, (all + parts - 1) / parts);
    const int64_t fit = kBlockBytes / (steps * static_cast<int64_t>(sizeof(Operand)));
    const int64_t most_tiles = std::clamp<int64_t>(fit / kRows, 1, 64);
    const int64_t tiles = (shape.rows + kRows - 1) / kRows;
    const int64_t least = (tiles + most_tiles - 1) / most_tiles;
    const int64_t blocks =
        least <= threads ? least : std::min((least + threads - 1) / threads * threads, tiles);
    const int64_t splits = std::min(even_splits(blocks, shape.in_place ? 4 : 1), shape.panels());
    return {tiles, blocks, steps, splits};
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

// What is packed at a time: panels of b, and steps of them, which are one chain of additions and so
// a function of the shape alone.
struct Chunk {
  int64_t panels, steps;
};
// Of few rows the reading of b takes longer than the products: wider pieces of its rows.
template <typename Operand>
Chunk chunk_of(const Rows<Operand>&, bool few_rows, int64_t) {
  return few_rows ? Chunk{kPackedPanels, kShortChain} : Chunk{1, kChain};
}
// Where a chain is not all there is, it is short: these rows lie side by side with those of four
// tiles, all of which then stay in L1.
template <typename Operand>
Chunk chunk_of(const StepRows<Operand>&, bool, int64_t steps) {
  return {1, steps <= kChain ? kChain : kShortChain};
}

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

// One block of rows of a by panels [begin, end) of b, over one part of K.
struct Part {
  int64_t first_row, rows, begin, end;
  int64_t step, steps, dim;  // of K; all of its values
  bool begins, ends;         // the sums
  bool few_rows;             // in all blocks
  // How many values the steps from `at` on hold.
  template <typename Operand>
  int64_t values(int64_t at, int64_t count) const {
    return std::min(count * Operand::kDepth, dim - at * Operand::kDepth);
  }
};

// sums_of(panel): (rows, kColumns). b: scratch for a chunk.
template <typename Operand, typename RowsOfA, typename Panels, typename SumsOf, typename Finish>
void multiply_part(const Part& part, const RowsOfA& a, const Panels& panels, Operand* b,
                   const SumsOf& sums_of, const Finish& finish) {
  constexpr int64_t kDepth = Operand::kDepth;
  const int64_t tiles = (part.rows + kRows - 1) / kRows;
  const Chunk most = chunk_of(a, part.few_rows, part.steps);
  for (int64_t p = part.begin; p < part.end; p += most.panels) {
    const int64_t width = std::min(most.panels, part.end - p);
    for (int64_t done = 0; done < part.steps; done += most.steps) {
      const int64_t from = part.step + done, steps = std::min(most.steps, part.steps - done);
      const auto packed = [&](int64_t i) { return b + i * most.steps * kColumns; };
      for (int64_t i = 0; i < width; ++i) {
        panels.pack((p + i) * kColumns, from * kDepth, part.values<Operand>(from, steps),
                    packed(i));
      }
      // The next chunk is of the same panels, or the first of the next ones.
      const bool last = done + steps == part.steps;
      const int64_t next = last ? p + most.panels : p, next_done = last ? 0 : done + steps;
      const int64_t next_width = std::min(most.panels, part.end - next);
      const int64_t next_steps = next_width > 0 ? std::min(most.steps, part.steps - next_done) : 0;
      const int64_t turns = width * tiles;
      int64_t turn = 0, fetched = 0;
      for (int64_t panel = p; panel < p + width; ++panel) {
        float* sums = sums_of(panel);
        const Operand* columns = packed(panel - p);
        for (int64_t row = 0; row < part.rows; row += kRows) {
          const int64_t to_fetch = ++turn * next_steps / turns - fetched;
          const int64_t ahead = part.step + next_done + fetched;
          const int64_t values = part.values<Operand>(ahead, to_fetch);
          for (int64_t i = 0; i < next_width; ++i) {
            panels.fetch((next + i) * kColumns, ahead * kDepth, values);
          }
          fetched += to_fetch;
          if (panel == part.begin) fetch_rows(a, row + kRows, done, steps);
          const int64_t rows = std::min<int64_t>(kRows, part.rows - row);
          float* to = sums + row * kColumns;
          multiply_rows(a, row, rows, done, steps, columns, to, !part.begins || done > 0);
          if (part.ends && last) finish(part.first_row + row, rows, panel * kColumns, to);
        }
      }
    }
  }
}

// c = a b. rows_of(begin, count, value, values, scratch) gives Rows or StepRows of a, of the values
// of K from `value` on; scratch holds `count` rows, rounded up to whole groups, of these values'
// steps and kLanes more. panels.pack(column, value, values, to) writes the steps of the panel of b
// that begins with this column, panels.fetch(column, value, values) fetches what that will read.
// finish(begin, count, column, c) takes c: (count, kColumns), columns from `column` on, of at most
// kRows rows, and may stream. Pieces of K begin with a whole step.
template <typename Operand, typename RowsOf, typename Panels, typename Finish>
void multiply_packing(const Shape& shape, const RowsOf& rows_of, const Panels& panels,
                      const Finish& finish) {
  const Blocking cut = Blocking::of<Operand>(shape, torch::stable::get_num_threads());
  const int64_t count = shape.panels(), most_panels = (count + cut.splits - 1) / cut.splits;
  const int64_t all_steps = steps_of(Operand::kDepth, shape.dim);
  const int64_t parts = (all_steps + cut.steps - 1) / cut.steps;
  const int64_t sums_size = cut.most_rows() * kColumns;
  const int64_t scratch_rows = (cut.most_rows() + kGroupRows - 1) / kGroupRows * kGroupRows;
  const bool few_rows = shape.rows <= kFewPackedRows;
  // Sums of all panels where they wait for the next part, else of those packed together.
  const int64_t kept = parts > 1 ? most_panels : few_rows ? kPackedPanels : 1;
  share(cut.blocks * cut.splits, [&](const auto& next) {
    const Scratch<float> c(sums_size * kept);
    const Scratch<Operand> rows_scratch(scratch_rows * (cut.steps + kLanes));
    const Scratch<Operand> b(kPackedSize);
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t block = item / cut.splits, split = item % cut.splits;
      Part part;
      part.dim = shape.dim;
      part.few_rows = few_rows;
      part.first_row = cut.first_row(block);
      part.rows = std::min(cut.first_row(block + 1), shape.rows) - part.first_row;
      part.begin = split * count / cut.splits;
      part.end = (split + 1) * count / cut.splits;
      for (part.step = 0; part.step < all_steps; part.step += cut.steps) {
        part.steps = std::min(cut.steps, all_steps - part.step);
        part.begins = part.step == 0;
        part.ends = part.step + part.steps == all_steps;
        const auto a = rows_of(part.first_row, part.rows, part.step * Operand::kDepth,
                               part.values<Operand>(part.step, part.steps), rows_scratch.get());
        const auto sums_of = [&](int64_t panel) {
          return c.get() + (panel - part.begin) % kept * sums_size;
        };
        multiply_part(part, a, panels, b.get(), sums_of, finish);
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
          simd::stream_part(to, sum, lanes);
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
