// group_norm in one launch: y, mean and rstd of images whose groups fit in shared memory.
//
// Algorithm. A block, or on sm_90 and sm_100 a cluster of up to 8 that share the pixels out, copies
// all pixels of a span of groups to shared memory, every thread what it will read itself: no
// barrier, and all bytes in flight at once. From there the mean is summed, then the squares of the
// distances from it; a cluster's blocks hand each other both and combine them in order of rank
// (Chan et al. 1979); y is computed from what is held. Bytes: x once, y once. Limit: at U-Net sizes
// the latency of launch, copy and barriers (2x320x64x64 in half precision is 10.5 MB, 2.5 us at
// 4.3 TB/s, on 128 blocks of 40 KiB), above them memory bandwidth.
#pragma once

#include <algorithm>

#include "cuda_mma.cuh"
#include "group_norm_cuda.cuh"

namespace sdfast::group_norm {

constexpr int kWholeThreads = 512, kLeastThreads = 128;

struct WholePlan {
  Spans spans{};
  int threads = 0;  // 0: there is no plan
  int cluster = 1;
  int units = 0;  // of pixels, of a block
  int slots = 0;  // accesses of a thread
  size_t shared_bytes = 0;

  // Units that the block of this rank has, of an image's.
  __host__ __device__ int units_of(int rank, int64_t all) const {
    const int64_t left = all - int64_t{rank} * units;
    return static_cast<int>(left < 0 ? 0 : left < units ? left : units);
  }
};

// How many elements the shared arrays of a block have.
template <typename T, int N, bool kLast>
struct WholeSizes {
  int slab, channels, buffer, partial, groups, moments;

