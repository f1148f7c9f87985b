// CUDA kernels on a CPU, from their own source: what a C++ compiler lacks of CUDA's words.
//
// Threads of a block are fibers of one CPU thread. A fiber runs until it waits for others (a
// barrier, a shuffle, an mma), then another goes on, in an order drawn from a seed. Blocks follow
// each other, those of a cluster run together. Every load and store of a kernel is looked at
// (memory.cpp): the compiler is asked for ThreadSanitizer's calls, which end here instead of in its
// run-time. Found are accesses outside the launch's tensors and shared arrays, stores through
// tensors that are only read, loads of shared memory that nobody wrote, races between threads and
// between blocks, and barriers that not every thread reaches. Whatever is found ends the launch
// with a std::runtime_error.
//
// Only what our kernels use is here; warps are whole, and so is every mask.
#pragma once

#include <cuda_bf16.h>  // first: CUDA's headers use the names that are macros here
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <device_launch_parameters.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __grid_constant__
#define __launch_bounds__(...)
#ifndef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))
#endif

namespace simt {

// Where a kernel waits, as "file:line" of the call.
struct Site {
  const char* file;
  int line;
  void* call = nullptr;  // or the address of the instruction, where the file is null
  // As a default argument: where the function is called.
  static constexpr Site current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Site& other) const { return file == other.file && line == other.line; }
  bool operator!=(const Site& other) const { return !(*this == other); }
};
// ---- launch (scheduler.cpp)

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
};
// Calls thread(argument) once for each thread of the grid.
void run(const Shape& shape, void (*thread)(const void*), const void* argument);
template <typename Thread>
void run(const Shape& shape, const Thread& thread) {
  run(shape, [](const void* it) { (*static_cast<const Thread*>(it))(); }, &thread);
}

// The GPU that launchers see.
struct Gpu {
  int capability, multiprocessors;
};
extern Gpu device;

// What a kernel sees of itself, set for the fiber that runs.
struct Indices {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Indices indices;

// ---- memory that a launch may use (memory.cpp)

// From now until `forget_tensors` kernels may read these bytes, and write them where `writable`.
void allow(const void* begin, size_t bytes, bool writable);
void forget_tensors();

// A `__shared__` array: each block has its own.
class SharedArray {
 public:
  SharedArray();
  void* of_block(size_t bytes, size_t alignment) const;

 private:
  int id_;
};
// The dynamic shared array `bytes` long, at `at` of the launch's; `reserved` bytes are its own.
void* dynamic_shared(size_t at, size_t reserved, size_t bytes);
void* shared_of_block(void* shared, unsigned block);
unsigned cluster_block();

// ---- waiting for each other (scheduler.cpp)

void block_barrier(Site site);
void warp_barrier(Site site);
void cluster_barrier(Site site = simt::Site::current());

// All lanes of a warp meet: each gives the address of something in its own frame; the last to come
// calls `combine` with all 32 addresses, and then all go on.
void meet(Site site, void* mine, void (*combine)(void* const (&lanes)[32]));

template <typename T>
struct Exchanged {
  T mine, received;
  int from;
};
// What lane `from` gives as `value`.
template <typename T>
T exchange(Site site, T value, int from) {
  Exchanged<T> mine{value, value, from};
  meet(site, &mine, [](void* const(&lanes)[32]) {
    for (void* lane : lanes) {
      auto* to = static_cast<Exchanged<T>*>(lane);
      to->received = static_cast<Exchanged<T>*>(lanes[to->from])->mine;
    }
  });
  return mine.received;
}
int lane();

// Fails the launch with what is wrong at `site`; does not return.
[[noreturn]] void fail(Site site, const char* what);
void check_mask(unsigned mask, Site site);

// ---- asynchronous copies (memory.cpp)

// 16 bytes from global to shared memory, of which the last 16 - `bytes` are zeros. They arrive at
// any time until the wait, early or late as the seed has it.
void copy_async(void* shared, const void* global, int bytes, Site site);
void commit_copies();
void wait_for_copies(int groups_left);

// ---- matrices (matrix.cpp): fragments as the PTX manual lays them out, "Matrix fragments for
// mma.m16n8k16" and "ldmatrix"

enum class Element { kHalf, kBFloat16, kTf32 };
// d += a b for 16x8x16, of tf32 16x8x8. a: 4 registers, b: 2, d: 4 floats, row and column as in
// PTX.
void mma(Element element, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site);
// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, Site site);

// ---- Hopper's own units (hopper.cpp), as csrc/cuda_hopper.cuh has them

extern bool hopper;  // whether launchers find kernels for them

struct TensorMap {
  const void* data;
  int axes;
  int64_t sizes[4], strides[4];
  int box[4], steps[4];
};
void init_barrier(uint64_t* barrier, unsigned arrivals, Site site = Site::current());
void arrive(uint64_t* barrier, Site site = Site::current());
void arrive_for_bytes(uint64_t* barrier, unsigned bytes, Site site = Site::current());
void wait(uint64_t* barrier, unsigned parity, Site site = Site::current());
void copy_tile(void* tile, const TensorMap& map, uint64_t* barrier, int c, int x, int y, int image,
               Site site = Site::current());
void copy_tile(void* tile, const TensorMap& map, uint64_t* barrier, int c, int tap, int row,
               Site site = Site::current());

// sums += x wT, or = where is_first: of a warp's 16 rows of x, in registers `rows` or in a tile,
// and n rows of w, or n columns where it is transposed.
struct TileFactors {
  Element element;
  int n;
  float* sums;
  const uint32_t* rows;
  uint64_t x, w;
  bool transposed, is_first;
};
uint64_t tile_descriptor(const void* tile);  // in units of 16 bytes
void begin_products();
void multiply_tiles(const TileFactors& factors, Site site = Site::current());
void commit_products();
void wait_for_products(int groups_left, Site site = Site::current());

}  // namespace simt

#define threadIdx (simt::indices.thread)
#define blockIdx (simt::indices.block)
#define blockDim (simt::indices.block_size)
#define gridDim (simt::indices.grid_size)

inline void __syncthreads(simt::Site site = simt::Site::current()) { simt::block_barrier(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::current()) {
  simt::check_mask(mask, site);
  simt::warp_barrier(site);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int = 32, simt::Site site = simt::Site::current()) {
  simt::check_mask(mask, site);
  return simt::exchange(site, value, from & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32,
                  simt::Site site = simt::Site::current()) {
  simt::check_mask(mask, site);
  return simt::exchange(site, value, simt::lane() ^ bits);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int = 32,
                   simt::Site site = simt::Site::current()) {
  simt::check_mask(mask, site);
  const int from = simt::lane() + static_cast<int>(distance);
  return simt::exchange(site, value, from < 32 ? from : simt::lane());
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int = 32,
                 simt::Site site = simt::Site::current()) {
  simt::check_mask(mask, site);
  const int from = simt::lane() - static_cast<int>(distance);
  return simt::exchange(site, value, from >= 0 ? from : simt::lane());
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::current()) {
  for (int bits = 1; bits < 32; bits *= 2)
    predicate |= __shfl_xor_sync(mask, predicate, bits, 32, site);
  return predicate != 0;
}

// Atomics and fences order blocks: see memory.cpp on "released".
unsigned simt_atomic_add(unsigned* address, unsigned value);
void simt_fence();
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return simt_atomic_add(address, value);
}
inline void __threadfence() { simt_fence(); }

// ---- arithmetic

inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline uint32_t __umulhi(uint32_t x, uint32_t y) { return static_cast<uint64_t>(x) * y >> 32; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
