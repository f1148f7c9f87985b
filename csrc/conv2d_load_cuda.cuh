// conv2d on CUDA, what is read: halo tiles of x and slices of the weight, copied asynchronously to
// shared memory, and a GroupNorm applied there.
#pragma once

#include "conv2d_problem_cuda.cuh"
#include "cuda_mma.cuh"

namespace sdfast {

// Up to kVector values from global to 16 bytes of shared memory, the rest zeros. `kWhole`: 16 bytes
// or nothing, aligned, and copied asynchronously.
template <bool kWhole, typename T>
__device__ __forceinline__ void copy_unit(unsigned char* to, const T* from, int count) {
  if constexpr (kWhole) {
    copy_async(to, from, count > 0 ? 16 : 0);
  } else {
    Vector<T, kVector<T>> values;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) values.values[i] = i < count ? from[i] : from_float<T>(0);
    *reinterpret_cast<Vector<T, kVector<T>>*>(to) = values;
  }
}

// A step multiplies one chunk of channels at one position of the kernel. Its slice of the weight
// has a buffer in a ring; the halo tile of a chunk, which all its steps share, has one in another.
template <typename T, typename Tile>
class Conv2dLoader {
 public:
  __device__ Conv2dLoader(const Conv2d<T>& call, const Conv2dPlan& plan, const Conv2dPlace& place,
                          unsigned char* memory)
      : call_(call),
        plan_(plan),
        place_(place),
        weights_(memory),
        halos_(memory + Tile::kStages * kWeightBytes),
        chunk_(static_cast<int>(blockIdx.y) * plan.chunks_per_split) {}

  static constexpr int kWeightBytes = Tile::kChannels * kRowBytes;

  __device__ const unsigned char* weights(int stage) const {
    return weights_ + stage * kWeightBytes;
  }
  __device__ unsigned char* halo(int buffer) const {
    return halos_ + buffer * plan_.halo_pixels * kRowBytes;
  }

  // Starts the copies of the next step.
  __device__ void load_step() {
    const Source source(call_, plan_, chunk_);
    plan_.vectors ? load<true>(source) : load<false>(source);
    if (tap_ == 0) buffer_ = buffer_ + 1 == plan_.halo_buffers ? 0 : buffer_ + 1;
    stage_ = stage_ + 1 == Tile::kStages ? 0 : stage_ + 1;
    if (++tap_ == call_.taps()) {
      tap_ = 0;
      ++chunk_;
    }
  }

  // silu?(GroupNorm) of a halo tile: of the units that this thread copied, which have arrived. The
  // pixels outside the image stay zero.
  __device__ void normalise(int chunk, int buffer) const {
    const Source source(call_, plan_, chunk);
    const int size = call_.all_channels() / call_.groups;
    const int first = source.first + unit() * kVector<T>;
    int group = first / size, next_group = (group + 1) * size;
    float mean[kVector<T>], scale[kVector<T>], shift[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      const bool is_there = unit() * kVector<T> + i < source.left;
      if (first + i == next_group) {
        ++group;
        next_group += size;
      }
      const int64_t at = int64_t{place_.image} * call_.groups + group;
      mean[i] = is_there ? call_.mean[at] : 0;
      scale[i] = is_there ? call_.rstd[at] * to_float(call_.norm_weight[first + i]) : 0;
      shift[i] = is_there ? to_float(call_.norm_bias[first + i]) : 0;
    }
    unsigned char* const to = halo(buffer);
    for_each_pixel([&](int pixel, int64_t at) {
      if (at < 0) return;
      T* const values = reinterpret_cast<T*>(to + unit_place(pixel, unit()));
      float h[kVector<T>];
      sdfast::load(values, h);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) h[i] = (h[i] - mean[i]) * scale[i] + shift[i];
      if (call_.silu) {
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) h[i] = __fdividef(h[i], 1 + __expf(-h[i]));
      }
      store(values, h);
    });
  }

 private:
  // The channels of a chunk: where they are, the first one's place among all, how many are left.
  struct Source {
    const T* x;
    int channels, first, left;

    __device__ Source(const Conv2d<T>& call, const Conv2dPlan& plan, int chunk) {
      const bool skips = chunk >= plan.chunks_of_x;
      const int begin = (skips ? chunk - plan.chunks_of_x : chunk) * kChunk<T>;
      channels = skips ? call.skip_channels : call.channels;
      x = (skips ? call.skip : call.x) + begin;
      first = begin + (skips ? call.channels : 0);
      left = channels - begin;
    }
  };

  __device__ static int unit() { return threadIdx.x % kUnits; }

  // Calls body(pixel of the halo tile, its place in x or -1) for this thread's pixels.
  template <typename Body>
  __device__ void for_each_pixel(const Body& body) const {
    const int top = place_.row * call_.stride - call_.top + place_.phase / 2;
    const int left = place_.column * call_.stride - call_.left + place_.phase % 2;
    const int64_t first = int64_t{place_.image} * call_.height;
#pragma unroll 2
    for (int pixel = threadIdx.x / kUnits; pixel < plan_.halo_pixels;
         pixel += Tile::kThreads / kUnits) {
      const int row = pixel * plan_.halo_inverse >> 16;
      const int y = top + row, x = left + pixel - row * plan_.halo_width;
      const bool inside = static_cast<unsigned>(y) < static_cast<unsigned>(call_.height) &&
                          static_cast<unsigned>(x) < static_cast<unsigned>(call_.width);
      body(pixel, inside ? (first + y) * call_.width + x : -1);
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ void load(const Source& source) const {
    const int count = source.left - unit() * kVector<T>;
    if (tap_ == 0) {
      unsigned char* const to = halo(buffer_);
      for_each_pixel([&](int pixel, int64_t at) {
        const bool inside = at >= 0 && count > 0;
        const T* const from = source.x + at * source.channels + unit() * kVector<T>;
        copy_unit<kWhole>(to + unit_place(pixel, unit()), inside ? from : call_.x,
                          inside ? count : 0);
      });
    }
    unsigned char* const to = weights_ + stage_ * kWeightBytes;
    const int64_t row_size = int64_t{call_.taps()} * call_.all_channels();
    const T* const from = call_.weight + int64_t{place_.phase} * call_.out_channels * row_size +
                          int64_t{tap_} * call_.all_channels() + source.first + unit() * kVector<T>;
    constexpr int kRowsAtOnce = Tile::kThreads / kUnits;
#pragma unroll(kWhole ? 4 : 1)
    for (int begin = 0; begin < Tile::kChannels; begin += kRowsAtOnce) {
      const int row = begin + static_cast<int>(threadIdx.x) / kUnits;
      if (Tile::kChannels % kRowsAtOnce != 0 && row >= Tile::kChannels) break;
      const int o = place_.channel + row;
      const bool inside = o < call_.out_channels && count > 0;
      copy_unit<kWhole>(to + unit_place(row, unit()), inside ? from + o * row_size : call_.weight,
                        inside ? count : 0);
    }
  }

  const Conv2d<T>& call_;
  const Conv2dPlan& plan_;
  const Conv2dPlace& place_;
  unsigned char *const weights_, *const halos_;
  // Of the step to be loaded next.
  int chunk_, tap_ = 0, stage_ = 0, buffer_ = 0;
};

}  // namespace sdfast
