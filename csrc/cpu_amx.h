// Products of pairs of bf16 on AMX tiles, for the CPUs that have them.
//
// Algorithm. A tile register holds 16 rows of 64 bytes. Two of a (16 rows of 16 pairs) meet two of
// b (16 steps of 16 columns; a packed panel is laid out so already) in four of c (16 rows of 16
// columns, fp32): four products a step of K for four loads. Limit: TDPBF16PS, one in 16 cycles: 16
// x 16 x 32 multiply-adds. Its sums are rounded in another order than VDPBF16PS's, so that which
// rows are served here must depend on the shape alone.
#pragma once

#include <cstdint>

#include "cpu_simd.h"

#if defined(SDFAST_EMULATE_AMX)
#include "emulated_amx.h"
#endif

namespace sdfast::amx {

struct NoTiles {
  NoTiles() {}  // so that it does not count as an unused variable
};

#if defined(__AMX_BF16__) || defined(SDFAST_EMULATE_AMX)
#define SDFAST_TILES
constexpr bool kAvailable = true;

constexpr int kTileRows = 16, kTileSteps = 16, kTileColumns = 16, kColumns = 2 * kTileColumns;

struct Configuration {
  uint8_t palette, first_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64);
alignas(64) inline constexpr Configuration kAllTilesWhole = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The calling thread can use tiles while this lives.
class Tiles {
 public:
  Tiles() { _tile_loadconfig(&kAllTilesWhole); }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Tiles of columns, 6 and 7. With kPassing they come from L2 and are not wanted again soon: they
// leave L1 to the rows.
template <bool kPassing>
SDFAST_INLINE void load_left(const void* b, int64_t stride) {
  if constexpr (kPassing) {
    _tile_stream_loadd(6, b, stride);
  } else {
    _tile_loadd(6, b, stride);
  }
}
template <bool kPassing>
SDFAST_INLINE void load_right(const void* b, int64_t stride) {
  if constexpr (kPassing) {
    _tile_stream_loadd(7, b, stride);
  } else {
    _tile_loadd(7, b, stride);
  }
}

// Two tiles of rows, or one, by two of columns, for a step of K. Tiles 0 to 3 are c, 4 and 5 a, 6
// and 7 b. Strides in bytes.
template <bool kPassing = false>
SDFAST_INLINE void multiply_step(const void* first, const void* second, int64_t a_stride,
                                 const void* left, const void* right, int64_t b_stride, bool two) {
  load_left<kPassing>(left, b_stride);
  _tile_loadd(4, first, a_stride);
  _tile_dpbf16ps(0, 4, 6);
  load_right<kPassing>(right, b_stride);
  _tile_dpbf16ps(1, 4, 7);
  if (!two) return;
  _tile_loadd(5, second, a_stride);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// The same of values that are sums of two bf16, whose lower parts lie a_lower and b_lower values
// behind the upper ones. What two lower parts give, at most 2^-16 of the product, is left out.
template <bool kPassing = false>
SDFAST_INLINE void multiply_split_step(const simd::BFloat16* first, const simd::BFloat16* second,
                                       int64_t a_stride, int64_t a_lower,
                                       const simd::BFloat16* left, const simd::BFloat16* right,
                                       int64_t b_stride, int64_t b_lower, bool two) {
  multiply_step<kPassing>(first + a_lower, second + a_lower, a_stride, left, right, b_stride, two);
  _tile_loadd(4, first, a_stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (two) {
    _tile_loadd(5, second, a_stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  load_left<kPassing>(left + b_lower, b_stride);
  _tile_dpbf16ps(0, 4, 6);
  load_right<kPassing>(right + b_lower, b_stride);
  _tile_dpbf16ps(1, 4, 7);
  if (!two) return;
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Tiles 0 to 3 are (kTileRows or twice as many, kColumns) fp32, rows `stride` bytes apart in c.
SDFAST_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
SDFAST_INLINE void load_sums(const float* c, int64_t stride, bool two) {
  const char* below = reinterpret_cast<const char*>(c) + kTileRows * stride;
  _tile_loadd(0, c, stride);
  _tile_loadd(1, c + kTileColumns, stride);
  if (!two) return;
  _tile_loadd(2, below, stride);
  _tile_loadd(3, below + 64, stride);
}
SDFAST_INLINE void store_sums(float* c, int64_t stride, bool two) {
  char* below = reinterpret_cast<char*>(c) + kTileRows * stride;
  _tile_stored(0, c, stride);
  _tile_stored(1, c + kTileColumns, stride);
  if (!two) return;
  _tile_stored(2, below, stride);
  _tile_stored(3, below + 64, stride);
}

#else
constexpr bool kAvailable = false;
constexpr int kTileRows = 16;

using Tiles = NoTiles;
#endif

}  // namespace sdfast::amx
