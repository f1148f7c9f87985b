// What GPUs of compute capability 9.0 alone have: copies of whole tiles by the tensor memory
// accelerator (TMA), barriers in shared memory that such copies complete on, and products of four
// warps that read their factors from shared memory (wgmma). PTX manual: "cp.async.bulk.tensor",
// "mbarrier", "wgmma.mma_async".
//
// Tiles are rows of 128 bytes, with the 16-byte units of row r swapped by XOR with r % 8 ("128B
// swizzle"): a copy writes them so, a product reads them so, and neither meets a bank twice.
#pragma once

#ifndef SDFAST_SIMT
#include <cuda.h>
#endif

#include <algorithm>
#include <type_traits>

#include "cuda_common.cuh"

// Machine code for 9.0a; elsewhere kernels of this kind have no body, and are not launched.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(SDFAST_SIMT)
#define SDFAST_HOPPER 1
#else
#define SDFAST_HOPPER 0
#endif

namespace sdfast {

constexpr int kTileRowBytes = 128;  // tiles begin at multiples of 8 of them
constexpr int kWarpgroup = 128;     // threads that multiply together

// ---- the host's part: what a copy is told of a tensor

// A tensor of up to 4 axes, the innermost first, of 16-bit elements; boxes of it are copied to
// tiles, with zeros for what lies outside of it. Every `step`-th element along an axis is taken.
struct TileSource {
  const void* data;
  int axes;
  int64_t sizes[4];
  int64_t strides[4];  // in elements, multiples of 8 but for the innermost, which is 1; 0 of a
                       // single one
  int box[4];          // of elements that are taken; the innermost 64
  int steps[4] = {1, 1, 1, 1};
};

#ifdef SDFAST_SIMT
using TensorMap = simt::TensorMap;
template <typename T>
TensorMap tensor_map(const TileSource& source) {
  TensorMap map = {};
  map.data = source.data, map.axes = source.axes;
  std::copy_n(source.sizes, 4, map.sizes), std::copy_n(source.strides, 4, map.strides);
  std::copy_n(source.box, 4, map.box), std::copy_n(source.steps, 4, map.steps);
  return map;
}
template <typename Kernel>
bool has_hopper_code(Kernel) {
  return simt::hopper;
}
#else
using TensorMap = CUtensorMap;
// Whether this library holds a kernel with its body. Code for 9.0 without the "a", and PTX of older
// GPUs, have none, which takes next to no registers; these kernels keep sums in 40 and more.
template <typename Kernel>
bool has_hopper_code(Kernel kernel) {
  static const bool is_there = [&] {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && attributes.numRegs >= 40;
  }();
  return is_there;
}
template <typename T>
TensorMap tensor_map(const TileSource& source) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_error(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                 cudaEnableDefault, &found),
                "tensor map");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode) throw std::runtime_error("tensor map: the driver is too old, update it");
  cuuint64_t sizes[4], strides[4];
  cuuint32_t box[4], steps[4];
  for (int axis = 0; axis < source.axes; ++axis) {
    sizes[axis] = source.sizes[axis];
    if (axis > 0) strides[axis - 1] = std::max<int64_t>(source.strides[axis] * sizeof(T), 16);
    steps[axis] = source.steps[axis];
    box[axis] = source.box[axis] * source.steps[axis];
  }
  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                   : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  TensorMap map;
  const CUresult result =
      encode(&map, kType, source.axes, const_cast<void*>(source.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("tensor map: error " + std::to_string(static_cast<int>(result)));
  }
  return map;
}

#endif

#ifdef SDFAST_SIMT
using simt::arrive;
using simt::arrive_for_bytes;
using simt::begin_products;
using simt::commit_products;
using simt::copy_tile;
using simt::init_barrier;
using simt::tile_descriptor;
using simt::wait;
inline void show_barriers() {}
inline void prefetch(const TensorMap&) {}
template <int kLeft>
void wait_for_products() {
  simt::wait_for_products(kLeft);
}
template <int count>
void hold(float (&)[count]) {}

template <typename T>
constexpr simt::Element kElement =
    std::is_same_v<T, __half> ? simt::Element::kHalf : simt::Element::kBFloat16;
