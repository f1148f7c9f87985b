// Tensors that an elementwise operation takes sample by sample (the first axis), wherever these
// lie.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "tensor_checks.h"

namespace sdfast {

// How the tensors of an elementwise operation lie: samples (the first axis) of any distance, each
// of them dense with the same strides. A slice of an image's channels needs no copy then.
struct SampleLayout {
  int64_t samples = 1, size = 1;        // elements of one sample
  std::vector<int64_t> sizes, strides;  // of the results, sample after sample

  // As x lies where its samples are dense, else contiguous.
  explicit SampleLayout(const Tensor& x) {
    sizes.assign(x.sizes().begin(), x.sizes().end());
    strides.assign(x.strides().begin(), x.strides().end());
    const int64_t dim = x.dim();
    if (dim == 0) return;
    std::vector<int64_t> axes;  // that move through a sample, fastest first
    for (int64_t axis = dim - 1; axis > 0; --axis) {
      size *= sizes[axis];
      if (sizes[axis] > 1) axes.push_back(axis);
    }
    std::stable_sort(axes.begin(), axes.end(),
                     [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
    int64_t expected = 1;
    bool dense = true;
    for (const int64_t axis : axes) {
      dense = dense && strides[axis] == expected;
      expected *= sizes[axis];
    }
    samples = sizes[0];
    if (!dense) {
      strides = dense_strides(sizes, Layout::kChannelsFirst);
    } else if (samples > 1) {
      strides[0] = expected;
    }
  }

  // t has the sizes of x, but for the number of samples.
  bool fits(const Tensor& t) const {
    const IntHeaderOnlyArrayRef its = t.strides();
    for (size_t axis = 1; axis < sizes.size(); ++axis) {
      if (sizes[axis] > 1 && its[axis] != strides[axis]) return false;
    }
    return true;
  }
  Tensor new_result(ScalarType dtype) const { return empty_strided(sizes, strides, dtype); }
  // Calls body(sample, begin, end) for parts of samples, which threads share out. `joined`: the
  // samples of every tensor lie one after another, and count as one. `grain`: elements worth a
  // thread.
  template <typename Body>
  void for_each_part(bool joined, const Body& body, int64_t grain = 32768) const {
    const int64_t length = joined ? samples * size : size;
    torch::stable::parallel_for(0, samples * size, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t sample = begin / length, first = sample * length;
        const int64_t last = std::min(end, first + length);
        body(sample, begin - first, last - first);
        begin = last;
      }
    });
  }
};

// Walks through a sample as its elements lie, and tells each one's index in logical (row-major)
// order.
class LogicalIndex {
 public:
  LogicalIndex(const SampleLayout& layout, int64_t position) {
    int64_t logical_stride = 1;
    for (size_t axis = layout.sizes.size() - 1; axis > 0; --axis) {
      const int64_t size = layout.sizes[axis];
      if (size > 1) axes_.push_back({size, layout.strides[axis], logical_stride, 0});
      logical_stride *= size;
    }
    in_order_ = std::is_sorted(axes_.begin(), axes_.end(), lies_closer);
    std::sort(axes_.begin(), axes_.end(), lies_closer);
    for (Axis& axis : axes_) {
      axis.at = position % axis.size;
      position /= axis.size;
      index_ += axis.at * axis.logical_stride;
    }
  }
  bool in_order() const { return in_order_; }  // elements lie as they are counted
  int64_t next() {
    const int64_t index = index_;
    for (Axis& axis : axes_) {
      index_ += axis.logical_stride;
      if (++axis.at < axis.size) break;
      index_ -= axis.size * axis.logical_stride;
      axis.at = 0;
    }
    return index;
  }

 private:
  struct Axis {
    int64_t size, stride, logical_stride, at;
  };
  static bool lies_closer(const Axis& a, const Axis& b) { return a.stride < b.stride; }
  std::vector<Axis> axes_;  // fastest first
  int64_t index_ = 0;
  bool in_order_;
};

// An input of an elementwise operation, copied where its samples lie otherwise, or where they are
// so short that taking each by itself costs more.
class Samples {
 public:
  static constexpr int64_t kShortSample = 64;

  // `groups`: how many tensors of the layout's shape it holds, one after another along the batch.
  Samples(const Tensor& t, const char* name, const SampleLayout& layout, ScalarType dtype,
          int64_t groups = 1)
      : tensor_(t) {
    check_device(t, name);
    std::vector<int64_t> shape = layout.sizes;
    if (groups > 1) shape[0] *= groups;
    check_shape(t, name, shape);
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected the dtype of the others");
    const bool short_samples = layout.size < kShortSample && layout.samples > 1;
    if (!layout.fits(t) || (short_samples && t.stride(0) != layout.size)) {
      std::vector<int64_t> strides = layout.strides;
      if (!strides.empty()) strides[0] = layout.size;  // which that of a single sample need not be
      tensor_ = empty_strided(shape, strides, dtype);
      torch::stable::copy_(tensor_, t);
    }
    if (!shape.empty()) stride_ = tensor_.stride(0);
    joined_ = groups * layout.samples <= 1 || stride_ == layout.size;
  }
  template <typename T>
  const T* data() const {
    return static_cast<const T*>(tensor_.const_data_ptr());
  }
  const Tensor& tensor() const { return tensor_; }
  int64_t stride() const { return stride_; }  // from sample to sample
  bool joined() const { return joined_; }     // without gaps

 private:
  Tensor tensor_;
  int64_t stride_ = 0;
  bool joined_;
};

}  // namespace sdfast
