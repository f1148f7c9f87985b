// group_norm in two launches, for images that shared memory does not hold, or in one, where the
// statistics are known.
//
// Algorithm. Blocks take chunks of pixels of a span of groups. The first launch keeps a running
// mean and squares for every place of a thread's vectors (Welford 1962), sums them up to each
// group's, and writes these. The second reads those of all chunks again, in order, combines them
// (Chan et al. 1979), and applies them, last chunk first: what was read last is in L2 still. A
// group that is too wide is cut into parts, combined as chunks are. Bytes: x twice, y once, less
// what L2 holds; with known statistics x once. Limit: memory bandwidth.
#pragma once

#include <algorithm>

#include "group_norm_cuda.cuh"

namespace sdfast::group_norm {

constexpr int kChunkThreads = 256;
// Loads of a thread in flight: with those of three blocks more than a multiprocessor's share of
// what memory's latency takes (25 KiB), within 80 registers.
constexpr int kPartialsLoads = 4, kApplyLoads = 3;

struct ChunkPlan {
  Spans spans{};
  int chunks = 1;  // of an image's pixels
  int units = 0;   // of pixels, of a chunk

  __host__ __device__ int units_of(int chunk, int64_t all) const {
    const int64_t left = all - int64_t{chunk} * units;
    return static_cast<int>(left < units ? left : units);
  }
};

// What block `index` of a grid of images, chunks and spans takes.
struct Chunk {
  int64_t n;
  int chunk, span;

  __device__ Chunk(const ChunkPlan& plan, int64_t index) {
    span = static_cast<int>(index % plan.spans.count);
    chunk = static_cast<int>(index / plan.spans.count % plan.chunks);
    n = index / plan.spans.count / plan.chunks;
  }
};

// Calls each(vector, q) for a thread's inner units of a run, after kLoads loads at a time.
template <int N, int kLoads, bool kLast, typename T, typename Each>
__device__ void for_each(const Threads<kLast>& me, int inners, const Run<const T>& from,
                         const Each& each) {
  for (int q = me.inner; q < inners; q += kLoads * me.inner_step) {
    Vector<T, N> x[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int at = q + k * me.inner_step;
      if (at < inners) x[k] = *reinterpret_cast<const Vector<T, N>*>(from.at(at));
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int at = q + k * me.inner_step;
      if (at < inners) each(x[k], at);
    }
  }
}

// Mean and squares of each chunk and group: (images, groups, chunks parts), written.
struct Partials {
  float *means, *squares;
};

// Channels last: how many floats of each statistic the threads of a block leave.
template <int N, bool kLast>
__host__ __device__ int places(const Spans& spans) {
  if (!kLast) return kChunkThreads;
  return kChunkThreads * N > spans.channels ? kChunkThreads * N : spans.channels;
}

template <typename T, int N, bool kLast>
__global__ void __launch_bounds__(kChunkThreads, 3)
    partials_kernel(Shape shape, Source<T> source, Partials partials, ChunkPlan plan) {
  const Chunk mine(plan, blockIdx.x);
  const Span span = plan.spans.at(mine.span, shape);
  const int inners = plan.units_of(mine.chunk, shape.units<kLast, N>());
  const int64_t first = int64_t{mine.chunk} * plan.units;
  constexpr int kChannels = kLast ? N : 1;
  const int outers = span.width / kChannels;
  const Threads<kLast> me(threadIdx.x, blockDim.x, outers, inners);
  const int most_groups = plan.spans.most_groups(shape), warps = kChunkThreads / kWarp;
  SharedMemory memory;
  float* const means = memory.array<float>(places<N, kLast>(plan.spans));
  float* const squares = memory.array<float>(places<N, kLast>(plan.spans));
  float* const counts = memory.array<float>(kChunkThreads);  // of a row of places
  float* const partial = memory.array<float>(most_groups > warps ? most_groups : warps);
  float* const group_means = memory.array<float>(most_groups);
  float* const group_squares = memory.array<float>(most_groups);

  const int width = kLast ? span.width : 1;
  float mean[N] = {}, square[N] = {}, seen = 0;
  for (int u = me.outer; u < outers; u += me.outer_step) {
    const int c = span.first + u * kChannels;
    for_each<N, kPartialsLoads>(
        me, inners, source.template run<kLast, N>(shape.pixels, mine.n, first, c),
        [&](const Vector<T, N>& x, int) {
          seen += 1;
          const float share = __fdividef(1, seen);
#pragma unroll
          for (int i = 0; i < N; ++i) {
            const float value = to_float(x.values[i]), distance = value - mean[i];
            mean[i] += distance * share;
            square[i] += distance * (value - mean[i]);
          }
        });
    if constexpr (kLast) {
      put(means + me.inner * width + u * N, mean);
      put(squares + me.inner * width + u * N, square);
      if (u == 0) counts[me.inner] = seen;
      seen = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) mean[i] = square[i] = 0;
    }
  }
  if constexpr (!kLast) {  // a thread's places are of one group
    float of_thread = 0, distances = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) of_thread += mean[i] * (1.0f / N);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float distance = mean[i] - of_thread;
      distances += square[i] + distance * distance * seen;
    }
    means[threadIdx.x] = of_thread;
    squares[threadIdx.x] = distances;
    counts[threadIdx.x] = seen * N;
  }
  const int rows = kLast ? me.inner_step : blockDim.x, group_width = kLast ? span.group_width : 1;
  const float elements =
      static_cast<float>(inners) * (kLast ? 1 : N) * (kLast ? span.group_width : span.width);
  sum_groups(rows, span.groups, group_width, elements, partial, group_means,
             [&](int, int r, int c) { return means[r * width + c] * counts[r]; });
  sum_groups(rows, span.groups, group_width, 1, partial, group_squares, [&](int g, int r, int c) {
    const float distance = means[r * width + c] - group_means[g];
    return squares[r * width + c] + distance * distance * counts[r];
  });
  for (int group = threadIdx.x; group < span.groups; group += blockDim.x) {
    const int64_t row = mine.n * shape.groups + span.group + group;
    const int64_t at = (row * plan.chunks + mine.chunk) * plan.spans.parts + span.part;
    partials.means[at] = group_means[group];
    partials.squares[at] = group_squares[group];
  }
}

