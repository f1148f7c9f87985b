// add_noise on CPU, for fp32, bf16 and fp16: noised samples, and in the same pass the velocity.
//
// Algorithm. One pass: per vector alpha x0 + sigma noise, and alpha noise - sigma x0 where it is
// asked for, in fp32; each result is rounded once. alpha and sigma differ from sample to sample.
// Compiled without contraction to FMA: bit for bit what torch gives.
// Bytes: every input and result once. Limit: memory bandwidth.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu_tensors.h"
#include "sample_layout.h"

namespace sdfast {
namespace {

using simd::Vec;

// velocity may be null.
template <typename T>
void noise_sample(const T* x0, const T* noise, int64_t begin, int64_t end, float alpha, float sigma,
                  T* x_t, T* velocity) {
  simd::for_each_vector(begin, end, [=](int64_t i, auto lanes) {
    const Vec x = simd::load(x0 + i, lanes), e = simd::load(noise + i, lanes);
    simd::store(x_t + i, alpha * x + sigma * e, lanes);
    if (velocity) simd::store(velocity + i, alpha * e - sigma * x, lanes);
  });
}

// x0, noise: (N, ...). alpha, sigma: (N). x_t, velocity: of the layout; velocity may be null.
void noise_samples(const SampleLayout& layout, const Tensor& x0, const Tensor& noise,
                   const Tensor& alpha, const Tensor& sigma, Tensor* x_t, Tensor* velocity) {
  STD_TORCH_CHECK(x0.dim() > 0, "x0: expected (N, ...)");
  const ScalarType dtype = x0.scalar_type();
  const Samples x(x0, "x0", layout, dtype), e(noise, "noise", layout, dtype);
  const Values a(alpha, "alpha", {layout.samples}), s(sigma, "sigma", {layout.samples});
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    T* const to = static_cast<T*>(x_t->mutable_data_ptr());
    T* const v = velocity ? static_cast<T*>(velocity->mutable_data_ptr()) : nullptr;
    layout.for_each_part(false, [&](int64_t n, int64_t begin, int64_t end) {
      const int64_t from = n * layout.size;
      noise_sample(x.data<T>() + n * x.stride(), e.data<T>() + n * e.stride(), begin, end,
                   a.data()[n], s.data()[n], to + from, v ? v + from : nullptr);
    });
  });
}

// Returns x_t, as x0.
Tensor add_noise_cpu(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma) {
  const SampleLayout layout(x0);
  Tensor x_t = layout.new_result(x0.scalar_type());
  noise_samples(layout, x0, noise, alpha, sigma, &x_t, nullptr);
  return x_t;
}

// Returns x_t and the velocity, each as x0.
std::tuple<Tensor, Tensor> add_noise_velocity_cpu(Tensor x0, Tensor noise, Tensor alpha,
                                                  Tensor sigma) {
  const SampleLayout layout(x0);
  Tensor x_t = layout.new_result(x0.scalar_type()), velocity = layout.new_result(x0.scalar_type());
  noise_samples(layout, x0, noise, alpha, sigma, &x_t, &velocity);
  return {x_t, velocity};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("add_noise", TORCH_BOX(&add_noise_cpu));
  m.impl("add_noise_velocity", TORCH_BOX(&add_noise_velocity_cpu));
}

}  // namespace
}  // namespace sdfast
