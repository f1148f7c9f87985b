// Between torch::stable::Tensor and the fp32 vectors of the CPU kernels: storage types and
// parameters.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu_simd.h"
#include "tensor_checks.h"

namespace sdfast {

// Calls f with a value of the storage type.
template <typename F>
void with_element_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(float());
  if (dtype == ScalarType::BFloat16) return f(simd::BFloat16());
  STD_TORCH_CHECK(dtype == ScalarType::Half, "dtype: expected float32, bfloat16 or float16");
  f(simd::Half());
}

// A parameter's values in fp32, null where it is absent: the tensor's own where they are so
// already.
class Values {
 public:
  Values(const std::optional<Tensor>& tensor, const char* name, IntHeaderOnlyArrayRef shape) {
    if (!tensor) return;
    check_device(*tensor, name);
    check_shape(*tensor, name, shape);
    dense_ = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
    if (dense_->scalar_type() == ScalarType::Float) {
      data_ = dense_->const_data_ptr<float>();
      return;
    }
    converted_.resize(dense_->numel());
    if (dense_->scalar_type() == ScalarType::Double) {
      std::copy_n(dense_->const_data_ptr<double>(), converted_.size(), converted_.data());
    } else {
      with_element_type(dense_->scalar_type(), [&](auto element) {
        const auto* from = static_cast<const decltype(element)*>(dense_->const_data_ptr());
        simd::for_each_vector(0, dense_->numel(), [&](int64_t i, auto lanes) {
          simd::store(converted_.data() + i, simd::load(from + i, lanes), lanes);
        });
      });
    }
    data_ = converted_.data();
  }
  Values(const Values&) = delete;
  const float* data() const { return data_; }

 private:
  std::optional<Tensor> dense_;
  std::vector<float> converted_;
  const float* data_ = nullptr;
};

// The gradient of a parameter, value(i) for each of its elements; of no elements where it is
// absent.
template <typename Value>
Tensor parameter_gradient(const Tensor& x, const std::optional<Tensor>& parameter,
                          const Value& value) {
  if (!parameter) return empty({0}, x.scalar_type());
  Tensor gradient = empty(parameter->sizes(), parameter->scalar_type());
  with_element_type(gradient.scalar_type(), [&](auto element) {
    auto* to = static_cast<decltype(element)*>(gradient.mutable_data_ptr());
    for (int64_t i = 0; i < gradient.numel(); ++i) {
      simd::store(to + i, simd::broadcast(static_cast<float>(value(i))), 1);
    }
  });
  return gradient;
}

}  // namespace sdfast