// Mean and rstd of one group, for lane 0, from its `chunks` times `parts` partials at `row`.
template <bool kLast, int N>
__device__ void combine(const Shape& shape, const ChunkPlan& plan, const float* means,
                        const float* squares, float eps, float& mean, float& rstd) {
  const int lane = threadIdx.x % kWarp, parts = plan.spans.parts, all = plan.chunks * parts;
  const int group_channels = shape.group_channels();
  const auto elements = [&](int i) {
    const int before = i % parts * plan.spans.channels, left = group_channels - before;
    const int width = parts > 1 && plan.spans.channels < left ? plan.spans.channels : left;
    return static_cast<float>(plan.units_of(i / parts, shape.units<kLast, N>())) * (kLast ? 1 : N) *
           width;
  };
  float sum = 0;
  for (int i = lane; i < all; i += kWarp) sum += means[i] * elements(i);
  mean = warp_sum(sum) / shape.elements_of_group();
  sum = 0;
  for (int i = lane; i < all; i += kWarp) {
    const float distance = means[i] - mean;
    sum += squares[i] + distance * distance * elements(i);
  }
  rstd = rstd_of(warp_sum(sum), shape.elements_of_group(), eps);
}

// y, from the partials of `from`, or where that has no spans from mean and rstd, (images, groups).
template <typename T, int N, bool kLast>
__global__ void __launch_bounds__(kChunkThreads, 3)
    apply_kernel(Forward<T> call, const float* means, const float* squares, ChunkPlan from,
                 ChunkPlan plan) {
  const Shape& shape = call.shape;
  const Chunk mine(plan, int64_t{gridDim.x} - 1 - blockIdx.x);
  const Span span = plan.spans.at(mine.span, shape);
  const int inners = plan.units_of(mine.chunk, shape.units<kLast, N>());
  const int64_t first = int64_t{mine.chunk} * plan.units;
  constexpr int kChannels = kLast ? N : 1;
  const int outers = span.width / kChannels;
  const Threads<kLast> me(threadIdx.x, blockDim.x, outers, inners);
  SharedMemory memory;
  float* const factors = memory.array<float>(plan.spans.channels);
  float* const offsets = memory.array<float>(plan.spans.channels);
  float* const group_means = memory.array<float>(plan.spans.most_groups(shape));
  float* const group_rstds = memory.array<float>(plan.spans.most_groups(shape));

  put_affine(call.affine, mine.n, span, factors, offsets);
  const bool writes = call.mean && mine.chunk == 0 && span.part == 0;
  for (int group = threadIdx.x / kWarp; group < span.groups; group += blockDim.x / kWarp) {
    const int64_t row = mine.n * shape.groups + span.group + group;
    float mean, rstd;
    if (from.spans.count == 0) {
      mean = means[row];
      rstd = squares[row];
    } else {
      const int64_t at = row * from.chunks * from.spans.parts;
      combine<kLast, N>(shape, from, means + at, squares + at, call.eps, mean, rstd);
    }
    if (threadIdx.x % kWarp == 0) {
      group_means[group] = mean;
      group_rstds[group] = rstd;
      if (writes) {
        call.mean[row] = mean;
        call.rstd[row] = rstd;
      }
    }
  }
  __syncthreads();
  for (int u = me.outer; u < outers; u += me.outer_step) {
    const int c = span.first + u * kChannels;
    const Coefficients<kLast, N> coefficients(span, u, factors, offsets, group_means, group_rstds);
    const auto to = run_of<kLast, N>(call.y, shape.pixels, shape.channels, mine.n, first, c);
    for_each<N, kApplyLoads>(
        me, inners, call.source.template run<kLast, N>(shape.pixels, mine.n, first, c),
        [&](const Vector<T, N>& x, int q) { coefficients.apply(x, call.silu, to.at(q)); });
  }
}

