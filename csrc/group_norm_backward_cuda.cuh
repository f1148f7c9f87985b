// Gradients of group_norm on CUDA.
//
//   dz = dy act'(z),  dxhat = dz factor,  factor = weight (1 + scale)
//   dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)), means over each group
//   dshift = sum(dz),  dscale = sum(dz (xhat weight + bias))
//   dbias, dweight = sum(dz (1 + scale) {1, xhat}) over images, too
//
// Algorithm. All follow from two sums of each channel and image, of dz and dz xhat. Blocks sum
// chunks of pixels, then a second launch adds the chunks, in order, to groups and to parameters, a
// third one writes dx, last chunk first: what was read last is in L2 still. Channels last a thread
// keeps its channels, channels first a warp has one. Bytes: 2 (x + dy) + dx, less what L2 holds.
// Limit: memory bandwidth.
#pragma once

#include "group_norm_cuda.cuh"

namespace sdfast::group_norm {

constexpr int kBackwardThreads = 256, kFinishThreads = 128;

template <typename T>
struct Backward {
  Shape shape;
  const T *dy, *x;
  const float *mean, *rstd;  // (images, groups)
  Affine<T> affine;
  bool silu;
};

struct BackwardPlan {
  int span = 0, spans = 0;  // channels of a block, and how many of these are an image's
  int chunks = 1, units = 0;

  __device__ int units_of(int chunk, int64_t all) const {
    const int64_t left = all - int64_t{chunk} * units;
    return static_cast<int>(left < units ? left : units);
  }
};

// Where a block and its threads are.
template <int N, bool kLast>
struct BackwardPlace {
  static constexpr int kChannels = kLast ? N : 1;  // of an outer unit
  int64_t n, first;                                // image, unit
  int chunk, channel, width, inners;
  Threads<kLast> me;

  __device__ BackwardPlace(const Shape& shape, const BackwardPlan& plan, int64_t index)
      : n(index / plan.spans / plan.chunks),
        chunk(static_cast<int>(index / plan.spans % plan.chunks)),
        channel(static_cast<int>(index % plan.spans) * plan.span),
        me(0, 1, 1, 1) {
    first = int64_t{chunk} * plan.units;
    width = shape.channels - channel < plan.span ? shape.channels - channel : plan.span;
    inners = plan.units_of(chunk, shape.units<kLast, N>());
    me = Threads<kLast>(threadIdx.x, blockDim.x, width / kChannels, kLast ? inners : kWarp);
  }
};

// Of a span's channels, in shared memory: z = (x - centre) gain + offset; dx = dz gain - pull -
// (x - centre) slope.
struct ChannelValues {
  float *centre, *gain, *offset, *pull, *slope;
};

template <typename T>
__device__ void put_channel(const Backward<T>& call, int64_t n, int channel, int i,
                            const ChannelValues& to) {
  const int c = channel + i;
  const int64_t group = n * call.shape.groups + c / call.shape.group_channels();
  float factor, offset;
  call.affine.at(n, c, factor, offset);
  to.centre[i] = call.mean[group];
  to.gain[i] = factor * call.rstd[group];
  to.offset[i] = offset;
}

// dz, of N elements of dy.
template <bool kLast, int N, int kValues>
__device__ inline void to_dz(const float (&distance)[N], const float (&gain)[kValues],
                             const float (&offset)[kValues], bool with_silu, float (&dy)[N]) {
  if (!with_silu) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float z = distance[i] * gain[kLast ? i : 0] + offset[kLast ? i : 0];
    const float s = __fdividef(1, 1 + __expf(-z));
    dy[i] *= s * (1 + z * (1 - s));
  }
}

