// Memory for what lies between the steps of a kernel.
#pragma once

#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sdfast {

// Uninitialised, on the boundaries of cache lines, which no vector then crosses; huge pages where
// there is use for them.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(count * sizeof(T)),
        data_(static_cast<T*>(::operator new(bytes_, std::align_val_t(alignment())))) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (is_large()) madvise(data_, bytes_ / kHugePageBytes * kHugePageBytes, MADV_HUGEPAGE);
#endif
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t(alignment())); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  static constexpr size_t kLineBytes = 64, kHugePageBytes = 2 << 20;
  bool is_large() const { return bytes_ >= 4 * kHugePageBytes; }
  size_t alignment() const { return is_large() ? kHugePageBytes : kLineBytes; }

  size_t bytes_;
  T* data_;
};

}  // namespace sdfast
