// What the kernels of group_norm on CUDA share: spans of channels, where threads and elements lie,
// coefficients, sums over groups. The kernels are group_norm_whole_cuda.cuh (an image's groups held
// in shared memory), group_norm_chunks_cuda.cuh (two launches) and group_norm_backward_cuda.cuh.
//
// Both layouts are one to them. The outer loop goes over channels, with coefficients in registers,
// the inner one over pixels; an access is of N elements, channels last those of N channels of a
// pixel, channels first those of N pixels of a channel. A unit is what one access covers of an
// axis.
#pragma once

#include "cuda_common.cuh"

namespace sdfast::group_norm {

constexpr int kMaxSpan = 1024;  // channels of a block at most

// ---- operands

// A parameter in fp32 where `wide`, else in T; `row` from image to image. Absent where null.
template <typename T>
struct Parameter {
  const void* data = nullptr;
  bool wide = false;
  int64_t row = 0;

  __device__ float at(int64_t i, float absent) const {
    if (!data) return absent;
    return wide ? static_cast<const float*>(data)[i] : to_float(static_cast<const T*>(data)[i]);
  }
};

template <typename T>
struct Affine {
  Parameter<T> weight, bias, scale, shift;

  // z = xhat factor + offset at channel c of image n.
  __device__ void at(int64_t n, int c, float& factor, float& offset) const {
    const float s = 1 + scale.at(n * scale.row + c, 0);
    factor = weight.at(c, 1) * s;
    offset = bias.at(c, 0) * s + shift.at(n * shift.row + c, 0);
  }
};

// Images, pixels of each, channels and their groups.
struct Shape {
  int64_t images, pixels;
  int channels, groups;

  __host__ __device__ int group_channels() const { return channels / groups; }
  // Units of an image's pixels.
  template <bool kLast, int N>
  __host__ __device__ int64_t units() const {
    return kLast ? pixels : pixels / N;
  }
  __device__ float elements_of_group() const {
    return static_cast<float>(pixels) * group_channels();
  }
};

// ---- where elements lie

// The elements of one outer unit: those of inner unit q are at begin + q step.
template <typename T>
struct Run {
  T* begin;
  int step;

  __device__ T* at(int q) const { return begin + int64_t{q} * step; }
};

// Of tensor t, (images, pixels, channels) or channels first, at channel c of image n; its inner
// units are counted from `first`.
template <bool kLast, int N, typename T>
__device__ Run<T> run_of(T* t, int64_t pixels, int channels, int64_t n, int64_t first, int c) {
  if (kLast) return {t + (n * pixels + first) * channels + c, channels};
  return {t + (n * channels + c) * pixels + first * N, N};
}

// x, of `channels`, and behind it the channels of skip, if there are any.
template <typename T>
struct Source {
  const T *x, *skip;
  int channels, skip_channels;

  template <bool kLast, int N>
  __device__ Run<const T> run(int64_t pixels, int64_t n, int64_t first, int c) const {
    const bool of_x = c < channels;
    return run_of<kLast, N>(of_x ? x : skip, pixels, of_x ? channels : skip_channels, n, first,
                            of_x ? c : c - channels);
  }
};

// One call of the forward.
template <typename T>
struct Forward {
  Shape shape;
  Source<T> source;
  T* y;
  Affine<T> affine;
  float *mean, *rstd;  // (images, groups), written; or null
  float eps;
  bool silu;
};

// The channels that a block takes: some whole groups, or one of the parts of a group.
struct Span {
  int first, width;                // channels
  int group, groups, group_width;  // the first group, how many, channels of each that are here
  int part;
};

struct Spans {
  int channels, count;  // of a span, and spans of an image
  int parts;            // of a group; 1 where spans are whole groups

  __host__ __device__ Span at(int index, const Shape& shape) const {
    const int group_channels = shape.group_channels();
    if (parts > 1) {
      const int group = index / parts, part = index % parts;
      const int left = group_channels - part * channels, width = left < channels ? left : channels;
      return {group * group_channels + part * channels, width, group, 1, width, part};
    }
    const int first = index * channels, left = shape.channels - first;
    const int width = left < channels ? left : channels;
    return {first, width, first / group_channels, width / group_channels, group_channels, 0};
  }
  __host__ __device__ int most_groups(const Shape& shape) const {
    return parts > 1 ? 1 : channels / shape.group_channels();
  }
};

// Spans of the fewest groups that are `least` channels and start at whole vectors. None, of no
// channels, where vectors do not fit: never with vector = 1.
inline Spans spans_of(const Shape& shape, bool last, int vector, int least) {
  const int width = shape.group_channels();
  const auto cut = [&](int whole) {
    const int parts = static_cast<int>(ceil_div(whole, kMaxSpan));
    return Spans{parts > 1 ? kMaxSpan : whole, shape.groups * parts, parts};
  };
  if (!last) return cut(width);
  int count = 1;
  while (count < shape.groups && (count * width % vector != 0 || count * width < least)) ++count;
  if (count * width <= kMaxSpan) {
    return {count * width, static_cast<int>(ceil_div(shape.groups, count)), 1};
  }
  return width % vector == 0 ? cut(width) : Spans{0, 0, 1};
}

// How the threads of a block lie over `outers` times `inners` units: neighbours take what lies
// together in memory, channels last the outer units. A thread starts at (outer, inner).
template <bool kLast>
struct Threads {
  int outer, inner, outer_step, inner_step;

