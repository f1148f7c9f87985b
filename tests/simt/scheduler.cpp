// Fibers, their order, and what they wait for.
#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>

namespace simt {

Gpu device{90, 132};
Indices indices;
Fiber* current = nullptr;
bool watching = false;
std::vector<std::unique_ptr<Block>> cluster_blocks;
uint32_t now = 1;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kLargestBlock = 1024;

// Saves the registers that a call preserves and the stack, and goes on where `to` was saved.
extern "C" void simt_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#else
#error "fibers are written for x86-64"
#endif

void* host_stack = nullptr;
void (*kernel)(const void*) = nullptr;
const void* kernel_argument = nullptr;
std::string failure;
std::mt19937_64 random_order;
uint64_t seed = 0;
std::vector<Fiber*> ready;

std::string text(Site site) {
  if (!site.file) site = line_of(site.call);
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string text(const Fiber& fiber) {
  const uint3 thread = fiber.indices.thread, block = fiber.indices.block;
  return "thread (" + std::to_string(thread.x) + ", " + std::to_string(thread.y) + ", " +
         std::to_string(thread.z) + ") of block (" + std::to_string(block.x) + ", " +
         std::to_string(block.y) + ", " + std::to_string(block.z) + ")";
}

void leave() {
  Fiber* const fiber = current;
  simt_switch(&fiber->stack_pointer, host_stack);
}

void thread_main() {
  kernel(kernel_argument);
  watching = false;
  current->finished = true;
  leave();
}

// Stacks outlive launches: a page that was touched once stays.
unsigned char* stack_of(size_t fiber) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= fiber) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
    mprotect(memory, 4096, PROT_NONE);  // an overflow ends here
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[fiber];
}

void start(Fiber& fiber, size_t index) {
  fiber.stack = stack_of(index);
  fiber.stack_end = fiber.stack + kStackBytes;
  void** top = reinterpret_cast<void**>(fiber.stack_end) - 1;
  *top = nullptr;                                  // where thread_main would return to
  *--top = reinterpret_cast<void*>(&thread_main);  // popped by ret
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
}

template <typename Complete>
void wait_in(Meeting& meeting, size_t expected, Site site, const char* what,
             const Complete& complete) {
  if (!meeting.waiting.empty() && meeting.site != site) {
    fail(site,
         ("divergent " + std::string(what) + ": others wait at " + text(meeting.site)).c_str());
  }
  meeting.site = site;
  meeting.waiting.push_back(current);
  current->waits_for = what;
  current->site = site;
  if (meeting.waiting.size() == expected) {
    complete();
    ready.insert(ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  leave();
}

// Why nobody can go on.
std::string deadlock(const std::vector<Fiber>& fibers) {
  size_t finished = 0;
  const Fiber* waiting = nullptr;
  for (const Fiber& fiber : fibers) {
    finished += fiber.finished;
    if (!fiber.finished && !waiting) waiting = &fiber;
  }
  return text(waiting->site) + ": divergent " + waiting->waits_for + ": " + text(*waiting) +
         " waits, " + std::to_string(finished) + " threads have ended";
}

// Runs the blocks from `first` on together; in a launch without clusters it is one.
void run_cluster(const Shape& shape, uint64_t first, uint64_t index_of_run) {
  const size_t threads = size_t{shape.block.x} * shape.block.y * shape.block.z;
  cluster_blocks.clear();
  std::vector<Fiber> fibers(threads * shape.cluster);
  now = 1;
  for (unsigned b = 0; b < shape.cluster; ++b) {
    auto block = std::make_unique<Block>();
    block->threads = threads;
    block->rank = b;
    block->index = first + b;
    block->warps.resize((threads + 31) / 32);
    block->dynamic_bytes = shape.shared_bytes;
    cluster_blocks.push_back(std::move(block));
  }
  ready.clear();
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    const uint64_t block = first + i / threads, thread = i % threads;
    fiber.id = static_cast<uint32_t>(i);
    fiber.thread = static_cast<uint32_t>(thread);
    fiber.block = cluster_blocks[i / threads].get();
    fiber.indices.block_size = shape.block;
    fiber.indices.grid_size = shape.grid;
    fiber.indices.thread = {static_cast<unsigned>(thread % shape.block.x),
                            static_cast<unsigned>(thread / shape.block.x % shape.block.y),
                            static_cast<unsigned>(thread / shape.block.x / shape.block.y)};
    fiber.indices.block = {static_cast<unsigned>(block % shape.grid.x),
                           static_cast<unsigned>(block / shape.grid.x % shape.grid.y),
                           static_cast<unsigned>(block / shape.grid.x / shape.grid.y)};
    start(fiber, i);
    ready.push_back(&fiber);
  }
  random_order.seed(seed * 0x9e3779b97f4a7c15u + index_of_run);
  size_t finished = 0;
  while (finished < fibers.size()) {
    if (ready.empty()) throw std::runtime_error(deadlock(fibers));
    size_t next = ready.size() - 1;  // seed 0: the one that came last
    if (seed == 1) next = 0;
    if (seed > 1) next = random_order() % ready.size();
    Fiber* const fiber = ready[next];
    ready[next] = ready.back();
    ready.pop_back();
    current = fiber;
    indices = fiber->indices;
    watching = true;
    simt_switch(&host_stack, fiber->stack_pointer);
    watching = false;
    current = nullptr;
    if (!failure.empty()) throw std::runtime_error(std::exchange(failure, ""));
    if (fiber->finished) {
      end_of_thread(*fiber);
      ++finished;
    }
  }
  for (const auto& block : cluster_blocks) end_of_block(*block);
}

}  // namespace

