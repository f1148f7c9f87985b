// Tiles of queries over all keys in bf16 on AMX where D is at most kNarrow: o of kLanes queries and
// the queries themselves stay in tile registers.
//
// In one step a unit of keys is multiplied by q, the unit before it is weighed, and the weights of
// the one before that are multiplied by their values: a tile instruction, then four rows of
// weights, in turns. A core looks some hundred instructions ahead; only where both kinds are among
// them do its tiles and its vectors work at the same time. Scores and weights stay in L1, keys and
// values come from L2.
#pragma once

#include "attention_tiles_cpu.h"

#if defined(SDFAST_TILES)

namespace sdfast::attention {

constexpr int64_t kNarrow = 4 * amx::kTileColumns;
static_assert(kLanes == amx::kTileColumns && kColumns == 2 * kLanes);

// What is subtracted from a query's scores is the maximum of its first unit. Where later scores are
// much larger the sum of the weights shows it: beyond this the tile is left to attend_items. Below,
// o is finite if no value exceeds 2^63.
constexpr float kMostNarrowSum = 0x1p64f;

// The keys of a head and the tiles of queries that meet them, half a tile at a time. kOut: tiles of
// D.
template <int kOut>
struct NarrowAttention {
  static constexpr int kIn = (kOut + 1) / 2;
  static constexpr int64_t kUnit = 2 * amx::kTileRows;  // keys
  static constexpr int64_t kUnits = 64;  // in a block, whose keys and values share L2
  // Bytes from row to row of a packed tile, of half a tile of queries.
  static constexpr int64_t kDense = kLanes * sizeof(float), kHalf = kColumns * sizeof(float);

  const BFloat16Pair *keys, *values;
  int64_t key_count;
  const Tile<BFloat16Pair>* tiles;
  int64_t tile_count;
  float scale;
  float* scores;  // (2, kUnit, kLanes), and as many weights

  int64_t units() const { return (key_count + kUnit - 1) / kUnit; }

  // One unit of keys for one half of a tile: unit by unit of a block, half by half, block by block.
  struct Place {
    int64_t half = 0, unit = 0;
    bool begins_block() const { return unit % kUnits == 0; }
  };
  Place after(Place place) const {
    const int64_t block = place.unit / kUnits * kUnits;
    if (++place.unit % kUnits != 0 && place.unit < units()) return place;
    if (++place.half < 2 * tile_count) return {place.half, block};
    return {0, place.unit};
  }

  float* scores_at(int64_t step) const { return scores + step % 2 * kUnit * kLanes; }
  BFloat16Pair* weights_at(int64_t step) const {
    return reinterpret_cast<BFloat16Pair*>(scores + 2 * kUnit * kLanes) + step % 2 * kTile;
  }
  const BFloat16Pair* keys_at(const Place& place) const {
    return keys + place.unit * 2 * kIn * kTile;
  }
  const BFloat16Pair* values_at(const Place& place) const {
    return values + place.unit * kOut * kTile;
  }
  float* stats_at(const Place& place) const {
    return tiles[place.half / 2].stats + place.half % 2 * kLanes;
  }
  float* o_at(const Place& place) const {
    return tiles[place.half / 2].o + place.half % 2 * kLanes;
  }

  // The compiler does not know what memory tiles touch, and would gather the vectors' loads and
  // stores: none moves past this.
  static SDFAST_INLINE void pin() { __asm__ volatile("" ::: "memory"); }

  // The tile registers: 0 to 3 o, 4 and 5 q, 6 and 7 what a product needs.
  SDFAST_INLINE void load_queries(const Place& place) const {
    const BFloat16Pair* q = tiles[place.half / 2].q + place.half % 2 * kLanes;
    _tile_loadd(4, q, kHalf);
    if constexpr (kIn > 1) _tile_loadd(5, q + kLanes * kColumns, kHalf);
  }
  SDFAST_INLINE void load_output(const Place& place) const {
    const float* o = o_at(place);
    constexpr int64_t kNext = kLanes * kColumns;
    if (place.unit == 0) {
      _tile_zero(0);
      if constexpr (kOut > 1) _tile_zero(1);
      if constexpr (kOut > 2) _tile_zero(2);
      if constexpr (kOut > 3) _tile_zero(3);
    } else {
      _tile_loadd(0, o, kHalf);
      if constexpr (kOut > 1) _tile_loadd(1, o + kNext, kHalf);
      if constexpr (kOut > 2) _tile_loadd(2, o + 2 * kNext, kHalf);
      if constexpr (kOut > 3) _tile_loadd(3, o + 3 * kNext, kHalf);
    }
  }
  SDFAST_INLINE void store_output(const Place& place) const {
    float* o = o_at(place);
    constexpr int64_t kNext = kLanes * kColumns;
    _tile_stored(0, o, kHalf);
    if constexpr (kOut > 1) _tile_stored(1, o + kNext, kHalf);
    if constexpr (kOut > 2) _tile_stored(2, o + 2 * kNext, kHalf);
    if constexpr (kOut > 3) _tile_stored(3, o + 3 * kNext, kHalf);
  }

