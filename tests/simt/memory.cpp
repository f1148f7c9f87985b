// Every load and store of a kernel is looked at here.
//
// Shared memory: an access is a race where another thread's access to the same bytes, one of the
// two a store, is not ordered by a barrier of both. Each synchronisation has a number (`now`), and
// each pair of bytes remembers when it was last stored and loaded, and by whom. Global memory: a
// block may not load or store what another block of the launch stored, unless that block passed a
// fence and then an atomic (it "released"), and this one an atomic after (it "acquired").
#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <utility>

#include "scheduler.h"

// Of this library's image.
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start, _end;

namespace simt {
namespace {

constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xa5, kUnwritten = 0xff;  // the latter is NaN in every dtype
constexpr uint32_t kSeveral = 0x80000000u;                 // readers: of a warp, a block, a cluster
constexpr uint32_t kOfWarp = kSeveral, kOfBlock = kSeveral | 0x20000000u,
                   kOfCluster = kSeveral | 0x40000000u;
constexpr size_t kDynamic = size_t{1} << 62;  // keys of dynamic arrays, by their place

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
struct Region {
  const unsigned char* begin;
  size_t bytes;
  bool writable;
  std::unique_ptr<uint64_t[], Free> writer;  // launch and block of every two bytes

  bool holds(const unsigned char* address, size_t count) const {
    return address >= begin && address + count <= begin + bytes;
  }
};
std::vector<Region> regions;
size_t last_region = 0;
uint64_t launches = 0;
std::unordered_set<uint64_t> released;
int shared_arrays = 0;

const unsigned char* as_bytes(const void* address) {
  return static_cast<const unsigned char*>(address);
}

bool on_host_stack(const unsigned char* address) {
  static thread_local const unsigned char *low = nullptr, *high = nullptr;
  if (!low) {
    pthread_attr_t attributes;
    void* begin;
    size_t bytes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
    low = as_bytes(begin);
    high = low + bytes;
  }
  return address >= low && address < high;
}

SharedRegion& region_of(Block& block, size_t key, size_t bytes, size_t alignment) {
  for (const auto& region : block.regions) {
    if (region->key != key) continue;
    if (region->bytes != bytes) throw std::runtime_error("simt: threads ask for different arrays");
    return *region;
  }
  auto region = std::make_unique<SharedRegion>();
  region->key = key;
  region->bytes = bytes;
  const size_t room = bytes + 2 * kGuardBytes + alignment;
  region->memory = std::make_unique<unsigned char[]>(room);
  std::memset(region->memory.get(), kGuard, room);
  const uintptr_t first = reinterpret_cast<uintptr_t>(region->memory.get()) + kGuardBytes;
  region->begin = region->memory.get() + kGuardBytes + (alignment - first % alignment) % alignment;
  std::memset(region->begin, kUnwritten, bytes);
  region->cells.resize((bytes + 1) / 2);
  block.regions.push_back(std::move(region));
  return *block.regions.back();
}

uint32_t warp_of(uint32_t id) {
  return id / static_cast<uint32_t>(current->block->threads) * 32 +
         id % static_cast<uint32_t>(current->block->threads) / 32;
}
uint32_t block_of(uint32_t id) { return id / static_cast<uint32_t>(current->block->threads); }

// Whether what happened at `time` among the threads of the given nearness comes before.
bool before(uint32_t time, bool same_warp, bool same_block) {
  const Block& block = *current->block;
  return time < block.cluster_synchronized || (same_block && time < block.synchronized) ||
         (same_warp && time < current->warp().synchronized);
}
bool after_thread(uint32_t thread, uint32_t time) {
  const uint32_t id = thread - 1;
  return id == current->id ||
         before(time, warp_of(id) == warp_of(current->id), block_of(id) == block_of(current->id));
}
bool after_readers(const Cell& cell) {
  if (cell.reader == 0) return true;
  if (!(cell.reader & kSeveral)) return after_thread(cell.reader, cell.read);
  const uint32_t kind = cell.reader & ~0x1fffffffu, which = cell.reader & 0x1fffffffu;
  if (kind == kOfWarp) {
    return before(cell.read, which == warp_of(current->id), which / 32 == block_of(current->id));
  }
  return before(cell.read, false, kind == kOfBlock && which == block_of(current->id));
}
void note_reader(Cell& cell) {
  const uint32_t me = current->id + 1;
  if (cell.reader == 0 || cell.reader == me || after_readers(cell)) {
    cell.reader = me;
  } else {
    uint32_t warp, block;
    bool one_warp = true, one_block = true;
    if (!(cell.reader & kSeveral)) {
      warp = warp_of(cell.reader - 1);
      block = block_of(cell.reader - 1);
    } else {
      const uint32_t which = cell.reader & 0x1fffffffu;
      one_warp = (cell.reader & ~0x1fffffffu) == kOfWarp;
      one_block = one_warp || (cell.reader & ~0x1fffffffu) == kOfBlock;
      warp = which;
      block = one_warp ? which / 32 : which;
    }
    one_warp = one_warp && warp == warp_of(current->id);
    one_block = one_block && block == block_of(current->id);
    cell.reader = one_warp ? kOfWarp | warp : one_block ? kOfBlock | block : kOfCluster;
  }
  cell.read = now;
}

// Null where the address is no shared memory of this cluster.
SharedRegion* shared_at(const unsigned char* address, Site site) {
  const auto near = [&](Block& block) -> SharedRegion* {
    for (const auto& region : block.regions) {
      if (address + kGuardBytes >= region->begin &&
          address < region->begin + region->bytes + kGuardBytes) {
        return region.get();
      }
    }
    return nullptr;
  };
  if (SharedRegion* const region = near(*current->block)) return region;
  for (const auto& block : cluster_blocks) {
    SharedRegion* const region = near(*block);
    if (!region) continue;
    // There is such memory from the start of a block to its end.
    if (current->block->cluster_synchronized == 0) {
      fail(site, "another block's shared memory before a cluster barrier: it may not have begun");
    }
    if (block->ended == block->threads) fail(site, "shared memory of a block that has ended");
    return region;
  }
  return nullptr;
}

void access_shared(SharedRegion& region, const unsigned char* address, size_t bytes, bool write,
                   Site site) {
  if (address < region.begin || address + bytes > region.begin + region.bytes) {
    fail(site, write ? "store outside a shared array" : "load outside a shared array");
  }
  const size_t offset = address - region.begin;
  for (size_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i) {
    Cell& cell = region.cells[i];
    if (!write && cell.writer == 0) fail(site, "load of shared memory that nobody wrote");
    if (cell.writer != 0 && !after_thread(cell.writer, cell.written)) {
      fail(site, write ? "race: another thread stored here, no barrier between"
                       : "race: another thread stored what this one loads, no barrier between");
    }
    if (write) {
      if (!after_readers(cell))
        fail(site, "race: another thread loads what this one stores, no barrier between");
      cell = {current->id + 1, now, 0, 0};
    } else {
      note_reader(cell);
    }
  }
}

void access_global(Region& region, const unsigned char* address, size_t bytes, bool write,
                   Site site) {
  if (!region.writable) return;
  const uint64_t block = current->block->index, mine = launches << 40 | (block + 1);
  const size_t offset = address - region.begin;
  for (size_t i = offset / 2; i <= (offset + bytes - 1) / 2; ++i) {
    uint64_t& writer = region.writer[i];
    if (writer >> 40 == launches && writer != mine) {
      const uint64_t other = (writer & ((uint64_t{1} << 40) - 1)) - 1;
      const bool ordered = released.count(other) && current->block->acquired;
      const bool same_cluster = other - cluster_blocks[0]->index < cluster_blocks.size() &&
                                current->block->cluster_synchronized > 0;
      if (!ordered && !same_cluster) fail(site, "race: another block stored here");
    }
    if (write) writer = mine;
  }
}

Region* global_at(const unsigned char* address, size_t bytes, bool write) {
  const auto fits = [&](const Region& region) {
    return region.holds(address, bytes) && (region.writable || !write);
  };
  if (last_region < regions.size() && fits(regions[last_region])) return &regions[last_region];
  for (size_t i = 0; i < regions.size(); ++i) {
    if (!fits(regions[i])) continue;
    last_region = i;
    return &regions[i];
  }
  return nullptr;
}

}  // namespace

void allow(const void* begin, size_t bytes, bool writable) {
  if (bytes == 0) return;
  Region region{as_bytes(begin), bytes, writable, nullptr};
  if (writable) {
    region.writer.reset(static_cast<uint64_t*>(std::calloc((bytes + 1) / 2, sizeof(uint64_t))));
  }
  regions.push_back(std::move(region));
}
void forget_tensors() { regions.clear(); }

void start_of_launch() {
  ++launches;
  released.clear();
}

void end_of_thread(const Fiber& fiber) {
  if (!fiber.issued.empty() || !fiber.committed.empty()) {
    throw std::runtime_error("simt: a thread ended before its asynchronous copies arrived");
  }
  ++fiber.block->ended;
}

void end_of_block(const Block& block) {
  for (const auto& region : block.regions) {
    const unsigned char* const guards[] = {region->begin - kGuardBytes,
                                           region->begin + region->bytes};
    for (const unsigned char* guard : guards) {
      if (std::any_of(guard, guard + kGuardBytes,
                      [](unsigned char byte) { return byte != kGuard; })) {
        throw std::runtime_error("simt: bytes beside a shared array were overwritten");
      }
    }
  }
}

void access(const void* where, size_t bytes, bool write, Site site) {
  const unsigned char* const address = as_bytes(where);
  if (address >= current->stack && address < current->stack_end) return;
  if (SharedRegion* const region = shared_at(address, site)) {
    return access_shared(*region, address, bytes, write, site);
  }
  if (Region* const region = global_at(address, bytes, write)) {
    return access_global(*region, address, bytes, write, site);
  }
  if (address >= as_bytes(&__ehdr_start) && address < as_bytes(&_end)) return;
  if (on_host_stack(address)) return;
  if (write && global_at(address, bytes, false)) fail(site, "store to a tensor that is only read");
  fail(site, write ? "store outside of every tensor" : "load outside of every tensor");
}

SharedArray::SharedArray() : id_(++shared_arrays) {}
void* SharedArray::of_block(size_t bytes, size_t alignment) const {
  const Pause pause;
  return region_of(*current->block, id_, bytes, alignment).begin;
}

void* dynamic_shared(size_t at, size_t reserved, size_t bytes) {
  const Pause pause;
  if (at + reserved > current->block->dynamic_bytes) {
    fail(Site::current(), "the launch gives less dynamic shared memory than the kernel takes");
  }
  return region_of(*current->block, kDynamic + at, bytes, 1024).begin;
}

void* shared_of_block(void* shared, unsigned block) {
  const Pause pause;
  if (block >= cluster_blocks.size()) fail(Site::current(), "no such block in the cluster");
  for (const auto& region : current->block->regions) {
    const unsigned char* const address = as_bytes(shared);
    if (address < region->begin || address > region->begin + region->bytes) continue;
    SharedRegion& there = region_of(*cluster_blocks[block], region->key, region->bytes, 1024);
    return there.begin + (address - region->begin);
  }
  fail(Site::current(), "not an address of this block's shared memory");
}

unsigned cluster_block() { return current->block->rank; }

namespace {
void mark(SharedRegion& region, const void* address, uint32_t writer, uint32_t time = now) {
  const size_t first = (as_bytes(address) - region.begin) / 2;
  for (size_t i = first; i < first + 8; ++i) region.cells[i] = {writer, time, 0, 0};
}
void arrive(const Copy& copy) {
  if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<unsigned char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
  mark(*shared_at(as_bytes(copy.to), copy.site), copy.to, current->id + 1);
}
}  // namespace

void copy_async(void* shared, const void* global, int bytes, Site site) {
  const Pause pause;
  if (reinterpret_cast<uintptr_t>(shared) % 16 ||
      (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16)) {
    fail(site, "misaligned asynchronous copy");
  }
  if (bytes > 0) access(global, bytes, false, site);
  SharedRegion* const region = shared_at(as_bytes(shared), site);
  if (!region) fail(site, "asynchronous copy to what is not shared memory");
  access(shared, 16, true, site);
  const Copy copy{shared, global, bytes, site};
  if (early()) return arrive(copy);
  std::memset(shared, kUnwritten, 16);
  mark(*region, shared, 0);
  current->issued.push_back(copy);
}
void awaits_copy(void* to, size_t bytes, Site site) {
  SharedRegion* const region = shared_at(as_bytes(to), site);
  if (!region || as_bytes(to) < region->begin ||
      as_bytes(to) + bytes > region->begin + region->bytes) {
    fail(site, "a copy to what is not shared memory");
  }
  std::memset(to, kUnwritten, bytes);
  mark(*region, to, 0);
}
// As if before the block's first barrier: whoever sees the bytes at all waited for them.
void written_by_copy(void* to, size_t, Site site) {
  mark(*shared_at(as_bytes(to), site), to, current->id + 1, 0);
}
void commit_copies() {
  const Pause pause;
  current->committed.push_back(std::exchange(current->issued, {}));
}
void wait_for_copies(int groups_left) {
  const Pause pause;
  auto& groups = current->committed;
  while (groups.size() > static_cast<size_t>(groups_left)) {
    for (const Copy& copy : groups.front()) arrive(copy);
    groups.erase(groups.begin());
  }
}

}  // namespace simt

void simt_fence() { simt::current->block->fenced = true; }
unsigned simt_atomic_add(unsigned* address, unsigned value) {
  using namespace simt;
  const Pause pause;
  if (!global_at(as_bytes(address), sizeof *address, true)) {
    fail(Site::current(), "atomic outside of every tensor that may be written");
  }
  Block& block = *current->block;
  if (block.fenced) released.insert(block.index);
  block.acquired = true;
  return std::exchange(*address, *address + value);
}
