// linear on CPU: y = act(x Wᵀ + bias + residual), fp32, bf16 and fp16.
//
// Algorithm. cpu_gemm.h with W packed once per weight (linear_pack). A block of rows and one panel
// of columns at a time the sums are finished: bias and residual added, activated, rounded once.
// For GEGLU a panel holds as many columns of the value as of their gate, so that the two meet in
// registers and the doubled intermediate is never written.
// bf16 multiplies pairs with AMX or AVX512-BF16; elsewhere bf16 and fp16 are widened to fp32.
// Bytes: x, W and the residual read, y written. Limit: fused multiply-adds.
#include "cpu_gemm.h"
#include "cpu_math.h"
#include "cpu_tensors.h"

namespace sdfast {
namespace {

using gemm::kColumns;
using simd::Vec;

enum class Activation : int64_t { kNone, kSilu, kGelu, kQuickGelu, kGeglu };

// Which row of W stands in column j of a panel; -1 where none does. With GEGLU the first half of
// each panel are values, the second their gates.
int64_t weight_row(int64_t panel, int64_t j, int64_t rows, bool geglu) {
  if (!geglu) {
    const int64_t row = panel * kColumns + j;
    return row < rows ? row : -1;
  }
  constexpr int64_t kHalf = kColumns / 2;
  const int64_t column = panel * kHalf + j % kHalf, half = rows / 2;
  return column < half ? column + (j < kHalf ? 0 : half) : -1;
}

// The columns of the product, padding of the last GEGLU panel included.
int64_t product_columns(int64_t rows, bool geglu) {
  constexpr int64_t kHalf = kColumns / 2;
  return geglu ? (rows / 2 + kHalf - 1) / kHalf * kColumns : rows;
}

template <typename T>
gemm::Shape shape_of(int64_t tokens, int64_t rows, int64_t k, bool geglu) {
  return {tokens, product_columns(rows, geglu),
          gemm::steps_of(gemm::OperandOf<T>::Type::kDepth, k)};
}

// weight: (rows, K), its rows contiguous. Returns (panels * steps * kColumns) operands, in a tensor
// of the operand's dtype.
Tensor linear_pack(Tensor weight, bool geglu) {
  check_cpu(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected (rows, K)");
  const Tensor dense = weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  const int64_t rows = weight.size(0), k = weight.size(1);
  std::optional<Tensor> result;
  with_element_type(weight.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Operand = typename gemm::OperandOf<T>::Type;
    const gemm::Shape shape = shape_of<T>(0, rows, k, geglu);
    constexpr bool kPairs = std::is_same_v<Operand, gemm::BFloat16Pair>;
    result = empty({gemm::packed_size<Operand>(shape) * Operand::kDepth},
                   kPairs ? ScalarType::BFloat16 : ScalarType::Float);
    auto* to = static_cast<Operand*>(result->mutable_data_ptr());
    const T* from = static_cast<const T*>(dense.const_data_ptr());
    torch::stable::parallel_for(0, shape.panels(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        Operand* out = to + panel * shape.steps * kColumns;
        // By steps that share cache lines of W.
        for (int64_t first = 0; first < shape.steps; first += 16) {
          const int64_t last = std::min<int64_t>(first + 16, shape.steps);
          for (int64_t j = 0; j < kColumns; ++j) {
            const int64_t row = weight_row(panel, j, rows, geglu);
            for (int64_t step = first; step < last; ++step) {
              Operand& operand = out[step * kColumns + j];
              operand = Operand();
              if (row >= 0) gemm::set_operand(operand, from + row * k, step, k);
            }
          }
        }
      }
    });
  });
  return *result;
}

template <Activation kActivation, typename V>
SDFAST_INLINE V activate(const V& v) {
  if constexpr (kActivation == Activation::kSilu) return simd::silu(v);
  if constexpr (kActivation == Activation::kGelu) return simd::gelu(v);
  if constexpr (kActivation == Activation::kQuickGelu) return simd::quick_gelu(v);
  return v;
}

// What follows the product, for a block of rows and one panel of columns.
template <typename T>
struct Epilogue {
  Activation activation;
  const T* bias;      // (weight rows) or null
  const T* residual;  // (tokens, weight rows) or null
  T* y;               // (tokens, width)
  int64_t weight_rows, width;