  // Scores of kTileRows keys, in as many parts as q has tiles.
  SDFAST_INLINE void multiply_keys(const BFloat16Pair* k, int part) const {
    if (part >= kIn) return;
    if (part == 0) _tile_zero(6);
    _tile_loadd(7, k + part * kTile, kDense);
    if (part == 0) {
      _tile_dpbf16ps(6, 7, 4);
    } else {
      _tile_dpbf16ps(6, 7, 5);
    }
  }
  SDFAST_INLINE void multiply_values(const BFloat16Pair* v, int part) const {
    if (part >= kOut) return;
    _tile_loadd(6, v + part * kTile, kDense);
    if (part == 0) _tile_dpbf16ps(0, 6, 7);
    if (part == 1) _tile_dpbf16ps(1, 6, 7);
    if (part == 2) _tile_dpbf16ps(2, 6, 7);
    if (part == 3) _tile_dpbf16ps(3, 6, 7);
  }

  // A unit of scores on its way to weights.
  struct Unit {
    const float* scores;
    BFloat16Pair* weights;
    float scale;
    Vec shift;
    Vecs<2> sums;

    // An eighth of it.
    SDFAST_INLINE void weigh(int part) {
      constexpr int kRows = kUnit / 8;
      static_assert(kRows == 4);
      const Vecs<4> weight =
          power_of_two<true>(simd::make_vecs<4>([&](int i) {
                               return simd::load(scores + (part * kRows + i) * kLanes);
                             }) * scale -
                             Vecs<4>{{shift, shift, shift, shift}});
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Vecs<2> pair{{weight.v[2 * i], weight.v[2 * i + 1]}};
        sums = sums + pair;
        store_row_pair<1>(weights + (part * kRows / 2 + i) * kLanes, pair);
      }
      pin();
    }
  };

  SDFAST_INLINE Unit unit_at(const Place& place, int64_t step) const {
    float* own = scores_at(step);
    const int64_t there = std::min(kUnit, key_count - place.unit * kUnit);
    std::fill(own + there * kLanes, own + kUnit * kLanes, -std::numeric_limits<float>::infinity());
    float *reference = stats_at(place), *sum = reference + kColumns;
    if (place.unit == 0) {
      Vec most = simd::load(own);
      for (int64_t key = 1; key < kUnit; ++key) most = larger(most, simd::load(own + key * kLanes));
      simd::store(reference, most * scale);
      simd::store(sum, Vec{});
    }
    return {own, weights_at(step), scale, simd::load(reference), {}};
  }

  SDFAST_INLINE void multiply_first_keys() const {
    const BFloat16Pair* k = keys_at({});
    load_queries({});
    for (int64_t row = 0; row < 2; ++row) {
      multiply_keys(k + row * kIn * kTile, 0);
      multiply_keys(k + row * kIn * kTile, 1);
      _tile_stored(6, scores_at(0) + row * kTile, kDense);
    }
    pin();
  }

  // Begins `next`, weighs `now` and, but in the first step, ends `before`.
  template <bool kEnds>
  SDFAST_INLINE void take(int64_t step, const Place& before, const Place& now,
                          const Place& next) const {
    Unit unit = unit_at(now, step);
    const BFloat16Pair *k = keys_at(next), *v = values_at(before);
    float* to = scores_at(step + 1);
    if (next.begins_block()) load_queries(next);
    multiply_keys(k, 0);
    unit.weigh(0);
    multiply_keys(k, 1);
    unit.weigh(1);
    _tile_stored(6, to, kDense);
    multiply_keys(k + kIn * kTile, 0);
    unit.weigh(2);
    multiply_keys(k + kIn * kTile, 1);
    unit.weigh(3);
    _tile_stored(6, to + kTile, kDense);
    if constexpr (kEnds) {
      if (before.begins_block()) load_output(before);
      _tile_loadd(7, weights_at(step - 1), kDense);
      multiply_values(v, 0);
    }
    unit.weigh(4);
    if constexpr (kEnds) multiply_values(v, 1);
    unit.weigh(5);
    if constexpr (kEnds) multiply_values(v, 2);
    unit.weigh(6);
    if constexpr (kEnds) {
      multiply_values(v, 3);
      if (now.begins_block()) store_output(before);
    }
    unit.weigh(7);
    // Of the unit alone: shorter chains round less.
    float* sum = stats_at(now) + kColumns;
    simd::store(sum, simd::load(sum) + (unit.sums.v[0] + unit.sums.v[1]));
  }

  __attribute__((noinline)) void run() const {
    const int64_t steps = units() * 2 * tile_count;
    Place before, now, next = after(now);
    multiply_first_keys();
    take<false>(0, before, now, next);
    for (int64_t step = 1; step < steps; ++step) {
      before = now;
      now = next;
      // There is none after the last: the first again, for nothing.
      next = step + 1 < steps ? after(now) : Place{};
      take<true>(step, before, now, next);
    }
    pin();
    if (now.begins_block()) load_output(now);
    _tile_loadd(7, weights_at(steps - 1), kDense);
    for (int part = 0; part < kOut; ++part) multiply_values(values_at(now), part);
    store_output(now);
    pin();
  }
};

// Returns whether all of a tile's weights were in range.
inline bool are_in_range(const Tile<BFloat16Pair>& tile) {
  return all_below(
      simd::make_vecs<2>([&](int v) { return simd::load(tile.stats + kColumns + v * kLanes); }),
      kMostNarrowSum);
}

}  // namespace sdfast::attention

#endif
