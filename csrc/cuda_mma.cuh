// Thin wrappers of the instructions that feed and use tensor cores, sm_80 and later. Fragments are
// laid out as the PTX manual says ("Matrix Fragments for mma.m16n8k16", "mma.m16n8k8", "ldmatrix").
#pragma once

#include "cuda_common.cuh"

namespace sdfast {

#ifdef SDFAST_SIMT
#define SDFAST_SITE , simt::Site site = simt::Site::current()
#else
#define SDFAST_SITE
#endif

// ---- asynchronous copies to shared memory, in groups that arrive in order

// 16 bytes, both sides aligned to them; `bytes` of them are read, the rest are zeros.
__device__ inline void copy_async(void* shared, const void* global, int bytes = 16 SDFAST_SITE) {
#ifdef SDFAST_SIMT
  simt::copy_async(shared, global, bytes, site);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
#endif
}
// Ends the group of the copies issued since the last.
__device__ inline void commit_copies() {
#ifdef SDFAST_SIMT
  simt::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for this thread's copies, all groups but the newest kLeft.
template <int kLeft>
__device__ inline void wait_for_copies() {
#ifdef SDFAST_SIMT
  simt::wait_for_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// ---- fragments

// Four 8x8 matrices of 16-bit elements; lane i gives the row i % 8 of matrix i / 8, 16 bytes,
// aligned.
template <bool kTransposed = false>
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row SDFAST_SITE) {
#ifdef SDFAST_SIMT
  simt::load_matrices(to, row, kTransposed, site);
#else
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
#endif
}

// d += a b, (16, 16) times (16, 8), of T = __half or __nv_bfloat16; of float as tf32 (16, 8) times
// (8, 8).
template <typename T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4],
                           const uint32_t (&b)[2] SDFAST_SITE) {
  constexpr bool kHalf = sizeof(T) == 2 && !std::is_same_v<T, __nv_bfloat16>;
#ifdef SDFAST_SIMT
  constexpr auto kElement = sizeof(T) == 4 ? simt::Element::kTf32
                            : kHalf        ? simt::Element::kHalf
                                           : simt::Element::kBFloat16;
  simt::mma(kElement, d, a, b, site);
#else
#define SDFAST_MMA(instruction)                                                               \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (sizeof(T) == 4) {
    SDFAST_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (kHalf) {
    SDFAST_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    SDFAST_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  }
#undef SDFAST_MMA
#endif
}

// The nearest tf32, of whose low 13 bits an mma looks at none; ties away from zero.
template <int N>
__device__ inline void round_to_tf32(uint32_t (&values)[N]) {
#pragma unroll
  for (uint32_t& value : values) {
#ifdef SDFAST_SIMT
    const bool finite = (value & 0x7f800000u) != 0x7f800000u;
    if (finite) value = (value + 0x1000u) & 0xffffe000u;
#else
    asm("cvt.rna.tf32.f32 %0, %0;" : "+r"(value));
#endif
  }
}

// Two values as one register of a fragment, the first in its low half.
template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  const Vector<T, 2> pair{from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

}  // namespace sdfast
