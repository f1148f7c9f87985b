// The tensors of layer_norm's CUDA kernels.
#include <tuple>

#include "cuda_tensors.h"
#include "layer_norm_backward_cuda.cuh"

namespace sdfast {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A row is what is normalized together: the last `axes` of x.
struct Rows {
  int64_t rows = 1, width = 1;
  std::vector<int64_t> normalized;

  Rows(const Tensor& x, int64_t axes) {
    check_device(x, "x");
    STD_TORCH_CHECK(axes > 0 && axes <= x.dim(), "axes: expected 1 to the rank of x");
    for (int64_t axis = 0; axis < x.dim(); ++axis) {
      if (axis < x.dim() - axes) {
        rows *= x.size(axis);
      } else {
        width *= x.size(axis);
        normalized.push_back(x.size(axis));
      }
    }
  }
};

void check_parameter(const Tensor& x, const OptionalTensor& t, const char* name, const Rows& rows) {
  if (!t) return;
  check_device(*t, name);
  check_shape(*t, name, rows.normalized);
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float || t->scalar_type() == x.scalar_type(),
                  name, ": expected the dtype of x, or float32");
}

// A parameter for kernels to read, contiguous for as long as this lives.
class DenseParameter {
 public:
  DenseParameter(const Call& call, const Tensor& x, const OptionalTensor& t, const char* name,
                 const Rows& rows) {
    check_parameter(x, t, name, rows);
    if (!t) return;
    dense_ = dense(*t);
    parameter_.is_float = t->scalar_type() == ScalarType::Float;
    with_element_type(t->scalar_type(), [&](auto element) {
      parameter_.data = call.input<decltype(element)>(*dense_);
    });
  }
  const Parameter& operator*() const { return parameter_; }

 private:
  OptionalTensor dense_;
  Parameter parameter_;
};

// Returns y; mean and rstd, (rows), are written where given.
Tensor normalize(const Tensor& x, int64_t axes, const OptionalTensor& weight,
                 const OptionalTensor& bias, double eps, const Tensor* mean, const Tensor* rstd) {
  const Rows rows(x, axes);
  const Call call(x);
  const DenseParameter w(call, x, weight, "weight", rows), b(call, x, bias, "bias", rows);
  const Tensor input = dense(x);
  Tensor y = empty(x.sizes(), x.scalar_type());
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    layer_norm<T>(
        {call.input<T>(input), *w, *b, call.output<T>(y),
         mean ? call.output<float>(*mean) : nullptr, rstd ? call.output<float>(*rstd) : nullptr,
         rows.rows, rows.width, static_cast<float>(eps)},
        call.stream());
  });
  return y;
}

Tensor layer_norm_cuda(Tensor x, int64_t axes, OptionalTensor weight, OptionalTensor bias,
                       double eps) {
  return normalize(x, axes, weight, bias, eps, nullptr, nullptr);
}

// Returns y, mean and rstd: (rows), fp32.
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward_cuda(Tensor x, int64_t axes,
                                                           OptionalTensor weight,
                                                           OptionalTensor bias, double eps) {
  const Rows rows(x, axes);
  const Call call(x);
  Tensor mean = empty({rows.rows}, ScalarType::Float), rstd = empty({rows.rows}, ScalarType::Float);
  if (x.numel() == 0) {
    torch::stable::zero_(mean);
    torch::stable::zero_(rstd);
  }
  Tensor y = normalize(x, axes, weight, bias, eps, &mean, &rstd);
  return {y, mean, rstd};
}

// dy: as x. mean, rstd: (rows), fp32. Returns dx, contiguous, then the gradients of weight and bias
// in their dtypes, each of no elements where the parameter is absent.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(Tensor dy, Tensor x, Tensor mean,
                                                            Tensor rstd, int64_t axes,
                                                            OptionalTensor weight,
                                                            OptionalTensor bias) {
  const Rows rows(x, axes);
  const Call call(x);
  check_device(dy, "dy");
  check_shape(dy, "dy", x.sizes());
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy: expected the dtype of x");
  const Values m(call, mean, "mean", {rows.rows}), r(call, rstd, "rstd", {rows.rows});
  const DenseParameter w(call, x, weight, "weight", rows);
  check_parameter(x, bias, "bias", rows);
  const Tensor input = dense(x), output_gradient = dense(dy);
  Tensor dx = empty(x.sizes(), x.scalar_type());
  const auto gradient_like = [&](const OptionalTensor& t) {
    if (!t) return empty({0}, x.scalar_type());
    return empty(t->sizes(), t->scalar_type());
  };
  Tensor dweight = gradient_like(weight), dbias = gradient_like(bias);
  if (x.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dweight, dbias};
  }
  const auto written = [&](const Tensor& t) {
    ParameterGradient gradient;
    if (t.numel() == 0) return gradient;
    gradient.is_float = t.scalar_type() == ScalarType::Float;
    with_element_type(t.scalar_type(),
                      [&](auto element) { gradient.data = call.output<decltype(element)>(t); });
    return gradient;
  };
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    LayerNormBackward<T> values{};
    values.dy = call.input<T>(output_gradient);
    values.x = call.input<T>(input);
    values.mean = m.data();
    values.rstd = r.data();
    values.weight = *w;
    values.dx = call.output<T>(dx);
    const bool vectors =
        takes_vectors<T>(rows.width, {values.dy, values.x, values.weight.data, values.dx});
    const BackwardPlan plan = plan_backward<T>(rows.rows, rows.width, vectors);
    const Tensor sums = empty({2, plan.shares, rows.width}, ScalarType::Float);
    const Tensor means = empty({2, plan.given_means ? rows.rows : 0}, ScalarType::Float);
    values.sums = call.output<float>(sums);
    values.means = call.output<float>(means);
    values.rows = rows.rows;
    values.width = rows.width;
    values.shares = plan.shares;
    values.steps = plan.steps;
    values.team = plan.team;
    layer_norm_backward(values, plan, written(dweight), written(dbias), call.stream());
  });
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("layer_norm_cuda", TORCH_BOX(&layer_norm_cuda));
  m.impl("layer_norm_forward_cuda", TORCH_BOX(&layer_norm_forward_cuda));
  m.impl("layer_norm_backward_cuda", TORCH_BOX(&layer_norm_backward_cuda));
}

}  // namespace
}  // namespace sdfast
