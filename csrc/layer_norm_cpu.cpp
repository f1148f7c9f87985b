// layer_norm on CPU, forward and backward, for fp32, bf16 and fp16.
//
// Algorithm. Forward, row by row: (1) the sums of deviations from a center near the mean and of
// their squares, which give the mean and the variance about it; (2) y. Backward, in blocks of rows:
// (1) per row the sums of dxhat = dy * weight and of dxhat * (x - mean); (2) some rows at a time dx
// = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)) and the block's sums for dweight and dbias,
// which are merged in fp64, block after block. Bytes: forward x and y once, backward x, dy and dx
// once: between the steps rows stay in L1. Limit: memory bandwidth. Blocks depend on the shape
// alone, so the result does not depend on the number of threads.
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <memory>
#include <tuple>

#include "cpu_math.h"
#include "cpu_tensors.h"

namespace sdfast {
namespace {

using simd::Vec;
using simd::Vecs;

constexpr int64_t kGrainElements = 32768;  // worth a thread
constexpr int64_t kStrip = 4096;           // fp32 sums over more would round too much
constexpr int64_t kBlockElements = 65536;  // of backward
constexpr int64_t kFewestBlockRows = 16, kMostBlockRows = 256;
constexpr int kRows = 4;  // taken together where they share sums

// Contiguous.
struct Shape {
  int64_t rows, width;
};

// Parameters of the formula in fp32, (width); null where absent.
struct Affine {
  const float *weight, *bias;
};

// One vector of a parameter, or what changes nothing where it is absent.
template <typename Lanes>
SDFAST_INLINE Vec at(const float* values, int64_t i, float neutral, Lanes lanes) {
  return values ? simd::load(values + i, lanes) : simd::broadcast(neutral);
}

template <int N>
struct Sums {
  double of[N];
};

// The N vectors of term(i, lanes), lanes beyond the row being zero, summed over a row in four
// interleaved chains, as one chain of additions is slow.
template <int N, typename Term>
SDFAST_INLINE Sums<N> sum_row(int64_t width, const Term& term) {
  Sums<N> sums{};
  for (int64_t begin = 0; begin < width; begin += kStrip) {
    const int64_t end = std::min(begin + kStrip, width);
    constexpr int kLanes = simd::kLanes;
    const simd::FullVector full;
    Vecs<N> a{}, b{}, c{}, d{};
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      a = a + term(i, full);
      b = b + term(i + kLanes, full);
      c = c + term(i + 2 * kLanes, full);
      d = d + term(i + 3 * kLanes, full);
    }
    simd::for_each_vector(i, end, [&](int64_t j, auto lanes) { a = a + term(j, lanes); });
    simd::for_each_of((a + b) + (c + d), [&](int k, Vec v) { sums.of[k] += simd::sum(v); });
  }
  return sums;
}

// The sums of a row's deviations from a center and of their squares.
struct Moments {
  float center;
  double sum, squares;
};

// The first elements give the center; should they be far from typical, so that squares about the
// mean would lose too many digits, the mean they led to is the center of a second attempt.
template <typename T>
SDFAST_INLINE Moments moments(const T* x, int64_t width) {
  const int first = static_cast<int>(std::min<int64_t>(width, simd::kLanes));
  const Vec typical =
      first < simd::kLanes ? simd::load(x, first) : simd::load(x, simd::FullVector());
  float center = simd::sum(typical) / static_cast<float>(first);
  for (int attempt = 0;; ++attempt) {
    const auto sums = sum_row<2>(width, [&](int64_t i, auto lanes) {
      const Vec deviation = simd::keep_first(simd::load(x + i, lanes) - center, lanes);
      return Vecs<2>{{deviation, deviation * deviation}};
    });
    const double shift = sums.of[0] / width, squares = sums.of[1];
    const bool poor = squares > 2.0 * (squares - sums.of[0] * shift);  // false for NaN
    if (!poor || attempt == 1) return {center, sums.of[0], squares};
    center += static_cast<float>(shift);
  }
}

// y of one row from x and its moments; `scale` is rstd.
template <typename T>
SDFAST_INLINE void normalize_row(const T* x, int64_t width, const Moments& about, double shift,
                                 double scale, Affine affine, T* y) {
  const Vec gain = simd::broadcast(static_cast<float>(scale));
  const Vec offset = simd::broadcast(static_cast<float>(-shift * scale));
  simd::for_each_vector(0, width, [&, affine, width](int64_t i, auto lanes) {
    simd::prefetch(x + i + width);
    simd::prefetch_for_write(y + i + width);
    const Vec xhat = (simd::load(x + i, lanes) - about.center) * gain + offset;
    const Vec z = xhat * at(affine.weight, i, 1, lanes) + at(affine.bias, i, 0, lanes);
    simd::store(y + i, z, lanes);
  });
}

// mean, rstd: (rows), or null where nobody asks for them.
template <typename T>
void forward(const Shape& shape, const T* x, const Affine& affine, double eps, T* y, float* mean,
             float* rstd) {
  const int64_t width = shape.width;
  const auto run = [=](int64_t row) {
    const T* from = x + row * width;
    const Moments about = moments(from, width);
    const double shift = about.sum / width;  // from the center to the mean
    const double squares = about.squares - about.sum * shift;
    // Rounding may leave a constant row just below zero; a NaN is kept.
    const double scale = 1.0 / std::sqrt((squares < 0 ? 0.0 : squares / width) + eps);
    if (mean) {
      mean[row] = static_cast<float>(about.center + shift);
      rstd[row] = static_cast<float>(scale);
    }
    normalize_row(from, width, about, shift, scale, affine, y + row * width);
  };
  const int64_t grain = 1 + kGrainElements / width;
  torch::stable::parallel_for(0, shape.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) run(row);
  });
}

