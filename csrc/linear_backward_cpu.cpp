// linear on CPU for training: the gradients dx = dh W and dW = dhᵀ x, and the activation.
//
// Algorithm. The products of cpu_gemm_packing.h; on AMX, in bf16 and in fp32 that may be split,
// those of cpu_tiles_gradient.h. Operands lie as torch keeps them: W by rows for dx, x and dh by
// tokens for dW. The activation is a pass of its own, because its gradient needs h. Bytes: the
// operands once a block of rows, the result written. Limit: fused multiply-adds, or TDPBF16PS.
#include "cpu_gemm_packing.h"
#include "cpu_math.h"
#include "cpu_tensors.h"
#include "cpu_tiles_gradient.h"

namespace sdfast {
namespace {

using simd::Vec;

enum class Activation : int64_t { kNone, kSilu, kGelu, kQuickGelu, kGeglu };

// A matrix whose rows are contiguous, a distance apart.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns, stride;
  explicit Matrix(const Tensor& t)
      : data(static_cast<const T*>(t.const_data_ptr())),
        rows(t.size(0)),
        columns(t.size(1)),
        stride(t.stride(0)) {}
};

void check_matrix(const Tensor& t, const char* name, ScalarType dtype) {
  check_device(t, name);
  STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == dtype, name,
                  ": expected a matrix of x's dtype");
  STD_TORCH_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name, ": expected contiguous rows");
}

template <typename T>
void input_gradient(const Matrix<T>& dh, const Matrix<T>& w, T* dx) {
  using Operand = typename gemm::OperandOf<T>::Type;
  gemm::multiply_packing<Operand>(
      {dh.rows, w.columns, w.rows, gemm::lies_ready<Operand, T>(dh.stride, w.rows)},
      [&](int64_t begin, int64_t count, int64_t value, int64_t values, Operand* scratch) {
        return gemm::rows_of(dh.data + begin * dh.stride + value, dh.stride, count, values,
                             scratch);
      },
      gemm::MatrixPanels<T>{w.data, w.stride, w.columns}, gemm::store_to(dx, w.columns));
}

template <typename T>
void weight_gradient(const Matrix<T>& dh, const Matrix<T>& x, T* dw) {
  using Operand = typename gemm::OperandOf<T>::Type;
  gemm::multiply_packing<Operand>(
      {dh.columns, x.columns, dh.rows},
      [&](int64_t begin, int64_t count, int64_t value, int64_t values, Operand* scratch) {
        return gemm::step_rows(dh.data + value * dh.stride + begin, dh.stride, count, values,
                               scratch);
      },
      gemm::MatrixPanels<T>{x.data, x.stride, x.columns},
      gemm::store_to(dw, x.columns, simd::streams_gradient(dw, dh.columns, x.columns)));
}

#if defined(SDFAST_TILES)
using simd::BFloat16;

// The rows of a matrix, completed to whole steps.
template <typename T>
class MatrixRows : public gemm::tiles::Rows<T> {
 public:
  explicit MatrixRows(const Matrix<T>& m)
      : gemm::tiles::Rows<T>(
            (m.rows + gemm::tiles::kStep - 1) / gemm::tiles::kStep * gemm::tiles::kStep,
            m.columns) {
    for (int64_t i = 0; i < m.rows; ++i) (*this)[i] = m.data + i * m.stride;
  }
};

template <typename T>
void input_gradient_in_tiles(const Matrix<T>& dh, const Matrix<T>& w, T* dx) {
  const gemm::tiles::Tokens<T> tokens{dh.data, dh.rows, dh.stride, dh.columns};
  const gemm::tiles::Product p{w.columns, w.rows};
  const MatrixRows<T> rows(w);
  gemm::tiles::multiply_weights(std::is_same_v<T, float> ? p.splits() : p,
                                gemm::tiles::Columns<T>{rows.get()}, tokens,
                                gemm::tiles::StoreRows<T>{dx, w.columns});
}

template <typename T>
void weight_gradient_in_tiles(const Matrix<T>& dh, const Matrix<T>& x, T* dw) {
  const MatrixRows<T> left(dh), right(x);
  const bool streamed = gemm::tiles::streams_gradient(dw, dh.columns, x.columns);
  gemm::tiles::multiply_taps({x.columns, x.rows}, {}, left.get(), dh.columns, right.get(),
                             gemm::tiles::StoreRows<T>{dw, x.columns, streamed});
}

