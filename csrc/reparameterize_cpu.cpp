// reparameterize on CPU, forward and backward, for fp32, bf16 and fp16.
//
// Algorithm. One pass: per vector mean + std noise with std = exp(logvar / 2), logvar clamped;
// backward dlogvar = dz std noise / 2, zero where logvar was clamped (dmean is dz itself). fp32
// arithmetic; each result is rounded once. Bytes: every input and the result once. Limit: memory
// bandwidth; in cache, the exponential.
#include <torch/csrc/stable/ops.h>

#include "cpu_math.h"
#include "cpu_tensors.h"
#include "sample_layout.h"

namespace sdfast {
namespace {

using simd::Vec;

constexpr float kLowestLogvar = -30.0f, kHighestLogvar = 20.0f;

SDFAST_INLINE Vec standard_deviation(Vec logvar) {
  const Vec v = 0.5f * simd::at_most(simd::at_least(logvar, kLowestLogvar), kHighestLogvar);
  const Vec power = simd::exp_in_range(v);
#if defined(__AVX512F__)
  // There log2(e) is rounded, which takes 1.3e-8 v of the result: nothing in a sigmoid, but v is
  // up to 10 here where the result is largest.
  return power + power * (v * 1.335e-8f);
#else
  return power;
#endif
}

template <typename T>
void forward(const T* mean, const T* logvar, const T* noise, int64_t begin, int64_t end, T* z) {
  simd::for_each_vector(begin, end, [=](int64_t i, auto lanes) {
    const Vec std = standard_deviation(simd::load(logvar + i, lanes));
    simd::store(z + i, simd::load(mean + i, lanes) + std * simd::load(noise + i, lanes), lanes);
  });
}

template <typename T>
void backward(const T* dz, const T* logvar, const T* noise, int64_t begin, int64_t end,
              T* dlogvar) {
  simd::for_each_vector(begin, end, [=](int64_t i, auto lanes) {
    const Vec v = simd::load(logvar + i, lanes);
    const Vec gradient = simd::load(dz + i, lanes) * simd::load(noise + i, lanes) * 0.5f;
    const simd::Mask moves = (v >= kLowestLogvar) & (v <= kHighestLogvar);
    simd::store(dlogvar + i, simd::select(moves, gradient * standard_deviation(v), Vec{}), lanes);
  });
}

// run(first, logvar, noise, begin, end, result) on parts of samples; the result is of the layout.
template <typename Run>
Tensor over_samples(const SampleLayout& layout, const Tensor& first, const char* first_name,
                    const Tensor& logvar, const Tensor& noise, const Run& run) {
  const ScalarType dtype = first.scalar_type();
  const Samples a(first, first_name, layout, dtype), v(logvar, "logvar", layout, dtype);
  const Samples e(noise, "noise", layout, dtype);
  Tensor result = layout.new_result(dtype);
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    T* const to = static_cast<T*>(result.mutable_data_ptr());
    const bool joined = a.joined() && v.joined() && e.joined();
    layout.for_each_part(joined, [&](int64_t n, int64_t begin, int64_t end) {
      run(a.data<T>() + n * a.stride(), v.data<T>() + n * v.stride(), e.data<T>() + n * e.stride(),
          begin, end, to + n * layout.size);
    });
  });
  return result;
}

// mean, logvar, noise: of one shape. Returns z, as mean.
Tensor reparameterize_cpu(Tensor mean, Tensor logvar, Tensor noise) {
  return over_samples(SampleLayout(mean), mean, "mean", logvar, noise,
                      [](const auto&... all) { forward(all...); });
}

// dz, logvar, noise: of one shape. Returns dlogvar, as logvar.
Tensor reparameterize_backward(Tensor dz, Tensor logvar, Tensor noise) {
  return over_samples(SampleLayout(logvar), dz, "dz", logvar, noise,
                      [](const auto&... all) { backward(all...); });
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("reparameterize", TORCH_BOX(&reparameterize_cpu));
  m.impl("reparameterize_backward", TORCH_BOX(&reparameterize_backward));
}

}  // namespace
}  // namespace sdfast
