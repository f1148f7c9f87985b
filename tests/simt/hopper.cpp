// Hopper's own units: barriers in shared memory, copies of tiles that complete on them, products
// that read such tiles (PTX ISA, "mbarrier", "cp.async.bulk.tensor", "Matrix fragments for wgmma").
//
// A copy arrives when somebody waits for it, or at once, as the seed has it; until then its bytes
// count as not written. Each warp notes which kilobytes its products read; they are in use until it
// waited for these products and arrived at some barrier, and a copy onto them before that is a
// race. Sums are complete at once: who reads them before waiting is not found.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace simt {

bool hopper = false;
static int tiles_copied = 0;

struct TileCopy {
  unsigned char* tile;
  TensorMap map;
  int at[4];
  int64_t bytes;
  Site site;
};

struct Barrier {
  unsigned arrivals = 0, missing = 0;  // of a phase
  int64_t bytes = 0;                   // that it still waits for
  uint32_t phase = 0;
  std::vector<Fiber*> waiting;
  std::vector<TileCopy> copies;
};

// What a warp's products read.
struct Reads {
  std::vector<std::vector<uintptr_t>> committed;
  std::vector<uintptr_t> issued;
  bool began = false;
};

struct Units {
  std::unordered_map<const void*, Barrier> barriers;
  std::unordered_map<uintptr_t, std::vector<uint32_t>>
      reads;                      // by granule: when each warp last read it
  std::vector<uint32_t> arrived;  // when each warp last arrived at a barrier
  std::vector<Reads> of_warp;
};

namespace {

constexpr int kRowBytes = 128, kUnitBytes = 16, kGranule = 1024;
constexpr uint32_t kInUse = UINT32_MAX;

size_t warp_index() { return current->thread / 32; }

Units& units() {
  auto& mine = current->block->units;
  if (!mine) {
    mine = std::make_shared<Units>();
    mine->arrived.resize(current->block->warps.size());
    mine->of_warp.resize(current->block->warps.size());
  }
  return *mine;
}

Barrier& barrier_at(const uint64_t* address, Site site) {
  access(address, sizeof *address, false, site);
  const auto found = units().barriers.find(address);
  if (found == units().barriers.end()) fail(site, "a barrier that nobody initialised");
  return found->second;
}

void complete_if_over(Barrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  wake(barrier.waiting);
}

// The bytes of a tile, 16 at a time, where the swizzle puts them.
template <typename Visit>
void for_each_unit(const TileCopy& copy, const Visit& visit) {
  int box[4] = {1, 1, 1, 1};
  std::copy_n(copy.map.box, copy.map.axes, box);
  int64_t row = 0;
  for (int c3 = 0; c3 < box[3]; ++c3) {
    for (int c2 = 0; c2 < box[2]; ++c2) {
      for (int c1 = 0; c1 < box[1]; ++c1, ++row) {
        for (int unit = 0; unit < box[0] * 2 / kUnitBytes; ++unit) {
          const uintptr_t plain =
              reinterpret_cast<uintptr_t>(copy.tile) + row * kRowBytes + unit * kUnitBytes;
          auto* const to = reinterpret_cast<unsigned char*>(plain ^ (plain >> 7 & 7) << 4);
          const int taken[4] = {unit * kUnitBytes / 2, c1, c2, c3};
          visit(to, taken);
        }
      }
    }
  }
}

void deliver(Barrier& barrier, const TileCopy& copy) {
  for_each_unit(copy, [&](unsigned char* to, const int (&taken)[4]) {
    for (int element = 0; element < kUnitBytes / 2; ++element) {
      bool inside = true;
      int64_t offset = 0;
      for (int axis = 0; axis < copy.map.axes; ++axis) {
        const int64_t index =
            copy.at[axis] + int64_t{taken[axis] + (axis == 0 ? element : 0)} * copy.map.steps[axis];
        inside = inside && index >= 0 && index < copy.map.sizes[axis];
        offset += index * (axis == 0 ? 1 : copy.map.strides[axis]);
      }
      uint16_t value = 0;
      if (inside) {
        const auto* const from = static_cast<const uint16_t*>(copy.map.data) + offset;
        access(from, 2, false, copy.site);
        value = *from;
      }
      std::memcpy(to + 2 * element, &value, 2);
    }
    written_by_copy(to, kUnitBytes, copy.site);
  });
  barrier.bytes -= copy.bytes;
}

// The element `k` of row `row` of a factor whose tile begins at `tile`.
uintptr_t place_of(uint64_t tile, int row, int k, bool transposed) {
  const int line = transposed ? k : row, in_line = transposed ? row : k;
  const uintptr_t plain = (tile << 4) + line * kRowBytes + 2 * in_line;
  return plain ^ (plain >> 7 & 7) << 4;
}

float value_of(Element element, uint16_t bits) {
  if (element == Element::kHalf) return __half2float(__half(__half_raw{bits}));
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

void multiply(void* const (&lanes)[32]) {
  const auto of_lane = [&](int i) -> const TileFactors& {
    return *static_cast<TileFactors*>(lanes[i]);
  };
  const TileFactors& one = of_lane(0);
  const Site site = current->site;
  Reads& reads = units().of_warp[warp_index()];
  if (!reads.began) fail(site, "a product before begin_products");
  const auto read = [&](uint64_t tile, int row, int k, bool transposed) {
    const uintptr_t place = place_of(tile, row, k, transposed);
    if (place % kUnitBytes == 0) {
      access(reinterpret_cast<void*>(place), kUnitBytes, false, site);
      reads.issued.push_back(place / kGranule);
    }
    uint16_t bits;
    std::memcpy(&bits, reinterpret_cast<void*>(place), 2);
    return double{value_of(one.element, bits)};
  };
  static double x[16][16], w[256][16];
  const int warp = static_cast<int>(warp_index() % 4);
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      if (!one.rows) {
        x[row][k] = read(one.x, 16 * warp + row, k, false);
      } else {
        const uint32_t pair = of_lane(row % 8 * 4 + k % 8 / 2).rows[row / 8 + k / 8 * 2];
        x[row][k] = value_of(one.element, static_cast<uint16_t>(pair >> 16 * (k % 2)));
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < one.n; ++n) w[n][k] = read(one.w, n, k, one.transposed);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < one.n / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = one.is_first ? 0 : of_lane(lane).sums[i];
      for (int k = 0; k < 16; ++k) sum += x[row][k] * w[column][k];
      of_lane(lane).sums[i] = static_cast<float>(sum);
    }
  }
  std::sort(reads.issued.begin(), reads.issued.end());
  reads.issued.erase(std::unique(reads.issued.begin(), reads.issued.end()), reads.issued.end());
  for (const uintptr_t granule : reads.issued) {
    auto& times = units().reads[granule];
    times.resize(current->block->warps.size());
    times[warp_index()] = kInUse;
  }
}

}  // namespace