// The rows whose terms of dweight and dbias are summed together.
struct Blocks {
  int64_t rows, count, padded;  // padded: the width in whole vectors

  explicit Blocks(const Shape& shape) {
    rows = std::clamp(kBlockElements / shape.width, kFewestBlockRows, kMostBlockRows);
    count = (shape.rows + rows - 1) / rows;
    padded = simd::round_up(shape.width);
  }
  int64_t partials_size() const { return 2 * padded; }
};

// dx of `count` rows; what they give to dweight and dbias is added to the partials, if any.
template <int count, typename T>
SDFAST_INLINE void backward_rows(int64_t width, const T* dy, const T* x, const float* weight,
                                 const float* mean, const float* rstd, T* dx, float* dweight,
                                 float* dbias) {
  struct {
    float mean[count], rstd[count], pull[count], slope[count];
  } k;  // dx = dxhat * rstd - pull - (x - mean) * slope
  for (int j = 0; j < count; ++j) {
    const T *row_x = x + j * width, *row_dy = dy + j * width;
    const auto sums = sum_row<2>(width, [&](int64_t i, auto lanes) {
      const Vec dxhat = simd::load(row_dy + i, lanes) * at(weight, i, 1, lanes);
      const Vec deviation = simd::keep_first(simd::load(row_x + i, lanes) - mean[j], lanes);
      return Vecs<2>{{dxhat, dxhat * deviation}};
    });
    const double scale = rstd[j];
    k.mean[j] = mean[j];
    k.rstd[j] = rstd[j];
    k.pull[j] = static_cast<float>(sums.of[0] / width * scale);
    k.slope[j] = static_cast<float>(sums.of[1] / width * scale * scale * scale);
  }
  simd::for_each_vector(0, width, [&](int64_t i, auto lanes) {
    const auto gradient = simd::make_vecs<count>([&](int j) {
      simd::prefetch(dy + (j + count) * width + i);
      return simd::load(dy + j * width + i, lanes);
    });
    const auto deviation = simd::make_vecs<count>([&](int j) {
      simd::prefetch(x + (j + count) * width + i);
      return simd::load(x + j * width + i, lanes) - k.mean[j];
    });
    const Vec factor = at(weight, i, 1, lanes);
    simd::for_each_of(gradient, [&](int j, Vec g) {
      simd::prefetch_for_write(dx + (j + count) * width + i);
      const Vec result = g * factor * k.rstd[j] - k.pull[j] - deviation.v[j] * k.slope[j];
      simd::store(dx + j * width + i, result, lanes);
    });
    if (!dweight) return;
    Vec along_xhat{}, along_one{};
    simd::for_each_of(gradient, [&](int j, Vec g) {
      along_xhat += g * (deviation.v[j] * k.rstd[j]);
      along_one += g;
    });
    simd::store(dweight + i, simd::load(dweight + i) + along_xhat);
    simd::store(dbias + i, simd::load(dbias + i) + along_one);
  });
}

// mean, rstd: (rows). partials: (blocks, 2, padded), sums for dweight and dbias, written; or null.
template <typename T>
void backward(const Shape& shape, const Blocks& blocks, const T* dy, const T* x,
              const float* weight, const float* mean, const float* rstd, T* dx, float* partials) {
  const int64_t width = shape.width;
  const auto run = [&](int64_t block) {
    float* dweight = partials ? partials + block * blocks.partials_size() : nullptr;
    float* dbias = partials ? dweight + blocks.padded : nullptr;
    if (partials) std::fill_n(dweight, blocks.partials_size(), 0.0f);
    const int64_t end = std::min((block + 1) * blocks.rows, shape.rows);
    const auto take = [&](int64_t row, auto count) {
      const int64_t from = row * width;
      backward_rows<count>(width, dy + from, x + from, weight, mean + row, rstd + row, dx + from,
                           dweight, dbias);
    };
    int64_t row = block * blocks.rows;
    for (; row + kRows <= end; row += kRows) take(row, std::integral_constant<int, kRows>());
    for (; row < end; ++row) take(row, std::integral_constant<int, 1>());
  };
  const int64_t grain = 1 + kGrainElements / (blocks.rows * width);
  torch::stable::parallel_for(0, blocks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) run(block);
  });
}

