// group_norm on CUDA, forward: the tensors, the choice of kernels, registration.
#include <tuple>

#include "group_norm_chunks_cuda.cuh"
#include "group_norm_tensors_cuda.h"
#include "group_norm_whole_cuda.cuh"

namespace sdfast {
namespace {

using group_norm::ChunkPlan;
using group_norm::Forward;
using group_norm::Operands;
using group_norm::Shape;
using group_norm::WholePlan;

// mean and rstd, (N, G), fp32: given, or to be written.
struct Statistics {
  const float *mean = nullptr, *rstd = nullptr;
  float *mean_out = nullptr, *rstd_out = nullptr;
};

template <typename T, int N, bool kLast>
void run(const Call& call, const Forward<T>& forward, const Statistics& given) {
  const Device device = current_device();
  if (given.mean) {
    const auto plan = group_norm::chunk_plan<T, N, kLast>(forward.shape, device, 4);
    group_norm::apply<T, N, kLast>(forward, given.mean, given.rstd, {}, plan, call.stream());
    return;
  }
  const auto whole = group_norm::whole_plan<T, N, kLast>(forward.shape, device);
  if (whole.threads > 0) return group_norm::whole<T, N, kLast>(forward, whole, call.stream());
  const auto plan = group_norm::chunk_plan<T, N, kLast>(forward.shape, device, 1);
  const Tensor partials =
      empty({2, forward.shape.images, forward.shape.groups, plan.chunks * plan.spans.parts},
            ScalarType::Float);
  float* const means = call.output<float>(partials);
  float* const squares = means + partials.numel() / 2;
  group_norm::partials<T, N, kLast>(forward, {means, squares}, plan, call.stream());
  group_norm::apply<T, N, kLast>(forward, means, squares, plan, plan, call.stream());
}

// x: (N, C, *), skip: (N, C2, *) or null, y: (N, C + C2, *), in one layout.
void normalize(const Call& call, const Shape& shape, bool channels_last, const Tensor& x,
               const Tensor* skip, const Tensor& y, const Operands& operands, double eps, bool silu,
               const Statistics& statistics) {
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int channels = x.size(1), skip_channels = skip ? skip->size(1) : 0;
    const Forward<T> forward{
        shape,
        {call.input<T>(x), skip ? call.input<T>(*skip) : nullptr, channels, skip_channels},
        call.output<T>(y),
        operands.as<T>(),
        statistics.mean_out,
        statistics.rstd_out,
        static_cast<float>(eps),
        silu};
    const bool whole = group_norm::rows_are_whole<T>(shape, channels_last, channels) &&
                       group_norm::rows_are_whole<T>(shape, channels_last, skip_channels) &&
                       is_aligned(forward.source.x, 16) && is_aligned(forward.source.skip, 16) &&
                       is_aligned(forward.y, 16) &&
                       group_norm::spans_of(shape, channels_last, kVector<T>, 1).count > 0;
    group_norm::with_access<T>(whole, channels_last, [&](auto width, auto last) {
      run<T, decltype(width)::value, decltype(last)::value>(call, forward, statistics);
    });
  });
}

Tensor normalize_one(const Call& call, const Shape& shape, const Tensor& x,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     double eps, bool silu, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift, const Statistics& statistics) {
  const Operands operands(call, shape, x.scalar_type(), weight, bias, scale, shift);
  const Layout layout = group_norm::layout_of(x);
  Tensor y = empty_in_layout(x, layout);
  if (x.numel() == 0) return y;
  normalize(call, shape, layout == Layout::kChannelsLast, in_layout(x, layout), nullptr, y,
            operands, eps, silu, statistics);
  return y;
}

// Returns y, as x.
Tensor group_norm_cuda(Tensor x, int64_t num_groups, std::optional<Tensor> weight,
                       std::optional<Tensor> bias, double eps, bool silu,
                       std::optional<Tensor> scale, std::optional<Tensor> shift) {
  const Call call(x);
  return normalize_one(call, group_norm::shape_of(x, num_groups), x, weight, bias, eps, silu, scale,
                       shift, {});
}

