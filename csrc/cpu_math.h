// exp, sigmoid, silu and gelu of fp32 vectors, for one vector or for several side by side.
//
// Such a chain of operations waits for itself: its latency is ten times its throughput, and a core
// looks ahead no further than about five chains. `Vecs<N>` takes N of them through each operation
// in turn. The functions are written once, for V = Vec and V = Vecs<N>.
#pragma once

#include <limits>
#include <utility>

#include "cpu_simd.h"

namespace sdfast::simd {

template <int N>
struct Vecs {
  Vec v[N];
};

namespace detail {
template <typename F, int... I, typename... V>
SDFAST_INLINE auto each(std::integer_sequence<int, I...>, const F& f, const V&... all) {
  const auto at = [&](auto i) { return f(all.v[i]...); };
  return Vecs<sizeof...(I)>{{at(std::integral_constant<int, I>())...}};
}
template <typename F, int... I>
SDFAST_INLINE auto make(std::integer_sequence<int, I...>, const F& f) {
  return Vecs<sizeof...(I)>{{f(I)...}};
}
template <int N, typename F, int... I>
SDFAST_INLINE void visit(std::integer_sequence<int, I...>, const Vecs<N>& v, const F& f) {
  (f(I, v.v[I]), ...);
}
}  // namespace detail

// f(0), ..., f(N - 1), each index a constant. A loop would keep the vectors in memory.
template <int N, typename F>
SDFAST_INLINE Vecs<N> make_vecs(const F& f) {
  return detail::make(std::make_integer_sequence<int, N>(), f);
}
// f(i, v[i]) for each i.
template <int N, typename F>
SDFAST_INLINE void for_each_of(const Vecs<N>& v, const F& f) {
  detail::visit(std::make_integer_sequence<int, N>(), v, f);
}

// f of each vector.
template <typename F>
SDFAST_INLINE Vec each(const F& f, Vec a) {
  return f(a);
}
template <typename F>
SDFAST_INLINE Vec each(const F& f, Vec a, Vec b) {
  return f(a, b);
}
template <int N, typename F, typename... V>
SDFAST_INLINE Vecs<N> each(const F& f, const Vecs<N>& a, const V&... rest) {
  return detail::each(std::make_integer_sequence<int, N>(), f, a, rest...);
}

template <int N>
SDFAST_INLINE Vecs<N> operator+(const Vecs<N>& a, const Vecs<N>& b) {
  return each([](Vec x, Vec y) { return x + y; }, a, b);
}
template <int N>
SDFAST_INLINE Vecs<N> operator-(const Vecs<N>& a, const Vecs<N>& b) {
  return each([](Vec x, Vec y) { return x - y; }, a, b);
}
template <int N>
SDFAST_INLINE Vecs<N> operator*(const Vecs<N>& a, const Vecs<N>& b) {
  return each([](Vec x, Vec y) { return x * y; }, a, b);
}
template <int N>
SDFAST_INLINE Vecs<N> operator+(const Vecs<N>& a, Vec b) {
  return each([&](Vec x) { return x + b; }, a);
}
template <int N>
SDFAST_INLINE Vecs<N> operator-(const Vecs<N>& a, Vec b) {
  return each([&](Vec x) { return x - b; }, a);
}
template <int N>
SDFAST_INLINE Vecs<N> operator*(const Vecs<N>& a, Vec b) {
  return each([&](Vec x) { return x * b; }, a);
}
template <int N>
SDFAST_INLINE Vecs<N> operator-(const Vecs<N>& a) {
  return each([](Vec x) { return -x; }, a);
}
template <int N>
SDFAST_INLINE Vecs<N> operator+(const Vecs<N>& a, float b) {
  return a + broadcast(b);
}
template <int N>
SDFAST_INLINE Vecs<N> operator-(const Vecs<N>& a, float b) {
  return a - broadcast(b);
}
template <int N>
SDFAST_INLINE Vecs<N> operator*(const Vecs<N>& a, float b) {
  return a * broadcast(b);
}
template <int N>
SDFAST_INLINE Vecs<N> operator+(float a, const Vecs<N>& b) {
  return b + a;
}
template <int N>
SDFAST_INLINE Vecs<N> operator-(float a, const Vecs<N>& b) {
  return each([&](Vec x) { return a - x; }, b);
}
template <int N>
SDFAST_INLINE Vecs<N> at_least(const Vecs<N>& a, float bound) {
  return each([&](Vec x) { return at_least(x, bound); }, a);
}
template <int N>
SDFAST_INLINE Vecs<N> at_most(const Vecs<N>& a, float bound) {
  return each([&](Vec x) { return at_most(x, bound); }, a);
}

// exp(v) for v between -104 and 89, where it has reached zero and inf. Relative error about one
// unit in the last place.
template <typename V>
SDFAST_INLINE V exp_in_range(const V& v) {
#if defined(__AVX512F__)
  // exp(v) = 2^n 2^r with n a multiple of 1/32 and |r| <= 1/64: the fraction's power from a table
  // that one permutation reads, 2^r from a parabola (relative error 5e-8), the integer's power by
  // scalef.
  const Vec low{1.0f,        1.02189715f, 1.04427378f, 1.0671404f,  1.09050773f, 1.11438674f,
                1.13878863f, 1.16372486f, 1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f,
                1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f};
  const Vec high{1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f,
                 1.61049033f, 1.64575548f, 1.68179283f, 1.7186193f,  1.75625216f, 1.79470908f,
                 1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f};
  constexpr float kToMultiple = 0x1.8p18f;  // adding it leaves 32 n in the low bits
  const V shifted = v * 1.44269502f + kToMultiple;
  const V n = shifted - kToMultiple;
  const V r = v * 1.44269502f - n;  // one rounding; log2(e) itself is 1.3e-8 off
  const V power = each([&](Vec index) { return lookup(low, high, as_bits(index)); }, shifted);
  const V p = power + power * (r * (r * 0.240226507f + 0.693157346f));
  return each([](Vec a, Vec b) { return scale_by_power_of_two(a, b); }, p, n);
#else
  constexpr float kToInteger = 0x1.8p23f;  // adding it rounds to an integer, held in the low bits
  const V shifted = v * 1.44269504f + kToInteger;
  const V n = shifted - kToInteger;
  const V r = v - n * 0.693145751953125f - n * 1.42860682e-6f;  // v - n ln 2, ln 2 in two parts
  // Minimax polynomial for |r| <= ln(2)/2: relative error 2e-9, a thirtieth of a unit.
  V p = r * 0.00138368464f + 0.00837481561f;
  p = p * r + 0.0416682261f;
  p = p * r + 0.166664198f;
  p = p * r + 0.499999907f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, each a normal number, so that n may reach 129 and -151.
  return each(
      [](Vec mantissa, Vec exponent) {
        const Mask whole = reinterpret_cast<Mask>(as_bits(exponent) - 0x4b400000u);
        const Mask half = whole >> 1;
        const Vec first = as_floats(reinterpret_cast<Bits>(half + 127) << 23);
        const Vec second = as_floats(reinterpret_cast<Bits>(whole - half + 127) << 23);
        return mantissa * first * second;
      },
      p, shifted);
#endif
}

// a / d for d between 2^-125 and 2^125, a number or inf or NaN.
template <typename V>
SDFAST_INLINE V divide(const V& a, const V& d) {
#if defined(__AVX512F__)
  // An estimate to 14 bits and one Newton step: cheaper than the division.
  const V estimate = each([](Vec x) { return estimate_reciprocal(x); }, d);
  const V quotient = a * estimate;
  return quotient + at_most(quotient, std::numeric_limits<float>::max()) *
                        (1.0f - d * estimate);  // inf * 0 would be NaN
#else
  return each([](Vec x, Vec y) { return x / y; }, a, d);
#endif
}

// 1 + exp(-v) for v >= -kSigmoidRange; beyond kSigmoidRange as there, where it is 1.
constexpr float kSigmoidRange = 87.0f;  // exp(87) is finite
template <typename V>
SDFAST_INLINE V one_plus_exp_of_negative(const V& v) {
  return 1.0f + exp_in_range(-at_most(v, kSigmoidRange));
}
template <typename V>
SDFAST_INLINE V sigmoid(const V& v) {
  const V one = each([](Vec) { return broadcast(1.0f); }, v);
  return divide(one, one_plus_exp_of_negative(at_least(v, -kSigmoidRange)));
}
template <typename V>
SDFAST_INLINE V silu(const V& x) {
  const V v = at_least(x, -kSigmoidRange);  // below, silu vanishes
  return divide(v, one_plus_exp_of_negative(v));
}

// d/dv of silu: s + v s (1 - s), s = sigmoid(v).
template <typename V>
SDFAST_INLINE V silu_gradient(const V& x) {
  const V v = at_most(at_least(x, -kSigmoidRange), kSigmoidRange);  // beyond, it is 0 or 1
  const V s = sigmoid(v);
  return s + v * s * (1.0f - s);
}

// Phi(-size) / exp(-size^2 / 2) for size from 0 to 14, Phi the normal distribution function:
// q(t) t with t = 1 / (1 + 0.35 size); q is minimax, relative error 3e-8.
constexpr float kGeluRange = 14.0f;  // beyond, exp(-size^2 / 2) has vanished
template <typename V>
SDFAST_INLINE V normal_tail_ratio(const V& size) {
  const V one = each([](Vec) { return broadcast(1.0f); }, size);
  const V t = divide(one, size * 0.35f + 1.0f);
  V q = t * -0.0291471494f + 0.143977445f;
  q = q * t + -0.255725682f;
  q = q * t + 0.159186619f;
  q = q * t + -0.0231179362f;
  q = q * t + 0.105511201f;
  q = q * t + 0.119832125f;
  q = q * t + 0.139861962f;
  q = q * t + 0.1396214f;
  return q * t;
}

// v * Phi(v): the GELU through erf.
template <typename V>
SDFAST_INLINE V gelu(const V& v) {
  const V size = at_most(each([](Vec x) { return absolute(x); }, v), kGeluRange);
  const V tail = size * exp_in_range(size * size * -0.5f) * normal_tail_ratio(size);
  return each([](Vec x, Vec y) { return select(x < 0.0f, -y, x - y); }, v, tail);
}

// d/dv of gelu: Phi(v) + v exp(-v^2 / 2) / sqrt(2 pi).
template <typename V>
SDFAST_INLINE V gelu_gradient(const V& v) {
  const V x = at_most(at_least(v, -kGeluRange), kGeluRange);
  const V size = each([](Vec a) { return absolute(a); }, x);
  const V density = exp_in_range(size * size * -0.5f);
  const V tail = density * normal_tail_ratio(size);  // Phi(-|v|)
  const V phi = each([](Vec a, Vec b) { return select(a < 0.0f, b, 1.0f - b); }, x, tail);
  return phi + x * density * 0.398942280f;
}

// v * sigmoid(1.702 v), the approximation CLIP was trained with.
template <typename V>
SDFAST_INLINE V quick_gelu(const V& v) {
  return at_least(v, -kSigmoidRange / 1.702f) * sigmoid(v * 1.702f);  // below, it vanishes
}

}  // namespace sdfast::simd