void input_gradient(const Matrix<BFloat16>& dh, const Matrix<BFloat16>& w, BFloat16* dx) {
  input_gradient_in_tiles(dh, w, dx);
}
void weight_gradient(const Matrix<BFloat16>& dh, const Matrix<BFloat16>& x, BFloat16* dw) {
  weight_gradient_in_tiles(dh, x, dw);
}
#endif

Tensor new_matrix(int64_t rows, int64_t columns, ScalarType dtype) {
  Tensor result = empty({rows, columns}, dtype);
  advise_huge_pages(result);
  return result;
}

// Calls body with a value of the type of the elements and whether they are split.
template <typename Body>
void with_elements(const Tensor& t, bool split, const Body& body) {
#if defined(SDFAST_TILES)
  if (split) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "dh: expected fp32");
    return body(float(), std::true_type());
  }
#endif
  STD_TORCH_CHECK(!split, "dh: is multiplied so only where there is AMX");
  with_element_type(t.scalar_type(), [&](auto element) { body(element, std::false_type()); });
}

// dh: (tokens, M). weight: (M, K). Returns dx: (tokens, K).
Tensor input_gradient_of(const Tensor& dh, const Tensor& weight, bool split) {
  check_matrix(dh, "dh", dh.scalar_type());
  check_matrix(weight, "weight", dh.scalar_type());
  check_shape(weight, "weight", {dh.size(1), weight.size(1)});
  STD_TORCH_CHECK(dh.numel() > 0 && weight.numel() > 0,
                  "dh, weight: expected at least one element");
  Tensor dx = new_matrix(dh.size(0), weight.size(1), dh.scalar_type());
  with_elements(dh, split, [&](auto element, auto in_tiles) {
    using T = decltype(element);
    const Matrix<T> left(dh), right(weight);
    T* to = static_cast<T*>(dx.mutable_data_ptr());
#if defined(SDFAST_TILES)
    if constexpr (in_tiles) return input_gradient_in_tiles(left, right, to);
#endif
    input_gradient(left, right, to);
  });
  return dx;
}
Tensor linear_input_gradient(Tensor dh, Tensor weight) {
  return input_gradient_of(dh, weight, false);
}
Tensor linear_input_gradient_split(Tensor dh, Tensor weight) {
  return input_gradient_of(dh, weight, true);
}

// dh: (tokens, M). x: (tokens, K). Returns dW: (M, K).
Tensor weight_gradient_of(const Tensor& dh, const Tensor& x, bool split) {
  check_matrix(dh, "dh", x.scalar_type());
  check_matrix(x, "x", x.scalar_type());
  check_shape(dh, "dh", {x.size(0), dh.size(1)});
  STD_TORCH_CHECK(dh.numel() > 0 && x.numel() > 0, "dh, x: expected at least one element");
  Tensor dw = new_matrix(dh.size(1), x.size(1), x.scalar_type());
  with_elements(x, split, [&](auto element, auto in_tiles) {
    using T = decltype(element);
    const Matrix<T> left(dh), right(x);
    T* to = static_cast<T*>(dw.mutable_data_ptr());
#if defined(SDFAST_TILES)
    if constexpr (in_tiles) return weight_gradient_in_tiles(left, right, to);
#endif
    weight_gradient(left, right, to);
  });
  return dw;
}
Tensor linear_weight_gradient(Tensor dh, Tensor x) { return weight_gradient_of(dh, x, false); }
Tensor linear_weight_gradient_split(Tensor dh, Tensor x) { return weight_gradient_of(dh, x, true); }

// x: (groups, rows, columns), dense. Returns the sums over rows, (groups, columns).
Tensor sum_rows(Tensor x) {
  check_device(x, "x");
  STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous(), "x: expected (groups, rows, columns), dense");
  Tensor sums = empty({x.size(0), x.size(2)}, x.scalar_type());
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    gemm::sum_rows(static_cast<const T*>(x.const_data_ptr()), x.size(0), x.size(1), x.size(2),
                   static_cast<T*>(sums.mutable_data_ptr()));
  });
  return sums;
}

