// What this machine multiplies at most: the micro-kernel of cpu_gemm.h on operands that stay in L1,
// on all threads. Benchmarks state their rates as shares of it.
#include <vector>

#include "cpu_gemm.h"
#include "tensor_checks.h"

namespace sdfast {
namespace {

// Returns the floating point operations done, a multiplication and an addition for each product.
template <typename Operand>
int64_t multiply_in_l1(int64_t repetitions) {
  constexpr int64_t kSteps = 128, kR = gemm::kTileRows<Operand>;
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const gemm::Tiles<Operand> tiles;
    const std::vector<Operand> a(kR * kSteps), b(kSteps * gemm::kColumns);
    std::vector<float> c(kR * gemm::kColumns);
    for (int64_t i = begin * repetitions; i < end * repetitions; ++i) {
      gemm::multiply_any_tile<kR>(kSteps, a.data(), kSteps, b.data(), c.data(), false);
    }
  });
  return 2 * threads * repetitions * kR * gemm::kColumns * kSteps * Operand::kDepth;
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
