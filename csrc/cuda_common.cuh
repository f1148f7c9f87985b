// What every CUDA kernel shares: its launch, shared memory, vector accesses, conversions and
// reductions.
//
// The same sources run on a CPU, where tests/simt/simt.h stands in for the compiler (SDFAST_SIMT).
// So kernels keep to a few rules: shared memory comes from SDFAST_SHARED or SharedMemory, every
// instruction without a C++ spelling from here or from cuda_mma.cuh, and warps are whole.
#pragma once

#ifdef SDFAST_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

namespace sdfast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- the current device

struct Device {
  int capability;       // 90 for 9.0
  int multiprocessors;  // how many blocks run at once at least
};

#ifdef SDFAST_SIMT
inline Device current_device() { return {simt::device.capability, simt::device.multiprocessors}; }
#else
inline void check_error(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline Device current_device() {
  constexpr int kDevices = 64;
  static Device known[kDevices] = {};  // the same values whoever writes them first
  int index = 0;
  check_error(cudaGetDevice(&index), "device");
  Device& device = known[index % kDevices];
  if (device.multiprocessors == 0) {
    int major = 0, minor = 0, count = 0;
    check_error(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "device");
    check_error(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "device");
    check_error(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index), "device");
    device = {10 * major + minor, count};
  }
  return device;
}
#endif

// What a block may hold of shared memory at most, in bytes.
inline size_t shared_bytes_of_block(const Device& device) {
  switch (device.capability) {
    case 80:
    case 87:
      return 163 << 10;
    case 90:
    case 100:
    case 103:
      return 227 << 10;
    default:
      return 99 << 10;
  }
}

// ---- launch

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic, of one block
  unsigned cluster = 1;     // blocks along x that share their shared memory, sm_90 and later
};

#ifdef SDFAST_SIMT
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t,
            Arguments... arguments) {
  simt::run({shape.grid, shape.block, shape.shared_bytes, shape.cluster},
            [&] { kernel(arguments...); });
}
#else
// Launches where nothing is empty; otherwise does nothing.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
            Arguments... arguments) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shape.shared_bytes > kWithoutAsking) {
    check_error(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shape.shared_bytes)),
                "shared memory");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape.cluster, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check_error(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "launch");
}
#endif

// ---- shared memory

// SDFAST_SHARED(float, sums, 32): an array of this block's, uninitialised.
#ifdef SDFAST_SIMT
#define SDFAST_SHARED(type, name, count)       \
  static const simt::SharedArray name##_array; \
  type* const name = static_cast<type*>(       \
      name##_array.of_block(sizeof(type) * (count), alignof(type) > 16 ? alignof(type) : 16))
#else
#define SDFAST_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

// The launch's dynamic shared memory, handed out array after array. Every thread asks for the same
// arrays in the same order.
class SharedMemory {
 public:
  static constexpr size_t kAlignment = 128;  // of every array, as bulk copies want it

  template <typename T>
  __device__ T* array(size_t count) {
    const size_t at = used_;
    used_ += bytes<T>(count);
#ifdef SDFAST_SIMT
    return static_cast<T*>(simt::dynamic_shared(at, bytes<T>(count), sizeof(T) * count));
#else
    extern __shared__ __align__(1024) unsigned char sdfast_dynamic_shared[];
    return reinterpret_cast<T*>(sdfast_dynamic_shared + at);
#endif
  }
  // What an array takes of a launch's `shared_bytes`.
  template <typename T>
  __host__ __device__ static constexpr size_t bytes(size_t count) {
    return (sizeof(T) * count + kAlignment - 1) / kAlignment * kAlignment;
  }

 private:
  size_t used_ = 0;
};

// ---- thread-block clusters (sm_90): blocks that read and write each other's shared memory

#ifdef SDFAST_SIMT
using simt::cluster_barrier;
using simt::cluster_block;
template <typename T>
T* in_block_of_cluster(T* shared, unsigned block) {
  return static_cast<T*>(simt::shared_of_block(shared, block));
}
#else
// Which block of its cluster this is.
__device__ inline unsigned cluster_block() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
// Waits for every thread of the cluster; what they wrote to shared memory before is seen after.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  // Not `.aligned`: a warp may come here in parts, after a loop whose rounds differ.
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
#else
  __trap();
#endif
}
// The same array in another block of the cluster.
template <typename T>
__device__ T* in_block_of_cluster(T* shared, unsigned block) {
  T* there = nullptr;
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(block));
#else
  __trap();
#endif
  return there;
}
#endif

// ---- values in memory

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// N values that move in one access; N sizeof(T) is a power of two, at most 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

// How many values of T are 16 bytes.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <int N, typename T>
__device__ inline void load(const T* from, float (&to)[N]) {
  const Vector<T, N> vector = *reinterpret_cast<const Vector<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(vector.values[i]);
}
template <int N, typename T>
__device__ inline void store(T* to, const float (&from)[N]) {
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) vector.values[i] = from_float<T>(from[i]);
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

// 2^x within 2 units in the last place; 0 where that is less than 2^-126.
__device__ inline float exp2_fast(float x) {
#ifdef SDFAST_SIMT
  return std::exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Calls f with a value of the tuple's type at an index.
template <typename Tuple, int first = 0, typename F>
void with_element_of(int index, const F& f) {
  if constexpr (first < std::tuple_size_v<Tuple>) {
    if (index == first) return f(std::tuple_element_t<first, Tuple>());
    with_element_of<Tuple, first + 1>(index, f);
  }
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Divides by what a launch knows and the compiler does not, in three instructions (Granlund and
// Montgomery 1994, section 4); the instructions' own way takes some hundred clocks.
struct Divisor {
  int by = 1, shift = 0;
  uint32_t factor = 1;

  constexpr Divisor() = default;
  constexpr explicit Divisor(int by) : by(by) {
    while (int64_t{1} << shift < by) ++shift;
    factor = static_cast<uint32_t>((((uint64_t{1} << shift) - by) << 32) / by + 1);
  }
  // n / by, of 0 <= n < 2^31; n becomes the remainder.
  __host__ __device__ constexpr int divide(int& n) const {
    const uint32_t high = static_cast<uint32_t>(uint64_t{static_cast<uint32_t>(n)} * factor >> 32);
    const int quotient = static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
    n -= quotient * by;
    return quotient;
  }
};
constexpr bool divides(int by) {
  for (const int n : {0, by - 1, by, 0x7ffffffe, 0x7fffffff}) {
    int rest = n;
    if (Divisor(by).divide(rest) != n / by || rest != n % by) return false;
  }
  return true;
}
static_assert(divides(1) && divides(2) && divides(3) && divides(7) && divides(132) &&
              divides(65535) && divides(65537) && divides(0x40000001) && divides(0x7fffffff));

// ---- reductions, in an order that does not depend on the schedule

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;  // the same bits in every lane: addition commutes
}

}  // namespace sdfast
