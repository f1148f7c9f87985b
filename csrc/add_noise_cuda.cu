// The tensors of add_noise's CUDA kernels.
#include <tuple>

#include "add_noise_cuda.cuh"
#include "cuda_tensors.h"
#include "sample_layout.h"

namespace sdfast {
namespace {

// x0, noise: (N, ...). alpha, sigma: (N). x_t, velocity: of the layout; velocity may be null.
void noise_samples(const Call& call, const SampleLayout& layout, const Tensor& x0,
                   const Tensor& noise, const Tensor& alpha, const Tensor& sigma, const Tensor& x_t,
                   const Tensor* velocity) {
  STD_TORCH_CHECK(x0.dim() > 0, "x0: expected (N, ...)");
  const ScalarType dtype = x0.scalar_type();
  const Samples x(x0, "x0", layout, dtype), e(noise, "noise", layout, dtype);
  const Values a(call, alpha, "alpha", {layout.samples}), s(call, sigma, "sigma", {layout.samples});
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    add_noise<T>({call.input<T>(x.tensor()), call.input<T>(e.tensor()), a.data(), s.data(),
                  call.output<T>(x_t), velocity ? call.output<T>(*velocity) : nullptr,
                  layout.samples, layout.size, x.stride(), e.stride()},
                 call.stream());
  });
}

// Returns x_t, as x0.
Tensor add_noise_cuda(Tensor x0, Tensor noise, Tensor alpha, Tensor sigma) {
  const Call call(x0);
  const SampleLayout layout(x0);
  Tensor x_t = layout.new_result(x0.scalar_type());
  noise_samples(call, layout, x0, noise, alpha, sigma, x_t, nullptr);
  return x_t;
}

// Returns x_t and the velocity, each as x0.
std::tuple<Tensor, Tensor> add_noise_velocity_cuda(Tensor x0, Tensor noise, Tensor alpha,
                                                   Tensor sigma) {
  const Call call(x0);
  const SampleLayout layout(x0);
  Tensor x_t = layout.new_result(x0.scalar_type()), velocity = layout.new_result(x0.scalar_type());
  noise_samples(call, layout, x0, noise, alpha, sigma, x_t, &velocity);
  return {x_t, velocity};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("add_noise_cuda", TORCH_BOX(&add_noise_cuda));
  m.impl("add_noise_velocity_cuda", TORCH_BOX(&add_noise_velocity_cuda));
}

}  // namespace
}  // namespace sdfast
