// Memory for what lies between the steps of a kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sdfast {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
constexpr bool kHasHugePages = true;
inline void* map_pages(size_t bytes) {
  void* begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return begin == MAP_FAILED ? nullptr : begin;
}
inline void unmap_pages(void* begin, size_t bytes) { munmap(begin, bytes); }
inline void ask_for_huge_pages(void* begin, size_t bytes) { madvise(begin, bytes, MADV_HUGEPAGE); }
#else
constexpr bool kHasHugePages = false;
inline void* map_pages(size_t) { return nullptr; }
inline void unmap_pages(void*, size_t) {}
inline void ask_for_huge_pages(void*, size_t) {}
#endif

constexpr size_t kLineBytes = 64, kHugePageBytes = 2 << 20;

// A thread's memory on huge pages, taken and given back as a stack; the pages that were used stay.
// What is to stay in L2 together must not meet in its sets, which physical addresses choose: on
// small pages, which lie anywhere, some processes ran Winograd's convolutions half as fast.
class Arena {
 public:
  static Arena& of_thread() {
    thread_local Arena arena;
    return arena;
  }
  // Null where it does not fit.
  void* take(size_t bytes) {
    const size_t lines = (bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
    if (!begin_ || lines > kBytes - used_) return nullptr;
    void* piece = begin_ + used_;
    used_ += lines;
    return piece;
  }
  // The last piece that was taken.
  void give_back(void* piece) { used_ = static_cast<char*>(piece) - begin_; }

  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

 private:
  static constexpr size_t kBytes = 16 << 20;

#if defined(SDFAST_SANITIZE)  // each piece is an allocation of its own, so that overruns are seen
  Arena() = default;
#else
  Arena() : mapped_(map_pages(kBytes + kHugePageBytes)) {
    if (!mapped_) return;
    const uintptr_t page = reinterpret_cast<uintptr_t>(mapped_) / kHugePageBytes + 1;
    begin_ = reinterpret_cast<char*>(page * kHugePageBytes);
    ask_for_huge_pages(begin_, kBytes);
  }
#endif
  ~Arena() {
    if (mapped_) unmap_pages(mapped_, kBytes + kHugePageBytes);
  }

  void* mapped_ = nullptr;
  char* begin_ = nullptr;
  size_t used_ = 0;
};

// Uninitialised, on the boundaries of cache lines, which no vector then crosses; on huge pages
// where there are any. Only for a scope: pieces are given back in the order opposite to their
// taking, by the thread that took them.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(count * sizeof(T)), in_arena_(Arena::of_thread().take(bytes_)), data_(in_arena_) {
    if (in_arena_) return;
    data_ = ::operator new(bytes_, std::align_val_t(alignment()));
    if (is_large()) ask_for_huge_pages(data_, bytes_ / kHugePageBytes * kHugePageBytes);
  }
  ~Scratch() {
    if (in_arena_) {
      Arena::of_thread().give_back(in_arena_);
    } else {
      ::operator delete(data_, std::align_val_t(alignment()));
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return static_cast<T*>(data_); }

 private:
  bool is_large() const { return kHasHugePages && bytes_ >= 4 * kHugePageBytes; }
  size_t alignment() const { return is_large() ? kHugePageBytes : kLineBytes; }

  size_t bytes_;
  void *in_arena_, *data_;
};

}  // namespace sdfast