// x is (*, *shape) with `axes` of them normalized together.
Shape shape_of(const Tensor& x, int64_t axes) {
  check_device(x, "x");
  STD_TORCH_CHECK(axes > 0 && axes <= x.dim(), "axes: expected 1 to the rank of x");
  Shape shape{1, 1};
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    (axis < x.dim() - axes ? shape.rows : shape.width) *= x.size(axis);
  }
  return shape;
}

Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

Tensor normalize(const Tensor& x, int64_t axes, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, double eps, float* mean, float* rstd) {
  const Shape shape = shape_of(x, axes);
  const auto normalized = x.sizes().slice(x.dim() - axes);
  const Values w(weight, "weight", normalized), b(bias, "bias", normalized);
  const Tensor input = as_contiguous(x);
  Tensor y = empty(x.sizes(), x.scalar_type());
  if (x.numel() == 0) return y;
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    forward(shape, static_cast<const T*>(input.const_data_ptr()), Affine{w.data(), b.data()}, eps,
            static_cast<T*>(y.mutable_data_ptr()), mean, rstd);
  });
  return y;
}

Tensor layer_norm_cpu(Tensor x, int64_t axes, std::optional<Tensor> weight,
                      std::optional<Tensor> bias, double eps) {
  return normalize(x, axes, weight, bias, eps, nullptr, nullptr);
}

// Returns y, mean and rstd: (rows), fp32.
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(Tensor x, int64_t axes,
                                                      std::optional<Tensor> weight,
                                                      std::optional<Tensor> bias, double eps) {
  const Shape shape = shape_of(x, axes);
  Tensor mean = empty({shape.rows}, ScalarType::Float);
  Tensor rstd = empty({shape.rows}, ScalarType::Float);
  float *means = mean.mutable_data_ptr<float>(), *rstds = rstd.mutable_data_ptr<float>();
  if (x.numel() == 0) {
    std::fill_n(means, shape.rows, 0.0f);
    std::fill_n(rstds, shape.rows, 0.0f);
  }
  Tensor y = normalize(x, axes, weight, bias, eps, means, rstds);
  return {y, mean, rstd};
}

// dy: as x. mean, rstd: (rows), fp32. Returns dx, contiguous, then the gradients of weight and bias
// in their dtypes, each of no elements where the parameter is absent.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, Tensor x, Tensor mean,
                                                       Tensor rstd, int64_t axes,
                                                       std::optional<Tensor> weight,
                                                       std::optional<Tensor> bias) {
  const Shape shape = shape_of(x, axes);
  check_device(dy, "dy");
  check_shape(dy, "dy", x.sizes());
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy: expected the dtype of x");
  const auto normalized = x.sizes().slice(x.dim() - axes);
  const Values saved_mean(mean, "mean", {shape.rows}), saved_rstd(rstd, "rstd", {shape.rows});
  const Values w(weight, "weight", normalized);
  if (bias) check_shape(*bias, "bias", normalized);
  const Tensor input = as_contiguous(x), output_gradient = as_contiguous(dy);
  Tensor dx = empty(x.sizes(), x.scalar_type());
  std::vector<double> sums;
  if (weight || bias) sums.assign(2 * shape.width, 0.0);
  if (x.numel() > 0) {
    const Blocks blocks(shape);
    const int64_t size = blocks.partials_size();
    const std::unique_ptr<float[]> partials(sums.empty() ? nullptr
                                                         : new float[blocks.count * size]);
    with_element_type(x.scalar_type(), [&](auto element) {
      using T = decltype(element);
      backward(shape, blocks, static_cast<const T*>(output_gradient.const_data_ptr()),
               static_cast<const T*>(input.const_data_ptr()), w.data(), saved_mean.data(),
               saved_rstd.data(), static_cast<T*>(dx.mutable_data_ptr()), partials.get());
    });
    for (int64_t block = 0; partials && block < blocks.count; ++block) {
      const float* from = partials.get() + block * size;
      for (int64_t c = 0; c < shape.width; ++c) {
        sums[c] += from[c];
        sums[shape.width + c] += from[blocks.padded + c];
      }
    }
  }
  return {dx, parameter_gradient(x, weight, [&](int64_t c) { return sums[c]; }),
          parameter_gradient(x, bias, [&](int64_t c) { return sums[shape.width + c]; })};
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm_cpu));
  m.impl("layer_norm_forward", TORCH_BOX(&layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
}

}  // namespace
}  // namespace sdfast
