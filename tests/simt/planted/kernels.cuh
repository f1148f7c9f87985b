// Small kernels that the emulation has to run right, and the same with one fault each.
#pragma once

#include "cuda_common.cuh"
#include "cuda_hopper.cuh"
#include "cuda_mma.cuh"

namespace planted {

using namespace sdfast;

enum class Fault {
  kNone,
  kNoBarrier,          // between stores to shared memory and loads by others
  kNoBarrierBefore,    // between loads by others and the next stores
  kDivergentBarrier,   // one warp goes another way
  kEarlyExit,          // one thread ends before the barrier
  kReadsBeside,        // one element past a tensor
  kWritesBeside,       // one element past a tensor
  kReadsBesideShared,  // one element past a shared array
  kWritesInput,        // a tensor that is only read
  kUnwritten,          // loads shared memory that nobody stored
  kMisaligned,         // a 16-byte load from an address that is not
};

constexpr int kThreads = 64;

// y[i] = x of the block's threads, reversed, twice over.
__global__ void reverse(const float* x, float* y, int n, Fault fault) {
  SDFAST_SHARED(float, values, kThreads);
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  if (fault == Fault::kEarlyExit && t == 5) return;
  if (fault == Fault::kMisaligned) {
    float four[4];
    load(x + 1, four);
    values[t] = four[0];
  }
  if (fault == Fault::kReadsBeside && t == 0) values[t] = x[n];
  if (fault != Fault::kUnwritten || t != 7) values[t] = x[i];
  if (fault == Fault::kDivergentBarrier && t < kWarp) {
    __syncthreads();
  } else if (fault != Fault::kNoBarrier) {
    __syncthreads();
  }
  const float first = values[kThreads - 1 - t];
  if (fault == Fault::kReadsBesideShared && t == 3) y[i] = values[kThreads];
  if (fault != Fault::kNoBarrierBefore) __syncthreads();
  values[t] = first;
  __syncthreads();
  y[i] = values[t];
  if (fault == Fault::kWritesBeside && i == n - 1) y[n] = 0;
  if (fault == Fault::kWritesInput && i == 0) const_cast<float*>(x)[0] = 0;
}

// What each lane receives: from lane i ^ 5, i + 3, i - 2 and 7, and the warp's sum. y: (5, 32).
__global__ void shuffle(const float* x, float* y) {
  const int lane = threadIdx.x;
  const float mine = x[lane];
  y[lane] = __shfl_xor_sync(kAllLanes, mine, 5);
  y[32 + lane] = __shfl_down_sync(kAllLanes, mine, 3);
  y[64 + lane] = __shfl_up_sync(kAllLanes, mine, 2);
  y[96 + lane] = __shfl_sync(kAllLanes, mine, 7);
  y[128 + lane] = warp_sum(mine);
}

// d = a b + c of one warp, T's (16, K) times (K, 8), K = 32 / sizeof(T); each register as PTX
// places it.
template <typename T>
__global__ void multiply(const T* a, const T* b, const float* c, float* d) {
  const int group = threadIdx.x / 4, in = threadIdx.x % 4;
  constexpr int kDepth = 32 / sizeof(T), kOfRegister = 4 / sizeof(T);
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) {
    const int row = group + i % 2 * 8, column = kOfRegister * in + i / 2 * (kDepth / 2);
    memcpy(&left[i], a + row * kDepth + column, 4);
  }
  for (int i = 0; i < 2; ++i) {
    T values[kOfRegister];
    for (int k = 0; k < kOfRegister; ++k) {
      values[k] = b[(kOfRegister * in + k + i * (kDepth / 2)) * 8 + group];
    }
    memcpy(&right[i], values, 4);
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = c[(group + i / 2 * 8) * 8 + 2 * in + i % 2];
  mma<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + 2 * in + i % 2] = sums[i];
}

// The four 8x8 matrices of a (16, 16) in the order of mma's left operand, transposed or not: every
// lane's registers. x: (16, 16) of 16 bits; y: (32, 4).
template <bool kTransposed>
__global__ void matrices(const __half* x, uint32_t* y) {
  SDFAST_SHARED(__half, tile, 16 * 16);
  for (int i = threadIdx.x; i < 16 * 16; i += kWarp) tile[i] = x[i];
  __syncthreads();
  uint32_t registers[4];
  const int lane = threadIdx.x, matrix = lane / 8;
  load_matrices<kTransposed>(registers, tile + (lane % 8 + matrix % 2 * 8) * 16 + matrix / 2 * 8);
  for (int i = 0; i < 4; ++i) y[4 * lane + i] = registers[i];
}

enum class CopyFault { kNone, kNoWait, kNoBarrier, kNeverWaits };

