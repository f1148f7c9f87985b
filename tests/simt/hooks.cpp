// What the compiler calls: ThreadSanitizer's functions before every load and store, and UBSan's
// where a pointer is not aligned. They end here; no sanitizer's run-time is linked.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "scheduler.h"

// The source line of a call in this library: addr2line, where it is there.
simt::Site simt::line_of(void* call) {
  static std::string file;
  Dl_info info;
  if (!dladdr(call, &info)) return {"kernel", 0};
  const size_t offset = static_cast<char*>(call) - static_cast<char*>(info.dli_fbase) - 1;
  char command[4096], line[4096] = "";
  std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                offset);
  if (FILE* const output = popen(command, "r")) {
    if (!std::fgets(line, sizeof line, output)) line[0] = 0;
    pclose(output);
  }
  file = line;
  const size_t colon = file.rfind(':');
  if (colon == std::string::npos) return {"kernel", 0};
  const int number = std::atoi(file.c_str() + colon + 1);
  file.resize(colon);
  return {file.c_str(), number};
}

namespace {
// Finding the line takes long, so it is looked for when a check has failed.
void check(const void* address, size_t bytes, bool write, void* call) {
  if (!simt::watching || bytes == 0) return;
  const simt::Pause pause;
  simt::access(address, bytes, write, {nullptr, 0, call});
}
}  // namespace

#define HOOKS(size)                                           \
  void __tsan_read##size(void* address) {                     \
    check(address, size, false, __builtin_return_address(0)); \
  }                                                           \
  void __tsan_write##size(void* address) {                    \
    check(address, size, true, __builtin_return_address(0));  \
  }                                                           \
  void __tsan_unaligned_read##size(void* address) {           \
    check(address, size, false, __builtin_return_address(0)); \
  }                                                           \
  void __tsan_unaligned_write##size(void* address) {          \
    check(address, size, true, __builtin_return_address(0));  \
  }
extern "C" {
HOOKS(1)
HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16) void __tsan_read_range(void* address, unsigned long bytes) {
  check(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  check(address, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}

// Atomics are the host code's: kernels have atomicAdd.
#define ATOMICS(bits, type)                                                       \
  type __tsan_atomic##bits##_load(const volatile type* address, int) {            \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                            \
  }                                                                               \
  void __tsan_atomic##bits##_store(volatile type* address, type value, int) {     \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                           \
  }                                                                               \
  type __tsan_atomic##bits##_fetch_add(volatile type* address, type value, int) { \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                  \
  }
ATOMICS(8, uint8_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

struct UbsanLocation {
  const char* file;
  uint32_t line, column;
};
// Of an access through a pointer that is null or not aligned to its type.
void __ubsan_handle_type_mismatch_v1(UbsanLocation* location, uintptr_t) {
  const simt::Site site{location->file, static_cast<int>(location->line)};
  if (simt::watching) simt::fail(site, "misaligned access");
  throw std::runtime_error("misaligned access on the host");
}
void __ubsan_handle_type_mismatch_v1_abort(UbsanLocation* location, uintptr_t address) {
  __ubsan_handle_type_mismatch_v1(location, address);
}
}
