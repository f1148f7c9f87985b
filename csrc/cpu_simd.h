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

// Across calls a vector would go through memory, so nothing here is left to the compiler's
// judgement.
#define SDFAST_INLINE inline __attribute__((always_inline))

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
typedef uint64_t Wide __attribute__((vector_size(kLanes * 4)));
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
SDFAST_INLINE void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kLanes <= end; begin += kLanes) body(begin, FullVector());
  if (begin < end) body(begin, static_cast<int>(end - begin));
}

constexpr int64_t round_up(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

SDFAST_INLINE Vec broadcast(float value) { return value - Vec{}; }
SDFAST_INLINE Bits as_bits(Vec v) { return reinterpret_cast<Bits>(v); }
SDFAST_INLINE Vec as_floats(Bits v) { return reinterpret_cast<Vec>(v); }
SDFAST_INLINE Vec select(Mask mask, Vec yes, Vec no) { return mask ? yes : no; }

SDFAST_INLINE Vec absolute(Vec v) { return as_floats(as_bits(v) & 0x7fffffffu); }

// Lanes added in halves, in registers: GCC makes a loop over them wait for memory.
SDFAST_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  const auto eight = v;
#endif
#if defined(__AVX__)
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                    __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  const auto four = eight;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The first `lanes` lanes of v, the others zero.
SDFAST_INLINE Vec keep_first(Vec v, FullVector) { return v; }
SDFAST_INLINE Vec keep_first(Vec v, int lanes) {
  float values[kLanes] = {};
  std::memcpy(values, &v, lanes * sizeof(float));
  std::memcpy(&v, values, sizeof v);
  return v;
}

// Between 16 and 32 bits per lane. GCC 12 splits the generic conversion of a whole AVX-512 vector.
SDFAST_INLINE Bits widen_bits(HalfBits v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits>(
      _mm512_maskz_cvtepu16_epi32(kAllLanes, reinterpret_cast<__m256i>(v)));
#else
  return __builtin_convertvector(v, Bits);
#endif
}
SDFAST_INLINE HalfBits narrow_bits(Bits v) {
#if defined(__AVX512F__)
  return reinterpret_cast<HalfBits>(
      _mm512_maskz_cvtepi32_epi16(kAllLanes, reinterpret_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, HalfBits);
#endif
}

SDFAST_INLINE HalfBits high_halves(Bits v) {
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

// The larger, the smaller of v and a bound; NaN stays NaN, because x86's min and max return their
// second operand then.
SDFAST_INLINE Vec at_least(Vec v, float bound) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_maskz_max_ps(kAllLanes, _mm512_set1_ps(bound), reinterpret_cast<__m512>(v)));
#elif defined(__AVX__)
  return reinterpret_cast<Vec>(_mm256_max_ps(_mm256_set1_ps(bound), reinterpret_cast<__m256>(v)));
#else
  return select(v < bound, broadcast(bound), v);
#endif
}
SDFAST_INLINE Vec at_most(Vec v, float bound) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_maskz_min_ps(kAllLanes, _mm512_set1_ps(bound), reinterpret_cast<__m512>(v)));
#elif defined(__AVX__)
  return reinterpret_cast<Vec>(_mm256_min_ps(_mm256_set1_ps(bound), reinterpret_cast<__m256>(v)));
#else
  return select(v > bound, broadcast(bound), v);
#endif
}

SDFAST_INLINE Vec widen_bfloat16(HalfBits v) { return as_floats(widen_bits(v) << 16); }

