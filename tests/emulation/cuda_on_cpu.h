// CUDA kernels on the CPU, for tests: g++ compiles the very same kernel templates, and sanitizers
// watch them.
//
// Every CUDA thread is a fiber; blocks run one after the other. A thread runs until it waits (at a
// barrier, at a warp-wide operation) or exits, then the next one does, in ascending order or, with
// `reversed` set, in descending order. A missing barrier can hide in one order, since whoever
// writes happens to come first, but then not in the other.
//
// What threads wait for is settled only when none of them can run. Whoever is missing then has gone
// another way, and a report says who waits where and ends the program.
//
// Not the GPU: a thread is never interrupted between two waits, so a race whose outcome depends on
// finer interleaving goes unseen, as does code that relies on a warp running in lockstep.
#pragma once

#include <sys/mman.h>

#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) || defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#define CUDA_ON_CPU_SWITCH_BY_UCONTEXT
#endif

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// __shared__ stays undefined: all shared memory comes from RK_SHARED, where an access past its end
// is seen. As C++ statics, one array would border on the next.
#define RK_SHARED(T, name) T* const name = cuda_on_cpu::shared_memory<T>()
#define RK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  cuda_on_cpu::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

// Set for the running thread at each switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_cpu {

// Whether threads, and blocks, run in descending order.
inline bool reversed = false;

constexpr int kWarp = 32;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 * 1024;  // what a kernel gets without asking for more
// What shared memory holds at the start of a block: a huge number in fp32 and fp64, NaN in fp16, an
// index far out of bounds. Sums and maxima that take in an unwritten value come out wrong.
constexpr unsigned char kUnwritten = 0x7f;

using Location = std::source_location;

// Apart by column too: two barriers may stand on one line.
inline bool same(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

inline std::string text(const Location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line()) + ":" +
         std::to_string(where.column());
}

// A place to switch to: a stack with the registers that a call preserves saved on it.
#if defined(CUDA_ON_CPU_SWITCH_BY_UCONTEXT)

struct Context {
  ucontext_t saved;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&saved);
    saved.uc_stack.ss_sp = stack;
    saved.uc_stack.ss_size = bytes;
    saved.uc_link = nullptr;
    makecontext(&saved, entry, 0);
  }

  static void swap(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
};

#else

// Twelve times as fast as ucontext, which makes a system call at each switch.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .weak cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
  .size cuda_on_cpu_switch, .-cuda_on_cpu_switch
  .popsection
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
    // From the top: a null return address, where backtraces end; `entry`, which the switch returns
    // to with the stack aligned as after a call; six registers.
    void** const top = reinterpret_cast<void**>(stack + bytes);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    std::memset(top - 8, 0, 6 * sizeof(void*));
    stack_pointer = top - 8;
  }

  static void swap(Context& from, Context& to) {
    cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
  }
};

#endif

enum class State { exited, ready, at_barrier, at_warp_operation };

struct Thread {
  Context context;
  unsigned char* stack;
  void* fake_stack = nullptr;  // ASan's, while the thread is switched away from
  unsigned rank;               // in its block
  uint3 index;
  State state = State::exited;
  // While it waits: for what and where; of a warp-wide operation, with whom and what it offers.
  const char* operation = "";
  Location where;
  uint32_t mask = 0;
  uint64_t offered = 0;
  uint32_t participants = 0;  // once the operation is done
};

struct Warp {
  uint64_t offered[kWarp];  // by each lane, in the last operation that it took part in
};

// The block that runs. Threads are made once and serve every block and launch that follows: their
// stacks are always left by returning, so ASan's marks on them stay right.
struct Block {
  std::vector<std::unique_ptr<Thread>> pool;
  size_t size = 0;  // threads in use
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  std::function<void()> kernel;
  Thread* current = nullptr;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  cudaError_t last_error = cudaSuccess;
};

inline Block block;

// No exception: it would have to cross from one stack to another, and leave other threads halfway.
[[noreturn]] inline void fail(const std::string& message) {
  std::fflush(stdout);
  std::fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               message.c_str());
  std::_Exit(1);
}

// ---- Switching between the scheduler and the threads.

constexpr size_t kStackBytes = 256 * 1024;  // only what is touched takes memory
constexpr size_t kGuardBytes = 64 * 1024;   // a multiple of every page size in use

inline void enter_scheduler() {
  Thread& thread = *block.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&thread.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_bytes);
#endif
  Context::swap(thread.context, block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.fake_stack, &block.scheduler_stack,
                                  &block.scheduler_stack_bytes);
#endif
}

inline void enter_thread(Thread& thread) {
  block.current = &thread;
  threadIdx = thread.index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, thread.stack, kStackBytes);
