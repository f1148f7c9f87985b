// Operands of the micro-kernel from rows of values as tensors hold them.
#pragma once

#include "cpu_gemm.h"

namespace sdfast::gemm {

// Whether the micro-kernel can read rows of `dim` values, `stride` apart, where they lie.
template <typename Operand, typename T>
bool lies_ready(int64_t stride, int64_t dim) {
  constexpr int kDepth = Operand::kDepth;
  return sizeof(T) * kDepth == sizeof(Operand) && stride % kDepth == 0 && dim % kDepth == 0 &&
         (!crowds(stride * sizeof(T)) || holds_crowd());
}

// `count` rows of `dim` values, `stride` apart, as the micro-kernel reads them: where they lie if
// that can be; else spread, widened, or the last pair completed, in scratch.
template <typename T, typename Operand>
Rows<Operand> rows_of(const T* from, int64_t stride, int64_t count, int64_t dim, Operand* scratch) {
  constexpr int kDepth = Operand::kDepth;
  const int64_t steps = steps_of(kDepth, dim), apart = scratch_stride<Operand>(steps);
  if constexpr (sizeof(T) * kDepth == sizeof(Operand)) {
    if (lies_ready<Operand, T>(stride, dim)) {
      return {reinterpret_cast<const Operand*>(from), stride / kDepth};
    }
    for (int64_t r = 0; r < count; ++r) {
      T* to = reinterpret_cast<T*>(scratch + r * apart);
      to[steps * kDepth - 1] = T{};
      std::memcpy(static_cast<void*>(to), from + r * stride, dim * sizeof(T));
    }
  } else {
    for (int64_t r = 0; r < count; ++r) {
      simd::for_each_vector(0, dim, [&](int64_t i, auto lanes) {
        simd::store(&scratch[r * apart + i].value, simd::load(from + r * stride + i, lanes), lanes);
      });
    }
  }
  return {scratch, apart};
}

// One step of adjacent columns, which lie in one row, or for pairs in two; `second` may be null,
// for zeros.
template <typename T, typename Lanes>
SDFAST_INLINE Vec load_step(Float32, const T* first, const T*, Lanes lanes) {
  return simd::load(first, lanes);
}
#if defined(__AVX512BF16__)
template <typename Lanes>
SDFAST_INLINE Vec load_step(BFloat16Pair, const simd::BFloat16* first, const simd::BFloat16* second,
                            Lanes lanes) {
  const Vec low = simd::load(first, lanes);
  const Vec high = second ? simd::load(second, lanes) : Vec{};
  return simd::as_floats(simd::as_bits(low) >> 16 | simd::as_bits(high));
}
#endif

template <typename Operand, typename Lanes>
SDFAST_INLINE void store_operands(Operand* to, Vec operands, Lanes lanes) {
  static_assert(sizeof(Operand) == sizeof(float));
  simd::store(reinterpret_cast<float*>(to), operands, lanes);
}

}  // namespace sdfast::gemm
