// linear on CPU: y = act(x Wᵀ + bias + residual), fp32, bf16 and fp16.
//
// Algorithm. cpu_weights.h, which reads W where it lies; of few tokens cpu_few_tokens.h, which does
// too; of many cpu_many_tokens.h, which reads x where it lies; on AMX in bf16 and in split fp32
// cpu_tiles.h, W read where it lies or in a copy for tiles. Some tokens and a group of W's rows
// at a time the sums are finished: bias and residual added, activated, rounded once. For GEGLU the
// sums of the value and of its gate meet in L1 and the doubled intermediate is never written. bf16
// multiplies pairs with AMX or AVX512-BF16; elsewhere bf16 and fp16 are widened to fp32. Bytes: x,
// W and the residual read, y written. Limit: fused multiply-adds.
#include "cpu_few_tokens.h"
#include "cpu_many_tokens.h"
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
  bool streamed = false;  // whether y is written past the caches

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
        if (!streamed) simd::prefetch_for_write(y + t * width + j);
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
      simd::for_each_of(v, [&](int r, Vec value) {
        T* to = y + (token + r) * width + j;
        if (streamed) {
          simd::stream_part(to, value, lanes);
        } else {
          simd::store(to, value, lanes);
        }
      });
    });
  }

  template <Activation kActivation>
  void block(int64_t first, int64_t count, int64_t row, int64_t rows,
             const gemm::Sums& sums) const {
    const Epilogue own = *this;  // in registers: a store may alias what a pointer leads to
    const gemm::Sums from = sums;
    int64_t token = first;
    for (; token + 4 <= first + count; token += 4) {
      own.template tokens<kActivation, 4>(token, first, row, rows, from);
    }
    for (; token < first + count; ++token) {
      own.template tokens<kActivation, 1>(token, first, row, rows, from);
    }
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

#if defined(SDFAST_TILES)
using simd::BFloat16;

template <typename T>
gemm::tiles::Product tiles_of(int64_t width, int64_t k, bool gated) {
  gemm::tiles::Product p{width, k};
  p.gated = gated;
  return std::is_same_v<T, float> ? p.splits() : p;
}

template <typename T>
void run_tiles(const T* x, int64_t stride, int64_t k, const gemm::tiles::Weight<T>& weight,
               int64_t tokens, Epilogue<T> epilogue) {
  const bool gated = epilogue.activation == Activation::kGeglu;
  epilogue.streamed = gemm::tiles::streams(epilogue.y, tokens, epilogue.width);
  gemm::tiles::multiply_weights(tiles_of<T>(epilogue.width, k, gated), weight,
                                gemm::tiles::Tokens<T>{x, tokens, stride, k}, epilogue);
}
#endif

// x: (tokens, k), rows `stride` apart. weight: (rows, k) contiguous, twice the rows for GEGLU.
template <typename Operand, typename T>
void run(const T* x, int64_t stride, int64_t k, const T* weight, int64_t tokens,
         Epilogue<T> epilogue) {
  const bool gated = epilogue.activation == Activation::kGeglu;
  const gemm::Product product{tokens, epilogue.width, k, gemm::even_part<Operand>(k), k, gated};
  if (tokens <= gemm::kFewTokens) {
    return gemm::multiply_few_tokens<Operand>(product, x, stride, weight, epilogue);
  }
#if defined(SDFAST_TILES)
  if constexpr (std::is_same_v<T, simd::BFloat16>) {
    return run_tiles<T>(x, stride, k, {weight}, tokens, epilogue);
  } else
#endif
  {
    if (gemm::are_many_tokens<Operand>(product, gemm::kManyTimes)) {
      epilogue.streamed = gemm::streams_past_l3(epilogue.y, tokens, epilogue.width);
      return gemm::multiply_many_tokens<Operand>(product, x, stride,
                                                 gemm::PackRows<T>{product, weight}, epilogue);
    }
    using Piece = gemm::Product::Piece;
    gemm::multiply_weights<Operand>(
        product, weight,
        [&](int64_t token, int64_t count, Piece piece, Operand* to) {
          const T* from = x + token * stride + piece.begin;
          gemm::pack_columns<T>([&](int64_t i) { return from + i * stride; }, count, piece.count,
                                to);
        },
        epilogue);
  }
}

// What a product takes beside the weight, checked. x: (..., K), dense, or (tokens, K), rows
// contiguous. bias: (weight_rows). residual: (..., weight_rows), contiguous. Gives y: (...,
// weight_rows), half of it for GEGLU.
struct Call {
  const Tensor& x;
  const std::optional<Tensor>&bias, &residual;
  Activation activation;
  int64_t tokens, k, stride, weight_rows, width;
  Tensor y;

  Call(const Tensor& x, int64_t weight_rows, const std::optional<Tensor>& bias,
       const std::optional<Tensor>& residual, int64_t activation)
      : x(x),
        bias(bias),
        residual(residual),
        activation(static_cast<Activation>(activation)),
        weight_rows(weight_rows) {
    check_device(x, "x");
    const int64_t last = x.dim() - 1;
    STD_TORCH_CHECK(last >= 0 && x.size(last) > 0, "x: expected at least one value in a row");
    STD_TORCH_CHECK(x.is_contiguous() || (last == 1 && (x.size(1) == 1 || x.stride(1) == 1)),
                    "x: expected dense, or (tokens, K), its rows contiguous");
    STD_TORCH_CHECK(activation >= 0 && activation <= 4, "activation: expected 0 to 4");
    k = x.size(last);
    tokens = x.numel() / k;
    stride = last == 1 ? x.stride(0) : k;
    width = is_gated() ? weight_rows / 2 : weight_rows;
    if (bias) check_like(*bias, "bias");
    if (residual) check_like(*residual, "residual");
    if (bias) check_shape(*bias, "bias", {weight_rows});
    if (residual) check_shape(*residual, "residual", with_width(x, weight_rows));
    y = empty(with_width(x, width), x.scalar_type());
  }
  bool is_gated() const { return activation == Activation::kGeglu; }
  void check_like(const Tensor& t, const char* name) const {
    check_device(t, name);
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.is_contiguous(), name,
                    ": expected contiguous, in the dtype of x");
  }
  template <typename T>
  Epilogue<T> epilogue() {
    const auto data = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
    };
    return {activation,  data(bias), data(residual), static_cast<T*>(y.mutable_data_ptr()),
            weight_rows, width};
  }
};

