// What this machine multiplies at most: the micro-kernel of cpu_gemm.h, or the step of cpu_amx.h,
// on operands that stay in L1, on all threads. Benchmarks state their rates as shares of it.
#include <algorithm>

#include "cpu_gemm.h"
#include "cpu_scratch.h"
#include "tensor_checks.h"

namespace sdfast {
namespace {

constexpr int64_t kSteps = 128;

template <typename Operand>
constexpr int64_t kRows = gemm::kInTiles<Operand> ? 2 * amx::kTileRows : gemm::kRows;

template <typename Operand>
void multiply_rows(const Operand* a, const Operand* b, float* c) {
#if defined(SDFAST_TILES)
  if constexpr (gemm::kInTiles<Operand>) {
    constexpr int64_t kStride = gemm::kColumns * sizeof(float);
    // GCC's tile loads do not say that they read memory.
    __asm__ volatile("" ::"r"(a), "r"(b) : "memory");
    amx::zero_sums();
    for (int64_t step = 0; step < kSteps; step += amx::kTileSteps) {
      const Operand *rows_of_step = a + step, *columns = b + step * gemm::kColumns;
      amx::multiply_step(rows_of_step, rows_of_step + amx::kTileRows * kSteps,
                         kSteps * sizeof(Operand), columns, columns + amx::kTileColumns, kStride,
                         true);
    }
    return amx::store_sums(c, kStride, true);
  }
#endif
  gemm::multiply_tile<gemm::kRows>(kSteps, a, kSteps, b, c, false);
}

// Returns the floating point operations done, a multiplication and an addition for each product.
template <typename Operand>
int64_t multiply_in_l1(int64_t repetitions) {
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const gemm::Tiles<Operand> tiles;
    constexpr int64_t kASize = kRows<Operand> * kSteps, kBSize = kSteps * gemm::kColumns;
    const Scratch<Operand> a(kASize), b(kBSize);
    const Scratch<float> c(kRows<Operand> * gemm::kColumns);
    std::fill_n(a.get(), kASize, Operand{});
    std::fill_n(b.get(), kBSize, Operand{});
    for (int64_t i = begin * repetitions; i < end * repetitions; ++i) {
      multiply_rows(a.get(), b.get(), c.get());
    }
  });
  return 2 * threads * repetitions * kRows<Operand> * gemm::kColumns * kSteps * Operand::kDepth;
}

// pairs: bf16 where this library multiplies it in pairs.
int64_t multiply_in_cache(int64_t repetitions, bool pairs) {
#if defined(__AVX512BF16__)
  if (pairs) return multiply_in_l1<gemm::BFloat16Pair>(repetitions);
#endif
  (void)pairs;
  return multiply_in_l1<gemm::Float32>(repetitions);
}

// No argument is a tensor, so the dispatcher has no device to go by.
STABLE_TORCH_LIBRARY_IMPL(sdfast, CompositeExplicitAutograd, m) {
  m.impl("multiply_in_cache", TORCH_BOX(&multiply_in_cache));
}

}  // namespace
}  // namespace sdfast