  __host__ __device__ WholeSizes(const WholePlan& plan, const Shape& shape) {
    const int warps = plan.threads / kWarp, rows = plan.threads * N;
    slab = plan.slots * plan.threads;
    channels = plan.spans.channels;
    buffer = !kLast ? plan.threads : rows > channels ? rows : channels;
    groups = plan.spans.most_groups(shape);
    partial = groups > warps ? groups : warps;
    moments = plan.cluster * groups;
  }
  size_t bytes() const {
    const auto floats = [](int count) { return SharedMemory::bytes<float>(count); };
    return SharedMemory::bytes<Vector<T, N>>(slab) + 2 * floats(channels) + floats(buffer) +
           floats(partial) + 2 * floats(groups) + SharedMemory::bytes<Vector<float, 2>>(moments);
  }
};

template <typename T, int N, bool kLast>
__global__ void __launch_bounds__(kWholeThreads) whole_kernel(Forward<T> call, WholePlan plan) {
  const Shape shape = call.shape;
  const int rank = plan.cluster > 1 ? static_cast<int>(cluster_block()) : 0;
  const int64_t which = blockIdx.x / plan.cluster, n = which / plan.spans.count;
  const Span span = plan.spans.at(static_cast<int>(which % plan.spans.count), shape);
  const int64_t first = int64_t{rank} * plan.units;
  const int inners = plan.units_of(rank, shape.units<kLast, N>());
  constexpr int kChannels = kLast ? N : 1;  // of an outer unit
  const int outers = span.width / kChannels, threads = blockDim.x;
  const Threads<kLast> me(threadIdx.x, threads, outers, inners);
  const WholeSizes<T, N, kLast> sizes(plan, shape);
  SharedMemory memory;
  auto* const slab = memory.array<Vector<T, N>>(sizes.slab);  // (slots, threads)
  float* const factors = memory.array<float>(sizes.channels);
  float* const offsets = memory.array<float>(sizes.channels);
  float* const buffer = memory.array<float>(sizes.buffer);  // (rows of threads, channels)
  float* const partial = memory.array<float>(sizes.partial);
  float* const means = memory.array<float>(sizes.groups);
  float* const squares = memory.array<float>(sizes.groups);
  // (blocks of the cluster, groups): mean and squares
  auto* const moments = memory.array<Vector<float, 2>>(sizes.moments);

  // Calls each_outer(u, walk_inner); that one calls each_inner(slot, q).
  const auto walk = [&](const auto& each_outer) {
    Vector<T, N>* slot = slab + threadIdx.x;
    for (int u = me.outer; u < outers; u += me.outer_step) {
      each_outer(u, [&](const auto& each_inner) {
        for (int q = me.inner; q < inners; q += me.inner_step, slot += threads) each_inner(slot, q);
      });
    }
  };
  walk([&](int u, const auto& walk_inner) {
    const int c = span.first + u * kChannels;
    const auto from = call.source.template run<kLast, N>(shape.pixels, n, first, c);
    walk_inner([&](Vector<T, N>* slot, int q) {
      if constexpr (sizeof(Vector<T, N>) == 16) {
        copy_async(slot, from.at(q));
      } else {
        *slot = *reinterpret_cast<const Vector<T, N>*>(from.at(q));
      }
    });
  });
  commit_copies();
  put_affine(call.affine, n, span, factors, offsets);
  if (plan.cluster > 1) cluster_barrier();  // every block is there to be written to
  wait_for_copies<0>();

  const int groups = span.groups, group_width = kLast ? span.group_width : 1;
  const float group_channels = kLast ? span.group_width : span.width;
  const float elements = static_cast<float>(inners) * (kLast ? 1 : N) * group_channels;
  // Each group's sum of x, or of squared distances from `means`.
  const auto sum = [&](auto of_squares, float divisor, float* totals) {
    constexpr bool kSquares = decltype(of_squares)::value;
    const int rows = kLast ? me.inner_step : threads, width = kLast ? span.width : 1;
    float of_thread = 0;
    walk([&](int u, const auto& walk_inner) {
      float sums[N] = {}, centre[kChannels] = {};
      if (kSquares) get_of_groups(means, kLast ? u * N : 0, group_width, centre);
      walk_inner([&](const Vector<T, N>* slot, int) {
        float x[N];
        load(slot->values, x);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float distance = x[i] - centre[kLast ? i : 0];
          sums[i] += kSquares ? distance * distance : x[i];
        }
      });
      if constexpr (kLast) {
        put(buffer + me.inner * width + u * N, sums);
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) of_thread += sums[i];
      }
    });
    if (!kLast) buffer[threadIdx.x] = of_thread;
    sum_groups(rows, groups, group_width, divisor, partial, totals,
               [&](int, int r, int c) { return buffer[r * width + c]; });
  };
  sum(std::false_type(), inners > 0 ? elements : 1, means);
  sum(std::true_type(), 1, squares);

  if (plan.cluster > 1) {
    for (int i = threadIdx.x; i < groups * plan.cluster; i += threads) {
      const int group = i % groups;
      auto* const there = in_block_of_cluster(moments, i / groups) + rank * groups + group;
      *there = {means[group], squares[group]};
    }
    cluster_barrier();
  }
  const float all_elements = shape.elements_of_group();
  for (int group = threadIdx.x; group < groups; group += threads) {
    float mean = means[group], square = squares[group];
    if (plan.cluster > 1) {
      const auto combine = [&](const auto& term) {
        float total = 0;
        for (int r = 0; r < plan.cluster; ++r) {
          const int its_units = plan.units_of(r, shape.units<kLast, N>());
          const auto its_moments = moments[r * groups + group];
          total += term(its_moments.values[0], its_moments.values[1],
                        static_cast<float>(its_units) * (kLast ? 1 : N) * group_channels);
        }
        return total;
      };
      mean = combine([](float m, float, float count) { return m * count; }) / all_elements;
      square = combine(
          [&](float m, float s, float count) { return s + (m - mean) * (m - mean) * count; });
    }
    const float rstd = rstd_of(square, all_elements, call.eps);
    means[group] = mean;
    squares[group] = rstd;
    if (rank == 0 && call.mean) {
      const int64_t at = n * shape.groups + span.group + group;
      call.mean[at] = mean;
      call.rstd[at] = rstd;
    }
  }
  __syncthreads();

  walk([&](int u, const auto& walk_inner) {
    const Coefficients<kLast, N> coefficients(span, u, factors, offsets, means, squares);
    const auto to = run_of<kLast, N>(call.y, shape.pixels, shape.channels, n, first,
                                     span.first + u * kChannels);
    walk_inner(
        [&](const Vector<T, N>* slot, int q) { coefficients.apply(*slot, call.silu, to.at(q)); });
  });
}

