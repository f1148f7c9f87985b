// group_norm on CPU: checks, launch and registration. The kernels are in group_norm_forward_cpu.h
// and group_norm_backward_cpu.h.
#include "group_norm_cpu.h"

#include <tuple>

#include "cpu_tensors.h"
#include "group_norm_backward_cpu.h"
#include "group_norm_forward_cpu.h"
#include "tensor_checks.h"

namespace sdfast {
namespace {

using group_norm::Affine;
using group_norm::at;
using group_norm::Tiling;

// Calls f with a value of the storage type and with the two flags as compile-time constants.
template <typename F>
void dispatch(ScalarType dtype, bool channels_last, bool silu, const F& f) {
  const auto with_flags = [&](auto element) {
    if (channels_last && silu) return f(element, std::true_type(), std::true_type());
    if (channels_last) return f(element, std::true_type(), std::false_type());
    if (silu) return f(element, std::false_type(), std::true_type());
    return f(element, std::false_type(), std::false_type());
  };
  with_element_type(dtype, with_flags);
}

// The layout a kernel reads x in. Where both fit (one pixel, one channel) rows of channels are
// longer.
Layout layout_of(const Tensor& x) {
  const bool channels_last = has_layout(x, Layout::kChannelsLast);
  const bool single_channel = x.size(1) == 1 && has_layout(x, Layout::kChannelsFirst);
  return channels_last && !single_channel ? Layout::kChannelsLast : Layout::kChannelsFirst;
}

Tiling tiling_of(const Tensor& x, int64_t num_groups, Layout layout) {
  int64_t pixels = 1;
  for (int64_t axis = 2; axis < x.dim(); ++axis) pixels *= x.size(axis);
  return Tiling(layout == Layout::kChannelsLast, x.size(0), x.size(1), pixels, num_groups);
}

void check_input(const Tensor& x, int64_t num_groups) {
  check_device(x, "x");
  STD_TORCH_CHECK(x.dim() >= 2, "x: expected (N, C, *)");
  STD_TORCH_CHECK(num_groups > 0 && x.size(1) % num_groups == 0,
                  "num_groups: must divide the channels");
}

// y as x, for x: (N, C, *), weight, bias: (C), scale, shift: (N, C). mean, rstd: (N, G), written.
Tensor normalize(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, double eps, bool silu,
                 const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                 float* mean, float* rstd) {
  const int64_t images = x.size(0), channels = x.size(1);
  const Values w(weight, "weight", {channels}), b(bias, "bias", {channels});
  const Values s(scale, "scale", {images, channels}), t(shift, "shift", {images, channels});
  const Affine affine{w.data(), b.data(), s.data(), t.data()};
  const Layout layout = layout_of(x);
  const Tensor input = in_layout(x, layout);
  Tensor y = empty_in_layout(x, layout);
  if (x.numel() == 0) {
    std::fill_n(mean, images * num_groups, 0.0f);
    std::fill_n(rstd, images * num_groups, 0.0f);
    return y;
  }
  const Tiling tiling = tiling_of(x, num_groups, layout);
  dispatch(
      x.scalar_type(), tiling.channels_last, silu, [&](auto element, auto last, auto with_silu) {
        using T = decltype(element);
        group_norm::forward<last, with_silu>(tiling, static_cast<const T*>(input.const_data_ptr()),
                                             affine, eps, static_cast<T*>(y.mutable_data_ptr()),
                                             mean, rstd);
      });
  return y;
}

// For inference, where nobody asks for the statistics: allocating them would take as long as small
// images do.
Tensor group_norm_cpu(Tensor x, int64_t num_groups, std::optional<Tensor> weight,
                      std::optional<Tensor> bias, double eps, bool silu,
                      std::optional<Tensor> scale, std::optional<Tensor> shift) {
  check_input(x, num_groups);
  std::vector<float> statistics(2 * x.size(0) * num_groups);
  float* const mean = statistics.data();
  return normalize(x, num_groups, weight, bias, eps, silu, scale, shift, mean,
                   mean + x.size(0) * num_groups);
}

// Returns y, mean and rstd: (N, G), fp32.
std::tuple<Tensor, Tensor, Tensor> group_norm_forward(Tensor x, int64_t num_groups,
                                                      std::optional<Tensor> weight,
                                                      std::optional<Tensor> bias, double eps,
                                                      bool silu, std::optional<Tensor> scale,
                                                      std::optional<Tensor> shift) {
  check_input(x, num_groups);
  Tensor mean = empty({x.size(0), num_groups}, ScalarType::Float);
  Tensor rstd = empty({x.size(0), num_groups}, ScalarType::Float);
  Tensor y = normalize(x, num_groups, weight, bias, eps, silu, scale, shift,
                       mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>());
  return {y, mean, rstd};
}

// The mean of each group and the sum of squares about it: (N, G), fp64.
std::tuple<Tensor, Tensor> group_norm_moments(Tensor x, int64_t num_groups) {
  check_input(x, num_groups);
  Tensor mean = empty({x.size(0), num_groups}, ScalarType::Double);
  Tensor squares = empty({x.size(0), num_groups}, ScalarType::Double);
  double* const means = mean.mutable_data_ptr<double>();
  double* const sums = squares.mutable_data_ptr<double>();
  std::fill_n(means, mean.numel(), 0.0);
  std::fill_n(sums, squares.numel(), 0.0);
  if (x.numel() == 0) return {mean, squares};
  const Layout layout = layout_of(x);
  const Tensor input = in_layout(x, layout);
  const Tiling tiling = tiling_of(x, num_groups, layout);
  dispatch(x.scalar_type(), tiling.channels_last, false, [&](auto element, auto last, auto) {
    using T = decltype(element);
    group_norm::moments<last>(tiling, static_cast<const T*>(input.const_data_ptr()), means, sums);
  });
  return {mean, squares};
}

// x, out: (N, C, *) of one dtype, out dense in either layout. mean, rstd: (N, G), fp64.
void group_norm_apply_out(Tensor x, Tensor mean, Tensor rstd, int64_t num_groups,
                          std::optional<Tensor> weight, std::optional<Tensor> bias, bool silu,
                          Tensor out) {
  check_input(x, num_groups);
  check_device(out, "out");
  check_shape(out, "out", x.sizes());
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), "out: expected the dtype of x");
  const Layout layout = layout_of(out);
  STD_TORCH_CHECK(has_layout(out, layout), "out: expected a dense tensor");
  for (const Tensor& t : {mean, rstd}) {
    check_device(t, "mean, rstd");
    check_shape(t, "mean, rstd", {x.size(0), num_groups});
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous(),
                    "mean, rstd: expected contiguous fp64");
  }
  const Values w(weight, "weight", {x.size(1)}), b(bias, "bias", {x.size(1)});
  const Affine affine{w.data(), b.data(), nullptr, nullptr};
  if (x.numel() == 0) return;
  const Tensor input = in_layout(x, layout);
  const Tiling tiling = tiling_of(x, num_groups, layout);
  dispatch(x.scalar_type(), tiling.channels_last, silu,
           [&](auto element, auto last, auto with_silu) {
             using T = decltype(element);
             group_norm::apply_known<last, with_silu>(
                 tiling, static_cast<const T*>(input.const_data_ptr()), affine,
                 mean.const_data_ptr<double>(), rstd.const_data_ptr<double>(),
                 static_cast<T*>(out.mutable_data_ptr()));
           });
}

