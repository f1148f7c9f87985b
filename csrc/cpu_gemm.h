// The micro-kernel of matrix products on CPU: c = a b for rows of a and a panel of b, fp32
// accumulation, and what products of different operands (cpu_weights.h, cpu_many_tokens.h,
// cpu_gemm_packing.h) share.
//
// Algorithm. A panel holds kColumns columns of b, so that each step of the inner loop reads one
// contiguous piece. The micro-kernel keeps kRows x kColumns sums in registers and reads a where it
// lies, row-major: broadcasting needs no packing.
// Limit: fused multiply-adds, 24 of them against 14 loads a step with AVX-512.
// Every element is one chain of additions over K, cut at fixed places: the result does not depend
// on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu_amx.h"
#include "cpu_simd.h"

namespace sdfast::gemm {

using simd::kLanes;
using simd::Vec;

constexpr int kVecs = 2, kColumns = kVecs * simd::kLanes;
// As many sums as the registers hold beside two vectors of b and one of a.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif
constexpr int64_t kBlockBytes = 768 << 10;  // of a
constexpr int64_t kChain = 128;             // steps: a longer chain of additions rounds too much
constexpr int64_t kPartSteps = 1280;        // of a packed panel of tokens

// What one step multiplies: an fp32, or two bf16 that lie side by side along K.
struct Float32 {
  float value;
  static constexpr int kDepth = 1;
};
struct BFloat16Pair {
  typedef uint32_t Bits __attribute__((may_alias, aligned(2)));  // read where two bf16 were written
  Bits bits;
  static constexpr int kDepth = 2;
};

SDFAST_INLINE Vec multiply_add(Vec sum, Vec a, Vec b, Float32) { return sum + a * b; }
SDFAST_INLINE Vec broadcast(const Float32& a) { return simd::broadcast(a.value); }

#if defined(__AVX512BF16__)
SDFAST_INLINE Vec multiply_add(Vec sum, Vec a, Vec b, BFloat16Pair) {
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(
      reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
SDFAST_INLINE Vec broadcast(const BFloat16Pair& a) {
  return reinterpret_cast<Vec>(_mm512_set1_epi32(static_cast<int>(a.bits)));
}
#endif

// The operand a storage type is multiplied as.
template <typename T>
struct OperandOf {
  using Type = Float32;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<simd::BFloat16> {
  using Type = BFloat16Pair;
};
#endif

constexpr int64_t steps_of(int64_t depth, int64_t k) { return (k + depth - 1) / depth; }

// What a micro-kernel fetches meanwhile: an address a step, `stride` bytes apart.
struct Fetch {
  const void* from = nullptr;
  int64_t stride = 0;
};

// c[r][j] (+)= sum over steps of a[r] * b[j]. a: rows `lda` operands apart, steps adjacent; with
// kTransposed steps `lda` apart, rows adjacent. b: (steps, kColumns). c: (kR, kColumns) dense. Of
// the columns kV vectors are computed, from the left.
template <int kR, typename Operand, bool kTransposed = false, int kV = kVecs>
inline __attribute__((noinline)) void multiply_tile(int64_t steps, const Operand* a, int64_t lda,
                                                    const Operand* b, float* c, bool accumulate,
                                                    Fetch fetch = {}) {
  Vec sums[kR][kV];
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) sums[r][v] = Vec{};
  }
  const int64_t next_row = kTransposed ? 1 : lda, next_step = kTransposed ? lda : 1;
  // Rows are addressed from a pointer each three: base, base + lda, base + 2 lda.
  const Operand* base[(kR + 2) / 3];
#pragma GCC unroll 4
  for (int i = 0; i < (kR + 2) / 3; ++i) base[i] = a + 3 * i * next_row;
  const char* fetched = static_cast<const char*>(fetch.from ? fetch.from : a);
  for (int64_t step = 0; step < steps; ++step) {
    Vec columns[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      std::memcpy(&columns[v], b + v * simd::kLanes, sizeof(Vec));
    }
#pragma GCC unroll 16
    for (int r = 0; r < kR; ++r) {
      const Vec row = broadcast(base[r / 3][(r % 3) * next_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        sums[r][v] = multiply_add(sums[r][v], row, columns[v], Operand());
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < (kR + 2) / 3; ++i) base[i] += next_step;
    b += kColumns;
    simd::prefetch(fetched);
    fetched += fetch.stride;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      float* to = c + r * kColumns + v * simd::kLanes;
      simd::store(to, accumulate ? simd::load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

// Rows of a as the micro-kernel reads them.
template <typename Operand>
struct Rows {
  const Operand* data;
  int64_t stride;  // from one row to the next, in operands
};

// Addresses so many bytes apart share a set of the L1 cache.
constexpr int64_t kWayBytes = 4096;
constexpr bool crowds(int64_t stride_bytes) { return stride_bytes % kWayBytes == 0; }

// Whether a set holds the rows of a tile, which would otherwise drive each other out of it. Without
// AVX the caches are old.
inline bool holds_crowd() {
#if defined(__AVX__) && defined(_SC_LEVEL1_DCACHE_ASSOC)
  static const bool holds = sysconf(_SC_LEVEL1_DCACHE_ASSOC) >= kRows;  // 0 where it is not known
  return holds;
#else
  return false;
#endif
}

// From one row of scratch to the next, in operands.
template <typename Operand>
constexpr int64_t scratch_stride(int64_t steps) {
  return crowds(steps * sizeof(Operand)) ? steps + kLanes : steps;
}

// Whether AMX can multiply such operands.
template <typename Operand>
constexpr bool kInTiles = amx::kAvailable && Operand::kDepth == 2;

// What a thread holds while it multiplies.
template <typename Operand>
using Tiles = std::conditional_t<kInTiles<Operand>, amx::Tiles, amx::NoTiles>;

// A multiple of kRows, for `rows` rows of which any may be missing at the end.
constexpr int64_t padded_rows(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

// Rows of memory that are read next, from far: each is fetched during one of the last calls of the
// micro-kernel before.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* data, int64_t rows, int64_t row_bytes, int64_t stride_bytes, int64_t calls)
      : data_(static_cast<const char*>(data)),
        rows_(rows),
        row_bytes_(row_bytes),
        stride_bytes_(stride_bytes),
        row_(std::min<int64_t>(rows - calls, 0)) {}

  Fetch during(int64_t steps) {
    const int64_t row = row_++;
    if (row < 0 || row >= rows_) return {};
    return {data_ + row * stride_bytes_, (row_bytes_ + steps - 1) / steps};
  }

 private:
  const char* data_ = nullptr;
  int64_t rows_ = 0, row_bytes_ = 0, stride_bytes_ = 0, row_ = 0;
};

// Finished sums of tokens: `stride` from one to the next. The second, of a gated product, are of
// its gates.
struct Sums {
  const float *values, *gates;
  int64_t stride;
};

// How often multiply_panel calls the micro-kernel.
constexpr int64_t calls_of(int64_t rows, int64_t steps) {
  return (rows + kRows - 1) / kRows * ((steps + kChain - 1) / kChain);
}

// c (rows, kColumns) (+)= a b for one panel, tile by tile, the last ones narrower where rows end.
// Of the columns at least `columns` are computed, each to the same bits.
template <typename Operand>
void multiply_panel(int64_t rows, int64_t steps, const Rows<Operand>& a, const Operand* panel,
                    float* c, bool accumulate, Ahead& ahead, int64_t columns = kColumns) {
  const bool narrow = columns <= simd::kLanes;
  int64_t row = 0;
  const auto tile = [&](auto count) {
    int64_t step = 0;
    do {
      const int64_t chain = std::min(kChain, steps - step);
      const Operand* from = a.data + row * a.stride + step;
      const Operand* b = panel + step * kColumns;
      float* to = c + row * kColumns;
      const bool add = accumulate || step > 0;
      const Fetch fetch = ahead.during(chain);
      if (narrow) {
        multiply_tile<count, Operand, false, 1>(chain, from, a.stride, b, to, add, fetch);
      } else {
        multiply_tile<count>(chain, from, a.stride, b, to, add, fetch);
      }
      step += kChain;
    } while (step < steps);
    row += count;
  };
  while (row + kRows <= rows) tile(std::integral_constant<int, kRows>());
  if constexpr (kRows > 8) {
    if (row + 8 <= rows) tile(std::integral_constant<int, 8>());
  }
  for (; row + 4 <= rows;) tile(std::integral_constant<int, 4>());
  for (; row < rows;) tile(std::integral_constant<int, 1>());
}

template <typename Operand>
void multiply_panel(int64_t rows, int64_t steps, const Rows<Operand>& a, const Operand* panel,
                    float* c, bool accumulate) {
  Ahead nothing;
  multiply_panel(rows, steps, a, panel, c, accumulate, nothing);
}

// Into how many each of `blocks` is split, for at least so many items a thread and as many for
// each.
inline int64_t even_splits(int64_t blocks, int64_t items) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1) return 1;
  int64_t splits = (items * threads + blocks - 1) / blocks;
  while (blocks * splits % threads != 0) ++splits;
  return splits;
}

// Calls work(next) on every thread; next() gives items 0, 1, ..., each once, and -1 after the
// last: a thread that is held up takes fewer.
template <typename Work>
void share(int64_t items, const Work& work) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] {
    const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
    return item < items ? item : -1;
  };
  const int64_t threads = std::min<int64_t>(items, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(next); });
}

}  // namespace sdfast::gemm
