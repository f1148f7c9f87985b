// conv2d on CPU for training: the gradients of x and of the weight. Checks, launch and
// registration. The algorithms: direct in conv2d_backward_direct_cpu.h, of bf16 on AMX in
// conv2d_backward_tiles_cpu.h; Winograd's in conv2d_backward_winograd_cpu.h and, for the gradient
// of x, conv2d_winograd_unpacked_cpu.h.
#include "conv2d_backward_direct_cpu.h"
#include "conv2d_backward_tiles_cpu.h"
#include "conv2d_backward_winograd_cpu.h"
#include "cpu_tensors.h"

namespace sdfast {
namespace {

using conv2d::Shape;

// padding: left, right, top, bottom.
Shape shape_of(IntHeaderOnlyArrayRef x, IntHeaderOnlyArrayRef weight, int64_t stride,
               const std::vector<int64_t>& padding) {
  STD_TORCH_CHECK(x.size() == 4 && weight.size() == 4 && padding.size() == 4,
                  "x, weight: expected 4 dimensions, padding 4 sides");
  STD_TORCH_CHECK(x[1] == weight[1], "x: the channels do not fit the weight");
  Shape s;
  s.images = x[0];
  s.channels = x[1];
  s.upsample = false;
  s.height = x[2];
  s.width = x[3];
  s.out_channels = weight[0];
  s.kernel_height = weight[2];
  s.kernel_width = weight[3];
  s.stride = stride;
  s.left = padding[0];
  s.top = padding[2];
  STD_TORCH_CHECK(stride >= 1 && *std::min_element(padding.begin(), padding.end()) >= 0,
                  "stride, padding: out of range");
  STD_TORCH_CHECK(std::min({s.images, s.channels, s.height, s.width, s.out_channels,
                            s.kernel_height, s.kernel_width}) >= 1,
                  "x, weight: expected at least one element");
  s.out_height = (s.height + padding[2] + padding[3] - s.kernel_height) / stride + 1;
  s.out_width = (s.width + padding[0] + padding[1] - s.kernel_width) / stride + 1;
  STD_TORCH_CHECK(s.height + padding[2] + padding[3] >= s.kernel_height &&
                      s.width + padding[0] + padding[1] >= s.kernel_width,
                  "x: smaller than the kernel");
  return s;
}

// Whether Winograd's algorithm, which the caller may allow, computes this convolution.
void check_winograd(const Shape& s, bool winograd) {
  STD_TORCH_CHECK(!winograd || (s.kernel_height == 3 && s.kernel_width == 3 && s.stride == 1),
                  "winograd: expected a 3x3 kernel of stride 1");
}

void check_image(const Tensor& t, const char* name, ScalarType dtype) {
  check_device(t, name);
  STD_TORCH_CHECK(t.scalar_type() == dtype && has_layout(t, Layout::kChannelsLast), name,
                  ": expected channels last, in the dtype of the others");
}

Tensor new_image(IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return empty_strided(sizes, dense_strides(sizes, Layout::kChannelsLast), dtype);
}

void check_result(const Tensor& dy, const Shape& s) {
  check_shape(dy, "dy", {s.images, s.out_channels, s.out_height, s.out_width});
}

// Without Winograd's algorithm.
template <typename T>
void input_gradient(const Shape& s, const T* dy, const T* weight, T* dx) {
  using Operand = typename gemm::OperandOf<T>::Type;
  if (s.out_channels % Operand::kDepth == 0) {
    conv2d::direct::input_gradient<Operand>(s, dy, weight, dx);
  } else {
    conv2d::direct::input_gradient<gemm::Float32>(s, dy, weight, dx);
  }
}
template <typename T>
void weight_gradient(const Shape& s, const T* dy, const T* x, T* dw) {
  conv2d::direct::weight_gradient<typename gemm::OperandOf<T>::Type>(s, dy, x, dw);
}
#if defined(SDFAST_TILES)
using conv2d::tiles::input_gradient;
using conv2d::tiles::weight_gradient;
#endif

// dy: as y. weight as above. height, width: of x. Returns dx.
Tensor conv2d_input_gradient(Tensor dy, Tensor weight, int64_t height, int64_t width,
                             int64_t stride, std::vector<int64_t> padding, bool winograd) {
  const ScalarType dtype = dy.scalar_type();
  check_image(dy, "dy", dtype);
  check_image(weight, "weight", dtype);
  const std::vector<int64_t> sizes{dy.size(0), weight.size(1), height, width};
  const Shape s = shape_of(sizes, weight.sizes(), stride, padding);
  check_result(dy, s);
  check_winograd(s, winograd);
  STD_TORCH_CHECK(!winograd || (s.left <= 2 && s.top <= 2),
                  "winograd: expected a padding of at most 2");
  Tensor dx = new_image(sizes, dtype);
  if (std::min(s.kernel_height, s.kernel_width) < stride) torch::stable::zero_(dx);
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(dy.const_data_ptr());
    const T* w = static_cast<const T*>(weight.const_data_ptr());
    T* to = static_cast<T*>(dx.mutable_data_ptr());
    if (!winograd) return input_gradient(s, from, w, to);
    Shape turned = s;
    std::swap(turned.channels, turned.out_channels);
    std::swap(turned.height, turned.out_height);
    std::swap(turned.width, turned.out_width);
    turned.left = 2 - s.left;
    turned.top = 2 - s.top;
    const conv2d::winograd::TurnedWeight<T> points{w, s.out_channels, s.channels};
    conv2d::winograd::run_unpacked(turned, from, points, conv2d::Added<T>{}, to);
  });
  return dx;
}

// dy: as y. x as above. Returns dW: (O, C, kernel_height, kernel_width), channels last.
Tensor conv2d_weight_gradient(Tensor dy, Tensor x, int64_t kernel_height, int64_t kernel_width,
                              int64_t stride, std::vector<int64_t> padding, bool winograd) {
  const ScalarType dtype = x.scalar_type();
  check_image(dy, "dy", dtype);
  check_image(x, "x", dtype);
  const std::vector<int64_t> sizes{dy.size(1), x.size(1), kernel_height, kernel_width};
  const Shape s = shape_of(x.sizes(), sizes, stride, padding);
  check_result(dy, s);
  check_winograd(s, winograd);
  Tensor dw = new_image(sizes, dtype);
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const T* result = static_cast<const T*>(dy.const_data_ptr());
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(dw.mutable_data_ptr());
    if (winograd) return conv2d::winograd::weight_gradient(s, result, from, to);
    weight_gradient(s, result, from, to);
  });
  return dw;
}

STABLE_TORCH_LIBRARY_IMPL(sdfast, CPU, m) {
  m.impl("conv2d_input_gradient", TORCH_BOX(&conv2d_input_gradient));
  m.impl("conv2d_weight_gradient", TORCH_BOX(&conv2d_weight_gradient));
}

}  // namespace
}  // namespace sdfast