  // Vectors `v` of rows [row, row + kR) at this column, with bias and residual.
  template <int kR, typename Lanes>
  SDFAST_INLINE simd::Vecs<kR> sums(const float* c, int64_t row, int64_t column,
                                    Lanes lanes) const {
    const Vec added = bias ? simd::load(bias + column, lanes) : Vec{};
    return simd::make_vecs<kR>([&](int r) {
      const Vec sum = simd::load(c + r * kColumns) + added;
      return residual ? sum + simd::load(residual + (row + r) * weight_rows + column, lanes) : sum;
    });
  }

  template <Activation kActivation, int kR>
  SDFAST_INLINE void rows(int64_t row, int64_t column, const float* c) const {
    constexpr bool kGated = kActivation == Activation::kGeglu;
    const int64_t first = kGated ? column / 2 : column;
    const int64_t end = std::min<int64_t>(first + (kGated ? kColumns / 2 : kColumns), width);
    simd::for_each_vector(first, end, [&](int64_t j, auto lanes) {
      auto v = sums<kR>(c + (j - first), row, j, lanes);
      if constexpr (kGated) {
        const auto gate = sums<kR>(c + kColumns / 2 + (j - first), row, j + width, lanes);
        v = v * simd::gelu(gate);
      } else {
        v = activate<kActivation>(v);
      }
      simd::for_each_of(
          v, [&](int r, Vec value) { simd::store(y + (row + r) * width + j, value, lanes); });
    });
  }

  template <Activation kActivation>
  void block(int64_t begin, int64_t count, int64_t column, const float* c) const {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) rows<kActivation, 4>(begin + r, column, c + r * kColumns);
    for (; r < count; ++r) rows<kActivation, 1>(begin + r, column, c + r * kColumns);
  }

  void operator()(int64_t begin, int64_t count, int64_t column, const float* c) const {
    switch (activation) {
      case Activation::kNone:
        return block<Activation::kNone>(begin, count, column, c);
      case Activation::kSilu:
        return block<Activation::kSilu>(begin, count, column, c);
      case Activation::kGelu:
        return block<Activation::kGelu>(begin, count, column, c);
      case Activation::kQuickGelu:
        return block<Activation::kQuickGelu>(begin, count, column, c);
      case Activation::kGeglu:
        return block<Activation::kGeglu>(begin, count, column, c);
    }
  }
};

// Rows [begin, begin + count) of x: (tokens, k), `stride` apart, from one step on: where they lie,
// or widened, or with a pair completed, in scratch.
template <typename T>
gemm::Rows<typename gemm::OperandOf<T>::Type> rows_of(const T* x, int64_t stride, int64_t k,
                                                      int64_t begin, int64_t count, int64_t step,
                                                      int64_t steps,
                                                      typename gemm::OperandOf<T>::Type* scratch) {
  using Operand = typename gemm::OperandOf<T>::Type;
  constexpr int kDepth = Operand::kDepth;
  const T* from = x + begin * stride + step * kDepth;
  if constexpr (sizeof(T) * kDepth == sizeof(Operand)) {
    if (stride % kDepth == 0 && k % kDepth == 0) {
      return {reinterpret_cast<const Operand*>(from), stride / kDepth};
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t there = std::min(steps * kDepth, k - step * kDepth);
      T* to = reinterpret_cast<T*>(scratch + r * steps);
      std::memset(static_cast<void*>(to), 0, steps * sizeof(Operand));
      std::memcpy(static_cast<void*>(to), from + r * stride, there * sizeof(T));
    }
  } else {
    for (int64_t r = 0; r < count; ++r) {
      simd::for_each_vector(0, steps, [&](int64_t i, auto lanes) {
        simd::store(&scratch[r * steps + i].value, simd::load(from + r * stride + i, lanes), lanes);
      });
    }
  }
  return {scratch, steps};
}

