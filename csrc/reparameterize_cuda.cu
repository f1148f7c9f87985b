// The tensors of reparameterize's CUDA kernels.
#include "cuda_tensors.h"
#include "reparameterize_cuda.cuh"
#include "sample_layout.h"

namespace sdfast {
namespace {

template <bool kBackward>
Tensor over_samples(const SampleLayout& layout, const Tensor& first, const char* first_name,
                    const Tensor& logvar, const Tensor& noise) {
  check_device(first, first_name);  // another argument's may have led here
  const Call call(first);
  const ScalarType dtype = first.scalar_type();
  const Samples a(first, first_name, layout, dtype), v(logvar, "logvar", layout, dtype);
  const Samples e(noise, "noise", layout, dtype);
  Tensor result = layout.new_result(dtype);
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    reparameterize<kBackward, T>(
        {call.input<T>(a.tensor()), call.input<T>(v.tensor()), call.input<T>(e.tensor()),
         call.output<T>(result), layout.samples, layout.size, a.stride(), v.stride(), e.stride()},
        call.stream());
  });
  return result;
}

// mean, logvar, noise: of one shape. Returns z, as mean.
Tensor reparameterize_cuda(Tensor mean, Tensor logvar, Tensor noise) {
  return over_samples<false>(SampleLayout(mean), mean, "mean", logvar, noise);
}

// dz, logvar, noise: of one shape. Returns dlogvar, as logvar.
Tensor reparameterize_backward_cuda(Tensor dz, Tensor logvar, Tensor noise) {
  return over_samples<true>(SampleLayout(logvar), dz, "dz", logvar, noise);
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("reparameterize_cuda", TORCH_BOX(&reparameterize_cuda));
  m.impl("reparameterize_backward_cuda", TORCH_BOX(&reparameterize_backward_cuda));
}

}  // namespace
}  // namespace sdfast
