// The tensors of attention's CUDA kernels: checked, as views of rows.
#pragma once

#include "attention_parts_cuda.cuh"
#include "cuda_tensors.h"

namespace sdfast::attention {

struct Sizes {
  int64_t batch, heads, queries, keys, dim;

  Sizes(const Tensor& q, const Tensor& k) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q, k: expected 4 dimensions");
    batch = q.size(0), heads = q.size(1), queries = q.size(2), dim = q.size(3);
    keys = k.size(2);
    constexpr int64_t kMost = int64_t{1} << 30;
    STD_TORCH_CHECK(queries <= kMost && keys <= kMost && batch * heads <= kMost,
                    "q, k: expected at most 2^30 rows");
    STD_TORCH_CHECK(heads * dim <= kMost, "q: expected at most 2^30 elements of a row");
    constexpr int64_t kFewestRows = 16, kMostBlocks = 2147483647;
    STD_TORCH_CHECK(ceil_div(std::max(queries, keys), kFewestRows) * batch * heads <= kMostBlocks,
                    "q, k: expected at most 2^31 blocks of 16 rows");
  }
};

// (B, heads, rows, D) as the kernels read it: rows of a multiple of 8 elements, aligned to 16
// bytes. What lies otherwise is copied, with zeros after D: blocks read it again and again.
template <typename T>
class Input {
 public:
  Input(const Call& call, const Tensor& t, const char* name, const Sizes& sizes, int64_t rows,
        ScalarType dtype)
      : tensor_(t) {
    check_device(t, name);
    check_shape(t, name, {sizes.batch, sizes.heads, rows, sizes.dim});
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected the dtype of q");
    if (!fits(t)) {
      const int64_t dim = ceil_div(sizes.dim, 8) * 8;
      tensor_ = empty({sizes.batch, sizes.heads, rows, dim}, dtype);
      Tensor inside = torch::stable::narrow(tensor_, 3, 0, sizes.dim);
      torch::stable::copy_(inside, t);
      if (dim > sizes.dim) {
        Tensor beyond = torch::stable::narrow(tensor_, 3, sizes.dim, dim - sizes.dim);
        torch::stable::zero_(beyond);
      }
    }
    rows_ = {call.input<T>(tensor_), stride(tensor_, 0), stride(tensor_, 1),
             static_cast<int>(stride(tensor_, 2))};
  }
  const Rows<const T>& rows() const { return rows_; }

 private:
  static int64_t stride(const Tensor& t, int64_t axis) {
    return t.size(axis) > 1 ? t.stride(axis) : 0;
  }
  static bool fits(const Tensor& t) {
    bool fits = t.size(3) % 8 == 0 && t.stride(3) == 1 && is_aligned(t.const_data_ptr(), 16) &&
                stride(t, 2) <= std::numeric_limits<int>::max();
    for (int64_t axis = 0; axis < 3; ++axis) fits = fits && stride(t, axis) % 8 == 0;
    return fits;
  }
  Tensor tensor_;
  Rows<const T> rows_;
};

// A (B, heads, rows, D) view of (B, rows, heads, D).
inline Tensor new_by_token(const Sizes& sizes, int64_t rows, ScalarType dtype) {
  const int64_t token = sizes.heads * sizes.dim;
  return empty_strided({{sizes.batch, sizes.heads, rows, sizes.dim}},
                       {{rows * token, sizes.dim, token, 1}}, dtype);
}

template <typename T>
Rows<T> output(const Call& call, const Tensor& t) {
  return {call.output<T>(t), t.stride(0), t.stride(1), static_cast<int>(t.stride(2))};
}

// Calls f with a value of the element type.
template <typename F>
void with_half_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) return f(__nv_bfloat16());
  STD_TORCH_CHECK(dtype == ScalarType::Half, "q: expected bfloat16 or float16");
  f(__half());
}

}  // namespace sdfast::attention
