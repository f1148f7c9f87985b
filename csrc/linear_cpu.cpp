// linear on CPU: y = act(x Wᵀ + bias + residual), fp32, bf16 and fp16.
//
// Algorithm. cpu_weights.h, of few tokens cpu_few_tokens.h: W is read where it lies. A panel of
// tokens and a group of W's rows at a time the sums are finished: bias and residual added,
// activated, rounded once. For GEGLU the sums of the value and of its gate meet in L1 and the
// doubled intermediate is never written. bf16 multiplies pairs with AMX or AVX512-BF16; elsewhere
// bf16 and fp16 are widened to fp32. Bytes: x, W and the residual read, y written. Limit: fused
// multiply-adds.
#include "cpu_few_tokens.h"
#include "cpu_math.h"
#include "cpu_tensors.h"
#include "cpu_tiles.h"

namespace sdfast {
namespace {

using simd::Vec;

enum class Activation : int64_t { kNone, kSilu, kGelu, kQuickGelu, kGeglu };

template <Activation kActivation, typename V>
SDFAST_INLINE V activate(const V& v) {
  if constexpr (kActivation == Activation::kSilu) return simd::silu(v);
  if constexpr (kActivation == Activation::kGelu) return simd::gelu(v);
  if constexpr (kActivation == Activation::kQuickGelu) return simd::quick_gelu(v);
  return v;
}

// What follows the product.
template <typename T>
struct Epilogue {
  Activation activation;
  const T* bias;      // (weight rows) or null
  const T* residual;  // (tokens, weight rows) or null
  T* y;               // (tokens, width)
  int64_t weight_rows, width;

  // Vectors `v` of tokens [token, token + kR) at this row of W, with bias and residual.
  template <int kR, typename Lanes>
  SDFAST_INLINE simd::Vecs<kR> added(const float* c, int64_t stride, int64_t token, int64_t row,
                                     Lanes lanes) const {
    const Vec of_row = bias ? simd::load(bias + row, lanes) : Vec{};
    return simd::make_vecs<kR>([&](int r) {
      const Vec sum = simd::load(c + r * stride) + of_row;
      return residual ? sum + simd::load(residual + (token + r) * weight_rows + row, lanes) : sum;
    });
  }

  // Fetches what the sums of these rows will be added to and written to.
  void fetch(int64_t token, int64_t count, int64_t row, int64_t rows) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t t = token; t < token + count; ++t) {
      for (int64_t j = row; j < row + rows; j += kLine) {
        simd::prefetch_for_write(y + t * width + j);
        if (residual) simd::prefetch(residual + t * weight_rows + j);
      }
    }
  }

  template <Activation kActivation, int kR>
  SDFAST_INLINE void tokens(int64_t token, int64_t first, int64_t row, int64_t rows,
                            const gemm::Sums& sums) const {
    simd::for_each_vector(row, row + rows, [&](int64_t j, auto lanes) {
      const int64_t at = (token - first) * sums.stride + (j - row);
      auto v = added<kR>(sums.values + at, sums.stride, token, j, lanes);
      if constexpr (kActivation == Activation::kGeglu) {
        v = v * simd::gelu(added<kR>(sums.gates + at, sums.stride, token, j + width, lanes));
      } else {
        v = activate<kActivation>(v);
      }
      simd::for_each_of(
          v, [&](int r, Vec value) { simd::store(y + (token + r) * width + j, value, lanes); });
    });
  }

  template <Activation kActivation>
  void block(int64_t first, int64_t count, int64_t row, int64_t rows,
             const gemm::Sums& sums) const {
    int64_t token = first;
    for (; token + 4 <= first + count; token += 4) {
      tokens<kActivation, 4>(token, first, row, rows, sums);
    }
    for (; token < first + count; ++token) tokens<kActivation, 1>(token, first, row, rows, sums);
  }