#endif
  Context::swap(block.scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void thread_main() noexcept {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
  for (;;) {
    block.kernel();
    block.current->state = State::exited;
    enter_scheduler();  // until another block needs this thread
  }
}

inline void add_thread_to_pool() {
  const size_t bytes = kGuardBytes + kStackBytes;
  void* const memory =
      mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stack of a thread");
  unsigned char* const stack = static_cast<unsigned char*>(memory) + kGuardBytes;
  if (mprotect(stack, kStackBytes, PROT_READ | PROT_WRITE) != 0) fail("mprotect failed");
  block.pool.push_back(std::make_unique<Thread>());
  block.pool.back()->stack = stack;
  block.pool.back()->context.prepare(stack, kStackBytes, &thread_main);
}

inline void wait(State state, const char* operation, const Location& where) {
  block.current->state = state;
  block.current->operation = operation;
  block.current->where = where;
  enter_scheduler();
}

// ---- What threads wait for.

inline bool waits_with(const Thread& a, const Thread& b) {
  return a.state == b.state && a.mask == b.mask && same(a.where, b.where);
}

inline std::string hexadecimal(uint32_t value) {
  char digits[16];
  std::snprintf(digits, sizeof(digits), "0x%08x", value);
  return digits;
}

// Ends the program with a line for every place where threads wait.
[[noreturn]] inline void report_deadlock() {
  std::string message = "deadlock: threads wait for others that went another way\n";
  std::vector<bool> told(block.size, false);
  for (size_t i = 0; i < block.size; ++i) {
    const Thread& first = *block.pool[i];
    if (told[i] || first.state == State::exited) continue;
    message += "  at " + std::string(first.operation) + ", " + text(first.where);
    if (first.state == State::at_warp_operation) message += ", mask " + hexadecimal(first.mask);
    message += ": threads";
    for (size_t j = i; j < block.size; ++j) {
      if (!waits_with(first, *block.pool[j])) continue;
      size_t last = j;
      while (last + 1 < block.size && waits_with(first, *block.pool[last + 1])) ++last;
      message += " " + std::to_string(j) + (last > j ? "-" + std::to_string(last) : "");
      for (; j <= last; ++j) told[j] = true;
    }
    message += "\n";
  }
  fail(message);
}

// Lets the lanes of each warp go on whose whole mask has arrived at the same place; lanes that have
// exited, or that the block never had, are not waited for. Returns whether there were any.
inline bool complete_warp_operations() {
  bool progress = false;
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const size_t base = w * kWarp;
    const size_t lanes = block.size - base < kWarp ? block.size - base : kWarp;
    uint32_t alive = 0, waiting = 0;
    for (size_t lane = 0; lane < lanes; ++lane) {
      const State state = block.pool[base + lane]->state;
      alive |= (state != State::exited ? 1u : 0u) << lane;
      waiting |= (state == State::at_warp_operation ? 1u : 0u) << lane;
    }
    while (waiting) {
      const Thread& first = *block.pool[base + std::countr_zero(waiting)];
      uint32_t arrived = 0;
      for (size_t lane = 0; lane < lanes; ++lane) {
        arrived |= (waits_with(first, *block.pool[base + lane]) ? 1u : 0u) << lane;
      }
      waiting &= ~arrived;
      if (arrived != (first.mask & alive)) continue;
      for (size_t lane = 0; lane < lanes; ++lane) {
        if (!(arrived >> lane & 1u)) continue;
        Thread& thread = *block.pool[base + lane];
        block.warps[w].offered[lane] = thread.offered;
        thread.participants = arrived;
        thread.state = State::ready;
      }
      progress = true;
    }
  }
  return progress;
}

// Lets all threads go on if all that have not exited wait at one barrier, the same one.
inline bool complete_barrier() {
  const Thread* first = nullptr;
  for (size_t i = 0; i < block.size; ++i) {
    const Thread& thread = *block.pool[i];
    if (thread.state == State::exited) continue;
    if (first == nullptr) first = &thread;
    if (thread.state != State::at_barrier || !waits_with(*first, thread)) return false;
  }
  for (size_t i = 0; i < block.size; ++i) {
    Thread& thread = *block.pool[i];
    if (thread.state == State::at_barrier) thread.state = State::ready;
  }
  return true;
}

inline void run_block(size_t shared_bytes) {
  block.warps.assign((block.size + kWarp - 1) / kWarp, Warp{});
  // Allocated for this block alone and to the byte, so that ASan sees one access too far.
  block.shared.reset(shared_bytes ? new unsigned char[shared_bytes] : nullptr);
  if (shared_bytes) std::memset(block.shared.get(), kUnwritten, shared_bytes);
  for (size_t i = 0; i < block.size; ++i) {
    Thread& thread = *block.pool[i];
    const unsigned rank = static_cast<unsigned>(i);
    thread.rank = rank;
    thread.index = {rank % blockDim.x, rank / blockDim.x % blockDim.y,
                    rank / (blockDim.x * blockDim.y)};
    thread.mask = 0;
    thread.state = State::ready;
  }
  for (;;) {
    size_t exited = 0;
    for (size_t i = 0; i < block.size; ++i) {
      Thread& thread = *block.pool[reversed ? block.size - 1 - i : i];
      if (thread.state == State::ready) enter_thread(thread);
      exited += thread.state == State::exited ? 1 : 0;
    }
    if (exited == block.size) return;
    if (!complete_warp_operations() && !complete_barrier()) report_deadlock();
  }
}

