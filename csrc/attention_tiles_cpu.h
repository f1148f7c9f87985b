// Tiles of queries over all keys on AMX, for any D and causal ones: in bf16, or in fp32 as sums of
// two bf16.
//
// A block of keys of a tile of queries is an item. While the scores of one item become weights,
// the weights of the item before are multiplied by its values, and the scores of the next item are
// multiplied out: a product is begun, some keys are weighed, and the product's sums are stored.
//
// A split row of q and one of k have three times D values, whose product is the sum of three: upper
// by upper parts, lower by upper, upper by lower. Values and weights alternate in upper and lower
// parts instead, because weights are split where their scores lie.
#pragma once

#include "attention_cpu.h"

#if defined(SDFAST_TILES)

namespace sdfast::attention {

using gemm::BFloat16Pair;
using simd::BFloat16;

constexpr int64_t kTile = amx::kTileRows * kLanes;  // pairs

// c (kTileRows or twice as many, kColumns) (+)= a b. The tiles of a are dense, `next_rows` pairs
// from one to the next of other rows, `next_step` of other columns. Of split ones a step is a tile
// of upper parts and the next, of lower ones, and in b their rows alternate.
struct TileProduct {
  const BFloat16Pair *a, *b;
  int64_t next_rows, next_step, steps;
  float* c;
  bool two, accumulate, split;

  static constexpr int64_t kRowBytes = kColumns * sizeof(float);

  // Calls work(step) after each step.
  template <typename Work>
  SDFAST_INLINE void run(const Work& work) const {
    // GCC's tile loads do not say that they read memory.
    __asm__ volatile("" ::: "memory");
    if (accumulate) {
      amx::load_sums(c, kRowBytes, two);
    } else {
      amx::zero_sums();
    }
    constexpr int64_t kApart = kLanes * sizeof(BFloat16Pair);
    const int64_t parts = split ? 2 : 1;
    const BFloat16Pair *rows = a, *more_rows = a + next_rows, *columns = b;
    for (int64_t step = 0; step < steps; ++step) {
      if (split) {
        amx::multiply_split_step(values_of(rows), values_of(more_rows), kApart, 2 * next_step,
                                 values_of(columns), values_of(columns + kLanes), 2 * kRowBytes,
                                 2 * kColumns, two);
      } else {
        amx::multiply_step(rows, more_rows, kApart, columns, columns + kLanes, kRowBytes, two);
      }
      rows += parts * next_step;
      more_rows += parts * next_step;
      columns += parts * kLanes * kColumns;
      work(step);
    }
    amx::store_sums(c, kRowBytes, two);
    __asm__ volatile("" ::: "memory");
  }
  static const BFloat16* values_of(const BFloat16Pair* pairs) {
    return reinterpret_cast<const BFloat16*>(pairs);
  }
};

// Key `row`: of each kTileRows of them the steps, tiles of (kTileRows, kLanes) pairs.
inline void pack_key_in_tiles(const BFloat16* k, int64_t dim, int64_t row, BFloat16Pair* to) {
  const int64_t steps = whole_steps<BFloat16Pair>(dim), in_tile = row % amx::kTileRows;
  to += (row - in_tile) * steps + in_tile * kLanes;
  for (int64_t step = 0; step < steps; step += kLanes, to += kTile) {
    Vec pairs{};
    std::memcpy(&pairs, k + 2 * step,
                std::min<int64_t>(2 * kLanes, dim - 2 * step) * sizeof(BFloat16));
    std::memcpy(static_cast<void*>(to), &pairs, sizeof pairs);
  }
}

// The values of `keys` rows, transposed: for each 2 kLanes of the keys D rows of kLanes pairs,
// rounded up to whole tiles. What is missing is zeros.
inline void pack_values_in_tiles(const BFloat16* v, int64_t row_stride, int64_t keys, int64_t dim,
                                 BFloat16Pair* to) {
  for (int64_t first = 0; first < keys; first += 2 * kLanes) {
    simd::for_each_vector(0, dim, [&](int64_t d, auto lanes) {
      Vec rows[kLanes] = {};
      for (int64_t i = 0; i < kLanes && first + 2 * i < keys; ++i) {
        const int64_t key = first + 2 * i;
        rows[i] = value_pairs(v + key * row_stride + d, row_stride, keys - key, lanes);
      }
      transpose(rows);
      std::memcpy(static_cast<void*>(to + d * kLanes), rows, sizeof rows);
    });
    to += simd::round_up(dim) * kLanes;
  }
}

// Rows of fp32, `stride` apart, in their parts: (kParts, D) values each, upper parts where
// kUpper says so.
template <bool... kUpper>
void split_rows(const float* from, int64_t stride, int64_t rows, int64_t dim, BFloat16* to) {
  constexpr int64_t kParts = sizeof...(kUpper);
  for (int64_t row = 0; row < rows; ++row, from += stride, to += kParts * dim) {
    for_each_part(dim, [&](int64_t i, auto lanes) {
      const simd::Parts parts = simd::split(simd::load(from + i, lanes));
      int64_t at = i;
      const auto store = [&](const simd::HalfBits& part) {
        std::memcpy(static_cast<void*>(to + at), &part, lanes * sizeof *to);
        at += dim;
      };
      (store(kUpper ? parts.upper : parts.lower), ...);
    });
  }
}

// A product of more rows, two tiles of them at a time.
struct RowsProduct {
  const BFloat16Pair *a, *b;
  int64_t next_rows, next_step, steps, rows;
  float* c;
  bool accumulate, split = false;

