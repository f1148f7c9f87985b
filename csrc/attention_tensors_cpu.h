// The tensors of attention, forward and backward: checked, as views of rows, and scratch memory.
#pragma once

#include "cpu_scratch.h"
#include "cpu_tensors.h"

namespace sdfast::attention {

struct Sizes {
  int64_t batch, heads, queries, keys, dim;
};

inline Sizes sizes_of(const Tensor& q, const Tensor& k) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q, k: expected 4 dimensions");
  return {q.size(0), q.size(1), q.size(2), k.size(2), q.size(3)};
}

// (B, heads, rows, D), unit stride in D.
template <typename T>
struct View {
  T* data;
  int64_t batch_stride, head_stride, row_stride;
  T* row(int64_t batch, int64_t head, int64_t index) const {
    return data + batch * batch_stride + head * head_stride + index * row_stride;
  }
};

template <typename T>
View<T> view_of(const Tensor& t) {
  if constexpr (std::is_const_v<T>) {
    return {static_cast<T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
  } else {
    return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
  }
}

// t, copied where its rows have gaps.
inline Tensor checked(const Tensor& t, const char* name, const Sizes& sizes, int64_t rows,
                      ScalarType dtype) {
  check_device(t, name);
  check_shape(t, name, {sizes.batch, sizes.heads, rows, sizes.dim});
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected the dtype of q");
  return sizes.dim > 1 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t;
}

// A (B, heads, rows, D) view of (B, rows, heads, D).
inline Tensor new_by_token(const Sizes& sizes, int64_t rows, ScalarType dtype) {
  const int64_t token = sizes.heads * sizes.dim;
  return empty_strided({{sizes.batch, sizes.heads, rows, sizes.dim}},
                       {{rows * token, sizes.dim, token, 1}}, dtype);
}

}  // namespace sdfast::attention
