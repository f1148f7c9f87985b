// What takes finished sums and only stores them, as rows of a gradient.
#pragma once

#include "cpu_gemm.h"

namespace sdfast::gemm {

// A vector of values past the caches.
inline void stream_values(const float* from, float* to) {
  simd::stream(to, simd::load(from), simd::FullVector());
}
template <typename T>
void stream_values(const float* from, T* to) {
  alignas(Vec) T values[2 * kLanes];
  simd::store(values, simd::load(from), simd::FullVector());
  simd::store(values + kLanes, simd::load(from + kLanes), simd::FullVector());
  Vec bits;
  std::memcpy(&bits, values, sizeof bits);
  simd::stream(reinterpret_cast<float*>(to), bits, simd::FullVector());
}

// Rows of a gradient, `stride` values apart.
template <typename T>
struct StoreRows {
  T* to;
  int64_t stride;
  bool streamed = false;  // past the caches, in whole lines

  void fetch(int64_t token, int64_t count, int64_t row, int64_t rows) const {
    if (streamed) return;
    for (int64_t t = token; t < token + count; ++t) {
      const T* out = to + t * stride + row;
      constexpr int64_t kLine = 64 / sizeof(T);
      for (int64_t j = 0; j < rows; j += kLine) simd::prefetch_for_write(out + j);
    }
  }
  void operator()(int64_t token, int64_t count, int64_t row, int64_t rows, const Sums& sums) const {
    for (int64_t t = 0; t < count; ++t) {
      const float* from = sums.values + t * sums.stride;
      T* out = to + (token + t) * stride + row;
      if (streamed) {
        constexpr int64_t kValues = sizeof(Vec) / sizeof(T);
        for (int64_t j = 0; j < rows; j += kValues) stream_values(from + j, out + j);
      } else {
        simd::for_each_vector(0, rows, [&](int64_t j, auto lanes) {
          simd::store(out + j, simd::load(from + j), lanes);
        });
      }
    }
    if (streamed) simd::finish_streams();
  }
};

}  // namespace sdfast::gemm