// Calls each(q, x - centre, dz) for a thread's inner units of one outer unit, two at a time.
template <int N, bool kLast, typename T, int kValues, typename Each>
__device__ void for_each_gradient(const Backward<T>& call, const BackwardPlace<N, kLast>& place,
                                  int channel, const float (&centre)[kValues],
                                  const float (&gain)[kValues], const float (&offset)[kValues],
                                  const Each& each) {
  const Shape& shape = call.shape;
  const auto x =
      run_of<kLast, N>(call.x, shape.pixels, shape.channels, place.n, place.first, channel);
  const T* const dy = call.dy + (x.begin - call.x);
  constexpr int kAtOnce = 2;
  for (int q = place.me.inner; q < place.inners; q += kAtOnce * place.me.inner_step) {
    Vector<T, N> values[kAtOnce], gradients[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = q + k * place.me.inner_step;
      if (at >= place.inners) continue;
      values[k] = *reinterpret_cast<const Vector<T, N>*>(x.at(at));
      gradients[k] = *reinterpret_cast<const Vector<T, N>*>(dy + int64_t{at} * x.step);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = q + k * place.me.inner_step;
      if (at >= place.inners) continue;
      float distance[N], dz[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        distance[i] = to_float(values[k].values[i]) - centre[kLast ? i : 0];
        dz[i] = to_float(gradients[k].values[i]);
      }
      to_dz<kLast>(distance, gain, offset, call.silu, dz);
      each(at, distance, dz);
    }
  }
}

// sums: (2, images, chunks, channels), written: of dz and of dz xhat.
template <typename T, int N, bool kLast>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    sums_kernel(Backward<T> call, float* sums, BackwardPlan plan) {
  const BackwardPlace<N, kLast> place(call.shape, plan, blockIdx.x);
  constexpr int kChannels = kLast ? N : 1;
  SharedMemory memory;
  ChannelValues values{};
  values.centre = memory.array<float>(plan.span);
  values.gain = memory.array<float>(plan.span);
  values.offset = memory.array<float>(plan.span);
  float* const buffer = memory.array<float>(kLast ? 2 * kBackwardThreads * N : 1);
  for (int i = threadIdx.x; i < place.width; i += blockDim.x) {
    put_channel(call, place.n, place.channel, i, values);
  }
  __syncthreads();

  float sum[kChannels] = {}, product[kChannels] = {};
  const int outers = place.width / kChannels, outer = place.me.outer;
  if (outer < outers) {
    float centre[kChannels], gain[kChannels], offset[kChannels];
    get(values.centre + outer * kChannels, centre);
    get(values.gain + outer * kChannels, gain);
    get(values.offset + outer * kChannels, offset);
    for_each_gradient<N, kLast>(call, place, place.channel + outer * kChannels, centre, gain,
                                offset, [&](int, const float (&distance)[N], const float (&dz)[N]) {
#pragma unroll
                                  for (int i = 0; i < N; ++i) {
                                    sum[kLast ? i : 0] += dz[i];
                                    product[kLast ? i : 0] += dz[i] * distance[i];
                                  }
                                });
  }
  const int64_t results = call.shape.images * plan.chunks * call.shape.channels;
  float* const to =
      sums + (place.n * plan.chunks + place.chunk) * call.shape.channels + place.channel;
  const auto finish = [&](int i, float total, float total_product) {
    const int group = (place.channel + i) / call.shape.group_channels();
    to[i] = total;
    to[i + results] = total_product * call.rstd[place.n * call.shape.groups + group];
  };
  if constexpr (kLast) {
    const int rows = place.me.inner_step;
    float* const products = buffer + rows * place.width;
    if (outer < outers) {
      put(buffer + place.me.inner * place.width + outer * N, sum);
      put(products + place.me.inner * place.width + outer * N, product);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < place.width; i += blockDim.x) {
      float total = 0, total_product = 0;
      for (int r = 0; r < rows; ++r) {
        total += buffer[r * place.width + i];
        total_product += products[r * place.width + i];
      }
      finish(i, total, total_product);
    }
  } else {  // each warp a channel
    const float total = warp_sum(sum[0]), total_product = warp_sum(product[0]);
    if (threadIdx.x % kWarp == 0 && outer < outers) finish(outer, total, total_product);
  }
}

template <typename T>
struct Gradients {
  float* means;                         // (2, images, groups): of dxhat and of dxhat xhat
  void *weight, *bias, *scale, *shift;  // or null
  bool wide_weight, wide_bias, wide_scale, wide_shift;  // in fp32, else in T
};

