// The tensors of the CUDA kernels of linear's activation, GEGLU alone.
#include "cuda_tensors.h"
#include "linear_cuda.cuh"

namespace sdfast {
namespace {

constexpr int64_t kGeglu = 4;  // its place in linear.ACTIVATIONS

void check_gate(const Tensor& h, int64_t activation) {
  check_device(h, "h");
  STD_TORCH_CHECK(h.dim() == 2 && h.is_contiguous(), "h: expected a dense matrix");
  STD_TORCH_CHECK(activation == kGeglu, "activation: expected 4, GEGLU");
  STD_TORCH_CHECK(h.size(1) % 2 == 0, "h: expected an even width");
}

// h: (tokens, M). Returns a gelu(g): (tokens, M / 2).
Tensor linear_activate_cuda(Tensor h, int64_t activation) {
  check_gate(h, activation);
  const Call call(h);
  const int64_t tokens = h.size(0), columns = h.size(1) / 2;
  Tensor y = empty({tokens, columns}, h.scalar_type());
  with_element_type(h.scalar_type(), [&](auto element) {
    using T = decltype(element);
    gate<false, T>({call.input<T>(h), nullptr, call.output<T>(y), nullptr, tokens, columns},
                   call.stream());
  });
  return y;
}

// dy: (tokens, M / 2), dense. Returns dh: (tokens, M).
Tensor linear_activation_gradient_cuda(Tensor dy, Tensor h, int64_t activation) {
  check_gate(h, activation);
  check_device(dy, "dy");
  const Call call(h);
  const int64_t tokens = h.size(0), columns = h.size(1) / 2;
  check_shape(dy, "dy", {tokens, columns});
  STD_TORCH_CHECK(dy.is_contiguous() && dy.scalar_type() == h.scalar_type(),
                  "dy: expected dense, in the dtype of h");
  Tensor dh = empty(h.sizes(), h.scalar_type());
  with_element_type(h.scalar_type(), [&](auto element) {
    using T = decltype(element);
    gate<true, T>(
        {call.input<T>(h), call.input<T>(dy), nullptr, call.output<T>(dh), tokens, columns},
        call.stream());
  });
  return dh;
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("linear_activate_cuda", TORCH_BOX(&linear_activate_cuda));
  m.impl("linear_activation_gradient_cuda", TORCH_BOX(&linear_activation_gradient_cuda));
}

}  // namespace
}  // namespace sdfast
