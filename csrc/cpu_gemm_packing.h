// Matrix products of operands that lie as tensors do, for training: c = a b in fp32.
//
// A weight changes at every step of an optimiser, and a packed copy of it would serve two products:
// reading the weight, writing the copy and reading it again costs more than those. Here each thread
// packs what it is about to multiply, one chain of additions of a panel, into L1, and fetches the
// next one meanwhile; nothing lasts. Otherwise as cpu_gemm.h, with shorter chains: they run over
// tokens or pixels here, which are many.
#pragma once

#include "cpu_gemm.h"
#include "cpu_scratch.h"
#include "cpu_transpose.h"

namespace sdfast::gemm {

constexpr int64_t kShortChain = 64;
constexpr int64_t kGroupRows = 4 * kRows;  // of a, whole vectors

// Rows and columns of c, and K in steps. Whether a is multiplied where it lies, or packed.
struct Shape {
  int64_t rows, columns, steps;
  bool in_place = false;
  int64_t panels() const { return (columns + kColumns - 1) / kColumns; }
};

// How a product is cut: rows in the fewest blocks that fit in L2, for each block packs all of b; K
// in parts that depend on the shape alone; columns in `splits` where there are too few blocks to
// keep all threads busy to the end. Each split packs its block's rows, unless they are used in
// place.
struct Blocking {
  int64_t tiles, blocks, steps, splits;

  static Blocking of(const Shape& shape, int64_t threads) {
    const int64_t parts = std::max<int64_t>(1, (shape.steps + kPartSteps - 1) / kPartSteps);
    const int64_t steps = std::max<int64_t>(1, (shape.steps + parts - 1) / parts);
    const int64_t fit = kBlockBytes / (steps * static_cast<int64_t>(sizeof(float)));
    const int64_t most_tiles = std::clamp<int64_t>(fit / kRows, 1, 64);
    const int64_t tiles = (shape.rows + kRows - 1) / kRows;
    const int64_t least = (tiles + most_tiles - 1) / most_tiles;
    const int64_t blocks =
        least <= threads ? least : std::min((least + threads - 1) / threads * threads, tiles);
    const int64_t enough = (shape.in_place ? 4 : 2) * threads;
    const int64_t splits = std::clamp((enough + blocks - 1) / blocks, int64_t{1}, shape.panels());
    return {tiles, blocks, steps, threads == 1 ? 1 : splits};
  }
  int64_t first_row(int64_t block) const { return block * tiles / blocks * kRows; }
  int64_t most_rows() const { return (tiles + blocks - 1) / blocks * kRows; }
};

// Steps of a panel from rows that hold its columns: to[step][j] = from[step * stride + j] for
// j < columns, else 0.
template <int64_t kWidth = kColumns, typename T>
void copy_panel(const T* from, int64_t stride, int64_t steps, int64_t columns, float* to) {
  if (columns < kWidth) std::fill_n(to, steps * kWidth, 0.0f);
  for (int64_t step = 0; step < steps; ++step, from += stride, to += kWidth) {
    if (columns >= kWidth) {
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; j += simd::kLanes) {
        simd::store(to + j, simd::load(from + j, simd::FullVector()));
      }
    } else {
      simd::for_each_vector(0, columns, [&](int64_t j, auto lanes) {
        simd::store(to + j, simd::load(from + j, lanes));
      });
    }
  }
}

// Fetches what copy_panel will read: the rows may be pages apart, where nothing else does.
template <typename T>
void fetch_panel(const T* from, int64_t stride, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step, from += stride) {
    simd::prefetch(from);
    simd::prefetch(from + kColumns / 2);
    simd::prefetch(from + kColumns - 1);
  }
}

// The panels of b that a matrix of T holds, its columns contiguous.
template <typename T>
struct MatrixPanels {
  const T* data;
  int64_t stride, columns;

  void pack(int64_t column, int64_t step, int64_t steps, float* to) const {
    copy_panel(data + step * stride + column, stride, steps, columns - column, to);
  }
  void fetch(int64_t column, int64_t step, int64_t steps) const {
    fetch_panel(data + step * stride + column, stride, steps);
  }
};

// Rows of a as they lie in a matrix of T, or spread or widened in scratch.
template <typename T>
Rows<Float32> plain_rows(const T* from, int64_t stride, int64_t count, int64_t steps,
                         Float32* scratch) {
  if constexpr (std::is_same_v<T, float>) {
    if (!crowds(stride * sizeof(T))) return {reinterpret_cast<const Float32*>(from), stride};
  }
  const int64_t apart = scratch_stride<Float32>(steps);
  for (int64_t r = 0; r < count; ++r) {
    simd::for_each_vector(0, steps, [&](int64_t i, auto lanes) {
      simd::store(&scratch[r * apart + i].value, simd::load(from + r * stride + i, lanes), lanes);
    });
  }
  return {scratch, apart};
}