template <typename V>
SDFAST_INLINE V activate(Activation kind, const V& h) {
  if (kind == Activation::kSilu) return simd::silu(h);
  return kind == Activation::kGelu ? simd::gelu(h) : simd::quick_gelu(h);
}

// d/dh of the activation.
template <typename V>
SDFAST_INLINE V slope(Activation kind, const V& h) {
  if (kind == Activation::kSilu) return simd::silu_gradient(h);
  // h σ(1.702 h) has the slope of silu at 1.702 h.
  return kind == Activation::kGelu ? simd::gelu_gradient(h) : simd::silu_gradient(h * 1.702f);
}

void check_activation(const Tensor& h, Activation kind) {
  check_device(h, "h");
  STD_TORCH_CHECK(h.dim() == 2 && h.is_contiguous(), "h: expected a dense matrix");
  STD_TORCH_CHECK(kind >= Activation::kSilu && kind <= Activation::kGeglu,
                  "activation: expected 1 to 4");
  STD_TORCH_CHECK(kind != Activation::kGeglu || h.size(1) % 2 == 0, "h: expected an even width");
}

// Calls body(row, j, lanes) for the vectors of (rows, width), which threads share out.
template <typename Body>
void for_each_vector_of(int64_t rows, int64_t width, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      simd::for_each_vector(0, width, [&](int64_t j, auto lanes) { body(row, j, lanes); });
    }
  });
}

// h: (tokens, M). Returns act(h): (tokens, M), with GEGLU (tokens, M / 2).
Tensor linear_activate(Tensor h, int64_t activation) {
  const auto kind = static_cast<Activation>(activation);
  check_activation(h, kind);
  const bool geglu = kind == Activation::kGeglu;
  const int64_t tokens = h.size(0), whole = h.size(1), width = geglu ? whole / 2 : whole;
  Tensor y = new_matrix(tokens, width, h.scalar_type());
  with_element_type(h.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(h.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    for_each_vector_of(tokens, width, [&](int64_t row, int64_t j, auto lanes) {
      const T* at = from + row * whole + j;
      const Vec v = simd::load(at, lanes);
      const Vec result = geglu ? v * simd::gelu(simd::load(at + width, lanes)) : activate(kind, v);
      simd::store(to + row * width + j, result, lanes);
    });
  });
  return y;
}

// dy: as act(h), dense. Returns dh: (tokens, M).
Tensor linear_activation_gradient(Tensor dy, Tensor h, int64_t activation) {
  const auto kind = static_cast<Activation>(activation);
  check_activation(h, kind);
  check_device(dy, "dy");
  const bool geglu = kind == Activation::kGeglu;
  const int64_t tokens = h.size(0), whole = h.size(1), width = geglu ? whole / 2 : whole;
  check_shape(dy, "dy", {tokens, width});
  STD_TORCH_CHECK(dy.is_contiguous() && dy.scalar_type() == h.scalar_type(),
                  "dy: expected dense, in the dtype of h");
  Tensor dh = new_matrix(tokens, whole, h.scalar_type());
  with_element_type(h.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(h.const_data_ptr());
    const T* given = static_cast<const T*>(dy.const_data_ptr());
    T* to = static_cast<T*>(dh.mutable_data_ptr());
    for_each_vector_of(tokens, width, [&](int64_t row, int64_t j, auto lanes) {
      const int64_t at = row * whole + j;
      const Vec v = simd::load(from + at, lanes), d = simd::load(given + row * width + j, lanes);
      if (geglu) {
        const Vec gate = simd::load(from + at + width, lanes);
        simd::store(to + at, d * simd::gelu(gate), lanes);
        simd::store(to + at + width, d * v * simd::gelu_gradient(gate), lanes);
      } else {
        simd::store(to + at, d * slope(kind, v), lanes);
      }
    });
  });
  return dh;
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("linear_input_gradient", TORCH_BOX(&linear_input_gradient));
  m.impl("linear_weight_gradient", TORCH_BOX(&linear_weight_gradient));
  m.impl("linear_input_gradient_split", TORCH_BOX(&linear_input_gradient_split));
  m.impl("linear_weight_gradient_split", TORCH_BOX(&linear_weight_gradient_split));
  m.impl("linear_activate", TORCH_BOX(&linear_activate));
  m.impl("linear_activation_gradient", TORCH_BOX(&linear_activation_gradient));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
}

}  // namespace
}  // namespace sdfast
