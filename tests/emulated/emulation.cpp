// Runs launches of kernels: every thread of a block is a fiber with a stack of its own, which runs until it waits for
// others. Blocks run last to first and warps in a random order: nothing may depend on either.

#include "emulation.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <numeric>
#include <random>
#include <vector>

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

namespace emulation {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

// What the limits of the hardware allow.
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxGridY = 65535;
constexpr unsigned kMaxGridX = 0x7fffffff;

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

struct Fiber {
  void* stack_pointer;
  char* stack = nullptr;
  State state;
  uint3 index;
  int lane_mask;
  uint64_t sent, received;
  bool vote;
};

std::vector<Fiber> fibers;
int current;
int num_threads;
int num_votes;
void* scheduler_stack_pointer;
const std::function<void()>* running;
std::mt19937 random_order(1);

[[noreturn]] __attribute__((format(printf, 1, 2))) void refuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("emulated kernel: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, " (block %u, %u of %u, %u; %d threads)\n", block_index.x, block_index.y, grid_size.x,
               grid_size.y, num_threads);
  std::abort();
}

// Keeps the registers that a function must keep (System V calling convention) on the stack that it leaves. The
// library's own swapcontext asks the kernel for the mask of signals each time, which takes a hundred times as long.
extern "C" void emulation_switch(void** leave, void* enter);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
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
.size emulation_switch, . - emulation_switch
)");
constexpr int kKeptRegisters = 6;

// Back to the scheduler; returns when it lets this fiber go on.
void leave(State state) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  emulation_switch(&fiber.stack_pointer, scheduler_stack_pointer);
}

void fiber_main() {
  (*running)();
  leave(State::kDone);
  refuse("a thread that had ended went on");
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      refuse("no memory for a stack");
    }
    fiber.stack = static_cast<char*>(memory);
  }
  // As if fiber_main had just been called: below the return address, which is never used, stacks have 16 bytes.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;
  *--top = nullptr;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < kKeptRegisters; ++i) {
    *--top = nullptr;
  }
  fiber.stack_pointer = top;
  fiber.state = State::kReady;
  fiber.vote = false;
}

void resume(int thread) {
  current = thread;
  thread_index = fibers[thread].index;
  emulation_switch(&scheduler_stack_pointer, fibers[thread].stack_pointer);
}

int count_in(State state, int first, int stop) {
  return static_cast<int>(std::count_if(fibers.begin() + first, fibers.begin() + stop,
                                        [state](const Fiber& fiber) { return fiber.state == state; }));
}

void exchange(int first) {
  for (int lane = 0; lane < kWarp; ++lane) {
    Fiber& fiber = fibers[first + lane];
    fiber.received = fibers[first + (lane ^ fiber.lane_mask)].sent;
    fiber.state = State::kReady;
  }
}

// Until every thread of the warp has ended or waits for the block.
void run_warp(int first, int stop) {
  while (true) {
    for (int thread = first; thread < stop; ++thread) {
      if (fibers[thread].state == State::kReady) {
        resume(thread);
      }
    }
    const int waiting = count_in(State::kAtExchange, first, stop);
    if (waiting == 0) {
      return;
    }
    if (waiting != kWarp) {
      refuse("a shuffle that %d of 32 lanes reach", waiting);
    }
    exchange(first);
  }
}

void run_block() {
  for (int thread = 0; thread < num_threads; ++thread) {
    prepare(fibers[thread]);
  }
  std::vector<int> warps((num_threads + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  while (true) {
    std::shuffle(warps.begin(), warps.end(), random_order);
    for (const int warp : warps) {
      run_warp(warp * kWarp, std::min(num_threads, (warp + 1) * kWarp));
    }
    const int waiting = count_in(State::kAtBarrier, 0, num_threads);
    if (waiting == 0) {
      return;
    }
    if (waiting != num_threads) {
      refuse("a barrier that %d of %d threads reach", waiting, num_threads);
    }
    num_votes = 0;
    for (int thread = 0; thread < num_threads; ++thread) {
      num_votes += fibers[thread].vote;
      fibers[thread].vote = false;
      fibers[thread].state = State::kReady;
    }
  }
}

}  // namespace

void wait_for_block() { leave(State::kAtBarrier); }

int count_over_block(bool vote) {
  fibers[current].vote = vote;
  leave(State::kAtBarrier);
  return num_votes;
}

uint64_t exchange_in_warp(uint64_t bits, int lane_mask) {
  fibers[current].sent = bits;
  fibers[current].lane_mask = lane_mask;
  leave(State::kAtExchange);
  return fibers[current].received;
}

void Launch::run(const std::function<void()>& kernel) const {
  grid_size = grid_;
  block_size = block_;
  num_threads = static_cast<int>(block_.x * block_.y);
  if (num_threads < 1 || num_threads > static_cast<int>(kMaxThreads) || block_.z != 1) {
    refuse("a launch with blocks that no GPU runs");
  }
  if (grid_.x < 1 || grid_.x > kMaxGridX || grid_.y < 1 || grid_.y > kMaxGridY || grid_.z != 1) {
    refuse("a launch with a grid that no GPU runs");
  }
  running = &kernel;
  fibers.resize(kMaxThreads);
  for (int thread = 0; thread < num_threads; ++thread) {
    const unsigned place = static_cast<unsigned>(thread);
    fibers[thread].index = uint3{place % block_.x, place / block_.x, 0};
  }
  for (unsigned y = grid_.y; y-- > 0;) {
    for (unsigned x = grid_.x; x-- > 0;) {
      block_index = uint3{x, y, 0};
      run_block();
    }
  }
}

}  // namespace emulation

extern "C" int32_t emulation_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
