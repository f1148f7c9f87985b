// One tile of queries against one block of keys: the steps of attention_cpu.cpp on raw pointers.
//
// Queries are packed (steps of D, kColumns), so that each lane belongs to one of them. Scores and
// weights are (keys, kColumns) and o is (D, kColumns): each is at once what one product gives and
// what the next one takes. All of a tile but the keys stays in L1 at D = 40 and in L2 at D = 512.
#pragma once

#include <array>
#include <limits>

#include "attention_packing_cpu.h"
#include "cpu_math.h"

namespace sdfast::attention {

using simd::Vecs;

constexpr int64_t kChain = 64;  // steps: a longer chain of additions rounds too much

// b where either is NaN.
SDFAST_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_max_ps(simd::kAllLanes, reinterpret_cast<__m512>(a),
                                                   reinterpret_cast<__m512>(b)));
#else
  return simd::select(a > b, a, b);
#endif
}

// How many whole chains multiply_rows has.
constexpr int64_t fetches_of(int64_t rows, int64_t steps) {
  return (rows + gemm::kRows - 1) / gemm::kRows * std::max<int64_t>(steps / kChain, 1);
}

// c (rows, kColumns) (+)= a b, a as multiply_tile takes it: as few tiles as there can be, all of
// nearly the same number of rows. Of the columns kV vectors are computed. `ahead` is fetched during
// whole chains.
template <typename Operand, bool kTransposed, int kV, int... kR>
void multiply_rows(std::integer_sequence<int, kR...>, int64_t rows, int64_t steps, const Operand* a,
                   int64_t lda, const Operand* b, float* c, bool accumulate, gemm::Ahead& ahead) {
  using Tile =
      void (*)(int64_t, const Operand*, int64_t, const Operand*, float*, bool, gemm::Fetch);
  static constexpr Tile kTiles[] = {&gemm::multiply_tile<kR + 1, Operand, kTransposed, kV>...};
  const auto multiply = [&](int64_t count, Tile tile) {
    int64_t step = 0;
    do {
      const int64_t chain = std::min(kChain, steps - step);
      const bool is_whole = chain == std::min(kChain, steps);
      tile(chain, a + step * (kTransposed ? lda : 1), lda, b + step * kColumns, c,
           accumulate || step > 0, is_whole ? ahead.during(chain) : gemm::Fetch());
      step += kChain;
    } while (step < steps);
    a += count * (kTransposed ? 1 : lda);
    c += count * kColumns;
    rows -= count;
  };
  for (int64_t tiles = (rows + gemm::kRows - 1) / gemm::kRows; tiles > 0; --tiles) {
    multiply(rows / tiles, kTiles[rows / tiles - 1]);
  }
}
template <typename Operand, bool kTransposed, int kV = gemm::kVecs>
void multiply_rows(int64_t rows, int64_t steps, const Operand* a, int64_t lda, const Operand* b,
                   float* c, bool accumulate, gemm::Ahead ahead = {}) {
  multiply_rows<Operand, kTransposed, kV>(std::make_integer_sequence<int, gemm::kRows>(), rows,
                                          steps, a, lda, b, c, accumulate, ahead);
}

// Two rows of kV vectors, (2, kColumns) fp32 or (1, kColumns) pairs.
template <int kV>
SDFAST_INLINE void store_row_pair(gemm::Float32* to, const Vecs<2 * kV>& rows) {
  simd::for_each_of(
      rows, [&](int i, Vec v) { simd::store(&to[i / kV * kColumns + i % kV * kLanes].value, v); });
}
#if defined(__AVX512BF16__)
template <int kV>
SDFAST_INLINE void store_row_pair(gemm::BFloat16Pair* to, const Vecs<2 * kV>& rows) {
  // Rounds half up, on integers: a tie is too rare to matter.
#pragma GCC unroll 2
  for (int i = 0; i < kV; ++i) {
    const simd::Bits low = (simd::as_bits(rows.v[i]) + 0x8000u) >> 16;
    const simd::Bits high = (simd::as_bits(rows.v[i + kV]) + 0x8000u) & 0xffff0000u;
    const simd::Bits pairs = low | high;
    std::memcpy(static_cast<void*>(to + i * kLanes), &pairs, sizeof pairs);
  }
}
#endif
#if defined(SDFAST_TILES)
// Pairs of the upper halves of the lanes.
SDFAST_INLINE void store_high_halves(gemm::BFloat16Pair* to, Vec first, Vec second) {
  constexpr int kSelect = 0xca;  // of the first mask's bits the second operand's, else the third's
  const __m512i low = reinterpret_cast<__m512i>(simd::as_bits(first) >> 16);
  const __m512i pairs = _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int>(0xffff0000u)),
                                                  reinterpret_cast<__m512i>(second), low, kSelect);
  std::memcpy(static_cast<void*>(to), &pairs, sizeof pairs);
}
// Two rows of two vectors, not negative, as sums of two bf16: the upper parts in a row of pairs,
// the lower ones in the next.
SDFAST_INLINE void store_split_pair(gemm::BFloat16Pair* to, const Vecs<4>& rows) {
  const Vecs<4> upper =
      simd::each([](Vec v) { return simd::as_floats(simd::as_bits(v) & 0xffff0000u); }, rows);
  const Vecs<4> lower =
      simd::each([](Vec v) { return simd::as_floats(simd::as_bits(v) + 0x8000u); }, rows - upper);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    store_high_halves(to + i * kLanes, upper.v[i], upper.v[i + 2]);
    store_high_halves(to + kColumns + i * kLanes, lower.v[i], lower.v[i + 2]);
  }
}
#endif