void fail(Site site, const char* what) {
  watching = false;
  failure = text(site) + ": " + what + ", in " + text(*current);
  leave();
  __builtin_unreachable();
}

void park(std::vector<Fiber*>& waiting, Site site, const char* what) {
  waiting.push_back(current);
  current->waits_for = what;
  current->site = site;
  leave();
}
void wake(std::vector<Fiber*>& waiting) {
  ready.insert(ready.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

bool early() { return seed > 1 && random_order() % 2; }

void block_barrier(Site site) {
  const Pause pause;
  Block& block = *current->block;
  wait_in(block.barrier, block.threads, site, "barrier", [&] { block.synchronized = ++now; });
}

void warp_barrier(Site site) {
  const Pause pause;
  Warp& warp = current->warp();
  wait_in(warp.barrier, 32, site, "warp barrier", [&] { warp.synchronized = ++now; });
}

void cluster_barrier(Site site) {
  const Pause pause;
  const size_t threads = cluster_blocks.size() * current->block->threads;
  wait_in(cluster_blocks[0]->cluster_barrier, threads, site, "cluster barrier", [&] {
    ++now;
    for (const auto& block : cluster_blocks) block->cluster_synchronized = now;
  });
}

void meet(Site site, void* mine, void (*combine)(void* const (&lanes)[32])) {
  const Pause pause;
  Warp& warp = current->warp();
  warp.given[lane()] = mine;
  wait_in(warp.meeting, 32, site, "warp instruction", [&] { combine(warp.given); });
}

int lane() { return static_cast<int>(current->thread % 32); }

void check_mask(unsigned mask, Site site) {
  if (mask != 0xffffffffu) fail(site, "a mask of some lanes is not emulated");
}

void run(const Shape& shape, void (*thread)(const void*), const void* argument) {
  const size_t threads = size_t{shape.block.x} * shape.block.y * shape.block.z;
  const uint64_t blocks = uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
  if (blocks == 0) return;
  if (threads == 0 || threads > kLargestBlock || threads % 32 != 0) {
    throw std::runtime_error("launch: expected whole warps, at most 1024 threads, got " +
                             std::to_string(threads));
  }
  if (shape.grid.y > 65535 || shape.grid.z > 65535 || shape.grid.x > 2147483647u) {
    throw std::runtime_error("launch: the grid is too large");
  }
  if (shape.cluster == 0 || shape.grid.x % shape.cluster != 0 || shape.cluster > 16) {
    throw std::runtime_error("launch: expected whole clusters of at most 16 blocks along x");
  }
  const size_t available = device.capability == 90 || device.capability / 10 == 10 ? 227 << 10
                           : device.capability == 80                               ? 163 << 10
                                                                                   : 99 << 10;
  if (shape.shared_bytes > available) throw std::runtime_error("launch: too much shared memory");
  if (shape.cluster > 1 && device.capability < 90)
    throw std::runtime_error("launch: no clusters here");
  start_of_launch();
  kernel = thread;
  kernel_argument = argument;
  // Clusters, too, in an order of the seed's.
  std::vector<uint64_t> order(blocks / shape.cluster);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i * shape.cluster;
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  for (uint64_t i = 0; i < order.size(); ++i) run_cluster(shape, order[i], i);
}

}  // namespace simt

// 0 and 1: threads and blocks in one order and in the other; above, in a drawn one.
extern "C" __attribute__((visibility("default"))) void simt_seed(uint64_t value) {
  simt::seed = value;
}
extern "C" __attribute__((visibility("default"))) void simt_device(int capability,
                                                                   int multiprocessors) {
  simt::device = {capability, multiprocessors};
}