void init_barrier(uint64_t* barrier, unsigned arrivals, Site site) {
  const Pause pause;
  access(barrier, sizeof *barrier, true, site);
  Barrier made;
  made.arrivals = made.missing = arrivals;
  units().barriers[barrier] = std::move(made);
}

void arrive(uint64_t* address, Site site) { arrive_for_bytes(address, 0, site); }

void arrive_for_bytes(uint64_t* address, unsigned bytes, Site site) {
  const Pause pause;
  Barrier& barrier = barrier_at(address, site);
  if (barrier.missing == 0) fail(site, "more arrivals at a barrier than were announced");
  units().arrived[warp_index()] = ++now;
  --barrier.missing;
  barrier.bytes += bytes;
  complete_if_over(barrier);
}

void wait(uint64_t* address, unsigned parity, Site site) {
  const Pause pause;
  Barrier& barrier = barrier_at(address, site);
  while (barrier.phase % 2 == parity) {
    if (!barrier.copies.empty()) {
      for (const TileCopy& copy : std::exchange(barrier.copies, {})) deliver(barrier, copy);
      complete_if_over(barrier);
      continue;
    }
    park(barrier.waiting, site, "wait for a barrier");
  }
}

void copy_tile(void* tile, const TensorMap& map, uint64_t* address, int c, int x, int y, int image,
               Site site) {
  const Pause pause;
  TileCopy copy{static_cast<unsigned char*>(tile), map, {c, x, y, image}, kRowBytes, site};
  if (map.box[0] * 2 != kRowBytes) fail(site, "a row of a tile has 128 bytes");
  if (reinterpret_cast<uintptr_t>(tile) % kGranule)
    fail(site, "a tile is not aligned to 1024 bytes");
  if (reinterpret_cast<uintptr_t>(map.data) % 16) fail(site, "a tensor is not aligned to 16 bytes");
  for (int axis = 1; axis < map.axes; ++axis) {
    copy.bytes *= map.box[axis];
    if (map.strides[axis] % 8 && map.sizes[axis] > 1)
      fail(site, "a stride is no multiple of 16 bytes");
    if (map.box[axis] * map.steps[axis] > 256) fail(site, "a box is longer than 256");
  }
  ++tiles_copied;
  Units& mine = units();
  for_each_unit(copy, [&](unsigned char* to, const int (&)[4]) {
    const auto found = mine.reads.find(reinterpret_cast<uintptr_t>(to) / kGranule);
    if (found == mine.reads.end()) return;
    for (size_t warp = 0; warp < found->second.size(); ++warp) {
      if (found->second[warp] > mine.arrived[warp])
        fail(site, "race: a copy onto a tile that products read");
    }
  });
  for_each_unit(copy,
                [&](unsigned char* to, const int (&)[4]) { awaits_copy(to, kUnitBytes, site); });
  Barrier& barrier = barrier_at(address, site);
  if (!early() && barrier.waiting.empty()) {
    barrier.copies.push_back(copy);
    return;
  }
  deliver(barrier, copy);
  complete_if_over(barrier);
}
void copy_tile(void* tile, const TensorMap& map, uint64_t* barrier, int c, int tap, int row,
               Site site) {
  copy_tile(tile, map, barrier, c, tap, row, 0, site);
}

uint64_t tile_descriptor(const void* tile) { return reinterpret_cast<uintptr_t>(tile) >> 4; }

void begin_products() {
  const Pause pause;
  units().of_warp[warp_index()].began = true;
}
void multiply_tiles(const TileFactors& factors, Site site) {
  TileFactors mine = factors;
  meet(site, &mine, multiply);
}
void commit_products() {
  const Pause pause;
  if (lane() != 0) return;
  Reads& reads = units().of_warp[warp_index()];
  reads.committed.push_back(std::exchange(reads.issued, {}));
}
void wait_for_products(int groups_left, Site site) {
  const Pause pause;
  warp_barrier(site);
  if (lane() != 0) return;
  Units& mine = units();
  mine.of_warp[warp_index()].began = false;
  auto& groups = mine.of_warp[warp_index()].committed;
  while (groups.size() > static_cast<size_t>(groups_left)) {
    for (const uintptr_t granule : groups.front()) mine.reads[granule][warp_index()] = now;
    groups.erase(groups.begin());
  }
}

}  // namespace simt

extern "C" __attribute__((visibility("default"))) int simt_tiles_copied() {
  return std::exchange(simt::tiles_copied, 0);
}
extern "C" __attribute__((visibility("default"))) void simt_hopper(int on) {
  simt::hopper = on != 0;
}