template <typename T>
__device__ void put_gradient(void* to, bool wide, int64_t i, float value) {
  if (!to) return;
  if (wide) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<T*>(to)[i] = from_float<T>(value);
  }
}

// Adds the chunks. Grid: images + 1 times groups; the last row adds images, for the parameters.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(Shape shape, const float* sums, Affine<T> affine, Gradients<T> results,
                  int chunks) {
  SDFAST_SHARED(float, of_threads, 2 * kFinishThreads);
  float* const products = of_threads + kFinishThreads;
  const int group = blockIdx.x % shape.groups, width = shape.group_channels();
  const int64_t n = blockIdx.x / shape.groups, distance = shape.images * chunks * shape.channels;
  const bool over_images = n == shape.images;
  const int64_t begin = over_images ? 0 : n * chunks,
                rows = (over_images ? shape.images : 1) * chunks;
  const int columns = width < kFinishThreads ? width : kFinishThreads;
  const int slices = kFinishThreads / columns;  // of the rows
  const int column = threadIdx.x % columns, slice = threadIdx.x / columns;
  float of_group = 0, product_of_group = 0;
  for (int before = 0; before < width; before += columns) {
    const bool there = slice < slices && before + column < width;
    const int c = group * width + before + column;
    float sum = 0, product = 0;
    for (int64_t r = slice; there && r < rows; r += slices) {
      const float* const from = sums + (begin + r) * shape.channels + c;
      const float s =
          over_images ? 1 + affine.scale.at(r / chunks * affine.scale.row + c, 0) : 1.0f;
      sum += from[0] * s;
      product += from[distance] * s;
    }
    __syncthreads();
    of_threads[threadIdx.x] = sum;
    products[threadIdx.x] = product;
    __syncthreads();
    if (!there || slice > 0) continue;
    for (int i = 1; i < slices; ++i) {
      sum += of_threads[i * columns + column];
      product += products[i * columns + column];
    }
    if (over_images) {
      put_gradient<T>(results.weight, results.wide_weight, c, product);
      put_gradient<T>(results.bias, results.wide_bias, c, sum);
      continue;
    }
    const int64_t at = n * shape.channels + c;
    const float weight = affine.weight.at(c, 1);
    put_gradient<T>(results.scale, results.wide_scale, at,
                    product * weight + sum * affine.bias.at(c, 0));
    put_gradient<T>(results.shift, results.wide_shift, at, sum);
    const float factor = weight * (1 + affine.scale.at(n * affine.scale.row + c, 0));
    of_group += sum * factor;
    product_of_group += product * factor;
  }
  __syncthreads();
  of_threads[threadIdx.x] = of_group;
  products[threadIdx.x] = product_of_group;
  __syncthreads();
  if (over_images || threadIdx.x >= kWarp) return;
  float sum = 0, product = 0;
  for (int i = threadIdx.x; i < kFinishThreads; i += kWarp) {
    sum += of_threads[i];
    product += products[i];
  }
  sum = warp_sum(sum) / shape.elements_of_group();
  product = warp_sum(product) / shape.elements_of_group();
  if (threadIdx.x > 0) return;
  results.means[n * shape.groups + group] = sum;
  results.means[(shape.images + n) * shape.groups + group] = product;
}

