// The tensors of conv2d's CUDA kernels.
#include <tuple>
#include <vector>

#include "conv2d_cuda.cuh"
#include "cuda_tensors.h"
#include "tile_product_cuda.cuh"

namespace sdfast {
namespace {

// The operands of a call, checked, in the layouts that kernels read; and its geometry.
class Conv2dTensors {
 public:
  // x: (N, C, H, W). weight: (O, C + C2, kh, kw), or with `upsample` (4, O, 2, 2, C + C2), the
  // kernels of the four phases. bias: (O). time_embedding: (N, O). residual: as y. skip: (N, C2, H,
  // W). norm: empty, or mean and rstd, (N, groups), fp32, weight and bias, (C + C2). padding: left,
  // right, top, bottom.
  Conv2dTensors(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                int64_t stride, const std::vector<int64_t>& padding, bool upsample,
                const std::optional<Tensor>& time_embedding, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& skip, const std::vector<Tensor>& norm, bool silu)
      : dtype_(x.scalar_type()), silu_(silu) {
    STD_TORCH_CHECK(x.dim() == 4 && padding.size() == 4,
                    "x: expected 4 dimensions, padding 4 sides");
    STD_TORCH_CHECK(weight.dim() == (upsample ? 5 : 4),
                    "weight: expected 4 dimensions, or of four ", "phases 5 with an upsample");
    images_ = x.size(0), channels_ = x.size(1), height_ = x.size(2), width_ = x.size(3);
    x_ = image(x, "x", {images_, channels_, height_, width_});
    if (skip) {
      STD_TORCH_CHECK(skip->dim() == 4, "skip: expected 4 dimensions");
      skip_channels_ = skip->size(1);
      skip_ = image(*skip, "skip", {images_, skip_channels_, height_, width_});
    }
    const int64_t all_channels = channels_ + skip_channels_;
    phases_ = upsample ? 4 : 1;
    out_channels_ = weight.size(upsample ? 1 : 0);
    taps_y_ = weight.size(2), taps_x_ = weight.size(3);
    stride_ = stride, left_ = padding[0], top_ = padding[2];
    STD_TORCH_CHECK(std::min({left_, padding[1], top_, padding[3]}) >= 0, "padding: out of range");
    STD_TORCH_CHECK(std::min(taps_y_, taps_x_) >= 1 && std::max(taps_y_, taps_x_) <= 3 &&
                        (stride == 1 || stride == 2),
                    "weight, stride: expected kernels of 1 to 3 pixels, stride 1 or 2");
    if (upsample) {
      const bool ones =
          std::all_of(padding.begin(), padding.end(), [](int64_t p) { return p == 1; });
      STD_TORCH_CHECK(weight.size(0) == 4 && taps_y_ == 2 && taps_x_ == 2 && stride == 1 && ones,
                      "weight: an upsample expects four phases of 2x2, stride 1, padding 1");
      weight_ = flat(weight, "weight", {4, out_channels_, 2, 2, all_channels});
      out_height_ = height_, out_width_ = width_;
    } else {
      weight_ = image(weight, "weight", {out_channels_, all_channels, taps_y_, taps_x_});
      out_height_ = (height_ + top_ + padding[3] - taps_y_) / stride + 1;
      out_width_ = (width_ + left_ + padding[1] - taps_x_) / stride + 1;
      STD_TORCH_CHECK(
          height_ + top_ + padding[3] >= taps_y_ && width_ + left_ + padding[1] >= taps_x_,
          "x: smaller than the kernel");
    }
    const int64_t scale = upsample ? 2 : 1;
    y_sizes_ = {images_, out_channels_, scale * out_height_, scale * out_width_};
    if (bias) bias_ = flat(*bias, "bias", {out_channels_});
    if (time_embedding) {
      check(*time_embedding, "time_embedding", {images_, out_channels_}, dtype_);
      // As it lies where it can be: one row may be of all images.
      time_embedding_ = time_embedding->stride(1) == 1
                            ? *time_embedding
                            : in_layout(*time_embedding, Layout::kChannelsFirst);
    }
    if (residual) residual_ = image(*residual, "residual", y_sizes_);
    if (norm.empty()) return;
    STD_TORCH_CHECK(norm.size() == 4 && norm[0].dim() == 2,
                    "norm: expected mean and rstd, (N, groups), weight and bias");
    groups_ = norm[0].size(1);
    STD_TORCH_CHECK(groups_ >= 1 && all_channels % groups_ == 0,
                    "norm: groups divide the channels");
    mean_ = flat(norm[0], "norm", {images_, groups_}, ScalarType::Float);
    rstd_ = flat(norm[1], "norm", {images_, groups_}, ScalarType::Float);
    norm_weight_ = flat(norm[2], "norm", {all_channels});
    norm_bias_ = flat(norm[3], "norm", {all_channels});
  }