// Rows of a by steps: (groups, steps, kGroupRows).
struct StepRows {
  const Float32* data;
  int64_t steps;
};

// Rows of a that are columns of a matrix of T.
template <typename T>
StepRows step_rows(const T* from, int64_t stride, int64_t count, int64_t steps, Float32* scratch) {
  for (int64_t row = 0; row < count; row += kGroupRows) {
    copy_panel<kGroupRows>(from + row, stride, steps, count - row, &scratch[row * steps].value);
  }
  return {scratch, steps};
}

// c (rows, kColumns) (+)= a b for at most kRows rows from `row`, a multiple, and `count` steps from
// `step` on.
inline void multiply_rows(const Rows<Float32>& a, int64_t row, int64_t rows, int64_t step,
                          int64_t count, const Float32* b, float* c, bool accumulate) {
  multiply_panel<Float32>(rows, count, {a.data + row * a.stride + step, a.stride}, b, c,
                          accumulate);
}
inline void multiply_rows(const StepRows& a, int64_t row, int64_t, int64_t step, int64_t count,
                          const Float32* b, float* c, bool accumulate) {
  const int64_t in_group = row % kGroupRows;
  const Float32* from = a.data + (row - in_group) * a.steps + step * kGroupRows + in_group;
  multiply_tile<kRows, Float32, true>(count, from, kGroupRows, b, c, accumulate);
}

// c = a b. rows_of(begin, count, first_step, steps, scratch) gives Rows or StepRows of a; scratch
// holds count * (steps + kLanes) operands, count rounded up to whole groups. panels.pack(column,
// step, steps, to) writes steps of the panel of b that begins with this column,
// panels.fetch(column, step, steps) fetches what that will read. finish(begin, count, column, c)
// takes c: (count, kColumns), columns from `column` on.
template <typename RowsOf, typename Panels, typename Finish>
void multiply_packing(const Shape& shape, const RowsOf& rows_of, const Panels& panels,
                      const Finish& finish) {
  const Blocking cut = Blocking::of(shape, torch::stable::get_num_threads());
  const int64_t count = shape.panels(), most_panels = (count + cut.splits - 1) / cut.splits;
  const int64_t parts = (shape.steps + cut.steps - 1) / cut.steps;
  const int64_t sums_size = cut.most_rows() * kColumns;
  const int64_t scratch_rows = (cut.most_rows() + kGroupRows - 1) / kGroupRows * kGroupRows;
  share(cut.blocks * cut.splits, [&](const auto& next) {
    const Scratch<float> c(sums_size * (parts > 1 ? most_panels : 1));
    const Scratch<float> rows_scratch(scratch_rows * (cut.steps + kLanes));
    const Scratch<float> b(kShortChain * kColumns);
    auto* a_scratch = reinterpret_cast<Float32*>(rows_scratch.get());
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t block = item / cut.splits, split = item % cut.splits;
      const int64_t first = cut.first_row(block);
      const int64_t rows = std::min(cut.first_row(block + 1), shape.rows) - first;
      const int64_t tiles = (rows + kRows - 1) / kRows;
      const int64_t panel_begin = split * count / cut.splits;
      const int64_t panel_end = (split + 1) * count / cut.splits;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t step = part * cut.steps;
        const int64_t steps = std::min(cut.steps, shape.steps - step);
        const auto a = rows_of(first, rows, step, steps, a_scratch);
        for (int64_t p = panel_begin; p < panel_end; ++p) {
          float* sums = c.get() + (parts > 1 ? p - panel_begin : 0) * sums_size;
          for (int64_t done = 0; done < steps; done += kShortChain) {
            const int64_t chain = std::min(kShortChain, steps - done);
            panels.pack(p * kColumns, step + done, chain, b.get());
            // The next chain is this panel's, or the first of the next panel.
            const bool last = done + chain == steps;
            const int64_t next_panel = last ? p + 1 : p, next_done = last ? 0 : done + chain;
            const int64_t next_chain =
                next_panel < panel_end ? std::min(kShortChain, steps - next_done) : 0;
            for (int64_t tile = 0; tile < tiles; ++tile) {
              const int64_t fetched = tile * next_chain / tiles;
              panels.fetch(next_panel * kColumns, step + next_done + fetched,
                           (tile + 1) * next_chain / tiles - fetched);
              const int64_t row = tile * kRows;
              multiply_rows(a, row, std::min<int64_t>(kRows, rows - row), done, chain,
                            reinterpret_cast<const Float32*>(b.get()), sums + row * kColumns,
                            part > 0 || done > 0);
            }
          }
          if (part + 1 == parts) finish(first, rows, p * kColumns, sums);
        }
      }
    }
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
        streamed ? simd::stream(to, sum, lanes) : simd::store(to, sum, lanes);
      });
    }
    if (streamed) simd::finish_streams();
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