// The call of a weight (weight_rows, K) or (weight_rows, K, 1, 1), contiguous, checked.
Call call_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& residual, int64_t activation) {
  check_device(weight, "weight");
  STD_TORCH_CHECK(weight.dim() >= 2, "weight: expected (rows, K)");
  Call call(x, weight.size(0), bias, residual, activation);
  call.check_like(weight, "weight");
  STD_TORCH_CHECK(weight.size(1) == call.k && weight.numel() == call.weight_rows * call.k,
                  "weight: expected (rows, K) to fit x");
  return call;
}

// weight: as call_of's. The others as Call's.
Tensor linear_rows(Tensor x, Tensor weight, std::optional<Tensor> bias,
                   std::optional<Tensor> residual, int64_t activation) {
  Call call = call_of(x, weight, bias, residual, activation);
  if (call.y.numel() == 0) return call.y;
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    run<typename gemm::OperandOf<T>::Type>(static_cast<const T*>(x.const_data_ptr()), call.stride,
                                           call.k, static_cast<const T*>(weight.const_data_ptr()),
                                           call.tokens, call.epilogue<T>());
  });
  return call.y;
}

// linear_rows in fp32 on AMX tiles, whose factors are sums of two bf16.
Tensor linear_split(Tensor x, Tensor weight, std::optional<Tensor> bias,
                    std::optional<Tensor> residual, int64_t activation) {
#if defined(SDFAST_TILES)
  Call call = call_of(x, weight, bias, residual, activation);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x: expected fp32");
  if (call.y.numel() == 0) return call.y;
  if (call.tokens <= gemm::kFewTokens) {
    run<gemm::Float32>(x.const_data_ptr<float>(), call.stride, call.k,
                       weight.const_data_ptr<float>(), call.tokens, call.epilogue<float>());
    return call.y;
  }
  run_tiles<float>(x.const_data_ptr<float>(), call.stride, call.k, {weight.const_data_ptr<float>()},
                   call.tokens, call.epilogue<float>());
  return call.y;
#else
  STD_TORCH_CHECK(false, "x: is multiplied so only where there is AMX");
  return linear_rows(x, weight, bias, residual, activation);
#endif
}

