// Fibers, barriers and asynchronous copies for shim.h; x86-64. Built without sanitizers: SHIM_TSAN
// and SHIM_ASAN say that the kernels are built with one.
//
// SHIM_SEED in the environment chooses the order of blocks, warps and lanes and how far each warp
// runs ahead; 0, the default, lets each run in order as far as it can. With SHIM_ANNOUNCE_ONLY
// nothing runs.
#include "shim.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <numeric>
#include <random>
#include <vector>

#undef threadIdx
#undef blockIdx
#undef blockDim

#ifdef SHIM_TSAN
#define TSAN(...) __VA_ARGS__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#else
#define TSAN(...)
#endif
#ifdef SHIM_ASAN
#define ASAN(...) __VA_ARGS__
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void* __asan_region_is_poisoned(void*, size_t);
}
#else
#define ASAN(...)
#endif

// Saves the registers that a call keeps and the stack pointer, and goes on on another stack.
asm(R"(.text
.type shim_swap,@function
shim_swap:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi); movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret
)");
extern "C" void shim_swap(void** save, void* load);

namespace shim {

Thread* current = nullptr;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  Thread thread{};
  void *stack_pointer = nullptr, *stack = nullptr, *tsan = nullptr, *fake = nullptr;
  bool done = false;
  const char* waits_at = nullptr;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

// Arrivals are released and acquired by the parity of the barrier: a fast thread's next arrival
// must not order a slow one that still wakes up.
struct Barrier {
  int arrived = 0;
  uint64_t passed = 0;
  char token[2];
};

struct Warp {
  Barrier barrier;
  const char* what = nullptr;
  bool exited = false;
  Words words[2][kWarp];  // by parity
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  bool exited = false;
  uint64_t progress = 0;
};

Block* block;
Fiber* fiber;
void *main_stack_pointer, *main_tsan, *main_fake;
const void* main_bottom;
size_t main_size;
const std::function<void()>* kernel;
char launch_token;

void to_main(bool last = false) {
  Fiber* own = fiber;
  (void)last;
  TSAN(__tsan_switch_to_fiber(main_tsan, 1));
  ASAN(__sanitizer_start_switch_fiber(last ? nullptr : &own->fake, main_bottom, main_size));
  shim_swap(&own->stack_pointer, main_stack_pointer);
  ASAN(__sanitizer_finish_switch_fiber(own->fake, &main_bottom, &main_size));
}

void to_fiber(Fiber& next) {
  fiber = &next;
  current = &next.thread;
  TSAN(__tsan_switch_to_fiber(next.tsan, 1));
  ASAN(__sanitizer_start_switch_fiber(&main_fake, next.stack, kStack));
  shim_swap(&main_stack_pointer, next.stack_pointer);
  ASAN(__sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr));
}

void arrive(Barrier& barrier, int expected, const char* what) {
  const uint64_t passed = barrier.passed;
  TSAN(__tsan_release(&barrier.token[passed % 2]));
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.passed;
    ++block->progress;
  }
  fiber->waits_at = what;
  while (barrier.passed == passed) to_main();
  fiber->waits_at = nullptr;
  TSAN(__tsan_acquire(&barrier.token[passed % 2]));
}

Warp& own_warp() { return block->warps[fiber->thread.thread.x / kWarp]; }

void run_fiber() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size));
  (*kernel)();
  if (block->barrier.arrived) fail("a thread ends while others wait at __syncthreads");
  if (own_warp().barrier.arrived) fail("a lane ends while others wait for its warp");
  for (const auto& group : fiber->groups) {
    if (!group.empty()) fail("a thread ends with copies in flight");
  }
  if (!fiber->open.empty()) fail("a thread ends with copies that it never committed");
  block->exited = own_warp().exited = fiber->done = true;
  ++block->progress;
  TSAN(__tsan_release(&launch_token));
  to_main(true);
  abort();
}

void make_fiber(Fiber& f, char* stack, unsigned index, unsigned block_index, unsigned threads,
                char* shared) {
  f.thread = {{index}, {block_index}, {threads}, static_cast<int>(index % kWarp), shared};
  f.stack = stack;
  void** top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run_fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
  TSAN(f.tsan = __tsan_create_fiber(0));
}

// Whether every thread that has not ended waits at a barrier or collective.
bool all_wait() {
  for (const Fiber& f : block->fibers) {
    if (!f.done && !f.waits_at) return false;
  }
  return true;
}

// Runs the threads of a block, warp by warp, until all are done.
void run_block(std::mt19937* random) {
  std::vector<int> warps(block->warps.size()), lanes(kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  for (bool left = true; left;) {
    const uint64_t before = block->progress;
    left = false;
    if (random) std::shuffle(warps.begin(), warps.end(), *random);
    for (const int warp : warps) {
      if (random) std::shuffle(lanes.begin(), lanes.end(), *random);
      uint64_t seen;
      do {
        seen = block->progress;
        for (const int lane : lanes) {
          Fiber& f = block->fibers[warp * kWarp + lane];
          if (f.done) continue;
          left = true;
          to_fiber(f);
        }
      } while (seen != block->progress && (!random || (*random)() % 3));
    }
    if (left && before == block->progress && all_wait()) {
      fail("no thread can go on: a barrier that not all reach");
    }
  }
}

char* map_stacks(size_t size) {
  return static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}

// The order in which blocks run: shuffled with a seed, else by index.
std::vector<unsigned> order_of_blocks(unsigned blocks, std::mt19937* random) {
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (random) std::shuffle(order.begin(), order.end(), *random);
  return order;
}

}  // namespace

