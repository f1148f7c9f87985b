// Between torch::stable::Tensor and the CUDA kernels: the device and stream of a call, pointers,
// element types. In the emulation (tests/simt) tensors are on the CPU, and kernels may touch only
// what is asked for here.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "cuda_common.cuh"
#include "tensor_checks.h"

#ifdef SDFAST_SIMT
#define SDFAST_DISPATCH_KEY CPU
#else
#define SDFAST_DISPATCH_KEY CUDA
#endif

namespace sdfast {

// One call of an operation. While it lives the device of its first tensor is the current one.
class Call {
 public:
#ifdef SDFAST_SIMT
  explicit Call(const Tensor& first) { index_of(first); }
  ~Call() { simt::forget_tensors(); }
  cudaStream_t stream() const { return nullptr; }
#else
  explicit Call(const Tensor& first) : guard_(index_of(first)) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }
#endif
  Call(const Call&) = delete;

  // The elements of a tensor for kernels to read, or to write, too.
  template <typename T>
  const T* input(const Tensor& t) const {
    allow(t, t.const_data_ptr(), false);
    return static_cast<const T*>(t.const_data_ptr());
  }
  template <typename T>
  T* output(const Tensor& t) const {
    allow(t, t.mutable_data_ptr(), true);
    return static_cast<T*>(t.mutable_data_ptr());
  }

 private:
  static void allow(const Tensor& t, const void* begin, bool writable) {
#ifdef SDFAST_SIMT
    if (t.numel() == 0) return;
    int64_t elements = 1;
    for (int64_t axis = 0; axis < t.dim(); ++axis) elements += (t.size(axis) - 1) * t.stride(axis);
    simt::allow(begin, elements * t.element_size(), writable);
#else
    (void)t, (void)begin, (void)writable;
#endif
  }
  // A CPU tensor may have led here beside a CUDA tensor, and has no device to make the current one.
  static int32_t index_of(const Tensor& first) {
    check_device(first, "the first tensor");
    return first.get_device_index();
  }
#ifndef SDFAST_SIMT
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

// Calls f with a value of the element type.
template <typename F>
void with_element_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(float());
  if (dtype == ScalarType::BFloat16) return f(__nv_bfloat16());
  STD_TORCH_CHECK(dtype == ScalarType::Half, "dtype: expected float32, bfloat16 or float16");
  f(__half());
}

// A parameter in fp32, contiguous; null where it is absent.
class Values {
 public:
  Values(const Call& call, const std::optional<Tensor>& tensor, const char* name,
         IntHeaderOnlyArrayRef shape) {
    if (!tensor) return;
    check_device(*tensor, name);
    check_shape(*tensor, name, shape);
    dense_ = *tensor;
    if (tensor->scalar_type() != ScalarType::Float || !tensor->is_contiguous()) {
      dense_ = empty(tensor->sizes(), ScalarType::Float);
      torch::stable::copy_(*dense_, *tensor);
    }
    data_ = call.input<float>(*dense_);
  }
  Values(const Values&) = delete;
  const float* data() const { return data_; }

 private:
  std::optional<Tensor> dense_;
  const float* data_ = nullptr;
};

}  // namespace sdfast
