// What the parts of the emulator know of each other.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "simt.h"

namespace simt {

struct Fiber;
struct Units;  // Hopper's own, of a block (hopper.cpp)

// Threads that wait for each other, and where.
struct Meeting {
  std::vector<Fiber*> waiting;
  Site site{"", 0};
};

struct Warp {
  Meeting barrier, meeting;
  void* given[32] = {};
  uint32_t synchronized = 0;  // when its threads last saw each other's stores
};

// What was last done to two bytes of shared memory; 0 for never.
struct Cell {
  uint32_t writer = 0, written = 0;  // thread and time
  uint32_t reader = 0, read = 0;     // reader: a thread, or kSeveral and why
};

// A shared array between guards, with the history of its bytes.
struct SharedRegion {
  size_t key = 0;  // which of the block's arrays
  size_t bytes = 0;
  unsigned char* begin = nullptr;
  std::unique_ptr<unsigned char[]> memory;
  std::vector<Cell> cells;
};

struct Block {
  size_t threads = 0;
  unsigned rank = 0;  // in its cluster
  uint64_t index = 0;
  size_t dynamic_bytes = 0;
  std::vector<Warp> warps;
  Meeting barrier, cluster_barrier;
  uint32_t synchronized = 0, cluster_synchronized = 0;
  std::vector<std::unique_ptr<SharedRegion>> regions;
  std::shared_ptr<Units> units;
  size_t ended = 0;                       // threads
  bool fenced = false, acquired = false;  // see memory.cpp
};

// A copy that was issued and has not arrived.
struct Copy {
  void* to;
  const void* from;
  int bytes;
  Site site;
};

struct Fiber {
  uint32_t id = 0;      // in the cluster
  uint32_t thread = 0;  // in the block
  Block* block = nullptr;
  Indices indices;
  void* stack_pointer = nullptr;
  unsigned char *stack = nullptr, *stack_end = nullptr;
  bool finished = false;
  const char* waits_for = "";
  Site site{"", 0};
  std::vector<Copy> issued;
  std::vector<std::vector<Copy>> committed;  // oldest first

  Warp& warp() const { return block->warps[thread / 32]; }
};

extern Fiber* current;  // null outside of kernels

// Whether what runs is a kernel. The emulator's own code is not to be looked at, though it may
// share instrumented instances of the standard library's templates with kernels.
extern bool watching;
struct Pause {
  Pause() { watching = false; }
  ~Pause() { watching = true; }
  Pause(const Pause&) = delete;
};

extern std::vector<std::unique_ptr<Block>> cluster_blocks;
extern uint32_t now;  // counts synchronisations

bool early();  // whether a copy arrives at once

void start_of_launch();
void end_of_thread(const Fiber& fiber);
void end_of_block(const Block& block);

Site line_of(void* call);

// The running thread waits in a list, until all of it are woken.
void park(std::vector<Fiber*>& waiting, Site site, const char* what);
void wake(std::vector<Fiber*>& waiting);

// Bytes of shared memory that a copy is under way to, and that it has written, for whoever waited
// for it.
void awaits_copy(void* to, size_t bytes, Site site);
void written_by_copy(void* to, size_t bytes, Site site);

// Checks an access of the running thread; the calls of instrumented code end here.
void access(const void* address, size_t bytes, bool write, Site site);

}  // namespace simt
