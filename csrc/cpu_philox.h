// Standard normal noise as a function of seed, step and element alone: Philox4x32-10 (Salmon et al.
// 2011) and Box-Muller, as sdfast/ops/_philox.py defines them.
//
// A lane computes a block, the normals of four elements. Within 2 units in the last place of fp32
// of exact logarithms, roots and cosines. Where the including file is compiled without contraction
// to FMA, every instruction set gives the same bits.
#pragma once

#include <algorithm>

#include "cpu_simd.h"

namespace sdfast::philox {

using simd::Bits;
using simd::kLanes;
using simd::Mask;
using simd::Vec;
using simd::Wide;

constexpr int kRounds = 10;
constexpr int64_t kBlock = 4;                // elements
constexpr int64_t kChunk = kBlock * kLanes;  // the least that is drawn at once

// The noise of one sample in one step.
struct Stream {
  uint64_t keys[kRounds][2];
  uint64_t step;

  Stream(uint64_t seed, uint64_t step) : step(step) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (auto& key : keys) {
      key[0] = low, key[1] = high;
      low += 0x9e3779b9u, high += 0xbb67ae85u;
    }
  }
};

struct Words {
  Bits r[4];
};

// The four words of each lane's block. Lanes are taken in pairs, even and odd, because a product
// needs 64 bits; what it leaves in the upper half of a word, no later product reads.
SDFAST_INLINE Words draw_words(const Stream& stream, Bits block_low, Bits block_high) {
  const Wide low = reinterpret_cast<Wide>(block_low), high = reinterpret_cast<Wide>(block_high);
  const Wide step_low = Wide{} + stream.step, step_high = Wide{} + (stream.step >> 32);
  const Wide multiplier0 = Wide{} + 0xd2511f53u, multiplier1 = Wide{} + 0xcd9e8d57u;
  Wide even[4] = {low, high, step_low, step_high};
  Wide odd[4] = {low >> 32, high >> 32, step_low, step_high};
  const auto round = [&](Wide(&c)[4], const uint64_t (&key)[2]) {
    const Wide product0 = simd::multiply_low_halves(c[0], multiplier0);
    const Wide product1 = simd::multiply_low_halves(c[2], multiplier1);
    c[0] = (product1 >> 32) ^ c[1] ^ key[0];
    c[1] = product1;
    c[2] = (product0 >> 32) ^ c[3] ^ key[1];
    c[3] = product0;
  };
#pragma GCC unroll 10
  for (int i = 0; i < kRounds; ++i) {
    round(even, stream.keys[i]);
    round(odd, stream.keys[i]);
  }
  Words words;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    words.r[k] = reinterpret_cast<Bits>((even[k] & 0xffffffffu) | (odd[k] << 32));
  }
  return words;
}

// (r + 1/2) 2^-32, to fp32: from 2^-33 to 1.
SDFAST_INLINE Vec uniform(Bits r) { return simd::to_floats(r) * 0x1p-32f + 0x1p-33f; }

// A number as `head`, of few bits so that products of heads are exact, and what is left of it.
struct Split {
  Vec head, tail;
};
template <int kBits>
SDFAST_INLINE Split split(Vec v) {
  const Vec head = simd::as_floats(simd::as_bits(v) & (~0u << (24 - kBits)));
  return {head, v - head};
}

// sqrt(-2 ln u) to about 2^-33.
SDFAST_INLINE Split radius(Vec u) {
  // u = 2^n (1 + f) with f from -1/3 to 1/3, ln(1 + f) = f - f^2 / 2 + f^3 p(f), p minimax; 2 ln 2
  // in two parts, the first exact when multiplied by n.
  const Bits exponent = (simd::as_bits(u) - 0x3f2aaaabu) & 0xff800000u;
  const Vec f = simd::as_floats(simd::as_bits(u) - exponent) - 1.0f;
  constexpr float kFromInteger = 0x1.8p23f;  // plus n has n in its low bits
  const Bits n_bits = reinterpret_cast<Bits>(reinterpret_cast<Mask>(exponent) >> 23);
  const Vec n = simd::as_floats(n_bits + 0x4b400000u) - kFromInteger;
  Vec p = f * -0.128916830f + 0.139844388f;
  p = p * f - 0.121842615f;
  p = p * f + 0.140058681f;
  p = p * f - 0.166804880f;
  p = p * f + 0.200104058f;
  p = p * f - 0.249997973f;
  p = p * f + 0.333332151f;
  const Vec square = f * f;
  const Vec whole = n * 0.693145751953125f;
  const Vec first = whole + f;
  const Vec second = (square * f * p + n * 1.42860682e-6f - square * 0.5f) + (f - (first - whole));
  const Vec log = first + second;
  const Vec log_rest = second - (log - first);

  // The root, and a Newton step of it for what rounding it has left.
  const Vec squared = log * -2.0f;
  const Vec root = simd::square_root(squared);
  Split result = split<12>(root);
  const Vec residual = (squared - result.head * result.head) - (root + result.head) * result.tail;
  const Vec slope = simd::at_least(root + root, 1e-20f);  // the root is zero where u is 1
  result.tail += (residual - log_rest * 2.0f) / slope;
  return result;
}

struct SineCosine {
  Vec sine, cosine;
};

