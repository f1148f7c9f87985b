// conv2d on CPU: packing, checks, launch and registration. The algorithms are in
// conv2d_direct_cpu.h, conv2d_few_channels_cpu.h, conv2d_winograd_cpu.h and
// conv2d_winograd_unpacked_cpu.h.
#include "conv2d_cpu.h"

#include "conv2d_direct_cpu.h"
#include "conv2d_few_channels_cpu.h"
#include "conv2d_winograd_unpacked_cpu.h"
#include "cpu_tensors.h"

namespace sdfast {
namespace {

using conv2d::Added;
using conv2d::Shape;
using conv2d::winograd::F2x2Of2x2;
using conv2d::winograd::F2x2Of3x3;
using conv2d::winograd::F4x4Of2x2;
using conv2d::winograd::F4x4Of3x3;

// kSplit is the direct one in fp32 on AMX tiles, whose factors are sums of two bf16.
enum class Algorithm : int64_t {
  kDirect,
  kWinograd4x4,
  kWinograd2x2,
  kWinograd4x4Unpacked,
  kSplit
};

bool reads_packed(Algorithm algorithm) {
  return algorithm == Algorithm::kWinograd4x4 || algorithm == Algorithm::kWinograd2x2;
}

// Calls body with the transforms of a Winograd algorithm.
template <typename Body>
void with_winograd(int64_t algorithm, bool upsample, const Body& body) {
  const bool large = algorithm == static_cast<int64_t>(Algorithm::kWinograd4x4);
  if (upsample) return large ? body(F4x4Of2x2()) : body(F2x2Of2x2());
  return large ? body(F4x4Of3x3()) : body(F2x2Of3x3());
}

Algorithm checked_algorithm(int64_t algorithm) {
  STD_TORCH_CHECK(algorithm >= 0 && algorithm <= 4, "algorithm: expected 0 to 4");
  return static_cast<Algorithm>(algorithm);
}

template <typename F>
void pack_winograd(const Tensor& weight, float* to) {
  using gemm::kColumns;
  const int64_t out_channels = weight.size(1), channels = weight.size(4);
  const int64_t panels = (out_channels + kColumns - 1) / kColumns;
  const int64_t phase_size = conv2d::winograd::packed_size<F>(out_channels, channels);
  const auto strides = weight.strides();
  const auto* from = static_cast<const float*>(weight.const_data_ptr());
  torch::stable::parallel_for(
      0, weight.size(0) * panels * channels, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t phase = i / channels / panels, panel = i / channels % panels;
          const int64_t c = i % channels;
          float* packed = to + phase * phase_size;
          for (int64_t j = 0; j < kColumns; ++j) {
            const int64_t o = panel * kColumns + j;
            double points[F::kPoints] = {};
            if (o < out_channels) {
              const float* kernel = from + phase * strides[0] + o * strides[1] + c * strides[4];
              conv2d::winograd::transform_kernel<F>(
                  [&](int a, int b) {
                    return static_cast<double>(kernel[a * strides[2] + b * strides[3]]);
                  },
                  points);
            }
            for (int64_t p = 0; p < F::kPoints; ++p) {
              packed[((p * panels + panel) * channels + c) * kColumns + j] =
                  static_cast<float>(points[p]);
            }
          }
        }
      });
}

// weight: (phases, out_channels, kernel, kernel, channels), fp32; one phase of 3x3 kernels, or the
// four of an upsampling convolution. Returns what conv2d_kernel of this Winograd algorithm takes.
Tensor conv2d_pack(Tensor weight, int64_t algorithm) {
  check_device(weight, "weight");
  STD_TORCH_CHECK(reads_packed(checked_algorithm(algorithm)),
                  "algorithm: this one takes no packed weight");
  STD_TORCH_CHECK(weight.dim() == 5 && weight.scalar_type() == ScalarType::Float,
                  "weight: expected fp32, (phases, out_channels, kernel, kernel, channels)");
  STD_TORCH_CHECK(weight.numel() > 0, "weight: expected at least one element");
  const bool upsample = weight.size(0) == 4;
  std::optional<Tensor> packed;
  with_winograd(algorithm, upsample, [&](auto f) {
    using F = decltype(f);
    STD_TORCH_CHECK(weight.size(0) == (upsample ? 4 : 1) && weight.size(2) == F::kKernel &&
                        weight.size(3) == F::kKernel,
                    "weight: expected one phase of 3x3 kernels or four of 2x2");
    const int64_t size = conv2d::winograd::packed_size<F>(weight.size(1), weight.size(4));
    packed = empty({weight.size(0) * size}, ScalarType::Float);
    pack_winograd<F>(weight, packed->mutable_data_ptr<float>());
  });
  return *packed;
}