// x: (tokens, K), rows contiguous. packed: of a weight of `weight_rows` rows. bias: (weight_rows).
// residual: (tokens, weight_rows), contiguous. Returns (tokens, weight_rows), half of it for GEGLU.
Tensor linear_packed(Tensor x, Tensor packed, std::optional<Tensor> bias,
                     std::optional<Tensor> residual, int64_t weight_rows, int64_t activation) {
  check_cpu(x, "x");
  check_cpu(packed, "packed");
  STD_TORCH_CHECK(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1),
                  "x: expected (tokens, K), its rows contiguous");
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, "activation: expected 0 to 4");
  const auto kind = static_cast<Activation>(activation);
  const bool geglu = kind == Activation::kGeglu;
  const int64_t tokens = x.size(0), k = x.size(1), width = geglu ? weight_rows / 2 : weight_rows;
  const auto check_like = [&](const std::optional<Tensor>& t, const char* name) {
    if (!t) return;
    check_cpu(*t, name);
    STD_TORCH_CHECK(t->scalar_type() == x.scalar_type() && t->is_contiguous(), name,
                    ": expected contiguous, in the dtype of x");
  };
  check_like(bias, "bias");
  check_like(residual, "residual");
  if (bias) check_shape(*bias, "bias", {weight_rows});
  if (residual) check_shape(*residual, "residual", {tokens, weight_rows});
  Tensor y = empty({tokens, width}, x.scalar_type());
  advise_huge_pages(y);
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Operand = typename gemm::OperandOf<T>::Type;
    const gemm::Shape shape = shape_of<T>(tokens, weight_rows, k, geglu);
    constexpr bool kPairs = std::is_same_v<Operand, gemm::BFloat16Pair>;
    STD_TORCH_CHECK(packed.scalar_type() == (kPairs ? ScalarType::BFloat16 : ScalarType::Float) &&
                        packed.numel() == gemm::packed_size<Operand>(shape) * Operand::kDepth,
                    "packed: expected linear_pack of a weight that fits x");
    if (y.numel() == 0) return;
    const auto data = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
    };
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const int64_t stride = x.stride(0);
    const Epilogue<T> epilogue{kind,           data(bias),
                               data(residual), static_cast<T*>(y.mutable_data_ptr()),
                               weight_rows,    width};
    gemm::multiply<Operand>(
        shape, static_cast<const Operand*>(packed.const_data_ptr()),
        [&](int64_t begin, int64_t count, int64_t step, int64_t steps, Operand* scratch) {
          return rows_of(from, stride, k, begin, count, step, steps, scratch);
        },
        epilogue);
  });
  return y;
}

// A number that changes with the weight: its version counter does not see what is written through
// `weight.data`, as merging a LoRA does. Reads 64 places; whatever rescales or adds moves most.
int64_t fingerprint(Tensor weight) {
  check_cpu(weight, "weight");
  constexpr int64_t kPlaces = 64;
  const int64_t size = weight.element_size(), count = weight.numel();
  const auto* bytes = static_cast<const uint8_t*>(weight.const_data_ptr());
  uint64_t hash = 1469598103934665603u;
  // Element i of the tensor, whatever its strides.
  const auto offset = [&](int64_t i) {
    int64_t at = 0;
    for (int64_t axis = weight.dim(); axis-- > 0;) {
      at += i % weight.size(axis) * weight.stride(axis);
      i /= weight.size(axis);
    }
    return at * size;
  };
  const int64_t places = std::min(count, kPlaces);
  for (int64_t i = 0; i < places; ++i) {
    uint64_t value = 0;
    const int64_t element = i * (count - 1) / std::max<int64_t>(places - 1, 1);
    std::memcpy(&value, bytes + offset(element), std::min<int64_t>(size, 8));
    hash = (hash ^ value) * 1099511628211u;
  }
  return static_cast<int64_t>(hash);
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
}

}  // namespace
}  // namespace sdfast