// means: (2, images, groups), as `finish_kernel` left them. dx: as x, written.
template <typename T, int N, bool kLast>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    input_gradient_kernel(Backward<T> call, const float* means, T* dx, BackwardPlan plan) {
  const Shape& shape = call.shape;
  const BackwardPlace<N, kLast> place(shape, plan, int64_t{gridDim.x} - 1 - blockIdx.x);
  constexpr int kChannels = kLast ? N : 1;
  SharedMemory memory;
  ChannelValues values{};
  values.centre = memory.array<float>(plan.span);
  values.gain = memory.array<float>(plan.span);
  values.offset = memory.array<float>(plan.span);
  values.pull = memory.array<float>(plan.span);
  values.slope = memory.array<float>(plan.span);
  for (int i = threadIdx.x; i < place.width; i += blockDim.x) {
    put_channel(call, place.n, place.channel, i, values);
    const int64_t at = place.n * shape.groups + (place.channel + i) / shape.group_channels();
    const float rstd = call.rstd[at];
    values.pull[i] = rstd * means[at];
    values.slope[i] = rstd * rstd * means[shape.images * shape.groups + at];
  }
  __syncthreads();
  const int outer = place.me.outer, first = outer * kChannels;
  if (outer >= place.width / kChannels) return;
  float centre[kChannels], gain[kChannels], offset[kChannels], pull[kChannels], slope[kChannels];
  get(values.centre + first, centre);
  get(values.gain + first, gain);
  get(values.offset + first, offset);
  get(values.pull + first, pull);
  get(values.slope + first, slope);
  const auto to = run_of<kLast, N>(dx, shape.pixels, shape.channels, place.n, place.first,
                                   place.channel + first);
  for_each_gradient<N, kLast>(call, place, place.channel + first, centre, gain, offset,
                              [&](int q, const float (&distance)[N], const float (&dz)[N]) {
                                float result[N];
#pragma unroll
                                for (int i = 0; i < N; ++i) {
                                  const int k = kLast ? i : 0;
                                  result[i] = dz[i] * gain[k] - pull[k] - distance[i] * slope[k];
                                }
                                store(to.at(q), result);
                              });
}

// Blocks for some waves, each with some accesses for every thread.
template <int N, bool kLast>
BackwardPlan backward_plan(const Shape& shape, const Device& device) {
  constexpr int kBlocks = 8, kLeastSteps = 2;
  // Channels last: 512 bytes of a row, or 128 elements.
  constexpr int kColumns = N > 1 ? kWarp : 4 * kWarp, kWarps = kBackwardThreads / kWarp;
  BackwardPlan plan;
  if (kLast) {
    const int64_t columns = shape.channels / N;
    plan.span = N * static_cast<int>(ceil_div(columns, ceil_div(columns, kColumns)));
  } else {
    plan.span = shape.channels < kWarps ? shape.channels : kWarps;
  }
  plan.spans = static_cast<int>(ceil_div(shape.channels, plan.span));
  const int64_t units = shape.units<kLast, N>();
  // Units of which a block takes whole rounds.
  const int64_t round = kLast ? kBackwardThreads / (plan.span / N) : kWarp;
  const int64_t least = kLeastSteps * round;
  const int64_t wanted = int64_t{kBlocks} * device.multiprocessors / (shape.images * plan.spans);
  const int64_t most = ceil_div(units, least);
  const int64_t chunks = wanted < 1 ? 1 : wanted < most ? wanted : most;
  plan.units = static_cast<int>(ceil_div(ceil_div(units, chunks), round) * round);
  plan.chunks = static_cast<int>(ceil_div(units, plan.units));
  return plan;
}

// sums: (2, images, chunks, channels), scratch.
template <typename T, int N, bool kLast>
void backward(const Backward<T>& call, const Gradients<T>& results, T* dx, float* sums,
              const BackwardPlan& plan, cudaStream_t stream) {
  const Shape& shape = call.shape;
  const dim3 blocks(static_cast<unsigned>(shape.images * plan.chunks * plan.spans));
  const size_t values = SharedMemory::bytes<float>(plan.span);
  const size_t buffer = SharedMemory::bytes<float>(kLast ? 2 * kBackwardThreads * N : 1);
  launch(sums_kernel<T, N, kLast>, {blocks, dim3(kBackwardThreads), 3 * values + buffer}, stream,
         call, sums, plan);
  const dim3 rows(static_cast<unsigned>((shape.images + 1) * shape.groups));
  launch(finish_kernel<T>, {rows, dim3(kFinishThreads)}, stream, shape, sums, call.affine, results,
         plan.chunks);
  launch(input_gradient_kernel<T, N, kLast>, {blocks, dim3(kBackwardThreads), 5 * values}, stream,
         call, results.means, dx, plan);
}

}  // namespace sdfast::group_norm