// Rounds to nearest even; NaN stays NaN.
SDFAST_INLINE HalfBits narrow_bfloat16(Vec v) {
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

// v as a sum of two bf16: its upper 8 bits and those after them, each rounded. A relative error of
// at most 2^-17; NaN where v is not finite, or rounds to what is not in bf16.
struct Parts {
  HalfBits upper, lower;
};
SDFAST_INLINE Parts split(Vec v) {
  const HalfBits upper = narrow_bfloat16(v);
  return {upper, narrow_bfloat16(v - widen_bfloat16(upper))};
}

SDFAST_INLINE Vec widen_half(HalfBits v) {
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

SDFAST_INLINE HalfBits narrow_half(Vec v) {
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

SDFAST_INLINE Vec load(const float* p, FullVector) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SDFAST_INLINE Vec load(const BFloat16* p, FullVector) {
  HalfBits v;
  std::memcpy(&v, p, sizeof v);
  return widen_bfloat16(v);
}
SDFAST_INLINE Vec load(const Half* p, FullVector) {
  HalfBits v;
  std::memcpy(&v, p, sizeof v);
  return widen_half(v);
}

SDFAST_INLINE void store(float* p, Vec v, FullVector) { std::memcpy(p, &v, sizeof v); }
SDFAST_INLINE void store(BFloat16* p, Vec v, FullVector) {
  const HalfBits bits = narrow_bfloat16(v);
  std::memcpy(p, &bits, sizeof bits);
}
SDFAST_INLINE void store(Half* p, Vec v, FullVector) {
  const HalfBits bits = narrow_half(v);
  std::memcpy(p, &bits, sizeof bits);
}

// Rounded to nearest even.
SDFAST_INLINE Vec to_floats(Bits v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_cvtepu32_ps(kAllLanes, reinterpret_cast<__m512i>(v)));
#else
  // Either half is exact as a number behind the leading bit of 2^23.
  const Vec high = as_floats((v >> 16) + 0x4b000000u) - 0x1p23f;
  const Vec low = as_floats((v & 0xffffu) + 0x4b000000u) - 0x1p23f;
  return high * 65536.0f + low;
#endif
}

SDFAST_INLINE Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_sqrt_ps(kAllLanes, reinterpret_cast<__m512>(v)));
#elif defined(__AVX__)
  return reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vec>(_mm_sqrt_ps(reinterpret_cast<__m128>(v)));
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// The 64-bit products of the low halves of the lanes.
SDFAST_INLINE Wide multiply_low_halves(Wide a, Wide b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Wide>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Wide>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__) && !defined(__AVX__)
  return reinterpret_cast<Wide>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Loads fewer lanes than a vector has; the others are zero. No byte beyond them is touched.
template <typename T>
SDFAST_INLINE Vec load(const T* p, int lanes) {
  T values[kLanes] = {};
  std::memcpy(values, p, lanes * sizeof(T));
  return load(values, FullVector());
}

template <typename T>
SDFAST_INLINE void store(T* p, Vec v, int lanes) {
  T values[kLanes];
  store(values, v, FullVector());
  std::memcpy(p, values, lanes * sizeof(T));
}

// A store past the caches, for what is not read again while they would hold it: the line is not
// read first.
// p: on the boundary of a vector. Before another thread may read there, `finish_streams`.
SDFAST_INLINE void stream(float* p, Vec v, FullVector) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#elif defined(__AVX__)
  _mm256_stream_ps(p, reinterpret_cast<__m256>(v));
#elif defined(__SSE__)
  _mm_stream_ps(p, reinterpret_cast<__m128>(v));
#else
  store(p, v, FullVector());
#endif
}
template <typename T, typename Lanes>
SDFAST_INLINE void stream(T* p, Vec v, Lanes lanes) {
  store(p, v, lanes);
}

// The same of bf16 too, of which a vector is half a line: the other half must follow before many
// others do.
template <typename T, typename Lanes>
SDFAST_INLINE void stream_part(T* p, Vec v, Lanes lanes) {
  stream(p, v, lanes);
}
#if defined(__AVX512F__)
SDFAST_INLINE void stream_part(BFloat16* p, Vec v, FullVector) {
  const HalfBits bits = narrow_bfloat16(v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(bits));
}
#endif

// Whether stream_part of whole vectors passes the caches.
template <typename T>
constexpr bool kStreams = std::is_same_v<T, float>;
#if defined(__AVX512F__)
template <>
inline constexpr bool kStreams<BFloat16> = true;
#endif

// Whether rows of `width` elements can pass the caches, in whole lines, and have enough bytes in
// all.
constexpr int64_t kStreamedBytes = 64 << 20;  // more than caches hold, for any kernel
template <typename T>
bool streams(const T* to, int64_t rows, int64_t width, int64_t least_bytes) {
  constexpr int64_t kSize = sizeof(T), kLine = 64;
  return kStreams<T> && rows * width * kSize >= least_bytes && width * kSize % kLine == 0 &&
         reinterpret_cast<uintptr_t>(to) % kLine == 0;
}

// The same of a weight's gradient, which nothing reads before the optimiser does: of fewer elements
// too.
constexpr int64_t kStreamedGradient = 1 << 18;
template <typename T>
bool streams_gradient(const T* to, int64_t rows, int64_t width) {
  return streams(to, rows, width, kStreamedGradient * static_cast<int64_t>(sizeof(T)));
}

SDFAST_INLINE void finish_streams() {
#if defined(__SSE__)
  _mm_sfence();
#endif
}

// Hints; an address outside the array does no harm.
// GCC 12 takes a function that only prefetches for a pure one and drops calls of it; not with an
// asm.
SDFAST_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p);
  __asm__ volatile("");
}
SDFAST_INLINE void prefetch_for_write(const void* p) {
  __builtin_prefetch(p, 1);
  __asm__ volatile("");
}

#if defined(__AVX512F__)
// low and high as one table of 32, read at the low five bits of each index.
SDFAST_INLINE Vec lookup(Vec low, Vec high, Bits index) {
  return reinterpret_cast<Vec>(_mm512_maskz_permutex2var_ps(
      kAllLanes, reinterpret_cast<__m512>(low), reinterpret_cast<__m512i>(index),
      reinterpret_cast<__m512>(high)));
}
// v * 2^floor(n), rounded once.
SDFAST_INLINE Vec scale_by_power_of_two(Vec v, Vec n) {
  return reinterpret_cast<Vec>(
      _mm512_maskz_scalef_ps(kAllLanes, reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(n)));
}
// 1 / v to 14 bits.
SDFAST_INLINE Vec estimate_reciprocal(Vec v) {
  return reinterpret_cast<Vec>(_mm512_maskz_rcp14_ps(kAllLanes, reinterpret_cast<__m512>(v)));
}
#endif

SDFAST_INLINE Vec load(const float* p) { return load(p, FullVector()); }
SDFAST_INLINE void store(float* p, Vec v) { store(p, v, FullVector()); }

}  // namespace sdfast::simd
