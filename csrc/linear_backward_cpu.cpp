// linear on CPU for training: the gradients dx = dh W, dW = dhᵀ x and db = Σ dh, and the
// activation.
//
// Algorithm. The products of cpu_gemm_packing.h, for dx of many tokens of cpu_many_tokens.h; on
// AMX, in bf16 and in fp32 that may be split, those of cpu_tiles_gradient.h. Operands lie as torch
// keeps them: W by rows for dx, x and dh by tokens for dW. The activation is a pass of its own,
// because its gradient needs h. Bytes: the operands once a block of rows, the result written.
// Limit: fused multiply-adds, or TDPBF16PS.
#include "cpu_gemm_packing.h"
#include "cpu_many_tokens.h"
#include "cpu_math.h"
#include "cpu_store_rows.h"
#include "cpu_tensors.h"
#include "cpu_tiles_gradient.h"

namespace sdfast {
namespace {

using simd::Vec;

enum class Activation : int64_t { kNone, kSilu, kGelu, kQuickGelu, kGeglu };

// A dense tensor as a matrix of so many columns.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, columns;
  Matrix(const Tensor& t, int64_t columns)
      : data(static_cast<const T*>(t.const_data_ptr())),
        rows(t.numel() / columns),
        columns(columns) {}
};

void check_dense(const Tensor& t, const char* name, ScalarType dtype) {
  check_device(t, name);
  STD_TORCH_CHECK(t.dim() >= 1 && t.scalar_type() == dtype && t.is_contiguous(), name,
                  ": expected dense, in the dtype of x");
}

template <typename T>
void input_gradient(const Matrix<T>& dh, const Matrix<T>& w, T* dx) {
  using Operand = typename gemm::OperandOf<T>::Type;
  const gemm::Product product{dh.rows, w.columns, w.rows, w.rows, w.rows};
  constexpr int64_t kTimes = 4;  // from which it was measured faster
  if (gemm::are_many_tokens<Operand>(product, kTimes)) {
    const gemm::MatrixPanels<T> columns{w.data, w.columns, w.columns};
    const auto pack = [&](int64_t column, int64_t, Operand* to) {
      columns.pack(column, 0, w.rows, to);
    };
    return gemm::multiply_many_tokens<Operand>(product, dh.data, dh.columns, pack,
                                               gemm::StoreRows<T>{dx, w.columns});
  }
  gemm::multiply_packing<Operand>(
      {dh.rows, w.columns, w.rows, gemm::lies_ready<Operand, T>(dh.columns, w.rows)},
      [&](int64_t begin, int64_t count, int64_t value, int64_t values, Operand* scratch) {
        return gemm::rows_of(dh.data + begin * dh.columns + value, dh.columns, count, values,
                             scratch);
      },
      gemm::MatrixPanels<T>{w.data, w.columns, w.columns}, gemm::store_to(dx, w.columns));
}

template <typename T>
void weight_gradient(const Matrix<T>& dh, const Matrix<T>& x, T* dw) {
  using Operand = typename gemm::OperandOf<T>::Type;
  gemm::multiply_packing<Operand>(
      {dh.columns, x.columns, dh.rows},
      [&](int64_t begin, int64_t count, int64_t value, int64_t values, Operand* scratch) {
        return gemm::step_rows(dh.data + value * dh.columns + begin, dh.columns, count, values,
                               scratch);
      },
      gemm::MatrixPanels<T>{x.data, x.columns, x.columns},
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
    for (int64_t i = 0; i < m.rows; ++i) (*this)[i] = m.data + i * m.columns;
  }
};

template <typename T>
void input_gradient_in_tiles(const Matrix<T>& dh, const Matrix<T>& w, T* dx) {
  const gemm::tiles::Tokens<T> tokens{dh.data, dh.rows, dh.columns, dh.columns};
  const gemm::tiles::Product p{w.columns, w.rows};
  const MatrixRows<T> rows(w);
  gemm::tiles::multiply_weights(std::is_same_v<T, float> ? p.splits() : p,
                                gemm::tiles::Columns<T>{rows.get()}, tokens,
                                gemm::StoreRows<T>{dx, w.columns});
}

template <typename T>
void weight_gradient_in_tiles(const Matrix<T>& dh, const Matrix<T>& x, T* dw) {
  const MatrixRows<T> left(dh), right(x);
  const bool streamed = simd::streams_gradient(dw, dh.columns, x.columns);
  gemm::tiles::multiply_taps({x.columns, x.rows}, {}, left.get(), dh.columns, right.get(),
                             gemm::StoreRows<T>{dw, x.columns, streamed});
}

void input_gradient(const Matrix<BFloat16>& dh, const Matrix<BFloat16>& w, BFloat16* dx) {
  input_gradient_in_tiles(dh, w, dx);
}
void weight_gradient(const Matrix<BFloat16>& dh, const Matrix<BFloat16>& x, BFloat16* dw) {
  weight_gradient_in_tiles(dh, x, dw);
}
#endif

// Calls body with a value of the type of the elements and whether they are split.
template <typename Body>
void with_elements(const Tensor& t, bool split, const Body& body) {
#if defined(SDFAST_TILES)
  if (split) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "x: expected fp32");
    return body(float(), std::true_type());
  }