template <typename T, int n>
void multiply(float (&d)[n / 2], uint64_t x, uint64_t w) {
  simt::multiply_tiles({kElement<T>, n, d, nullptr, x, w, false, false});
}
template <typename T>
void multiply_rows(float (&d)[32], const uint32_t (&x)[4], uint64_t w, bool is_first) {
  simt::multiply_tiles({kElement<T>, 64, d, x, 0, w, false, is_first});
}
template <typename T, int n>
void multiply_transposed(float (&d)[n / 2], const uint32_t (&x)[4], uint64_t w) {
  simt::multiply_tiles({kElement<T>, n, d, x, 0, w, true, false});
}
#elif SDFAST_HOPPER

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- barriers: threads arrive, copies bring bytes, and a phase is over when all have

__device__ inline void init_barrier(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Shows other threads, and copies, barriers that were just initialised; a block's barrier follows.
__device__ inline void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ inline void arrive_for_bytes(uint64_t* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity is over; those of a barrier count from 0.
__device__ inline void wait(uint64_t* barrier, unsigned parity) {
  uint32_t over = 0;
  while (!over) {
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// ---- copies, asked for by one thread

__device__ inline void copy_tile(void* tile, const TensorMap& map, uint64_t* barrier, int c, int x,
                                 int y, int image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c), "r"(x), "r"(y), "r"(image)
      : "memory");
}
__device__ inline void copy_tile(void* tile, const TensorMap& map, uint64_t* barrier, int c,
                                 int tap, int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c), "r"(tap), "r"(row)
      : "memory");
}
__device__ inline void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- products

// Where a tile lies, its rows along M or N; 16 elements further along K are 2 more.
__device__ inline uint64_t tile_descriptor(const void* tile) {
  constexpr uint64_t kRowsOf8 = 1024 >> 4, kSwizzle128 = 1;
  return ((shared_address(tile) & 0x3ffff) >> 4) | uint64_t{1} << 16 | kRowsOf8 << 32 |
         kSwizzle128 << 62;
}
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kLeft>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Keeps the compiler from moving what is done to sums over to the other side of this place.
template <int count>
__device__ inline void hold(float (&sums)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

#define SDFAST_NAMES(t)                                                                    \
  ", %" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t \
  "8, %" #t "9"
#define SDFAST_FIRST_NAMES "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define SDFAST_FOUR(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define SDFAST_20(i) \
  SDFAST_FOUR(i), SDFAST_FOUR(i + 4), SDFAST_FOUR(i + 8), SDFAST_FOUR(i + 12), SDFAST_FOUR(i + 16)
#define SDFAST_WGMMA(type, n, names, a, b, one, ...)                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #one                                  \
               ", 0;\n"                                                                   \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names \
               "}, %" #a ", %" #b ", p, 1, 1, 0, 0;\n}"                                   \
               : __VA_ARGS__                                                              \
               : "l"(x), "l"(w), "r"(1))

#define SDFAST_WGMMA_80(type)                                                                    \
  SDFAST_WGMMA(type, 80, SDFAST_FIRST_NAMES SDFAST_NAMES(1) SDFAST_NAMES(2) SDFAST_NAMES(3), 40, \
               41, 42, SDFAST_20(0), SDFAST_20(20))
#define SDFAST_WGMMA_128(type)                                                                    \
  SDFAST_WGMMA(type, 128,                                                                         \
               SDFAST_FIRST_NAMES SDFAST_NAMES(1) SDFAST_NAMES(2) SDFAST_NAMES(3) SDFAST_NAMES(4) \
                   SDFAST_NAMES(5) ", %60, %61, %62, %63",                                        \
               64, 65, 66, SDFAST_20(0), SDFAST_20(20), SDFAST_20(40), SDFAST_FOUR(60))
#define SDFAST_WGMMA_160(type)                                                                    \
  SDFAST_WGMMA(type, 160,                                                                         \
               SDFAST_FIRST_NAMES SDFAST_NAMES(1) SDFAST_NAMES(2) SDFAST_NAMES(3) SDFAST_NAMES(4) \
                   SDFAST_NAMES(5) SDFAST_NAMES(6) SDFAST_NAMES(7),                               \
               80, 81, 82, SDFAST_20(0), SDFAST_20(20), SDFAST_20(40), SDFAST_20(60))