// dy, x: (N, C, *). mean, rstd: (N, G), fp32. Returns dx in the layout of x, then the gradients of
// weight, bias, scale and shift in their dtypes, each of no elements where the parameter is absent.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_backward(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups, std::optional<Tensor> weight,
    std::optional<Tensor> bias, bool silu, std::optional<Tensor> scale,
    std::optional<Tensor> shift) {
  check_input(x, num_groups);
  check_device(dy, "dy");
  check_shape(dy, "dy", x.sizes());
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy: expected the dtype of x");
  const int64_t images = x.size(0), channels = x.size(1);
  const Values saved_mean(mean, "mean", {images, num_groups});
  const Values saved_rstd(rstd, "rstd", {images, num_groups});
  const Values w(weight, "weight", {channels}), b(bias, "bias", {channels});
  const Values s(scale, "scale", {images, channels}), t(shift, "shift", {images, channels});
  const Affine affine{w.data(), b.data(), s.data(), t.data()};
  const Layout layout = layout_of(x);
  const Tensor input = in_layout(x, layout), output_gradient = in_layout(dy, layout);
  Tensor dx = empty_in_layout(x, layout);
  std::vector<double> sum_dz(images * channels), sum_dz_xhat(images * channels);
  if (x.numel() > 0) {
    const Tiling tiling = tiling_of(x, num_groups, layout);
    dispatch(x.scalar_type(), tiling.channels_last, silu,
             [&](auto element, auto last, auto with_silu) {
               using T = decltype(element);
               group_norm::backward<last, with_silu>(
                   tiling, static_cast<const T*>(output_gradient.const_data_ptr()),
                   static_cast<const T*>(input.const_data_ptr()), affine, saved_mean.data(),
                   saved_rstd.data(), static_cast<T*>(dx.mutable_data_ptr()), sum_dz.data(),
                   sum_dz_xhat.data());
             });
  }
  const auto over_images = [&](const std::vector<double>& sums) {
    return [&](int64_t c) {
      double total = 0;
      for (int64_t n = 0; n < images; ++n) {
        total += sums[n * channels + c] * (1.0 + at(affine.scale, n * channels + c, 0));
      }
      return total;
    };
  };
  const auto scale_gradient = [&](int64_t i) {
    return at(affine.weight, i % channels, 1) * sum_dz_xhat[i] +
           at(affine.bias, i % channels, 0) * sum_dz[i];
  };
  return {dx, parameter_gradient(x, weight, over_images(sum_dz_xhat)),
          parameter_gradient(x, bias, over_images(sum_dz)),
          parameter_gradient(x, scale, scale_gradient),
          parameter_gradient(x, shift, [&](int64_t i) { return sum_dz[i]; })};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&group_norm_cpu));
  m.impl("group_norm_forward", TORCH_BOX(&group_norm_forward));
  m.impl("group_norm_moments", TORCH_BOX(&group_norm_moments));
  m.impl("group_norm_apply_out", TORCH_BOX(&group_norm_apply_out));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
}

}  // namespace
}  // namespace sdfast