#if defined(SDFAST_TILES)
template <typename T>
Tensor pack_phases(const Tensor& weight, gemm::tiles::Product p) {
  Tensor packed = empty({weight.size(0) * p.packed()}, ScalarType::BFloat16);
  const auto* from = static_cast<const T*>(weight.const_data_ptr());
  auto* to = static_cast<BFloat16*>(packed.mutable_data_ptr());
  for (int64_t phase = 0; phase < weight.size(0); ++phase) {
    const gemm::tiles::Weight<T> rows{from + phase * p.rows * p.halves() * p.dim()};
    gemm::tiles::pack_all(p, rows, to + phase * p.packed());
  }
  return packed;
}
#endif

// weight: (phases, rows, kernel_height, kernel_width, channels), bf16 or fp32, contiguous. Returns
// what conv2d_kernel takes, and linear_packed of one phase and tap: each phase as cpu_tiles.h packs
// it.
Tensor pack_tiles(Tensor weight, [[maybe_unused]] bool gated) {
#if defined(SDFAST_TILES)
  check_device(weight, "weight");
  const bool split = weight.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(
      weight.dim() == 5 && (split || weight.scalar_type() == ScalarType::BFloat16) &&
          weight.is_contiguous() && weight.numel() > 0,
      "weight: expected bf16 or fp32, (phases, rows, kernel, kernel, channels), contiguous");
  gemm::tiles::Product p{weight.size(1), weight.size(4), weight.size(2), weight.size(3)};
  p.gated = gated;
  p.overlaps = p.taps() > 1;
  p.rows /= p.halves();
  return split ? pack_phases<float>(weight, p.splits()) : pack_phases<BFloat16>(weight, p);
#else
  STD_TORCH_CHECK(false, "weight: nothing is packed so where there is no AMX");
  return weight;
#endif
}

// packed: pack_tiles of a weight (weight_rows, K) of x's dtype, bf16 or fp32. The others as Call's.
Tensor linear_packed(Tensor x, [[maybe_unused]] Tensor packed, int64_t weight_rows,
                     std::optional<Tensor> bias, std::optional<Tensor> residual,
                     int64_t activation) {
  Call call(x, weight_rows, bias, residual, activation);
#if defined(SDFAST_TILES)
  check_device(packed, "packed");
  const auto run = [&](auto element) {
    using T = decltype(element);
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::BFloat16 && packed.is_contiguous() &&
                        packed.numel() == tiles_of<T>(call.width, call.k, call.is_gated()).packed(),
                    "packed: expected pack_tiles of a weight that fits x");
    if (call.y.numel() == 0) return;
    run_tiles<T>(static_cast<const T*>(x.const_data_ptr()), call.stride, call.k,
                 {nullptr, static_cast<const BFloat16*>(packed.const_data_ptr())}, call.tokens,
                 call.epilogue<T>());
  };
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "x: expected bf16 or fp32");
  if (x.scalar_type() == ScalarType::Float) {
    run(float());
  } else {
    run(BFloat16());
  }
#else
  STD_TORCH_CHECK(false, "packed: nothing is packed so where there is no AMX");
#endif
  return call.y;
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
  m.impl("linear_split", TORCH_BOX(&linear_split));
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
  m.impl("pack_tiles", TORCH_BOX(&pack_tiles));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
}

}  // namespace
}  // namespace sdfast
