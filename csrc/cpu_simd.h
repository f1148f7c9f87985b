// Vectors of fp32 for the CPU kernels, written once for every instruction set.
//
// `Vec` is a GCC/Clang vector as wide as the registers the file is compiled for; arithmetic on it
// is plain C++. Storage types are fp32, bf16 and fp16; all arithmetic is fp32. Loops over an axis
// that need not be a multiple of the width go through `for_each_vector`, which hands the body a
// full vector as a compile-time constant and the remainder as a number.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sdfast::simd {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
// For the zero-masking intrinsics: GCC 12 warns of an uninitialised value inside the plain ones.
constexpr uint16_t kAllLanes = 0xffff;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef int32_t Mask __attribute__((vector_size(kLanes * 4)));  // 0 or -1, as comparisons give
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));

// Storage types. Their bits are all a kernel needs to know.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

using FullVector = std::integral_constant<int, kLanes>;

// Calls body(i, lanes) for i = begin, begin + kLanes, ...: `lanes` is a FullVector, for what is
// left at the end an int.
template <typename Body>
inline __attribute__((always_inline)) void for_each_vector(int64_t begin, int64_t end,
                                                           const Body& body) {
  for (; begin + kLanes <= end; begin += kLanes) body(begin, FullVector());
  if (begin < end) body(begin, static_cast<int>(end - begin));
}

