// Standard normal noise as a function of seed, step and element alone, as sdfast/ops/_philox.py
// defines it: Philox4x32-10 (Salmon et al. 2011) and Box-Muller.
//
// A thread draws a block, the normals of four elements. Words and uniforms are the definition's bit
// for bit, normals within 2 units in the last place of fp32. Where a product meets a sum, it is
// written as a fused multiply-add, so that no compiler chooses; what roots, cosines and sines round
// off is carried beside them.
#pragma once

#include "cuda_common.cuh"

namespace sdfast::philox {

constexpr int kRounds = 10;
constexpr int kBlock = 4;  // elements

struct Words {
  uint32_t r[4];
};

__device__ inline Words draw_words(uint64_t seed, uint64_t block, uint64_t step) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(step), c3 = static_cast<uint32_t>(step >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const uint64_t product0 = uint64_t{c0} * 0xd2511f53u, product1 = uint64_t{c2} * 0xcd9e8d57u;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

// (r + 1/2) 2^-32, to fp32: from 2^-33 to 1.
__device__ inline float uniform(uint32_t r) {
  return __fmaf_rn(static_cast<float>(r), 0x1p-32f, 0x1p-33f);
}

// A number, and what rounding it has left.
struct Twofold {
  float head, tail;
};

constexpr float kToInteger = 0x1.8p23f;  // adding it rounds to an integer, held in the low bits

// sqrt(-2 ln u).
__device__ inline Twofold radius(float u) {
  // u = 2^n (1 + f) with f from -1/3 to 1/3, ln(1 + f) = f - f^2 / 2 + f^3 p(f), p minimax; ln 2 in
  // two parts, the first exact when multiplied by n.
  const uint32_t exponent = (__float_as_uint(u) - 0x3f2aaaabu) & 0xff800000u;
  const float f = __uint_as_float(__float_as_uint(u) - exponent) - 1.0f;
  const int32_t whole_exponent = static_cast<int32_t>(exponent) >> 23;
  const float n =
      __uint_as_float(static_cast<uint32_t>(whole_exponent) + __float_as_uint(kToInteger)) -
      kToInteger;
  float p = __fmaf_rn(f, -0.128916830f, 0.139844388f);
  p = __fmaf_rn(p, f, -0.121842615f);
  p = __fmaf_rn(p, f, 0.140058681f);
  p = __fmaf_rn(p, f, -0.166804880f);
  p = __fmaf_rn(p, f, 0.200104058f);
  p = __fmaf_rn(p, f, -0.249997973f);
  p = __fmaf_rn(p, f, 0.333332151f);
  const float square = f * f;
  const float whole = n * 0.693145751953125f;
  const float first = __fadd_rn(whole, f);
  float second = __fmaf_rn(n, 1.42860682e-6f, (square * f) * p);
  second = __fmaf_rn(square, -0.5f, second) + (f - (first - whole));
  const float log = first + second;
  const float log_rest = second - (log - first);

  const float squared = -2.0f * log;
  const float reciprocal = squared > 0 ? rsqrtf(squared) : 0.0f;  // zero where u is 1
  const float root = squared * reciprocal;
  // A Newton step: the reciprocal need not be exact.
  const float residual = __fmaf_rn(log_rest, -2.0f, __fmaf_rn(-root, root, squared));
  return {root, residual * (0.5f * reciprocal)};
}

struct SineCosine {
  Twofold sine, cosine;
};

// Of 2 pi u.
__device__ inline SineCosine sine_cosine(float u) {
  // 2 pi u = pi/2 (n + f), f from -1/2 to 1/2: exact, unlike a product with pi.
  const float turned = __fmaf_rn(u, 4.0f, kToInteger);
  const float f = __fmaf_rn(u, 4.0f, -(turned - kToInteger));
  const float square = f * f;
  // pi/2 f + f^3 p(f^2) and 1 - pi^2/8 f^2 + f^4 q(f^2), minimax.
  constexpr float kHalfPi = 0x1.921fb6p0f, kHalfPiRest = -0x1.777a5cp-25f;
  constexpr float kCurvature = 0x1.3bd3ccp0f, kCurvatureRest = 0x1.37c8bcp-25f;
  float p = __fmaf_rn(square, -0.00460483413f, 0.0796814114f);
  p = __fmaf_rn(p, square, -0.645963609f);
  const float sine_rest = f * __fmaf_rn(square, p, kHalfPiRest);
  const float sine = __fmaf_rn(f, kHalfPi, sine_rest);
  const float sine_tail = __fmaf_rn(f, kHalfPi, -sine) + sine_rest;
  float q = __fmaf_rn(square, 0.000903766544f, -0.0208601654f);
  q = __fmaf_rn(q, square, 0.253669232f);
  const float square_rest = __fmaf_rn(f, f, -square);
  const float cosine_rest =
      __fmaf_rn(square, __fmaf_rn(square, q, -kCurvatureRest), -kCurvature * square_rest);
  const float cosine = __fmaf_rn(square, -kCurvature, 1.0f);
  const float cosine_tail = __fmaf_rn(square, -kCurvature, 1.0f - cosine) + cosine_rest;
  // Quadrant n mod 4: odd ones swap the two, half of them change a sign.
  const uint32_t n = __float_as_uint(turned);
  const bool odd = n & 1u;
  const uint32_t sine_sign = (n & 2u) << 30, cosine_sign = ((n + 1u) & 2u) << 30;
  const auto signed_as = [](float x, uint32_t sign) {
    return __uint_as_float(__float_as_uint(x) ^ sign);
  };
  return {{signed_as(odd ? cosine : sine, sine_sign),
           signed_as(odd ? cosine_tail : sine_tail, sine_sign)},
          {signed_as(odd ? sine : cosine, cosine_sign),
           signed_as(odd ? sine_tail : cosine_tail, cosine_sign)}};
}

__device__ inline float product(const Twofold& a, const Twofold& b) {
  return __fmaf_rn(a.head, b.head, __fmaf_rn(a.head, b.tail, a.tail * b.head));
}

// The normals of the block's four elements.
__device__ inline void draw(uint64_t seed, uint64_t block, uint64_t step, float (&z)[kBlock]) {
  const Words words = draw_words(seed, block, step);
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const Twofold length = radius(uniform(words.r[2 * pair]));
    const SineCosine direction = sine_cosine(uniform(words.r[2 * pair + 1]));
    z[2 * pair] = product(length, direction.cosine);
    z[2 * pair + 1] = product(length, direction.sine);
  }
}

}  // namespace sdfast::philox