#if defined(SDFAST_TILES)
// 2^v for any v, with an error of 2e-7; 8e-5 with kCoarse. CPUs with tiles have few ports for
// vectors, and fast instructions for this; the polynomials are the minimax ones of 2^r, 0 <= r < 1.
template <bool kCoarse, typename V>
SDFAST_INLINE V power_by_polynomial(const V& exponent) {
  return simd::each(
      [](Vec v) {
        const __m512 number = reinterpret_cast<__m512>(v);
        const Vec r = reinterpret_cast<Vec>(
            _mm512_maskz_reduce_ps(simd::kAllLanes, number, 0x9));  // v - floor(v)
        Vec power;
        if constexpr (kCoarse) {
          power = ((r * 0.0780245513f + 0.226067185f) * r + 0.695833504f) * r + 0.999925256f;
        } else {
          power = (r * 0.00187757669f + 0.00898933969f) * r + 0.0558263175f;
          power = ((power * r + 0.240153611f) * r + 0.693153083f) * r + 0.99999994f;
        }
        return reinterpret_cast<Vec>(
            _mm512_maskz_scalef_ps(simd::kAllLanes, reinterpret_cast<__m512>(power), number));
      },
      exponent);
}
#endif

// 2^v for v <= 0 or little above, and never less than 2^kLowest, which is nothing beside the
// largest weight, 1. Relative error 5e-8; with kCoarse, for weights rounded to bf16, 6e-5. On CPUs
// with tiles kCoarse has an error of 8e-5 for any v, and reaches zero.
constexpr float kLowest = -125.0f;
template <bool kCoarse, typename V>
SDFAST_INLINE V power_of_two(const V& exponent) {
#if defined(SDFAST_TILES)
  if constexpr (kCoarse) return power_by_polynomial<true>(exponent);
#endif
  const V v = simd::at_least(exponent, kLowest);
#if defined(__AVX512F__)
  // As simd::exp_in_range, but n's integer part is added to the exponent of the table's entry as an
  // integer: half of the work then goes past the multipliers. Entry i is 2^(i / 32) less i << 18,
  // because n << 18 puts the fraction there.
  static constexpr std::array<uint32_t, 32> kTable = {
      0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3,
      0x3f78f4f0, 0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b,
      0x3f75583f, 0x3f7523f6, 0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a,
      0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907,
      0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
  simd::Bits low, high;
  std::memcpy(&low, kTable.data(), sizeof low);
  std::memcpy(&high, kTable.data() + kLanes, sizeof high);
  constexpr float kToMultiple = 0x1.8p18f;  // adding it leaves 32 n in the low bits
  const V shifted = v + kToMultiple;
  const V r = v - (shifted - kToMultiple);
  const V power = simd::each(
      [&](Vec n) {
        const Vec entry =
            simd::lookup(simd::as_floats(low), simd::as_floats(high), simd::as_bits(n));
        return simd::as_floats(simd::as_bits(entry) + (simd::as_bits(n) << 18));
      },
      shifted);
  if constexpr (kCoarse) return power + power * (r * 0.693147181f);
  return power + power * (r * (r * 0.240226507f + 0.693147182f));
#else
  return simd::exp_in_range(v * 0.693147181f);
#endif
}

// One tile of queries on its way over the keys.
template <typename Operand>
struct Tile {
  Operand* q;            // (steps, kColumns)
  float* o;              // (D, kColumns)
  float* stats;          // (2, kColumns): what is subtracted from the scores, sum of the weights
  int64_t first, count;  // queries
};

// Keys, where they are odd, are completed with one of no weight.
inline void complete_pair(int64_t keys, float* scores) {
  if (keys % 2 == 0) return;
  std::fill_n(scores + keys * kColumns, kColumns, -std::numeric_limits<float>::infinity());
}

SDFAST_INLINE Vecs<4> row_pair(const float* scores, int64_t key) {
  return simd::make_vecs<4>(
      [&](int i) { return simd::load(scores + key * kColumns + i * kLanes); });
}

constexpr float kSlack = 8.0f;
// What is to be subtracted from scale x scores, for all of a block. It is a maximum, of some block:
// it follows the running maximum, and o and the sum are rescaled, only where that is more than
// kSlack beyond; almost never after the first block. scores: (keys rounded up to even, kColumns).
template <typename Operand>
Vecs<2> reference_of(const Tile<Operand>& tile, int64_t keys, int64_t dim, float scale, bool first,
                     const float* scores) {
  Vecs<4> most = row_pair(scores, 0);
  for (int64_t key = 2; key < keys; key += 2) {
    most = simd::each([](Vec a, Vec b) { return larger(a, b); }, most, row_pair(scores, key));
  }
  most = most * scale;
  float *reference = tile.stats, *sum = tile.stats + kColumns;
  Vecs<2> shift = simd::make_vecs<2>([&](int i) { return larger(most.v[i], most.v[i + 2]); });
  if (first) {
    for (int i = 0; i < 2; ++i) simd::store(sum + i * kLanes, Vec{});
  } else {
    const Vecs<2> before =
        simd::make_vecs<2>([&](int i) { return simd::load(reference + i * kLanes); });
    shift =
        simd::each([](Vec a, Vec b) { return simd::select(a > b + kSlack, a, b); }, shift, before);
    if (std::memcmp(&shift, reference, sizeof shift) != 0) {
      const Vecs<2> factor = power_of_two<false>(before - shift);
      for (int64_t d = -1; d < dim; ++d) {
        float* row = d < 0 ? sum : tile.o + d * kColumns;
        for (int i = 0; i < 2; ++i) {
          simd::store(row + i * kLanes, simd::load(row + i * kLanes) * factor.v[i]);
        }
      }
    }
  }
  simd::for_each_of(shift, [&](int i, Vec v) { simd::store(reference + i * kLanes, v); });
  return shift;
}

// Scores of keys [begin, end), both even, to weights 2^(scale score - shift), in place, added to
// `total`: of even and odd keys. With kSplit a weight is a sum of two bf16: a row of pairs of upper
// parts, then one of lower parts.
template <typename Operand, bool kSplit = false>
SDFAST_INLINE void weigh(int64_t begin, int64_t end, float scale, const Vecs<2>& shift,
                         float* scores, Vecs<4>& total) {
  constexpr bool kCoarse = Operand::kDepth == 2;
  constexpr int64_t kParts = kSplit ? 2 : 1;
  const Vecs<4> shifts{{shift.v[0], shift.v[1], shift.v[0], shift.v[1]}};
  Operand* weights = reinterpret_cast<Operand*>(scores);
  Vecs<4> sum = total;
  for (int64_t key = begin; key < end; key += 2) {
    const Vecs<4> power = row_pair(scores, key) * scale - shifts;
    Operand* to = weights + key / Operand::kDepth * kParts * kColumns;
    Vecs<4> weight;
#if defined(SDFAST_TILES)
    if constexpr (kSplit) {
      weight = power_by_polynomial<false>(power);
      store_split_pair(to, weight);
    } else
#endif
    {
      weight = power_of_two<kCoarse>(power);
      store_row_pair<2>(to, weight);
    }
    sum = sum + weight;
  }
  total = sum;
}

SDFAST_INLINE Vecs<2> even_and_odd(const Vecs<4>& total) {
  return simd::make_vecs<2>([&](int i) { return total.v[i] + total.v[i + 2]; });
}

// All keys of a block. Returns the sum of their weights.
template <typename Operand, bool kSplit = false>
Vecs<2> weigh(int64_t keys, float scale, const Vecs<2>& shift, float* scores) {
  Vecs<2> sums{};
  for (int64_t begin = 0; begin < keys; begin += kChain) {
    Vecs<4> total{};
    weigh<Operand, kSplit>(begin, std::min(begin + kChain, keys), scale, shift, scores, total);
    sums = sums + even_and_odd(total);
  }
  return sums;
}

template <typename Operand>
SDFAST_INLINE void add_to_sum(const Tile<Operand>& tile, const Vecs<2>& sums) {
  float* sum = tile.stats + kColumns;
  simd::for_each_of(
      sums, [&](int i, Vec v) { simd::store(sum + i * kLanes, simd::load(sum + i * kLanes) + v); });
}

// Hides the keys after each query's own position. scores: keys from `key` on.
inline void hide_later_keys(int64_t query, int64_t key, int64_t keys, float* scores) {
  for (int64_t i = std::max<int64_t>(0, query + 1 - key); i < keys; ++i) {
    const int64_t hidden = std::min<int64_t>(key + i - query, kColumns);
    std::fill_n(scores + i * kColumns, hidden, -std::numeric_limits<float>::infinity());
  }
}

// A tile (D, kColumns) times factor(lane), a vector for the lanes from there on, into `count` rows.
template <typename T, typename Factor>
void store_rows(const float* tile, int64_t count, int64_t dim, const Factor& factor, T* to,
                int64_t row_stride) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const Vec factors = factor(first);
    const int64_t there = std::min<int64_t>(kLanes, count - first);
    for_each_part(dim, [&](int64_t d, auto lanes) {
      Vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = simd::load(tile + std::min(d + i, dim - 1) * kColumns + first) * factors;
      }
      transpose(rows);
      for (int64_t i = 0; i < there; ++i) {
        simd::store(to + (first + i) * row_stride + d, rows[i], lanes);
      }
    });
  }
}

}  // namespace sdfast::attention
