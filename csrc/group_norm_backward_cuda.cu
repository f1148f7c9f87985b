// The tensors of group_norm's gradient on CUDA.
#include <tuple>

#include "group_norm_backward_cuda.cuh"
#include "group_norm_tensors_cuda.h"

namespace sdfast {
namespace {

// Of no elements where the parameter is absent.
Tensor empty_as(const std::optional<Tensor>& parameter, ScalarType dtype) {
  return parameter ? empty(parameter->sizes(), parameter->scalar_type()) : empty({0}, dtype);
}

// dy, x: (N, C, *). mean, rstd: (N, G), fp32. Returns dx in the layout of x, then the gradients of
// weight, bias, scale and shift in their dtypes, each of no elements where the parameter is absent.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_backward_cuda(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups, std::optional<Tensor> weight,
    std::optional<Tensor> bias, bool silu, std::optional<Tensor> scale,
    std::optional<Tensor> shift) {
  const Call call(x);
  const auto shape = group_norm::shape_of(x, num_groups);
  const ScalarType dtype = x.scalar_type();
  check_device(dy, "dy");
  check_shape(dy, "dy", x.sizes());
  STD_TORCH_CHECK(dy.scalar_type() == dtype, "dy: expected the dtype of x");
  const Values its_mean(call, mean, "mean", {shape.images, num_groups});
  const Values its_rstd(call, rstd, "rstd", {shape.images, num_groups});
  const group_norm::Operands operands(call, shape, dtype, weight, bias, scale, shift);
  const Layout layout = group_norm::layout_of(x);
  Tensor dx = empty_in_layout(x, layout);
  Tensor dweight = empty_as(weight, dtype), dbias = empty_as(bias, dtype);
  Tensor dscale = empty_as(scale, dtype), dshift = empty_as(shift, dtype);
  if (x.numel() == 0) {
    for (Tensor* gradient : {&dweight, &dbias, &dscale, &dshift}) torch::stable::zero_(*gradient);
    return {dx, dweight, dbias, dscale, dshift};
  }
  const bool channels_last = layout == Layout::kChannelsLast;
  const Tensor values = in_layout(x, layout), gradients = in_layout(dy, layout);
  const Tensor means = empty({2, shape.images, num_groups}, ScalarType::Float);
  const auto is_wide = [](const Tensor& t) { return t.scalar_type() == ScalarType::Float; };
  const auto output = [&](const Tensor& t) {
    return t.numel() == 0 ? nullptr : call.output<void>(t);
  };
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const group_norm::Backward<T> backward{shape,
                                           call.input<T>(gradients),
                                           call.input<T>(values),
                                           its_mean.data(),
                                           its_rstd.data(),
                                           operands.as<T>(),
                                           silu};
    const group_norm::Gradients<T> results{
        call.output<float>(means), output(dweight), output(dbias),   output(dscale), output(dshift),
        is_wide(dweight),          is_wide(dbias),  is_wide(dscale), is_wide(dshift)};
    T* const to = call.output<T>(dx);
    const bool whole = group_norm::rows_are_whole<T>(shape, channels_last, shape.channels) &&
                       is_aligned(backward.x, 16) && is_aligned(backward.dy, 16) &&
                       is_aligned(to, 16);
    group_norm::with_access<T>(whole, channels_last, [&](auto width, auto last) {
      constexpr int kWidth = decltype(width)::value;
      constexpr bool kLast = decltype(last)::value;
      const auto plan = group_norm::backward_plan<kWidth, kLast>(shape, current_device());
      const Tensor sums = empty({2, shape.images, plan.chunks, shape.channels}, ScalarType::Float);
      group_norm::backward<T, kWidth, kLast>(backward, results, to, call.output<float>(sums), plan,
                                             call.stream());
    });
  });
  return {dx, dweight, dbias, dscale, dshift};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("group_norm_backward_cuda", TORCH_BOX(&group_norm_backward_cuda));
}

}  // namespace
}  // namespace sdfast
