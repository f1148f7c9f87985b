// Tensor-core instructions by their documented fragments (PTX ISA, "Matrix Fragments for
// mma.m16n8k16",
// "... mma.m16n8k8", "ldmatrix"). Sums are exact until they are rounded to fp32 once; the
// hardware's are not better than that.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <utility>

#include "scheduler.h"

namespace simt {
namespace {

struct Product {
  Element element;
  float* d;
  const uint32_t *a, *b;
};

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
float half_of(Element element, uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> 16 * which);
  if (element == Element::kBFloat16) return from_bits(uint32_t{bits} << 16);
  return __half2float(__half(__half_raw{bits}));
}

void multiply(void* const (&lanes)[32]) {
  double a[16][16], b[16][8];
  const auto of_lane = [&](int i) -> Product& { return *static_cast<Product*>(lanes[i]); };
  const Element element = of_lane(0).element;
  const int depth = element == Element::kTf32 ? 8 : 16;
  for (int lane = 0; lane < 32; ++lane) {
    const Product& mine = of_lane(lane);
    const int group = lane / 4, column = lane % 4;
    if (element == Element::kTf32) {
      constexpr uint32_t kKept = 0xffffe000u;  // the low 13 bits are not looked at
      for (int i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][column + i / 2 * 4] = from_bits(mine.a[i] & kKept);
      }
      for (int i = 0; i < 2; ++i) b[column + i * 4][group] = from_bits(mine.b[i] & kKept);
      continue;
    }
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][2 * column + half + i / 2 * 8] = half_of(element, mine.a[i], half);
      }
      for (int i = 0; i < 2; ++i) {
        b[2 * column + half + i * 8][group] = half_of(element, mine.b[i], half);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = of_lane(lane).d[i];
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      of_lane(lane).d[i] = static_cast<float>(sum);
    }
  }
}

struct Rows {
  uint32_t* to;
  const unsigned char* row;
  bool transposed;
};

void load(void* const (&lanes)[32]) {
  const auto of_lane = [&](int i) -> Rows& { return *static_cast<Rows*>(lanes[i]); };
  for (int lane = 0; lane < 32; ++lane) {
    Rows& mine = of_lane(lane);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int half = 0; half < 2; ++half) {
        int row = lane / 4, column = lane % 4 * 2 + half;
        if (mine.transposed) std::swap(row, column);
        std::memcpy(&pair[half], of_lane(8 * matrix + row).row + 2 * column, 2);
      }
      mine.to[matrix] = pair[0] | uint32_t{pair[1]} << 16;
    }
  }
}

}  // namespace

void mma(Element element, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         Site site) {
  Product mine{element, d, a, b};
  meet(site, &mine, multiply);
}

void load_matrices(uint32_t (&to)[4], const void* row, bool transposed, Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    fail(site, "ldmatrix: a row is not aligned to 16 bytes");
  access(row, 16, false, site);
  Rows mine{to, static_cast<const unsigned char*>(row), transposed};
  meet(site, &mine, load);
}

}  // namespace simt