  __host__ __device__ Threads(int thread, int threads, int outers, int inners) {
    const int near = kLast ? outers : inners;
    int columns = near < 1 ? 1 : near;
    if (columns > threads) {
      const int steps = (columns + threads - 1) / threads;
      columns = kLast || steps > 4 ? threads : (columns + steps - 1) / steps;
    }
    const int rows = threads / columns, row = thread / columns, column = thread % columns;
    outer_step = kLast ? columns : rows;
    inner_step = kLast ? rows : columns;
    outer = row < rows ? (kLast ? column : row) : outers;  // who is left over has nothing to do
    inner = kLast ? row : column;
  }
};

// ---- between registers and shared memory

// N consecutive floats, which lie at a multiple of N.
template <int N>
__device__ inline void put(float* to, const float (&from)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      *reinterpret_cast<Vector<float, 4>*>(to + i) = {from[i], from[i + 1], from[i + 2],
                                                      from[i + 3]};
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = from[i];
  }
}
template <int N>
__device__ inline void get(const float* from, float (&to)[N]) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const auto four = *reinterpret_cast<const Vector<float, 4>*>(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i + j] = four.values[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = from[i];
  }
}

// A group's value at each of the N channels from `channel` of its span on.
template <int N>
__device__ inline void get_of_groups(const float* groups, int channel, int group_width,
                                     float (&to)[N]) {
  int group = channel / group_width, next = (group + 1) * group_width - channel;
  float value = groups[group];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i == next) {
      value = groups[++group];
      next += group_width;
    }
    to[i] = value;
  }
}

// ---- arithmetic

__device__ inline float silu(float z) { return __fdividef(z, 1 + __expf(-z)); }

// 1 / sqrt(square / elements + eps), rounded well: it is a factor of every result.
__device__ inline float rstd_of(float square, float elements, float eps) {
  return __frcp_rn(__fsqrt_rn(square / elements + eps));
}

// z = (x - centre) gain + offset, for N channels, or for one where the N elements are pixels.
template <bool kLast, int N>
struct Coefficients {
  static constexpr int kValues = kLast ? N : 1;
  float centre[kValues], gain[kValues], offset[kValues];

  // From a span's `factors` and `offsets`, by channel, and `means` and `rstds`, by group.
  __device__ Coefficients(const Span& span, int outer, const float* factors, const float* offsets,
                          const float* means, const float* rstds) {
    const int channel = outer * kValues;
    float rstd[kValues];
    // A group of channels first is that of all its span.
    const int width = kLast ? span.group_width : span.width;
    get_of_groups(means, channel, width, centre);
    get_of_groups(rstds, channel, width, rstd);
    get(factors + channel, gain);
    get(offsets + channel, offset);
#pragma unroll
    for (int i = 0; i < kValues; ++i) gain[i] *= rstd[i];
  }

  template <typename T>
  __device__ void apply(const Vector<T, N>& x, bool with_silu, T* y) const {
    float z[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int k = kLast ? i : 0;
      z[i] = (to_float(x.values[i]) - centre[k]) * gain[k] + offset[k];
    }
    if (with_silu) {
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] = silu(z[i]);
    }
    store(y, z);
  }
};

// Writes factor and offset of a span's channels to shared memory.
template <typename T>
__device__ void put_affine(const Affine<T>& affine, int64_t n, const Span& span, float* factors,
                           float* offsets) {
  for (int c = threadIdx.x; c < span.width; c += blockDim.x) {
    affine.at(n, span.first + c, factors[c], offsets[c]);
  }
}

// Sums value(group, row, column) over `rows` and each group's columns, divides by `divisor`, and
// leaves the results in totals[group]. Waits before and after. partial: max(groups, warps) floats.
template <typename Value>
__device__ void sum_groups(int rows, int groups, int group_width, float divisor, float* partial,
                           float* totals, const Value& value) {
  __syncthreads();
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int slices = groups < warps ? warps / groups : 1;  // of the rows
  const bool narrow = group_width < kWarp;
  const int rows_at_once = narrow ? kWarp / group_width : 1;
  const int lane_row = narrow ? lane / group_width : 0, lane_column = lane - lane_row * group_width;
  for (int item = warp; item < groups * slices; item += warps) {
    const int group = item / slices, slice = item % slices;
    float sum = 0;
    if (lane_row < rows_at_once) {
      for (int r = slice * rows_at_once + lane_row; r < rows; r += slices * rows_at_once) {
        for (int c = narrow ? lane_column : lane; c < group_width; c += kWarp) {
          sum += value(group, r, group * group_width + c);
        }
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) partial[item] = sum;
  }
  __syncthreads();
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    float sum = 0;
    for (int slice = 0; slice < slices; ++slice) sum += partial[group * slices + slice];
    totals[group] = sum / divisor;
  }
  __syncthreads();
}

}  // namespace sdfast::group_norm