#endif
  STD_TORCH_CHECK(!split, "x: is multiplied so only where there is AMX");
  with_element_type(t.scalar_type(), [&](auto element) { body(element, std::false_type()); });
}

// dh: (..., M). x: (..., K). weight: (M, K) or (M, K, 1, 1). All dense. Returns dx, dW and db: (M),
// each of no elements where it is not asked for. One operation, for dispatching three takes a
// noticeable part of a small layer's time.
std::tuple<Tensor, Tensor, Tensor> linear_gradients(Tensor dh, Tensor x, Tensor weight, bool split,
                                                    bool for_x, bool for_weight, bool for_bias) {
  const ScalarType dtype = x.scalar_type();
  check_dense(x, "x", dtype);
  check_dense(dh, "dh", dtype);
  check_dense(weight, "weight", dtype);
  STD_TORCH_CHECK(dh.numel() > 0 && x.numel() > 0 && weight.numel() > 0,
                  "dh, x, weight: expected at least one element");
  const int64_t rows = weight.size(0), k = x.size(x.dim() - 1);
  STD_TORCH_CHECK(weight.dim() >= 2 && weight.size(1) == k && weight.numel() == rows * k,
                  "weight: expected (rows, K) to fit x");
  check_shape(dh, "dh", with_width(x, rows));
  const auto made_if = [&](bool wanted, IntHeaderOnlyArrayRef sizes) {
    return wanted ? empty(sizes, dtype) : empty({0}, dtype);
  };
  Tensor dx = made_if(for_x, x.sizes()), dw = made_if(for_weight, weight.sizes());
  Tensor db = made_if(for_bias, {rows});
  with_elements(x, split, [&](auto element, [[maybe_unused]] auto in_tiles) {
    using T = decltype(element);
    const Matrix<T> gradient(dh, rows), given(x, k), w(weight, k);
    const auto data = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
#if defined(SDFAST_TILES)
    if constexpr (in_tiles) {
      if (for_x) input_gradient_in_tiles(gradient, w, data(dx));
      if (for_weight) weight_gradient_in_tiles(gradient, given, data(dw));
    } else
#endif
    {
      if (for_x) input_gradient(gradient, w, data(dx));
      if (for_weight) weight_gradient(gradient, given, data(dw));
    }
    if (for_bias) gemm::sum_rows(gradient.data, 1, gradient.rows, rows, data(db));
  });
  return {dx, dw, db};
}

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
  STD_TORCH_CHECK(h.dim() >= 1 && h.is_contiguous(), "h: expected dense");
  STD_TORCH_CHECK(kind >= Activation::kSilu && kind <= Activation::kGeglu,
                  "activation: expected 1 to 4");
  STD_TORCH_CHECK(kind != Activation::kGeglu || h.size(h.dim() - 1) % 2 == 0,
                  "h: expected an even width");
}

// Of act(h): h's sizes are (..., whole), act(h)'s (..., width).
struct Widths {
  int64_t whole, width, tokens;
  Widths(const Tensor& h, Activation kind)
      : whole(h.size(h.dim() - 1)),
        width(kind == Activation::kGeglu ? whole / 2 : whole),
        tokens(whole > 0 ? h.numel() / whole : 0) {}
};

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

// h: (..., M), dense. Returns act(h): (..., M), with GEGLU (..., M / 2).
Tensor linear_activate(Tensor h, int64_t activation) {
  const auto kind = static_cast<Activation>(activation);
  check_activation(h, kind);
  const bool geglu = kind == Activation::kGeglu;
  const Widths sizes(h, kind);
  const int64_t whole = sizes.whole, width = sizes.width, tokens = sizes.tokens;
  Tensor y = empty(with_width(h, width), h.scalar_type());
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

// dy: as act(h), dense. Returns dh, as h.
Tensor linear_activation_gradient(Tensor dy, Tensor h, int64_t activation) {
  const auto kind = static_cast<Activation>(activation);
  check_activation(h, kind);
  check_device(dy, "dy");
  const bool geglu = kind == Activation::kGeglu;
  const Widths sizes(h, kind);
  const int64_t whole = sizes.whole, width = sizes.width, tokens = sizes.tokens;
  check_shape(dy, "dy", with_width(h, width));
  STD_TORCH_CHECK(dy.is_contiguous() && dy.scalar_type() == h.scalar_type(),
                  "dy: expected dense, in the dtype of h");
  Tensor dh = empty(h.sizes(), h.scalar_type());
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
  m.impl("linear_gradients", TORCH_BOX(&linear_gradients));
  m.impl("linear_activate", TORCH_BOX(&linear_activate));
  m.impl("linear_activation_gradient", TORCH_BOX(&linear_activation_gradient));
  m.impl("sum_rows", TORCH_BOX(&sum_rows));
}

}  // namespace
}  // namespace sdfast