// The plan with clusters of this size; without threads where a block's shared memory is too small.
template <typename T, int N, bool kLast>
WholePlan whole_plan(const Shape& shape, const Spans& spans, int cluster, const Device& device) {
  WholePlan plan;
  plan.spans = spans;
  plan.cluster = cluster;
  const int64_t outers = kLast ? spans.channels / N : spans.channels;
  const int64_t units = ceil_div(shape.units<kLast, N>(), cluster), vectors = outers * units;
  if (vectors * int64_t{sizeof(Vector<T, N>)} > int64_t(shared_bytes_of_block(device))) return plan;
  plan.units = static_cast<int>(units);
  // As many threads as leave few of them without work in the last round.
  const int most = vectors >= 1024 ? kWholeThreads : vectors >= 384 ? 256 : kLeastThreads;
  const auto slots = [&](int threads) {
    const Threads<kLast> steps(0, threads, static_cast<int>(outers), plan.units);
    return static_cast<int>(ceil_div(outers, steps.outer_step) * ceil_div(units, steps.inner_step));
  };
  int least = most * slots(most);
  for (int threads = std::max(most / 2, kLeastThreads); threads < most; threads += kWarp) {
    least = std::min(least, threads * slots(threads));
  }
  plan.threads = most;
  while (plan.threads * slots(plan.threads) * 10 > least * 11) plan.threads -= kWarp;
  plan.slots = slots(plan.threads);
  plan.shared_bytes = WholeSizes<T, N, kLast>(plan, shape).bytes();
  if (plan.shared_bytes > shared_bytes_of_block(device)) plan.threads = 0;
  return plan;
}

// One launch, or none where that cannot be or leaves most of the GPU idle. Assumed, not measured:
// a cluster pays where its blocks would else be few, or too large for two of a multiprocessor.
template <typename T, int N, bool kLast>
WholePlan whole_plan(const Shape& shape, const Device& device) {
  constexpr size_t kSmall = 24 << 10, kMiddle = 64 << 10, kLarge = 112 << 10;
  constexpr int kLeastBytes = 64;
  const Spans spans = spans_of(shape, kLast, N, kLeastBytes / sizeof(T));
  if (spans.parts > 1 || spans.count == 0) return {};
  const auto enough = [&](const WholePlan& plan, size_t bytes) {
    const int64_t blocks = shape.images * spans.count * plan.cluster;
    return plan.shared_bytes <= bytes ||
           (blocks >= device.multiprocessors && plan.shared_bytes <= kLarge);
  };
  const bool clusters = device.capability >= 90 && device.capability < 120;
  if (!clusters) {
    const WholePlan plan = whole_plan<T, N, kLast>(shape, spans, 1, device);
    return enough(plan, kMiddle) ? plan : WholePlan{};
  }
  WholePlan best;
  for (int cluster = 1; cluster <= 8; cluster *= 2) {
    const WholePlan plan = whole_plan<T, N, kLast>(shape, spans, cluster, device);
    if (plan.threads == 0) continue;
    best = plan;
    if (enough(plan, kSmall)) break;
  }
  return best;
}

template <typename T, int N, bool kLast>
void whole(const Forward<T>& call, const WholePlan& plan, cudaStream_t stream) {
  const unsigned blocks = call.shape.images * plan.spans.count * plan.cluster;
  launch(whole_kernel<T, N, kLast>,
         {dim3(blocks), dim3(plan.threads), plan.shared_bytes, static_cast<unsigned>(plan.cluster)},
         stream, call, plan);
}

}  // namespace sdfast::group_norm