  int64_t count() const { return (rows + 2 * amx::kTileRows - 1) / (2 * amx::kTileRows); }
  TileProduct operator[](int64_t i) const {
    const int64_t row = i * 2 * amx::kTileRows;
    return {
        a + 2 * i * next_rows,       b,          next_rows, next_step, steps, c + row * kColumns,
        rows - row > amx::kTileRows, accumulate, split};
  }
  void run() const {
    for (int64_t i = 0; i < count(); ++i) {
      (*this)[i].run([](int64_t) {});
    }
  }
};

// A block of keys of a tile of queries.
struct Item {
  int64_t tile, key, keys;
};

// The items of `tiles`, block by block of `most` keys; `keys_of(tile)` of them are seen.
template <typename KeysOf>
std::vector<Item> items_of(int64_t tiles, int64_t keys, int64_t most, const KeysOf& keys_of) {
  std::vector<Item> items;
  for (int64_t key = 0; key < keys; key += most) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t left = keys_of(t) - key;
      if (left > 0) items.push_back({t, key, std::min(most, left)});
    }
  }
  return items;
}

// A tile's first maximum is subtracted from all its scores while the weights stay below this;
// beyond, an item is multiplied out again and the maximum sought again.
constexpr float kMostSum = 0x1p32f;

// Not where any is NaN.
inline bool all_below(const Vecs<2>& v, float limit) {
  bool all = true;
  simd::for_each_of(v, [&](int, Vec lanes) {
    for (int i = 0; i < kLanes; ++i) all = all && lanes[i] < limit;
  });
  return all;
}

// scores_of(item, to) and values_of(item, weights) give products, settle(item, scores) what hides
// keys, complete(item, weights) the weights of keys that are none. scores: room for three items.
template <bool kSplit, typename ScoresOf, typename ValuesOf, typename Settle, typename Complete>
void attend_items(const std::vector<Item>& items, const Tile<BFloat16Pair>* tiles, int64_t dim,
                  float scale, float* scores, int64_t item_scores, const ScoresOf& scores_of,
                  const ValuesOf& values_of, const Settle& settle, const Complete& complete) {
  const int64_t count = static_cast<int64_t>(items.size());
  const auto scores_at = [&](int64_t i) { return scores + i % 3 * item_scores; };
  const auto product_of = [&](int64_t i) {
    return values_of(items[i], reinterpret_cast<const BFloat16Pair*>(scores_at(i)));
  };
  scores_of(items[0], scores_at(0)).run();
  for (int64_t i = 0; i < count; ++i) {
    const Item& item = items[i];
    const Tile<BFloat16Pair>& tile = tiles[item.tile];
    float* own = scores_at(i);
    const int64_t pairs = (item.keys + 1) / 2;
    settle(item, own);
    Vecs<2> shift =
        item.key == 0
            ? reference_of(tile, item.keys, dim, scale, true, own)
            : simd::make_vecs<2>([&](int v) { return simd::load(tile.stats + v * kLanes); });
    const RowsProduct before = i > 0 ? product_of(i - 1) : RowsProduct{};
    const RowsProduct next =
        i + 1 < count ? scores_of(items[i + 1], scores_at(i + 1)) : RowsProduct{};
    const int64_t products = before.count() + next.count();
    const int64_t steps = before.count() * before.steps + next.count() * next.steps;
    Vecs<4> total{};
    int64_t taken = 0, weighed = 0;
    for (int64_t p = 0; p < products; ++p) {
      const TileProduct product = p < before.count() ? before[p] : next[p - before.count()];
      product.run([&](int64_t) {
        const int64_t end = ++taken * pairs / steps;
        weigh<BFloat16Pair, kSplit>(2 * weighed, 2 * end, scale, shift, own, total);
        weighed = end;
      });
    }
    if (products == 0) weigh<BFloat16Pair, kSplit>(0, 2 * pairs, scale, shift, own, total);
    Vecs<2> sums = even_and_odd(total);
    if (item.key > 0 && !all_below(sums, kMostSum)) {
      scores_of(item, own).run();
      settle(item, own);
      shift = reference_of(tile, item.keys, dim, scale, false, own);
      sums = weigh<BFloat16Pair, kSplit>(2 * pairs, scale, shift, own);
    }
    add_to_sum(tile, sums);
    complete(item, own);
  }
  product_of(count - 1).run();
}

}  // namespace sdfast::attention

#endif