// What CUDA refuses to launch.
inline bool valid(dim3 grid, dim3 threads, size_t shared_bytes) {
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  return grid.x - 1 < 0x7fffffffu && grid.y - 1 < 65535u && grid.z - 1 < 65535u && count > 0 &&
         count <= kMaxThreads && threads.z <= 64 && shared_bytes <= kMaxSharedBytes;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes,
            cudaStream_t, Arguments&&... arguments) {
  if (!valid(grid, threads, shared_bytes)) {
    block.last_error = cudaErrorInvalidConfiguration;
    return;
  }
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  block.kernel = [&] { std::apply(kernel, copies); };
  block.size = size_t{threads.x} * threads.y * threads.z;
  while (block.pool.size() < block.size) add_thread_to_pool();
  gridDim = grid;
  blockDim = threads;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t rank = reversed ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(rank % grid.x), static_cast<unsigned>(rank / grid.x % grid.y),
                static_cast<unsigned>(rank / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  block.shared.reset();
}

template <typename T>
T* shared_memory() {
  static_assert(alignof(T) <= 16, "shared memory is aligned to 16 bytes");
  return reinterpret_cast<T*>(block.shared.get());
}

// Offers a value to the warp and waits for the other lanes of `mask`; returns what each one
// offered.
inline const uint64_t* exchange(const char* operation, uint32_t mask, uint64_t value,
                                const Location& where) {
  Thread& thread = *block.current;
  if (!(mask >> thread.rank % kWarp & 1u)) {
    fail(std::string(operation) + ", " + text(where) + ": thread " + std::to_string(thread.rank) +
         " is not in its own mask " + hexadecimal(mask));
  }
  thread.mask = mask;
  thread.offered = value;
  wait(State::at_warp_operation, operation, where);
  thread.mask = 0;
  return block.warps[thread.rank / kWarp].offered;
}

template <typename T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// `source`: from this lane, the first lane of its group of `width` and the last one, to the lane to
// read.
template <Shuffled T, typename Source>
T shuffle(const char* operation, uint32_t mask, T value, int width, const Location& where,
          Source source) {
  if (width < 1 || width > kWarp || !std::has_single_bit(static_cast<unsigned>(width))) {
    fail(std::string(operation) + ", " + text(where) + ": width " + std::to_string(width));
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* const offered = exchange(operation, mask, bits, where);
  const Thread& thread = *block.current;
  const int lane = static_cast<int>(thread.rank % kWarp), first = lane & ~(width - 1);
  const int from = source(lane, first, first + width - 1);
  if (!(thread.participants >> from & 1u)) {
    fail(std::string(operation) + ", " + text(where) + ": thread " + std::to_string(thread.rank) +
         " reads lane " + std::to_string(from) + ", which takes no part");
  }
  std::memcpy(&value, &offered[from], sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_on_cpu::block.last_error, cudaSuccess);
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

inline void __syncthreads(cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  cuda_on_cpu::wait(cuda_on_cpu::State::at_barrier, "__syncthreads", where);
}

inline void __syncwarp(uint32_t mask = 0xffffffffu,
                       cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  cuda_on_cpu::exchange("__syncwarp", mask, 0, where);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  using namespace cuda_on_cpu;
  const uint64_t* const offered = exchange("__ballot_sync", mask, predicate != 0, where);
  uint32_t bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (block.current->participants >> lane & 1u) bits |= uint32_t(offered[lane]) << lane;
  }
  return bits;
}

// Of a distance the hardware reads five bits. A lane outside the group: the thread's own value,
// except that xor reaches into earlier groups.
template <cuda_on_cpu::Shuffled T>
T __shfl_sync(uint32_t mask, T value, int source, int width = cuda_on_cpu::kWarp,
              cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, width, where,
                              [=](int, int first, int) { return first + (source & (width - 1)); });
}

template <cuda_on_cpu::Shuffled T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = cuda_on_cpu::kWarp,
                  cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, width, where,
                              [=](int lane, int, int last) {
                                const int from = lane ^ (lane_mask & 31);
                                return from <= last ? from : lane;
                              });
}

template <cuda_on_cpu::Shuffled T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = cuda_on_cpu::kWarp,
                 cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, width, where,
                              [=](int lane, int first, int) {
                                const int from = lane - static_cast<int>(delta & 31u);
                                return from >= first ? from : lane;
                              });
}

template <cuda_on_cpu::Shuffled T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = cuda_on_cpu::kWarp,
                   cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, width, where,
                              [=](int lane, int, int last) {
                                const int from = lane + static_cast<int>(delta & 31u);
                                return from <= last ? from : lane;
                              });
}

// The value's type does not take part in choosing T, as with CUDA's overloads.
template <typename T>
  requires(std::is_arithmetic_v<T> && sizeof(T) >= 4)
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}