// Returns y, as x, and mean and rstd: (N, G), fp32; zeros of no elements.
std::tuple<Tensor, Tensor, Tensor> group_norm_forward_cuda(Tensor x, int64_t num_groups,
                                                           std::optional<Tensor> weight,
                                                           std::optional<Tensor> bias, double eps,
                                                           bool silu, std::optional<Tensor> scale,
                                                           std::optional<Tensor> shift) {
  const Call call(x);
  const Shape shape = group_norm::shape_of(x, num_groups);
  Tensor mean = empty({shape.images, num_groups}, ScalarType::Float);
  Tensor rstd = empty({shape.images, num_groups}, ScalarType::Float);
  if (x.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(rstd);
  }
  Statistics statistics;
  statistics.mean_out = call.output<float>(mean);
  statistics.rstd_out = call.output<float>(rstd);
  Tensor y = normalize_one(call, shape, x, weight, bias, eps, silu, scale, shift, statistics);
  return {y, mean, rstd};
}

// x: (N, C, *), skip: (N, C2, *). Returns (N, C + C2, *), channels last where both are.
Tensor group_norm_pair_cuda(Tensor x, Tensor skip, int64_t num_groups, std::optional<Tensor> weight,
                            std::optional<Tensor> bias, double eps, bool silu,
                            std::optional<Tensor> scale, std::optional<Tensor> shift) {
  const Call call(x);
  check_device(skip, "skip");
  STD_TORCH_CHECK(skip.dim() == x.dim() && x.dim() >= 2 && skip.scalar_type() == x.scalar_type(),
                  "skip: expected (N, C2, *) of the dtype of x");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = skip.size(1);
  check_shape(skip, "skip", sizes);
  const Shape shape = group_norm::shape_of(x, num_groups, skip.size(1));
  const Operands operands(call, shape, x.scalar_type(), weight, bias, scale, shift);
  const bool last = has_layout(x, Layout::kChannelsLast) && has_layout(skip, Layout::kChannelsLast);
  const Layout layout = last ? Layout::kChannelsLast : Layout::kChannelsFirst;
  sizes[1] = shape.channels;
  Tensor y = empty_strided(sizes, dense_strides(sizes, layout), x.scalar_type());
  if (y.numel() == 0) return y;
  const Tensor its_skip = in_layout(skip, layout);
  normalize(call, shape, last, in_layout(x, layout), &its_skip, y, operands, eps, silu, {});
  return y;
}

// mean, rstd: (N, G), fp32, of x. Returns y, as x.
Tensor group_norm_apply_cuda(Tensor x, Tensor mean, Tensor rstd, int64_t num_groups,
                             std::optional<Tensor> weight, std::optional<Tensor> bias, bool silu,
                             std::optional<Tensor> scale, std::optional<Tensor> shift) {
  const Call call(x);
  const Shape shape = group_norm::shape_of(x, num_groups);
  const Values its_mean(call, mean, "mean", {shape.images, num_groups});
  const Values its_rstd(call, rstd, "rstd", {shape.images, num_groups});
  Statistics statistics;
  statistics.mean = its_mean.data();
  statistics.rstd = its_rstd.data();
  return normalize_one(call, shape, x, weight, bias, 0, silu, scale, shift, statistics);
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("group_norm_cuda", TORCH_BOX(&group_norm_cuda));
  m.impl("group_norm_forward_cuda", TORCH_BOX(&group_norm_forward_cuda));
  m.impl("group_norm_pair_cuda", TORCH_BOX(&group_norm_pair_cuda));
  m.impl("group_norm_apply_cuda", TORCH_BOX(&group_norm_apply_cuda));
}

}  // namespace
}  // namespace sdfast