  void operator()(int64_t token, int64_t count, int64_t row, int64_t rows,
                  const gemm::Sums& sums) const {
    switch (activation) {
      case Activation::kNone:
        return block<Activation::kNone>(token, count, row, rows, sums);
      case Activation::kSilu:
        return block<Activation::kSilu>(token, count, row, rows, sums);
      case Activation::kGelu:
        return block<Activation::kGelu>(token, count, row, rows, sums);
      case Activation::kQuickGelu:
        return block<Activation::kQuickGelu>(token, count, row, rows, sums);
      case Activation::kGeglu:
        return block<Activation::kGeglu>(token, count, row, rows, sums);
    }
  }
};

// x: (tokens, k), rows `stride` apart. weight: (rows, k) contiguous, twice the rows for GEGLU.
template <typename Operand, typename T>
void run(const T* x, int64_t stride, int64_t k, const T* weight, int64_t tokens,
         const Epilogue<T>& epilogue) {
  const bool gated = epilogue.activation == Activation::kGeglu;
  const gemm::Product product{tokens, epilogue.width, k, gemm::even_part<Operand>(k), k, gated};
  if (tokens <= gemm::kFewTokens) {
    return gemm::multiply_few_tokens<Operand>(product, x, stride, weight, epilogue);
  }
#if defined(SDFAST_TILES)
  if constexpr (std::is_same_v<T, simd::BFloat16>) {
    const gemm::tiles::Tokens source{x, tokens, stride, k};
    gemm::tiles::Product on_tiles{epilogue.width, k};
    on_tiles.gated = gated;
    return gemm::tiles::multiply_weights(on_tiles, weight, source, epilogue);
  }
#endif
  using Piece = gemm::Product::Piece;
  gemm::multiply_weights<Operand>(
      product, weight,
      [&](int64_t token, int64_t count, Piece piece, Operand* to) {
        const T* from = x + token * stride + piece.begin;
        gemm::pack_columns<T>([&](int64_t i) { return from + i * stride; }, count, piece.count,
                              gemm::kColumns * stride, to);
      },
      epilogue);
}

// x: (tokens, K), rows contiguous. weight: (weight_rows, K), contiguous. bias: (weight_rows).
// residual: (tokens, weight_rows), contiguous. Returns (tokens, weight_rows), half of it for GEGLU.
Tensor linear_rows(Tensor x, Tensor weight, std::optional<Tensor> bias,
                   std::optional<Tensor> residual, int64_t activation) {
  check_device(x, "x");
  check_device(weight, "weight");
  STD_TORCH_CHECK(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1),
                  "x: expected (tokens, K), its rows contiguous");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1) && weight.is_contiguous(),
                  "weight: expected contiguous, (rows, K) to fit x");
  STD_TORCH_CHECK(x.size(1) > 0, "x: expected at least one value in a row");
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, "activation: expected 0 to 4");
  const auto kind = static_cast<Activation>(activation);
  const int64_t tokens = x.size(0), k = x.size(1), weight_rows = weight.size(0);
  const int64_t width = kind == Activation::kGeglu ? weight_rows / 2 : weight_rows;
  const auto check_like = [&](const Tensor& t, const char* name) {
    check_device(t, name);
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.is_contiguous(), name,
                    ": expected contiguous, in the dtype of x");
  };
  check_like(weight, "weight");
  if (bias) check_like(*bias, "bias");
  if (residual) check_like(*residual, "residual");
  if (bias) check_shape(*bias, "bias", {weight_rows});
  if (residual) check_shape(*residual, "residual", {tokens, weight_rows});
  Tensor y = empty({tokens, width}, x.scalar_type());
  advise_huge_pages(y);
  if (y.numel() == 0) return y;
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const auto data = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
    };
    const Epilogue<T> epilogue{kind,           data(bias),
                               data(residual), static_cast<T*>(y.mutable_data_ptr()),
                               weight_rows,    width};
    run<typename gemm::OperandOf<T>::Type>(static_cast<const T*>(x.const_data_ptr()), x.stride(0),
                                           k, static_cast<const T*>(weight.const_data_ptr()),
                                           tokens, epilogue);
  });
  return y;
}

// A number that changes with the weight: its version counter does not see what is written through
// `weight.data`, as merging a LoRA does. Reads 64 places; whatever rescales or adds moves most.
int64_t fingerprint(Tensor weight) {
  check_device(weight, "weight");
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
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
}

}  // namespace
}  // namespace sdfast