constexpr int64_t round_up(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

inline Vec broadcast(float value) { return value - Vec{}; }
inline Bits as_bits(Vec v) { return reinterpret_cast<Bits>(v); }
inline Vec as_floats(Bits v) { return reinterpret_cast<Vec>(v); }
inline Vec select(Mask mask, Vec yes, Vec no) { return mask ? yes : no; }

inline float sum(Vec v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The first `lanes` lanes of v, the others zero.
inline Vec keep_first(Vec v, FullVector) { return v; }
inline Vec keep_first(Vec v, int lanes) {
  float values[kLanes] = {};
  std::memcpy(values, &v, lanes * sizeof(float));
  std::memcpy(&v, values, sizeof v);
  return v;
}

// Between 16 and 32 bits per lane. GCC 12 splits the generic conversion of a whole AVX-512 vector.
inline Bits widen_bits(HalfBits v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits>(
      _mm512_maskz_cvtepu16_epi32(kAllLanes, reinterpret_cast<__m256i>(v)));
#else
  return __builtin_convertvector(v, Bits);
#endif
}
inline HalfBits narrow_bits(Bits v) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfBits>(
      _mm512_maskz_cvtepi32_epi16(kAllLanes, reinterpret_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, HalfBits);
#endif
}

inline HalfBits high_halves(Bits v) {
#if defined(__AVX512BW__)
  const Bits odd = Bits{0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d};
  const __m512i gathered = _mm512_maskz_permutexvar_epi16(~0u, reinterpret_cast<__m512i>(odd),
                                                          reinterpret_cast<__m512i>(v));
  HalfBits low;
  std::memcpy(&low, &gathered, sizeof low);
  return low;
#else
  return narrow_bits(v >> 16);
#endif
}

// v between the bounds; NaN stays NaN, because x86's min and max return their second operand then.
inline Vec clamp(Vec v, float low, float high) {
#if defined(__AVX512F__)
  const __m512 capped =
      _mm512_maskz_min_ps(kAllLanes, _mm512_set1_ps(high), reinterpret_cast<__m512>(v));
  return reinterpret_cast<Vec>(_mm512_maskz_max_ps(kAllLanes, _mm512_set1_ps(low), capped));
#elif defined(__AVX__)
  const __m256 capped = _mm256_min_ps(_mm256_set1_ps(high), reinterpret_cast<__m256>(v));
  return reinterpret_cast<Vec>(_mm256_max_ps(_mm256_set1_ps(low), capped));
#else
  v = select(v > high, broadcast(high), v);
  return select(v < low, broadcast(low), v);
#endif
}

inline Vec widen_bfloat16(HalfBits v) { return as_floats(widen_bits(v) << 16); }

// Rounds to nearest even; NaN stays NaN.
inline HalfBits narrow_bfloat16(Vec v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<HalfBits>(
      _mm512_maskz_cvtneps_pbh(kAllLanes, reinterpret_cast<__m512>(v)));
#else
  const Bits bits = as_bits(v);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits quiet_nan = bits | 0x400000u;  // rounding could turn a NaN into inf
  const Mask is_number = v == v;
  return high_halves(is_number ? rounded : quiet_nan);
#endif
}

inline Vec widen_half(HalfBits v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(kAllLanes, reinterpret_cast<__m256i>(v)));
#elif defined(__F16C__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(v)));
#else
  // Exponent and mantissa move to their fp32 places; the product with 2^112 rebias the exponent and
  // normalises subnormals. Inf and NaN, which come out as 2^16 and above, get the full exponent.
  const Bits wide = widen_bits(v);
  const Vec magnitude = as_floats((wide & 0x7fffu) << 13) * 0x1p112f;
  const Mask special = magnitude >= 65536.0f;
  const Bits bits = special ? as_bits(magnitude) | 0x7f800000u : as_bits(magnitude);
  return as_floats(bits | ((wide & 0x8000u) << 16));
#endif
}

inline HalfBits narrow_half(Vec v) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfBits>(
      _mm512_maskz_cvtps_ph(kAllLanes, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<HalfBits>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const Bits sign = (as_bits(v) >> 16) & 0x8000u;
  const Bits bits = as_bits(v) & 0x7fffffffu;
  const Bits normal = (bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 leaves a subnormal half in the low mantissa bits, rounded to nearest even.
  const Bits subnormal = as_bits(as_floats(bits) + 0.5f) - 0x3f000000u;
  const Bits special = bits > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  Bits half = bits < (113u << 23) ? subnormal : normal;
  half = bits >= 0x477ff000u ? special : half;  // 65520 and above round to inf
  return narrow_bits(half | sign);
#endif
}

inline Vec load(const float* p, FullVector) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec load(const BFloat16* p, FullVector) {
  HalfBits v;
  std::memcpy(&v, p, sizeof v);
  return widen_bfloat16(v);
}
inline Vec load(const Half* p, FullVector) {
  HalfBits v;
  std::memcpy(&v, p, sizeof v);
  return widen_half(v);
}

inline void store(float* p, Vec v, FullVector) { std::memcpy(p, &v, sizeof v); }
inline void store(BFloat16* p, Vec v, FullVector) {
  const HalfBits bits = narrow_bfloat16(v);
  std::memcpy(p, &bits, sizeof bits);
}
inline void store(Half* p, Vec v, FullVector) {
  const HalfBits bits = narrow_half(v);
  std::memcpy(p, &bits, sizeof bits);
}

// Loads fewer lanes than a vector has; the others are zero. No byte beyond them is touched.
template <typename T>
inline Vec load(const T* p, int lanes) {
  T values[kLanes] = {};
  std::memcpy(values, p, lanes * sizeof(T));
  return load(values, FullVector());
}

template <typename T>
inline void store(T* p, Vec v, int lanes) {
  T values[kLanes];
  store(values, v, FullVector());
  std::memcpy(p, values, lanes * sizeof(T));
}

// Hints; an address outside the array does no harm.
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void prefetch_for_write(const void* p) { __builtin_prefetch(p, 1); }

inline Vec load(const float* p) { return load(p, FullVector()); }
inline void store(float* p, Vec v) { store(p, v, FullVector()); }

// exp(v) for v between kExpLow and kExpHigh, where it has reached zero and inf.
constexpr float kExpLow = -104.0f, kExpHigh = 89.0f;
inline Vec exp_in_range(Vec v) {
  constexpr float kToInteger = 0x1.8p23f;  // adding it rounds to an integer, held in the low bits
  const Vec shifted = v * 1.44269504f + kToInteger;
  const Vec n = shifted - kToInteger;
  const Vec r = v - n * 0.693145751953125f - n * 1.42860682e-6f;  // v - n ln 2, ln 2 in two parts
  // Minimax polynomial for |r| <= ln(2)/2: relative error 2e-9, a thirtieth of a unit.
  Vec p = r * 0.00138368464f + 0.00837481561f;
  p = p * r + 0.0416682261f;
  p = p * r + 0.166664198f;
  p = p * r + 0.499999907f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_maskz_scalef_ps(kAllLanes, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  // 2^n in two factors, each a normal number, so that n may reach 129 and -151.
  const Mask whole = reinterpret_cast<Mask>(as_bits(shifted) - 0x4b400000u);
  const Mask half = whole >> 1;
  const Vec first = as_floats(reinterpret_cast<Bits>(half + 127) << 23);
  const Vec second = as_floats(reinterpret_cast<Bits>(whole - half + 127) << 23);
  return p * first * second;
#endif
}

// exp(v) to about one unit in the last place over the whole range: overflow gives inf, underflow
// goes through the subnormals to zero, NaN stays NaN.
inline Vec exp(Vec v) { return exp_in_range(clamp(v, kExpLow, kExpHigh)); }

// 1 + exp(-v). Negated after the clamp, where the sign costs nothing.
inline Vec one_plus_exp_of_negative(Vec v) {
  return 1.0f + exp_in_range(-clamp(v, -kExpHigh, -kExpLow));
}
inline Vec sigmoid(Vec v) { return 1.0f / one_plus_exp_of_negative(v); }
inline Vec silu(Vec v) { return v / one_plus_exp_of_negative(v); }

// d/dv of silu: s + v s (1 - s), s = sigmoid(v).
inline Vec silu_gradient(Vec v) {
  const Vec s = sigmoid(v);
  return s + v * s * (1.0f - s);
}

}  // namespace sdfast::simd