// Chunks for `waves` times as many blocks as run at once, each with some accesses for every thread.
// Where the second launch reads the statistics of all chunks, these should be few: one wave.
template <typename T, int N, bool kLast>
ChunkPlan chunk_plan(const Shape& shape, const Device& device, int waves) {
  constexpr int kLeastBytes = 128, kBlocks = 4;  // of a row of channels; of a multiprocessor
  ChunkPlan plan;
  plan.spans = spans_of(shape, kLast, N, kLeastBytes / sizeof(T));
  if (plan.spans.count == 0) return plan;
  const int outers = kLast ? plan.spans.channels / N : plan.spans.channels;
  const int64_t units = shape.units<kLast, N>();
  // Units of which a block takes whole rounds.
  const int64_t round = kLast ? std::max(kChunkThreads / outers, 1) : kWarp;
  const int64_t least =
      kLast ? kPartialsLoads * round
            : ceil_div(ceil_div(kPartialsLoads * kChunkThreads, outers), kWarp) * kWarp;
  const int64_t wanted =
      int64_t{waves} * kBlocks * device.multiprocessors / (shape.images * plan.spans.count);
  const int64_t most = ceil_div(units, least);
  const int64_t chunks = wanted < 1 ? 1 : wanted < most ? wanted : most;
  plan.units = static_cast<int>(ceil_div(ceil_div(units, chunks), round) * round);
  plan.chunks = static_cast<int>(ceil_div(units, plan.units));
  return plan;
}

template <typename T, int N, bool kLast>
void partials(const Forward<T>& call, const Partials& results, const ChunkPlan& plan,
              cudaStream_t stream) {
  constexpr auto kFloats = [](int count) { return SharedMemory::bytes<float>(count); };
  const int groups = plan.spans.most_groups(call.shape), warps = kChunkThreads / kWarp;
  const size_t bytes = 2 * kFloats(places<N, kLast>(plan.spans)) + kFloats(kChunkThreads) +
                       kFloats(groups > warps ? groups : warps) + 2 * kFloats(groups);
  const unsigned blocks = call.shape.images * plan.chunks * plan.spans.count;
  launch(partials_kernel<T, N, kLast>, {dim3(blocks), dim3(kChunkThreads), bytes}, stream,
         call.shape, call.source, results, plan);
}

// `from` without spans: means and squares are mean and rstd themselves.
template <typename T, int N, bool kLast>
void apply(const Forward<T>& call, const float* means, const float* squares, const ChunkPlan& from,
           const ChunkPlan& plan, cudaStream_t stream) {
  const size_t bytes = 2 * SharedMemory::bytes<float>(plan.spans.channels) +
                       2 * SharedMemory::bytes<float>(plan.spans.most_groups(call.shape));
  const unsigned blocks = call.shape.images * plan.chunks * plan.spans.count;
  launch(apply_kernel<T, N, kLast>, {dim3(blocks), dim3(kChunkThreads), bytes}, stream, call, means,
         squares, from, plan);
}

}  // namespace sdfast::group_norm