void fail(const char* message) {
  std::fprintf(stderr, "shim: %s", message);
  if (fiber) std::fprintf(stderr, " (block %u, thread %u)", fiber->thread.block.x,
                          fiber->thread.thread.x);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  _exit(97);
}

void touch(const void* memory, size_t size, bool writes) {
  (void)memory, (void)size, (void)writes;
  TSAN((writes ? __tsan_write_range : __tsan_read_range)(const_cast<void*>(memory), size));
  ASAN(if (__asan_region_is_poisoned(const_cast<void*>(memory), size)) {
    fail(writes ? "a copy writes out of bounds" : "a copy or ldmatrix reads out of bounds");
  });
}

void block_barrier() {
  if (block->exited) fail("__syncthreads after a thread has ended");
  arrive(block->barrier, static_cast<int>(block->fibers.size()), "__syncthreads");
}

const Words* gather(const Words& own, const char* what) {
  Warp& warp = own_warp();
  if (warp.exited) fail("a collective of a warp after a lane has ended");
  if (warp.barrier.arrived && warp.what != what) fail("lanes of a warp meet in different places");
  warp.what = what;
  Words* words = warp.words[warp.barrier.passed % 2];
  words[fiber->thread.lane] = own;
  arrive(warp.barrier, kWarp, what);
  return words;
}

// Until a wait for it, the destination of a copy holds NaN.
void copy(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    fail("a misaligned copy");
  }
  touch(to, 16, true);
  if (valid) touch(from, 16, false);
  std::memset(to, 0xff, 16);
  fiber->open.push_back({to, from, valid});
}

void commit() {
  fiber->groups.push_back(std::move(fiber->open));
  fiber->open.clear();
}

void wait(int pending) {
  auto& groups = fiber->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) {
    for (const Copy& c : groups.front()) {
      touch(c.to, 16, true);
      if (c.valid) {
        std::memcpy(c.to, c.from, 16);
      } else {
        std::memset(c.to, 0, 16);
      }
    }
  }
}

// One line for each launch: blocks, threads, shared memory, where the kernel lies in the executable,
// and its parameters in hexadecimal.
void announce(const void* kernel, const Parameters& parameters, unsigned blocks, int threads,
              int64_t shared) {
  std::fprintf(stderr, "launch %u %d %lld %zu", blocks, threads, static_cast<long long>(shared),
               reinterpret_cast<uintptr_t>(kernel));
  for (const std::string& parameter : parameters) {
    std::fputc(' ', stderr);
    for (const unsigned char byte : parameter) std::fprintf(stderr, "%02x", byte);
  }
  std::fputc('\n', stderr);
}

void launch(const void* kernel_address, const Parameters& parameters, unsigned blocks, int threads,
            int64_t shared, const std::function<void()>& body) {
  announce(kernel_address, parameters, blocks, threads, shared);
  if (std::getenv("SHIM_ANNOUNCE_ONLY")) return;
  if (threads < 1 || threads > 1024 || threads % kWarp) fail("a bad number of threads");
  const char* seed = std::getenv("SHIM_SEED");
  std::mt19937 random(seed ? std::atoi(seed) : 0);
  std::mt19937* shuffle = seed && std::atoi(seed) ? &random : nullptr;
  const std::vector<unsigned> order = order_of_blocks(blocks, shuffle);
  kernel = &body;
  TSAN(main_tsan = __tsan_get_current_fiber());
  // Blocks and their memory stay until the end, so that no address is used twice, and that what
  // fibers allocate is freed after them in the eyes of ThreadSanitizer.
  std::deque<Block> all;
  std::vector<void*> memory;
  char* stacks = nullptr;
  const size_t size = threads * kStack;
  for (const unsigned index : order) {
    if (!stacks) stacks = map_stacks(size);
    block = &all.emplace_back();
    block->fibers.resize(threads);
    block->warps.resize(threads / kWarp);
    void* bytes = nullptr;
    if (posix_memalign(&bytes, 16, shared ? shared : 16)) fail("out of memory");
    std::memset(bytes, 0xff, shared);
    memory.push_back(bytes);
    for (int i = 0; i < threads; ++i) {
      make_fiber(block->fibers[i], stacks + i * kStack, i, index, threads,
                 static_cast<char*>(bytes));
    }
    run_block(shuffle);
    fiber = nullptr;
    current = nullptr;
    TSAN(for (Fiber& f : block->fibers) __tsan_destroy_fiber(f.tsan));
    // Otherwise what one block's fiber has left on a stack races with the next one's.
    TSAN(munmap(stacks, size); stacks = nullptr);
  }
  if (stacks) munmap(stacks, size);
  TSAN(__tsan_acquire(&launch_token));
  for (void* bytes : memory) free(bytes);
}

}  // namespace shim
