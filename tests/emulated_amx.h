// The AMX instructions that csrc/cpu_amx.h uses, in plain C++ as Intel's manual describes them
// (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, LDTILECFG to TDPBF16PS),
// for CPUs without them. What would raise an exception ends the program.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

struct Tile {
  int rows = 0, row_bytes = 0;
  alignas(64) unsigned char data[16][64];
};

inline thread_local bool configured = false;
inline thread_local Tile tiles[8];
inline std::atomic<int64_t> products{0};

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

inline void load_config(const void* from) {
  unsigned char bytes[64];
  std::memcpy(bytes, from, sizeof bytes);
  require(bytes[0] == 1, "palette");
  for (int i = 1; i < 64; ++i) {
    const bool is_reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    require(!is_reserved || bytes[i] == 0, "reserved bytes, or restarting from a row");
  }
  for (int t = 0; t < 8; ++t) {
    const int row_bytes = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8, rows = bytes[48 + t];
    require(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0), "size of a tile");
    tiles[t].rows = rows;
    tiles[t].row_bytes = row_bytes;
    std::memset(tiles[t].data, 0, sizeof tiles[t].data);
  }
  configured = true;
}

inline void release() {
  configured = false;
  for (Tile& tile : tiles) tile = Tile();
}

inline Tile& tile(int index) {
  require(configured && tiles[index].rows > 0, "the tile is not configured");
  return tiles[index];
}

inline void zero(int index) { std::memset(tile(index).data, 0, sizeof(Tile::data)); }

inline void load(int index, const void* base, int64_t stride) {
  Tile& to = tile(index);
  zero(index);
  for (int r = 0; r < to.rows; ++r) {
    std::memcpy(to.data[r], static_cast<const char*>(base) + r * stride, to.row_bytes);
  }
}

inline void store(int index, void* base, int64_t stride) {
  const Tile& from = tile(index);
  for (int r = 0; r < from.rows; ++r) {
    std::memcpy(static_cast<char*>(base) + r * stride, from.data[r], from.row_bytes);
  }
}

inline float flush(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

// Value `i` of the pairs in a row.
inline float bfloat16(const Tile& t, int row, int i) {
  uint16_t high;
  std::memcpy(&high, t.data[row] + 2 * i, sizeof high);
  const uint32_t bits = static_cast<uint32_t>(high) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return flush(value);
}

// Even and odd halves of the pairs are summed apart, then together, then added to c.
inline void multiply(int c_index, int a_index, int b_index) {
  Tile& c = tile(c_index);
  const Tile &a = tile(a_index), &b = tile(b_index);
  require(c_index != a_index && c_index != b_index && a_index != b_index, "tiles must differ");
  require(a.rows == c.rows && b.row_bytes == c.row_bytes && a.row_bytes == 4 * b.rows &&
              a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0,
          "sizes of the tiles of a product");
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float sums[2] = {0, 0};
      for (int k = 0; k < b.rows; ++k) {
        for (int half = 0; half < 2; ++half) {
          const float product_of = bfloat16(a, m, 2 * k + half);
          sums[half] = flush(std::fma(product_of, bfloat16(b, k, 2 * n + half), sums[half]));
        }
      }
      float sum;
      std::memcpy(&sum, c.data[m] + 4 * n, sizeof sum);
      sum = flush(flush(sum) + flush(sums[0] + sums[1]));
      std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
    }
  }
  ++products;
}

}  // namespace emulated_amx

// How many products there were: that the tiles have been used at all.
extern "C" inline __attribute__((visibility("default"), used)) int64_t emulated_amx_products() {
  return emulated_amx::products;
}

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_amx::load_config
#define _tile_release emulated_amx::release
#define _tile_loadd emulated_amx::load
#define _tile_stream_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_zero emulated_amx::zero
#define _tile_dpbf16ps emulated_amx::multiply