// y = x through asynchronous copies of two groups; of the last four floats of each block only two
// are there.
__global__ void copy(const float* x, float* y, CopyFault fault) {
  SharedMemory shared;
  float* const values = shared.array<float>(4 * kThreads);
  const int t = threadIdx.x, from = (t + 32) % kThreads;  // read what another warp has copied
  copy_async(values + 4 * t, x + (blockIdx.x * kThreads + t) * 4, t == kThreads - 1 ? 8 : 16);
  commit_copies();
  if (fault == CopyFault::kNone || fault == CopyFault::kNoBarrier) wait_for_copies<0>();
  if (fault != CopyFault::kNoBarrier) __syncthreads();
  if (fault == CopyFault::kNeverWaits) return;
  float four[4];
  load(values + 4 * from, four);
  store(y + (blockIdx.x * kThreads + from) * 4, four);
  if (fault == CopyFault::kNoWait) wait_for_copies<0>();
}

enum class ClusterFault { kNone, kNoBarrier, kNoBarrierAtEnd, kEndsEarly };

// y[block] = the sum of one value of each block in its cluster, read from their shared memory.
__global__ void cluster_sum(const float* x, float* y, unsigned blocks, ClusterFault fault) {
  SDFAST_SHARED(float, value, 1);
  if (threadIdx.x == 0) value[0] = x[blockIdx.x];
  if (fault != ClusterFault::kNoBarrier) cluster_barrier();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned b = 0; b < blocks; ++b) sum += *in_block_of_cluster(value, b);
    y[blockIdx.x] = sum;
  }
  if (fault == ClusterFault::kEndsEarly) return;
  if (fault != ClusterFault::kNoBarrierAtEnd) cluster_barrier();
  if (threadIdx.x == 0) value[0] = 0;
}

enum class GridFault { kNone, kNoFence, kSameElement };

// y[0] = the sum of x, a value from each block, by the block that comes last.
__global__ void grid_sum(const float* x, float* partial, unsigned* counter, float* y,
                         GridFault fault) {
  SDFAST_SHARED(unsigned, order, 1);
  if (threadIdx.x == 0) {
    partial[fault == GridFault::kSameElement ? 0 : blockIdx.x] = x[blockIdx.x];
    if (fault != GridFault::kNoFence) __threadfence();
    order[0] = atomicAdd(counter, 1);
  }
  __syncthreads();
  if (order[0] != gridDim.x - 1 || threadIdx.x != 0) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
  y[0] = sum;
}

enum class TileFault {
  kNone,
  kNoWaitForCopy,
  kNoWaitForReaders,
  kNoWaitForProducts,
  kNoBarrier,  // that anybody initialised
  kArrivesTwice,
  kNeverFull,
};

// y = x wT by four warps, 64 elements of their rows at a time, all in one place. x: (64, K), w:
// (80, K).
__global__ void tile_products(TensorMap x, TensorMap w, float* y, int steps, TileFault fault) {
  constexpr int kRows = 64, kColumns = 80;
  SharedMemory shared;
  unsigned char* const tile = shared.array<unsigned char>((kRows + kColumns) * kTileRowBytes);
  unsigned char* const weights = tile + kRows * kTileRowBytes;
  uint64_t* const full = shared.array<uint64_t>(1);
  uint64_t* const empty = shared.array<uint64_t>(1);
  const int t = threadIdx.x;
  if (t == 0) {
    init_barrier(full, 1);
    if (fault != TileFault::kNoBarrier) init_barrier(empty, 4);
  }
  __syncthreads();
  float sums[kColumns / 2] = {};
  for (int step = 0; step < steps; ++step) {
    if (t == 0) {
      if (fault != TileFault::kNoWaitForReaders) wait(empty, (step + 1) % 2);
      arrive_for_bytes(full, (kRows + kColumns) * kTileRowBytes + (fault == TileFault::kNeverFull));
      copy_tile(tile, x, full, 64 * step, 0, 0);
      copy_tile(weights, w, full, 64 * step, 0, 0);
    }
    __syncwarp();
    if (fault != TileFault::kNoWaitForCopy) wait(full, step % 2);
    begin_products();
    for (int k = 0; k < 4; ++k) {
      sdfast::multiply<__nv_bfloat16, kColumns>(sums, tile_descriptor(tile) + 2 * k,
                                                tile_descriptor(weights) + 2 * k);
    }
    commit_products();
    if (fault != TileFault::kNoWaitForProducts) wait_for_products<0>();
    if (t % kWarp == 0) {
      arrive(empty);
      if (fault == TileFault::kArrivesTwice) arrive(empty);
    }
  }
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = t / kWarp * 16 + t % kWarp / 4 + i / 2 % 2 * 8;
    y[row * kColumns + i / 4 * 8 + t % 4 * 2 + i % 2] = sums[i];
  }
}

}  // namespace planted
