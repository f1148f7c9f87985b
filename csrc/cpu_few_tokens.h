// Products of few tokens with a weight that is read where it lies: y = x Wᵀ for W (rows, K), K
// contiguous.
//
// Algorithm. The micro-kernel of cpu_gemm.h multiplies a vector of tokens at a time, and of few
// tokens most lanes would be idle. Here the lanes go along K: some rows of W are multiplied by some
// tokens, and at the end of each chain a sum's lanes are added up. Bytes: W once; x stays in L1.
// Limit: the rate at which W comes.
// Every element is added up in one order: the result does not depend on the number of threads.
#pragma once

#include "cpu_weights.h"

namespace sdfast::gemm {

constexpr int64_t kFewTokens = 8;  // up to which this is faster than whole vectors, or as fast
// As many sums as the registers hold beside a vector of each token and one of W.
constexpr int kFewRows = simd::kLanes == 16 ? 4 : 2;

// sums[t * kGroup + r] = W[r] · x[t] for kR rows and kT tokens.
template <int kR, int kT, typename Operand, typename T>
inline __attribute__((noinline)) void multiply_few(const T* weight, int64_t dim, const T* x,
                                                   int64_t stride, float* sums) {
  constexpr int64_t kStepValues = kLanes * Operand::kDepth;
  for (int64_t begin = 0; begin < dim; begin += kChain * kStepValues) {
    const int64_t end = std::min(begin + kChain * kStepValues, dim);
    int64_t k = begin;
    Vec chains[kR][kT] = {};
    const auto multiply = [&](const auto& load) __attribute__((always_inline)) {
      Vec values[kT];
      for (int t = 0; t < kT; ++t) values[t] = load(x + t * stride);
      for (int r = 0; r < kR; ++r) {
        const Vec row = load(weight + r * dim);
        simd::prefetch(weight + (r + kR) * dim + k);  // the next rows
        for (int t = 0; t < kT; ++t) {
          chains[r][t] = multiply_add(chains[r][t], row, values[t], Operand());
        }
      }
    };
    for (; k + kStepValues <= end; k += kStepValues) {
      multiply([&](const T* from)
                   __attribute__((always_inline)) { return load_whole(Operand(), from + k); });
    }
    if (k < end) {
      multiply([&](const T* from) { return load_steps(Operand(), from + k, 0, end - k); });
    }
    for (int r = 0; r < kR; ++r) {
      for (int t = 0; t < kT; ++t) {
        float& sum = sums[t * kGroup + r];
        sum = simd::sum(chains[r][t]) + (begin > 0 ? sum : 0.0f);
      }
    }
  }
}

// sums (tokens, kGroup): W's rows by all tokens.
template <typename Operand, typename T>
void multiply_few_rows(const T* weight, int64_t rows, int64_t dim, const T* x, int64_t stride,
                       int64_t tokens, float* sums) {
  int64_t row = 0;
  const auto by_all_tokens = [&](auto count) {
    constexpr int kR = count;
    const T* w = weight + row * dim;
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) {
      multiply_few<kR, 4, Operand>(w, dim, x + t * stride, stride, sums + t * kGroup + row);
    }
    for (; t + 2 <= tokens; t += 2) {
      multiply_few<kR, 2, Operand>(w, dim, x + t * stride, stride, sums + t * kGroup + row);
    }
    if (t < tokens) {
      multiply_few<kR, 1, Operand>(w, dim, x + t * stride, stride, sums + t * kGroup + row);
    }
    row += kR;
  };
  while (row + kFewRows <= rows) by_all_tokens(std::integral_constant<int, kFewRows>());
  while (row < rows) by_all_tokens(std::integral_constant<int, 1>());
}

// As multiply_weights, for at most kFewTokens rows x of `stride` and W dense.
template <typename Operand, typename T, typename Finish>
void multiply_few_tokens(const Product& p, const T* x, int64_t stride, const T* weight,
                         const Finish& finish) {
  share(p.groups(), [&](const auto& next) {
    float sums[2][kFewTokens * kGroup];
    for (int64_t group; (group = next()) >= 0;) {
      const int64_t row = group * kGroup, rows = std::min(kGroup, p.rows - row);
      for (int half = 0; half < (p.gated ? 2 : 1); ++half) {
        multiply_few_rows<Operand>(weight + (row + half * p.rows) * p.dim, rows, p.dim, x, stride,
                                   p.tokens, sums[half]);
      }
      finish(0, p.tokens, row, rows, Sums{sums[0], sums[1], kGroup});
    }
  });
}

}  // namespace sdfast::gemm
