// The tensors of linear's CUDA kernels: GEGLU's gate, and products on Hopper's own units.
#include "cuda_tensors.h"
#include "linear_cuda.cuh"
#include "tile_product_cuda.cuh"

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

// Dense, at a multiple of 16 bytes; a copy where it is not.
Tensor aligned(const Tensor& t) {
  if (t.is_contiguous() && is_aligned(t.const_data_ptr(), 16)) return t;
  Tensor copy = empty(t.sizes(), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// act(x weightT + bias + residual) on Hopper's own units. x: (tokens, K), weight: (M, K), bias:
// (M), residual: (tokens, M), none with GEGLU; bf16 or fp16, K and M multiples of 8, of GEGLU's M
// of 16. Returns (tokens, M), of GEGLU M / 2.
Tensor linear_rows_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias,
                        std::optional<Tensor> residual, int64_t activation) {
  const Call call(x);
  const bool gated = activation == kGeglu;
  STD_TORCH_CHECK(activation == 0 || (gated && !residual),
                  "activation: expected 0, or without residual 4, GEGLU");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x, weight: expected matrices");
  const int64_t tokens = x.size(0), k = x.size(1), rows = weight.size(0);
  const auto check = [&](const Tensor& t, const char* name, IntHeaderOnlyArrayRef shape) {
    check_device(t, name);
    check_shape(t, name, shape);
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
  };
  check(weight, "weight", {rows, k});
  if (bias) check(*bias, "bias", {rows});
  if (residual) check(*residual, "residual", {tokens, rows});
  constexpr int64_t kLargest = int64_t{1} << 30;
  STD_TORCH_CHECK(std::max({tokens, k, rows}) < kLargest, "x, weight: a size is out of range");
  STD_TORCH_CHECK(k > 0 && k % 8 == 0 && rows % (gated ? 16 : 8) == 0,
                  "x, weight: expected K and M to be multiples of 8, of GEGLU's M of 16");
  x = aligned(x), weight = aligned(weight);
  if (bias) bias = aligned(*bias);
  if (residual) residual = aligned(*residual);
  Tensor y = empty({tokens, gated ? rows / 2 : rows}, x.scalar_type());
  if (y.numel() == 0) return y;
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      STD_TORCH_CHECK(has_tile_products<T>(current_device()),
                      "x: expected a GPU of compute capability 9.0, in a library built for 9.0a");
      Conv2d<T> conv = {};
      conv.images = conv.height = conv.out_height = conv.phases = 1;
      conv.taps_y = conv.taps_x = conv.stride = 1;
      conv.width = conv.out_width = static_cast<int>(tokens);
      conv.channels = static_cast<int>(k), conv.out_channels = static_cast<int>(rows);
      conv.x = call.input<T>(x), conv.weight = call.input<T>(weight);
      conv.bias = bias ? call.input<T>(*bias) : nullptr;
      conv.residual = residual ? call.input<T>(*residual) : nullptr;
      conv.y = call.output<T>(y);
      gated ? tile_product<true>(conv, current_device(), call.stream())
            : tile_product<false>(conv, current_device(), call.stream());
    } else {
      STD_TORCH_CHECK(false, "x: expected bfloat16 or float16");
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("linear_rows_cuda", TORCH_BOX(&linear_rows_cuda));
  m.impl("linear_activate_cuda", TORCH_BOX(&linear_activate_cuda));
  m.impl("linear_activation_gradient_cuda", TORCH_BOX(&linear_activation_gradient_cuda));
}

}  // namespace
}  // namespace sdfast