  ScalarType dtype() const { return dtype_; }
  int64_t images() const { return images_; }
  int64_t out_channels() const { return out_channels_; }
  Tensor new_result() const {
    return empty_strided(y_sizes_, dense_strides(y_sizes_, Layout::kChannelsLast), dtype_);
  }

  template <typename T>
  Conv2d<T> on(const Call& call, const Tensor& y) const {
    Conv2d<T> conv = {};
    conv.images = to_int(images_), conv.height = to_int(height_), conv.width = to_int(width_);
    conv.channels = to_int(channels_), conv.skip_channels = to_int(skip_channels_);
    conv.out_channels = to_int(out_channels_);
    conv.out_height = to_int(out_height_), conv.out_width = to_int(out_width_);
    conv.phases = phases_, conv.taps_y = to_int(taps_y_), conv.taps_x = to_int(taps_x_);
    conv.stride = to_int(stride_), conv.top = to_int(top_), conv.left = to_int(left_);
    conv.x = input<T>(call, x_), conv.skip = input<T>(call, skip_);
    conv.weight = input<T>(call, weight_), conv.bias = input<T>(call, bias_);
    conv.time_embedding = input<T>(call, time_embedding_);
    conv.time_stride = time_embedding_ && images_ > 1 ? time_embedding_->stride(0) : 0;
    conv.residual = input<T>(call, residual_);
    conv.y = call.output<T>(y);
    conv.mean = input<float>(call, mean_), conv.rstd = input<float>(call, rstd_);
    conv.norm_weight = input<T>(call, norm_weight_), conv.norm_bias = input<T>(call, norm_bias_);
    conv.groups = to_int(groups_), conv.silu = silu_;
    flatten(conv);
    return conv;
  }

 private:
  static int to_int(int64_t size) {
    STD_TORCH_CHECK(size >= 0 && size < int64_t{1} << 30, "x, weight: a size is out of range");
    return static_cast<int>(size);
  }
  template <typename T>
  static const T* input(const Call& call, const std::optional<Tensor>& tensor) {
    return tensor ? call.input<T>(*tensor) : nullptr;
  }
  void check(const Tensor& t, const char* name, const std::vector<int64_t>& shape,
             ScalarType dtype) const {
    check_device(t, name);
    check_shape(t, name, shape);
    STD_TORCH_CHECK(t.scalar_type() == dtype, name,
                    ": expected the dtype of x, of statistics fp32");
  }
  Tensor image(const Tensor& t, const char* name, const std::vector<int64_t>& shape) const {
    check(t, name, shape, dtype_);
    return in_layout(t, Layout::kChannelsLast);
  }
  Tensor flat(const Tensor& t, const char* name, const std::vector<int64_t>& shape,
              std::optional<ScalarType> dtype = std::nullopt) const {
    check(t, name, shape, dtype.value_or(dtype_));
    return in_layout(t, Layout::kChannelsFirst);
  }

