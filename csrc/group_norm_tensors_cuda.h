// The tensors of group_norm's CUDA kernels: checks, layouts and parameters.
#pragma once

#include <climits>

#include "cuda_tensors.h"
#include "group_norm_cuda.cuh"

namespace sdfast::group_norm {

inline Shape shape_of(const Tensor& x, int64_t num_groups, int64_t skip_channels = 0) {
  check_device(x, "x");
  STD_TORCH_CHECK(x.dim() >= 2, "x: expected (N, C, *)");
  const int64_t channels = x.size(1) + skip_channels;
  STD_TORCH_CHECK(num_groups > 0 && channels % num_groups == 0,
                  "num_groups: must divide the channels");
  STD_TORCH_CHECK(channels <= INT_MAX, "x: too many channels");
  int64_t pixels = 1;
  for (int64_t axis = 2; axis < x.dim(); ++axis) pixels *= x.size(axis);
  return {x.size(0), pixels, static_cast<int>(channels), static_cast<int>(num_groups)};
}

// The layout that kernels read x in. Where both fit, rows are those that are longer.
inline Layout layout_of(const Tensor& x) {
  const bool single_channel = x.size(1) == 1 && has_layout(x, Layout::kChannelsFirst);
  return has_layout(x, Layout::kChannelsLast) && !single_channel ? Layout::kChannelsLast
                                                                 : Layout::kChannelsFirst;
}

// A parameter: in the dtype of x or fp32, its rows dense.
class Operand {
 public:
  Operand(const Call& call, const std::optional<Tensor>& tensor, const char* name,
          IntHeaderOnlyArrayRef shape, ScalarType dtype) {
    if (!tensor) return;
    check_device(*tensor, name);
    check_shape(*tensor, name, shape);
    wide_ = tensor->scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(wide_ || tensor->scalar_type() == dtype, name,
                    ": expected float32 or the dtype of x");
    const int64_t last = tensor->dim() - 1;
    const bool dense = tensor->size(last) <= 1 || tensor->stride(last) == 1;
    rows_ = dense ? *tensor : torch::stable::contiguous(*tensor);
    stride_ = last > 0 ? rows_->stride(0) : 0;
    data_ = call.input<void>(*rows_);
  }
  Operand(const Operand&) = delete;

  template <typename T>
  Parameter<T> as() const {
    return {data_, wide_, stride_};
  }

 private:
  std::optional<Tensor> rows_;
  const void* data_ = nullptr;
  bool wide_ = false;
  int64_t stride_ = 0;
};

// weight, bias: (C). scale, shift: (N, C).
struct Operands {
  Operand weight, bias, scale, shift;

  Operands(const Call& call, const Shape& shape, ScalarType dtype, const std::optional<Tensor>& w,
           const std::optional<Tensor>& b, const std::optional<Tensor>& s,
           const std::optional<Tensor>& t)
      : weight(call, w, "weight", {shape.channels}, dtype),
        bias(call, b, "bias", {shape.channels}, dtype),
        scale(call, s, "scale", {shape.images, shape.channels}, dtype),
        shift(call, t, "shift", {shape.images, shape.channels}, dtype) {}

  template <typename T>
  Affine<T> as() const {
    return {weight.as<T>(), bias.as<T>(), scale.as<T>(), shift.as<T>()};
  }
};

// Calls f(vector width, channels last), constants both; width: of 16 bytes where `whole`, or 1.
template <typename T, typename F>
void with_access(bool whole, bool channels_last, const F& f) {
  const auto with_layout = [&](auto width) {
    channels_last ? f(width, std::true_type()) : f(width, std::false_type());
  };
  if (whole) {
    with_layout(std::integral_constant<int, kVector<T>>());
  } else {
    with_layout(std::integral_constant<int, 1>());
  }
}

// Whether rows of x's layout are whole vectors of 16 bytes.
template <typename T>
bool rows_are_whole(const Shape& shape, bool channels_last, int64_t channels) {
  return (channels_last ? channels : shape.pixels) % kVector<T> == 0;
}

}  // namespace sdfast::group_norm
