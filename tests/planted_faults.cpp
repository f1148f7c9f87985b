// Faults for tests/sanitize.py: a sanitised library that lets one of them pass reports nothing at
// all. Compiled into each of those libraries, and into no other.
#include "../csrc/cpu_simd.h"

#define SDFAST_FAULT extern "C" __attribute__((visibility("default"), noinline))

namespace simd = sdfast::simd;

// Of `size` floats: a vector that ends, or a remainder of 3 lanes that ends, one beyond them.
SDFAST_FAULT float read_vector(const float* values, int64_t size) {
  return simd::sum(simd::load(values + size + 1 - simd::kLanes));
}
SDFAST_FAULT float read_remainder(const float* values, int64_t size) {
  volatile int lanes = 3;
  return simd::sum(simd::load(values + size + 1 - lanes, +lanes));
}
SDFAST_FAULT float write_vector(float* values, int64_t size) {
  simd::store(values + size + 1 - simd::kLanes, simd::Vec{});
  return 0;
}
SDFAST_FAULT float read_before(const float* values, int64_t) { return values[-1]; }

SDFAST_FAULT float read_misaligned(const float* values, int64_t) {
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(values) + 1);
}
SDFAST_FAULT float add_beyond_the_largest(const float*, int64_t size) {
  return static_cast<float>(INT64_MAX - 1 + size);
}