// Of 2 pi u, to about 0.6 units in the last place.
SDFAST_INLINE SineCosine sine_cosine(Vec u) {
  // 2 pi u = pi/2 (n + f), f from -1/2 to 1/2: exact, unlike a product with pi.
  constexpr float kToInteger = 0x1.8p23f;  // adding it rounds to an integer, held in the low bits
  const Vec turned = u * 4.0f + kToInteger;
  const Vec f = u * 4.0f - (turned - kToInteger);
  const Vec square = f * f;
  const auto [head, tail] = split<8>(f);
  // pi/2 f + f^3 p(f^2) and 1 - pi^2/8 f^2 + f^4 q(f^2), minimax; the leading terms in two parts.
  constexpr float kHalfPi = 0x1.92p0f, kHalfPiRest = 0x1.fb5444p-12f;
  constexpr float kCurvature = 0x1.3ap0f, kCurvatureRest = 0x1.d3cc9cp-8f;
  Vec p = square * -0.00460483413f + 0.0796814114f;
  p = p * square - 0.645963609f;
  const Vec sine = head * kHalfPi + (tail * kHalfPi + (f * kHalfPiRest + f * square * p));
  Vec q = square * 0.000903766544f - 0.0208601654f;
  q = q * square + 0.253669232f;
  const Vec drop = head * head * kCurvature;
  const Vec first = 1.0f - drop;
  const Vec rest = tail * (f + head) * kCurvature + square * kCurvatureRest;
  const Vec cosine = first + (((1.0f - first) - drop) + (square * square * q - rest));
  // Quadrant n mod 4: odd ones swap the two, half of them change a sign.
  const Bits n = simd::as_bits(turned);
  const Mask odd = reinterpret_cast<Mask>(n << 31) < 0;
  const Vec s = simd::select(odd, cosine, sine), c = simd::select(odd, sine, cosine);
  return {simd::as_floats(simd::as_bits(s) ^ ((n & 2u) << 30)),
          simd::as_floats(simd::as_bits(c) ^ (((n + 1u) & 2u) << 30))};
}

SDFAST_INLINE Vec product(const Split& a, Vec b) {
  const Split parts = split<12>(b);
  return a.head * parts.head + (a.head * parts.tail + a.tail * b);
}

struct Pair {
  Vec even, odd;
};
SDFAST_INLINE Pair to_normals(Bits r0, Bits r1) {
  const Split length = radius(uniform(r0));
  const SineCosine direction = sine_cosine(uniform(r1));
  return {product(length, direction.cosine), product(length, direction.sine)};
}

// The normals of a chunk, element after element. Lane 4 i + k holds block i + k kLanes / 4 of it
// (block_of_lane), so that transposes of four by four within 128 bits are all it takes.
SDFAST_INLINE void store_normals(const Words& words, float* to) {
  Bits low, high, low_pairs, high_pairs;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const int group = i / 4 * 4, in = i % 4;
    low[i] = group + in / 2 + in % 2 * kLanes;
    high[i] = low[i] + 2;
    low_pairs[i] = group + in % 2 + in / 2 * kLanes;
    high_pairs[i] = low_pairs[i] + 2;
  }
  const Pair front = to_normals(words.r[0], words.r[1]);
  const Pair back = to_normals(words.r[2], words.r[3]);
  const Vec front_low = __builtin_shuffle(front.even, front.odd, low);
  const Vec front_high = __builtin_shuffle(front.even, front.odd, high);
  const Vec back_low = __builtin_shuffle(back.even, back.odd, low);
  const Vec back_high = __builtin_shuffle(back.even, back.odd, high);
  simd::store(to, __builtin_shuffle(front_low, back_low, low_pairs));
  simd::store(to + kLanes, __builtin_shuffle(front_low, back_low, high_pairs));
  simd::store(to + 2 * kLanes, __builtin_shuffle(front_high, back_high, low_pairs));
  simd::store(to + 3 * kLanes, __builtin_shuffle(front_high, back_high, high_pairs));
}
SDFAST_INLINE Bits block_of_lane() {
  Bits block;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) block[i] = i % 4 * (kLanes / 4) + i / 4;
  return block;
}

// The normals of elements begin to end, in chunks: `to` has room for the last one. `begin` is a
// multiple of kBlock.
inline void draw(const Stream& stream, int64_t begin, int64_t end, float* to) {
  const Bits lane = block_of_lane();
  for (int64_t i = begin; i < end; i += kChunk, to += kChunk) {
    const uint64_t block = i / kBlock;
    const uint32_t first = static_cast<uint32_t>(block);
    const Bits low = lane + first;
    const Mask carry = low < first;
    const Bits high = static_cast<uint32_t>(block >> 32) - reinterpret_cast<Bits>(carry);
    store_normals(draw_words(stream, low, high), to);
  }
}

// The normals of `count` elements wherever they are, next() telling their indices one by one. Each
// draws a whole block for itself. `to` has room for a multiple of kLanes.
template <typename Next>
void draw_scattered(const Stream& stream, const Next& next, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    uint32_t low[kLanes] = {}, high[kLanes] = {}, place[kLanes] = {};
    for (int64_t l = 0; l < std::min<int64_t>(kLanes, count - i); ++l) {
      const uint64_t index = next();
      low[l] = static_cast<uint32_t>(index / kBlock);
      high[l] = static_cast<uint32_t>(index / kBlock >> 32);
      place[l] = index % kBlock;
    }
    const auto load = [](const uint32_t (&values)[kLanes]) {
      Bits bits;
      std::memcpy(&bits, values, sizeof bits);
      return bits;
    };
    const Words words = draw_words(stream, load(low), load(high));
    const Mask back = reinterpret_cast<Mask>(load(place) << 30) < 0;
    const Mask odd = reinterpret_cast<Mask>(load(place) << 31) < 0;
    const Pair z = to_normals(back ? words.r[2] : words.r[0], back ? words.r[3] : words.r[1]);
    simd::store(to + i, simd::select(odd, z.odd, z.even));
  }
}

}  // namespace sdfast::philox