  ScalarType dtype_;
  int64_t images_, channels_, height_, width_, skip_channels_ = 0;
  int64_t out_channels_, out_height_, out_width_, taps_y_, taps_x_, stride_, top_, left_;
  int64_t groups_ = 1;
  int phases_;
  bool silu_;
  std::vector<int64_t> y_sizes_;
  std::optional<Tensor> x_, skip_, weight_, bias_, time_embedding_, residual_;
  std::optional<Tensor> mean_, rstd_, norm_weight_, norm_bias_;
};

// Where moments are wanted, of how many groups, and what they become.
struct Statistics {
  int64_t groups;
  float eps;
  Tensor mean, rstd;  // (N, groups), fp32
};

void run(const Call& call, const Conv2dTensors& tensors, const Tensor& y,
         const Statistics* statistics) {
  with_element_type(tensors.dtype(), [&](auto element) {
    using T = decltype(element);
    const Conv2d<T> conv = tensors.on<T>(call, y);
    if constexpr (sizeof(T) == 2) {
      if (!statistics && suits_tile_product(conv) && has_tile_products<T>(current_device())) {
        return tile_product<false>(conv, current_device(), call.stream());
      }
    }
    const Conv2dPlan plan = plan_conv2d(conv, current_device());
    STD_TORCH_CHECK(plan.tile >= 0, "weight, stride: no tile of these fits a block");
    STD_TORCH_CHECK(plan.tiles(conv.phases, conv.images) < int64_t{1} << 31, "x: too large");
    std::optional<Tensor> partials, moments;
    if (const int64_t size = partial_sums(conv, plan)) partials = empty({size}, ScalarType::Float);
    const int64_t entries = moment_entries(conv, plan);
    if (statistics) {
      STD_TORCH_CHECK(entries * conv.out_channels < int64_t{1} << 31,
                      "x: too large for statistics");
      constexpr int64_t kFloats = sizeof(ChannelMoments) / sizeof(float);
      moments =
          empty({tensors.images(), entries, tensors.out_channels(), kFloats}, ScalarType::Float);
    }
    auto* const at =
        moments ? reinterpret_cast<ChannelMoments*>(call.output<float>(*moments)) : nullptr;
    conv2d(conv, plan, partials ? call.output<float>(*partials) : nullptr, at, call.stream());
    if (!statistics) return;
    const int64_t size = conv.out_channels / statistics->groups;
    const float values =
        static_cast<float>(int64_t{conv.phases} * conv.out_height * conv.out_width * size);
    const GroupStatistics group{at,
                                call.output<float>(statistics->mean),
                                call.output<float>(statistics->rstd),
                                conv.images,
                                static_cast<int>(statistics->groups),
                                conv.out_channels,
                                static_cast<int>(entries),
                                values,
                                statistics->eps};
    launch(conv2d_statistics_kernel,
           {dim3(static_cast<unsigned>(conv.images * statistics->groups)), dim3(kGroupThreads)},
           call.stream(), group);
  });
}

// See Conv2dTensors. Returns y: (N, O, H', W'), channels last.
Tensor conv2d_kernel_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride,
                          std::vector<int64_t> padding, bool upsample,
                          std::optional<Tensor> time_embedding, std::optional<Tensor> residual,
                          std::optional<Tensor> skip, std::vector<Tensor> norm, bool norm_silu) {
  const Call call(x);
  const Conv2dTensors tensors(x, weight, bias, stride, padding, upsample, time_embedding, residual,
                              skip, norm, norm_silu);
  Tensor y = tensors.new_result();
  run(call, tensors, y, nullptr);
  return y;
}

// Returns y, and its mean and rstd over groups of channels, (N, stats_groups) both, fp32.
std::tuple<Tensor, Tensor, Tensor> conv2d_statistics_cuda(
    Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride,
    std::vector<int64_t> padding, bool upsample, std::optional<Tensor> time_embedding,
    std::optional<Tensor> residual, std::optional<Tensor> skip, std::vector<Tensor> norm,
    bool norm_silu, int64_t stats_groups, double stats_eps) {
  const Call call(x);
  const Conv2dTensors tensors(x, weight, bias, stride, padding, upsample, time_embedding, residual,
                              skip, norm, norm_silu);
  STD_TORCH_CHECK(stats_groups >= 1 && tensors.out_channels() % stats_groups == 0,
                  "stats_groups: expected a divisor of the channels of y");
  Tensor y = tensors.new_result();
  const Statistics statistics{stats_groups, static_cast<float>(stats_eps),
                              empty({tensors.images(), stats_groups}, ScalarType::Float),
                              empty({tensors.images(), stats_groups}, ScalarType::Float)};
  run(call, tensors, y, &statistics);
  return {y, statistics.mean, statistics.rstd};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, SDFAST_DISPATCH_KEY, m) {
  m.impl("conv2d_kernel_cuda", TORCH_BOX(&conv2d_kernel_cuda));
  m.impl("conv2d_statistics_cuda", TORCH_BOX(&conv2d_statistics_cuda));
}

}  // namespace
}  // namespace sdfast
