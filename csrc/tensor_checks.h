// Checks, layouts and allocation on torch::stable::Tensor, shared by every operation, on CPU and,
// where nvcc compiles it, on CUDA.
//
// Python has validated the call with better messages; what is checked here is what memory safety
// needs when the registered operation is called directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sdfast {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensors of this library's kernels. New ones are made on the current device.
#ifdef __CUDACC__
inline void check_device(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor");
}
inline int32_t device_type() { return aoti_torch_device_type_cuda(); }
constexpr int32_t kCurrentDevice = -1;
#else
inline void check_device(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
}
inline int32_t device_type() { return aoti_torch_device_type_cpu(); }
constexpr int32_t kCurrentDevice = 0;
#endif

inline void check_shape(const Tensor& t, const char* name, IntHeaderOnlyArrayRef shape) {
  const IntHeaderOnlyArrayRef sizes = t.sizes();
  const bool same = std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  STD_TORCH_CHECK(same, name, ": the shape does not fit the input");
}

// The sizes of t, the last one `width`.
inline std::vector<int64_t> with_width(const Tensor& t, int64_t width) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = width;
  return sizes;
}

// How (N, C, *spatial) lies in memory when it is dense: which of C and the pixels varies fastest.
enum class Layout { kChannelsFirst, kChannelsLast };

// The strides of a dense tensor of these sizes in this layout; of any rank.
inline std::vector<int64_t> dense_strides(IntHeaderOnlyArrayRef sizes, Layout layout) {
  const int64_t dim = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> strides(dim);
  int64_t stride = 1;
  const auto place = [&](int64_t axis) {
    strides[axis] = stride;
    stride *= sizes[axis] > 1 ? sizes[axis] : 1;
  };
  const bool channels_last = layout == Layout::kChannelsLast && dim > 1;
  if (channels_last) place(1);
  for (int64_t axis = dim - 1; axis >= (channels_last ? 2 : 1); --axis) place(axis);
  if (dim > 0) place(0);
  return strides;
}

inline bool has_layout(const Tensor& t, Layout layout) {
  const IntHeaderOnlyArrayRef sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  const auto fits = [&](int64_t axis) {
    const bool right = sizes[axis] <= 1 || strides[axis] == expected;
    expected *= std::max<int64_t>(sizes[axis], 1);
    return right;
  };
  const int64_t dim = static_cast<int64_t>(sizes.size());
  const bool channels_last = layout == Layout::kChannelsLast && dim > 1;
  if (channels_last && !fits(1)) return false;
  for (int64_t axis = dim - 1; axis >= (channels_last ? 2 : 1); --axis) {
    if (!fits(axis)) return false;
  }
  return dim == 0 || fits(0);
}

// Asks for huge pages under memory that is about to be written for the first time. malloc maps
// allocations this large anew each time, and faulting them in by 4 KiB costs more than the kernel.
inline void advise_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE) && !defined(__CUDACC__)
  constexpr uintptr_t kHugePageBytes = 2 << 20, kMappedBytes = 32 << 20;
  const size_t bytes = t.numel() * t.element_size();
  if (bytes < kMappedBytes) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t first = (begin + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t last = (begin + bytes) / kHugePageBytes * kHugePageBytes;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a refusal is no error
#else
  (void)t;
#endif
}

// A new tensor, a large one on huge pages. Through the C shim: finding the operation by its name,
// as the dispatcher would, takes longer than the allocation.
inline Tensor empty_strided(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
                            ScalarType dtype) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), to<int32_t>(from(dtype)),
                                                  device_type(), kCurrentDevice, &handle));
  Tensor result(handle);
  advise_huge_pages(result);
  return result;
}

inline Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes[axis], 1);
  }
  return empty_strided(sizes, strides, dtype);
}

// t itself where it has the layout already, else a copy of it that has.
inline Tensor in_layout(const Tensor& t, Layout layout) {
  if (has_layout(t, layout)) return t;
  Tensor copy = empty_strided(t.sizes(), dense_strides(t.sizes(), layout), t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// A new tensor with the strides of t where t has the layout, also on axes of size 1; else dense.
inline Tensor empty_in_layout(const Tensor& t, Layout layout) {
  if (has_layout(t, layout)) return empty_strided(t.sizes(), t.strides(), t.scalar_type());
  return empty_strided(t.sizes(), dense_strides(t.sizes(), layout), t.scalar_type());
}

}  // namespace sdfast