// x: (N, channels, H, W), channels last. weight: conv2d_pack's, or for an algorithm that takes it
// unpacked (out_channels, kernel_height, kernel_width, channels), for each of the four phases of an
// upsampling one (out_channels, 2, 2, channels), contiguous; for the direct ones also pack_tiles'
// of that. bias: (out_channels). time_embedding: (N, out_channels). residual: as y, channels last.
// padding: left, right, top, bottom. Returns y: (N, out_channels, H', W'), channels last.
Tensor conv2d_kernel(Tensor x, Tensor weight, std::optional<Tensor> bias,
                     std::optional<Tensor> time_embedding, std::optional<Tensor> residual,
                     int64_t algorithm, int64_t out_channels, int64_t kernel_height,
                     int64_t kernel_width, int64_t stride, std::vector<int64_t> padding,
                     bool upsample) {
  check_device(x, "x");
  check_device(weight, "weight");
  STD_TORCH_CHECK(x.dim() == 4 && padding.size() == 4, "x: expected 4 dimensions, padding 4 sides");
  const Algorithm by = checked_algorithm(algorithm);
  Shape s;
  s.images = x.size(0);
  s.channels = x.size(1);
  s.upsample = upsample;
  s.height = x.size(2);
  s.width = x.size(3);
  s.out_channels = out_channels;
  s.kernel_height = kernel_height;
  s.kernel_width = kernel_width;
  s.stride = stride;
  s.left = padding[0];
  s.top = padding[2];
  STD_TORCH_CHECK(stride >= 1 && std::min(s.left, s.top) >= 0 && s.channels >= 1 &&
                      std::min({out_channels, kernel_height, kernel_width}) >= 1,
                  "stride, padding, kernel, channels: out of range");
  const int64_t scale = upsample ? 2 : 1;
  s.out_height = (scale * s.height + padding[2] + padding[3] - kernel_height) / stride + 1;
  s.out_width = (scale * s.width + padding[0] + padding[1] - kernel_width) / stride + 1;
  const bool is_3x3 = kernel_height == 3 && kernel_width == 3 && stride == 1;
  const bool is_direct = by == Algorithm::kDirect || by == Algorithm::kSplit;
  STD_TORCH_CHECK(is_3x3 || (is_direct && !upsample), "kernel: expected 3x3, stride 1");
  STD_TORCH_CHECK(by != Algorithm::kWinograd4x4Unpacked || !upsample,
                  "upsample: this algorithm has none");
  STD_TORCH_CHECK(!upsample || (s.left == 1 && s.top == 1 && padding[1] == 1 && padding[3] == 1),
                  "padding: expected 1 after an upsample");
  STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0, "x: smaller than the kernel");
  const auto check_like = [&](const std::optional<Tensor>& t, const char* name) {
    if (!t) return;
    check_device(*t, name);
    STD_TORCH_CHECK(t->scalar_type() == x.scalar_type(), name, ": expected the dtype of x");
  };
  check_like(bias, "bias");
  check_like(time_embedding, "time_embedding");
  check_like(residual, "residual");
  if (bias) check_shape(*bias, "bias", {out_channels});
  if (time_embedding) check_shape(*time_embedding, "time_embedding", {s.images, out_channels});
  const std::vector<int64_t> sizes{s.images, out_channels, s.out_height, s.out_width};
  if (residual) {
    check_shape(*residual, "residual", {s.images, out_channels, s.out_height, s.out_width});
    STD_TORCH_CHECK(has_layout(*residual, Layout::kChannelsLast),
                    "residual: expected channels last");
  }
  STD_TORCH_CHECK(
      (!bias || bias->is_contiguous()) && (!time_embedding || time_embedding->is_contiguous()),
      "bias, time_embedding: expected contiguous");
  const Tensor input = in_layout(x, Layout::kChannelsLast);
  Tensor y = empty_strided(sizes, dense_strides(sizes, Layout::kChannelsLast), x.scalar_type());
  if (y.numel() == 0) return y;
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Operand = typename gemm::OperandOf<T>::Type;
    const auto data = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
    };
    const Added<T> added{data(bias), data(time_embedding), data(residual)};
    const T* from = static_cast<const T*>(input.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    if (reads_packed(by)) {
      return with_winograd(algorithm, upsample, [&](auto f) {
        using F = decltype(f);
        const int64_t size = conv2d::winograd::packed_size<F>(out_channels, s.channels);
        STD_TORCH_CHECK(weight.numel() == size * (upsample ? 4 : 1) &&
                            weight.scalar_type() == ScalarType::Float && weight.is_contiguous(),
                        "weight: expected conv2d_pack of a weight that fits x");
        conv2d::winograd::run<F>(s, from, weight.const_data_ptr<float>(), added, to);
      });
    }
#if defined(SDFAST_TILES)
    constexpr bool kIsFloat = std::is_same_v<T, float>;
    if constexpr (kIsFloat || std::is_same_v<T, simd::BFloat16>) {
      const bool in_tiles = by == (kIsFloat ? Algorithm::kSplit : Algorithm::kDirect);
      if (in_tiles && weight.dim() == 1) {  // of pack_tiles
        int64_t size = 0;
        for (const conv2d::Phase& phase : conv2d::phases_of(s)) {
          size += conv2d::direct::Bands<T>{s, phase, from}.product().packed();
        }
        STD_TORCH_CHECK(weight.numel() == size && weight.scalar_type() == ScalarType::BFloat16 &&
                            weight.is_contiguous(),
                        "weight: expected pack_tiles of a weight that fits x");
        const auto* packed = static_cast<const simd::BFloat16*>(weight.const_data_ptr());
        return conv2d::direct::run_tiles<T>(s, from, {nullptr, packed}, added, to);
      }
    }
#endif
    const int64_t taps = upsample ? 16 : kernel_height * kernel_width;  // of four phases
    STD_TORCH_CHECK(weight.numel() == out_channels * taps * s.channels &&
                        weight.scalar_type() == x.scalar_type() && weight.is_contiguous(),
                    "weight: expected contiguous, of the dtype of x and a size that fits x");
    const T* values = static_cast<const T*>(weight.const_data_ptr());
    if (by == Algorithm::kWinograd4x4Unpacked) {
      const conv2d::winograd::Weight<T> points{values, out_channels, s.channels};
      return conv2d::winograd::run_unpacked(s, from, points, added, to);
    }
    if (by == Algorithm::kSplit) {
#if defined(SDFAST_TILES)
      if constexpr (kIsFloat) {
        return conv2d::direct::run_tiles<T>(s, from, {values}, added, to);
      }
#endif
      STD_TORCH_CHECK(false, "algorithm: this one takes fp32, where there is AMX");
    }
    if (conv2d::few::suit(s)) return conv2d::few::run<Operand>(s, from, values, added, to);
    // A pair must not reach from one tap to the next.
    if (s.channels % Operand::kDepth == 0) {
      return conv2d::direct::run<Operand>(s, from, values, added, to);
    }
    conv2d::direct::run<gemm::Float32>(s, from, values, added, to);
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("conv2d_pack", TORCH_BOX(&conv2d_pack));
  m.impl("conv2d_kernel", TORCH_BOX(&conv2d_kernel));
}

}  // namespace
}  // namespace sdfast
