// Products of many tokens, which are read where they lie: y = x Wᵀ for W (rows, K), K contiguous.
//
// Algorithm. As cpu_weights.h with the sides exchanged: rows of W are packed into panels, once for
// all threads, and groups of tokens go past them. The sums then lie as y does, so that nothing is
// transposed but W, where cpu_weights.h transposes x and y. Bytes: x once for each block of W that
// L3 holds beside all else, W twice, y. Limit: fused multiply-adds. Every element is one chain of
// additions over K, cut at fixed places: the result does not depend on the number of threads.
#pragma once

#include "cpu_weights.h"

namespace sdfast::gemm {

constexpr int64_t kManyTimes = 2;  // from which this was measured faster than cpu_weights.h

// Whether x and y have so many times the values of W: what cpu_weights.h transposes, and this file.
// Of longer rows L2 holds no group of tokens.
template <typename Operand>
bool are_many_tokens(const Product& p, int64_t times) {
  constexpr int64_t kMostSteps = 2560;
  const int64_t rows = p.gated ? 2 * p.rows : p.rows;
  return steps_of(Operand::kDepth, p.dim) <= kMostSteps &&
         p.tokens * (p.dim + rows) >= times * rows * p.dim;
}

// Whether y is written past the caches: more than L3 holds, in whole lines of a panel.
template <typename T>
bool streams_past_l3(const T* y, int64_t tokens, int64_t width) {
  return kColumns * sizeof(T) % 64 == 0 && simd::streams(y, tokens, width, 32 << 20);
}

// Packs rows of a dense W as columns.
template <typename T>
struct PackRows {
  const Product& product;
  const T* weight;

  template <typename Operand>
  void operator()(int64_t row, int64_t half, Operand* to) const {
    const Product& p = product;
    const T* from = weight + (row + half * p.rows) * p.dim;
    pack_columns<T>([&](int64_t i) { return from + i * p.dim; },
                    std::min<int64_t>(kColumns, p.rows - row), p.dim, to);
  }
};

// As multiply_weights, for tokens x of `stride`. pack(row, half, to) packs kColumns rows of W from
// this one of a half on; a product that is not gated has the first.
template <typename Operand, typename T, typename Pack, typename Finish>
void multiply_many_tokens(const Product& p, const T* x, int64_t stride, const Pack& pack,
                          const Finish& finish) {
  constexpr int64_t kSharedBytes = 4 << 20, kSums = kRows * kColumns;
  const int64_t halves = p.gated ? 2 : 1, steps = steps_of(Operand::kDepth, p.dim);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panels = (p.rows + kColumns - 1) / kColumns;
  const int64_t groups = (p.tokens + kGroup - 1) / kGroup;
  const int64_t panel_size = halves * steps * kColumns;
  const int64_t panel_bytes = panel_size * sizeof(Operand);
  const int64_t most = std::max<int64_t>(1, kSharedBytes / panel_bytes);
  const int64_t blocks = (panels + most - 1) / most;
  const int64_t most_panels = (panels + blocks - 1) / blocks;
  const Scratch<Operand> packed(most_panels * panel_size);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * panels / blocks, count = (block + 1) * panels / blocks - first;
    const auto packed_of = [&](int64_t panel, int64_t half) {
      return packed.get() + (panel * halves + half) * steps * kColumns;
    };
    share(count * halves, [&](const auto& next) {
      for (int64_t item; (item = next()) >= 0;) {
        const int64_t panel = item / halves, half = item % halves;
        pack((first + panel) * kColumns, half, packed_of(panel, half));
      }
    });
    // Where groups are few for all threads.
    const int64_t splits = std::clamp<int64_t>((8 * threads + groups - 1) / groups, 1, count);
    share(groups * splits, [&](const auto& next) {
      const Scratch<Operand> scratch(kGroup * (steps + kLanes));
      const Scratch<float> sums(halves * kSums);
      for (int64_t item; (item = next()) >= 0;) {
        const int64_t group = item / splits, split = item % splits;
        const int64_t begin = split * count / splits, end = (split + 1) * count / splits;
        const int64_t token = group * kGroup, tokens = std::min(kGroup, p.tokens - token);
        const T* from = x + token * stride;
        const auto a = rows_of(from, stride, tokens, p.dim, scratch.get());
        // The group that this thread is likely to take next.
        const int64_t next_token = token + std::max<int64_t>(threads / splits, 1) * kGroup;
        Ahead next_group;
        if (next_token < p.tokens) {
          next_group = Ahead(x + next_token * stride, std::min(kGroup, p.tokens - next_token),
                             p.dim * sizeof(T), stride * sizeof(T),
                             halves * (end - begin) * calls_of(tokens, steps));
        }
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t row = (first + panel) * kColumns;
          const int64_t rows = std::min<int64_t>(kColumns, p.rows - row);
          for (int64_t r = 0; r < tokens; r += kRows) {
            const int64_t near = std::min<int64_t>(kRows, tokens - r);
            finish.fetch(token + r, near, row, rows);
            for (int64_t half = 0; half < halves; ++half) {
              multiply_panel<Operand>(near, steps, {a.data + r * a.stride, a.stride},
                                      packed_of(panel, half), sums.get() + half * kSums, false,
                                      next_group, rows);
            }
            finish(token + r, near, row, rows, Sums{sums.get(), sums.get() + kSums, kColumns});
          }
        }
      }
      simd::finish_streams();
    });
  }
}

}  // namespace sdfast::gemm