#define SDFAST_WGMMA_256(type)                                                                     \
  SDFAST_WGMMA(type, 256,                                                                          \
               SDFAST_FIRST_NAMES SDFAST_NAMES(1) SDFAST_NAMES(2) SDFAST_NAMES(3) SDFAST_NAMES(4)  \
                   SDFAST_NAMES(5) SDFAST_NAMES(6) SDFAST_NAMES(7) SDFAST_NAMES(8) SDFAST_NAMES(9) \
                       SDFAST_NAMES(10)                                                            \
                           SDFAST_NAMES(11) ", %120, %121, %122, %123, %124, %125, %126, %127",    \
               128, 129, 130, SDFAST_20(0), SDFAST_20(20), SDFAST_20(40), SDFAST_20(60),           \
               SDFAST_20(80), SDFAST_20(100), SDFAST_FOUR(120), SDFAST_FOUR(124))

// d += x wᵀ of 64 rows of x, n of w and 16 elements of each. Thread t holds of rows 16 (t / 32) + t
// % 32 / 4 and 8 more, columns 8 j + 2 (t % 4) and 1 more, as d[4 j], d[4 j + 1], and of the second
// row the next two.
template <typename T, int n>
__device__ __forceinline__ void multiply(float (&d)[n / 2], uint64_t x, uint64_t w) {
  static_assert(n == 80 || n == 128 || n == 160 || n == 256);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (n == 80) {
    if constexpr (kHalf)
      SDFAST_WGMMA_80("f16");
    else
      SDFAST_WGMMA_80("bf16");
  } else if constexpr (n == 128) {
    if constexpr (kHalf)
      SDFAST_WGMMA_128("f16");
    else
      SDFAST_WGMMA_128("bf16");
  } else if constexpr (n == 160) {
    if constexpr (kHalf)
      SDFAST_WGMMA_160("f16");
    else
      SDFAST_WGMMA_160("bf16");
  } else {
    if constexpr (kHalf)
      SDFAST_WGMMA_256("f16");
    else
      SDFAST_WGMMA_256("bf16");
  }
}

// The same with rows of x in registers, as `multiply` leaves sums of 16 columns, in pairs: of the
// first row, the second, and again 8 columns on. `is_first` begins new sums.
#define SDFAST_WGMMA_ROWS(type, n, transposed, names, a0, a1, a2, a3, b, one, ...)           \
  asm volatile(                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #one                                              \
      ", 0;\n"                                                                               \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, {%" #a0 \
      ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, " #transposed ";\n}"               \
      : __VA_ARGS__                                                                          \
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(w), "r"(static_cast<int>(!is_first)))
#define SDFAST_ROWS_64(type, transposed)                                                         \
  SDFAST_WGMMA_ROWS(type, 64, transposed,                                                        \
                    SDFAST_FIRST_NAMES SDFAST_NAMES(1) SDFAST_NAMES(2) ", %30, %31", 32, 33, 34, \
                    35, 36, 37, SDFAST_20(0), SDFAST_FOUR(20), SDFAST_FOUR(24), SDFAST_FOUR(28))
#define SDFAST_ROWS_40(type, transposed)                                                          \
  SDFAST_WGMMA_ROWS(type, 40, transposed, SDFAST_FIRST_NAMES SDFAST_NAMES(1), 20, 21, 22, 23, 24, \
                    25, SDFAST_20(0))

// w's rows are columns of the sums.
template <typename T>
__device__ __forceinline__ void multiply_rows(float (&d)[32], const uint32_t (&x)[4], uint64_t w,
                                              bool is_first) {
  if constexpr (std::is_same_v<T, __half>)
    SDFAST_ROWS_64("f16", 0);
  else
    SDFAST_ROWS_64("bf16", 0);
}
// w's columns are: of its 16 rows each is one of those that are summed over. The next 16 are 128
// further.
template <typename T, int n>
__device__ __forceinline__ void multiply_transposed(float (&d)[n / 2], const uint32_t (&x)[4],
                                                    uint64_t w) {
  static_assert(n == 40 || n == 64);
  constexpr bool is_first = false;
  constexpr bool kHalf = std::is_same_v<T, __half>;
  if constexpr (n == 40) {
    if constexpr (kHalf)
      SDFAST_ROWS_40("f16", 1);
    else
      SDFAST_ROWS_40("bf16", 1);
  } else {
    if constexpr (kHalf)
      SDFAST_ROWS_64("f16", 1);
    else
      SDFAST_ROWS_64("bf16", 1);
  }
}

#endif  // SDFAST_HOPPER

}  // namespace sdfast
