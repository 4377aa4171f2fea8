// CUDA kernels on the CPU, for tests: g++ compiles the very same kernel templates, and sanitizers
// watch them.
//
// Every CUDA thread is a fiber; blocks run one after the other, those of a cooperative launch in
// turn. A thread runs until it waits (at a barrier, at a warp-wide operation, asleep between two
// looks at a variable) or exits, then the next one does, in ascending order or, with `reversed`
// set, in descending order. A missing barrier can hide in one order, since whoever writes happens
// to come first, but then not in the other. With `mixed` set, the order is drawn anew for each turn
// of all threads: what a launch leaves undetected, one of the next few does not.
//
// What threads wait for is settled only when none of them can run. Whoever is missing then has gone
// another way, and a report says who waits where and ends the program. So it does when all that can
// run are asleep and fall asleep again: nobody is left to write what they look for.
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
#include <deque>
#include <functional>
#include <map>
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
#define __grid_constant__
// __shared__ stays undefined: all shared memory comes from RK_SHARED, where an access past its end
// is seen. As C++ statics, one array would border on the next.
#define RK_SHARED(T, name) T* const name = cuda_on_cpu::shared_memory<T>()
#define RK_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  cuda_on_cpu::launch(false, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
#define RK_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, argument) \
  cuda_on_cpu::launch(true, kernel, grid, block, shared_bytes, stream, argument)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorCooperativeLaunchTooLarge = 82,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrReservedSharedMemoryPerBlock,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
enum { cudaSharedmemCarveoutMaxShared = 100 };

// Set for the running thread at each switch.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_cpu {

// Whether threads, and blocks, run in descending order; whether that is drawn, the same every time.
inline bool reversed = false;
inline bool mixed = false;
inline uint32_t draws = 1;

inline bool descending() {
  draws = draws * 1664525u + 1013904223u;
  return mixed ? draws >> 31 != 0 : reversed;
}

constexpr int kWarp = 32;
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 * 1024;  // what a kernel gets without asking for more

// The GPU that is played, an H100 unless a test makes it smaller. A multiprocessor's share of each.
struct Device {
  int multiprocessors = 132;
  int threads = 2048;
  int shared_bytes = 228 * 1024;
  int shared_bytes_a_block = 227 * 1024;  // for a kernel that asks
  int reserved_bytes_a_block = 1024;

  // How many blocks of a launch run at once.
  uint64_t resident(size_t block_threads, size_t block_shared_bytes) const {
    const size_t by_threads = static_cast<size_t>(threads) / block_threads;
    const size_t by_memory = static_cast<size_t>(shared_bytes) /
                             (block_shared_bytes + static_cast<size_t>(reserved_bytes_a_block));
    return static_cast<uint64_t>(multiprocessors) *
           (by_threads < by_memory ? by_threads : by_memory);
  }
};
inline Device device;

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

enum class State { exited, ready, at_barrier, at_warp_operation, asleep };

struct Block;

// A copy that was asked for and has not been waited for.
struct Copy {
  void* to;
  const void* from;  // or null: zeros
  size_t bytes;
  size_t group;  // the thread's groups that were closed before
};

struct Thread {
  Context context;
  unsigned char* stack;
  void* fake_stack = nullptr;  // ASan's, while the thread is switched away from
  Block* block;
  unsigned rank;  // in its block
  uint3 index;
  State state = State::exited;
  // While it waits: for what and where; of a warp-wide operation, with whom and what it offers.
  const char* operation = "";
  Location where;
  uint32_t mask = 0;
  uint64_t offered = 0;
  uint32_t participants = 0;  // once the operation is done
  std::deque<Copy> copies;
  size_t copy_groups = 0;  // closed ones
};

struct Warp {
  uint64_t offered[kWarp];  // by each lane, in the last operation that it took part in
};

struct Block {
  uint3 index;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
};

// What runs the blocks. Threads are made once and serve every block and launch that follows: their
// stacks are always left by returning, so ASan's marks on them stay right.
struct Machine {
  std::vector<std::unique_ptr<Thread>> pool;
  std::function<void()> kernel;
  Thread* current = nullptr;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::map<const void*, size_t> shared_bytes;  // that kernels have asked for
  cudaError_t last_error = cudaSuccess;
};

inline Machine machine;

// No exception: it would have to cross from one stack to another, and leave other threads halfway.
[[noreturn]] inline void fail(const std::string& message) {
  std::fflush(stdout);
  std::fprintf(stderr, "cuda_on_cpu: %s\n", message.c_str());
  std::_Exit(1);
}

inline std::string name(const Block& block) {
  return "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
         std::to_string(block.index.z) + ")";
}

// Of a thread that does what it must not.
[[noreturn]] inline void fail(const Thread& thread, const char* operation, const Location& where,
                              const std::string& message) {
  fail(name(*thread.block) + ": " + operation + ", " + text(where) + ": thread " +
       std::to_string(thread.rank) + " " + message);
}

// ---- Switching between the scheduler and the threads.

constexpr size_t kStackBytes = 256 * 1024;  // only what is touched takes memory
constexpr size_t kGuardBytes = 64 * 1024;   // a multiple of every page size in use

inline void enter_scheduler() {
  Thread& thread = *machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&thread.fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  Context::swap(thread.context, machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.fake_stack, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
}

inline void enter_thread(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, thread.stack, kStackBytes);
#endif
  Context::swap(machine.scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}

inline void thread_main() noexcept {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
  for (;;) {
    machine.kernel();
    machine.current->state = State::exited;
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
  machine.pool.push_back(std::make_unique<Thread>());
  machine.pool.back()->stack = stack;
  machine.pool.back()->context.prepare(stack, kStackBytes, &thread_main);
}

inline void wait(State state, const char* operation, const Location& where) {
  machine.current->state = state;
  machine.current->operation = operation;
  machine.current->where = where;
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
[[noreturn]] inline void report_deadlock(const std::vector<Block>& blocks) {
  std::string message = "deadlock: threads wait for others that went another way\n";
  for (const Block& block : blocks) {
    const size_t size = block.threads.size();
    std::vector<bool> told(size, false);
    for (size_t i = 0; i < size; ++i) {
      const Thread& first = *block.threads[i];
      if (told[i] || first.state == State::exited) continue;
      message += "  " + name(block) + " at " + first.operation + ", " + text(first.where);
      if (first.state == State::at_warp_operation) message += ", mask " + hexadecimal(first.mask);
      message += ": threads";
      for (size_t j = i; j < size; ++j) {
        if (!waits_with(first, *block.threads[j])) continue;
        size_t last = j;
        while (last + 1 < size && waits_with(first, *block.threads[last + 1])) ++last;
        message += " " + std::to_string(j) + (last > j ? "-" + std::to_string(last) : "");
        for (; j <= last; ++j) told[j] = true;
      }
      message += "\n";
    }
  }
  fail(message);
}

// Lets the lanes of each warp go on whose whole mask has arrived at the same place; lanes that have
// exited, or that the block never had, are not waited for. Returns whether there were any.
inline bool complete_warp_operations(Block& block) {
  bool progress = false;
  for (size_t w = 0; w < block.warps.size(); ++w) {
    Thread* const* const warp = block.threads.data() + w * kWarp;
    const size_t rest = block.threads.size() - w * kWarp, lanes = rest < kWarp ? rest : kWarp;
    uint32_t alive = 0, waiting = 0;
    for (size_t lane = 0; lane < lanes; ++lane) {
      const State state = warp[lane]->state;
      alive |= (state != State::exited ? 1u : 0u) << lane;
      waiting |= (state == State::at_warp_operation ? 1u : 0u) << lane;
    }
    while (waiting) {
      const Thread& first = *warp[std::countr_zero(waiting)];
      uint32_t arrived = 0;
      for (size_t lane = 0; lane < lanes; ++lane) {
        arrived |= (waits_with(first, *warp[lane]) ? 1u : 0u) << lane;
      }
      waiting &= ~arrived;
      if (arrived != (first.mask & alive)) continue;
      for (size_t lane = 0; lane < lanes; ++lane) {
        if (!(arrived >> lane & 1u)) continue;
        block.warps[w].offered[lane] = warp[lane]->offered;
        warp[lane]->participants = arrived;
        warp[lane]->state = State::ready;
      }
      progress = true;
    }
  }
  return progress;
}

// Lets all threads go on if all that have not exited wait at one barrier, the same one. Returns
// whether there were any.
inline bool complete_barrier(Block& block) {
  const Thread* first = nullptr;
  for (const Thread* thread : block.threads) {
    if (thread->state == State::exited) continue;
    if (first == nullptr) first = thread;
    if (thread->state != State::at_barrier || !waits_with(*first, *thread)) return false;
  }
  for (Thread* thread : block.threads) {
    if (thread->state == State::at_barrier) thread->state = State::ready;
  }
  return first != nullptr;
}

// Gives the block threads, [first, first + size) of the pool, and memory that nobody has written.
inline void set_up(Block& block, uint64_t rank, size_t first, size_t size, size_t shared_bytes) {
  block.index = {static_cast<unsigned>(rank % gridDim.x),
                 static_cast<unsigned>(rank / gridDim.x % gridDim.y),
                 static_cast<unsigned>(rank / gridDim.x / gridDim.y)};
  block.warps.assign((size + kWarp - 1) / kWarp, Warp{});
  // Allocated for this block alone and to the byte, so that ASan sees one access too far.
  block.shared.reset(shared_bytes ? new unsigned char[shared_bytes] : nullptr);
  if (shared_bytes) std::memset(block.shared.get(), kUnwritten, shared_bytes);
  while (machine.pool.size() < first + size) add_thread_to_pool();
  block.threads.resize(size);
  for (size_t i = 0; i < size; ++i) {
    Thread& thread = *machine.pool[first + i];
    const unsigned thread_rank = static_cast<unsigned>(i);
    thread.block = &block;
    thread.rank = thread_rank;
    thread.index = {thread_rank % blockDim.x, thread_rank / blockDim.x % blockDim.y,
                    thread_rank / (blockDim.x * blockDim.y)};
    thread.mask = 0;
    thread.copies.clear();
    thread.copy_groups = 0;
    thread.state = State::ready;
    block.threads[i] = &thread;
  }
}

// Runs a block until none of its threads can, waking each sleeper once. Returns whether anything
// has happened: a sleeper that fell asleep again is nothing.
inline bool run(Block& block) {
  const size_t size = block.threads.size();
  bool progress = false;
  for (bool wakes = true;; wakes = false) {
    const bool down = descending();
    for (size_t i = 0; i < size; ++i) {
      Thread& thread = *block.threads[down ? size - 1 - i : i];
      const bool asleep = thread.state == State::asleep;
      if (thread.state != State::ready && !(asleep && wakes)) continue;
      enter_thread(thread);
      progress |= !asleep || thread.state != State::asleep;
    }
    if (!complete_warp_operations(block) && !complete_barrier(block)) return progress;
    progress = true;
  }
}

inline bool has_exited(const Block& block) {
  for (const Thread* thread : block.threads) {
    if (thread->state != State::exited) return false;
  }
  return true;
}

// Runs blocks that are all there at once, in turn.
inline void run_together(std::vector<Block>& blocks) {
  for (;;) {
    const bool down = descending();
    bool progress = false, exited = true;
    for (size_t i = 0; i < blocks.size(); ++i) {
      Block& block = blocks[down ? blocks.size() - 1 - i : i];
      progress |= run(block);
      exited &= has_exited(block);
    }
    if (exited) return;
    if (!progress) report_deadlock(blocks);
  }
}

// What CUDA says of a launch before it makes it.
inline cudaError_t check(bool cooperative, const void* kernel, dim3 grid, dim3 threads,
                         size_t shared_bytes) {
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  const auto asked = machine.shared_bytes.find(kernel);
  const size_t shared_limit = asked == machine.shared_bytes.end() ? kMaxSharedBytes : asked->second;
  if (grid.x - 1 >= 0x7fffffffu || grid.y - 1 >= 65535u || grid.z - 1 >= 65535u || count == 0 ||
      count > kMaxThreads || threads.z > 64 || shared_bytes > shared_limit) {
    return cudaErrorInvalidConfiguration;
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (cooperative && blocks > device.resident(count, shared_bytes)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
void launch(bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 threads,
            size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  const cudaError_t refusal =
      check(cooperative, reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes);
  if (refusal != cudaSuccess) {
    machine.last_error = refusal;
    return;
  }
  const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
  machine.kernel = [&] { std::apply(kernel, copies); };
  gridDim = grid;
  blockDim = threads;
  const size_t size = size_t{threads.x} * threads.y * threads.z;
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t together = cooperative ? count : 1;
  std::vector<Block> blocks(together);
  const bool down = descending();
  for (uint64_t i = 0; i < count; i += together) {
    for (uint64_t j = 0; j < together; ++j) {
      const uint64_t rank = cooperative || !down ? i + j : count - 1 - i;
      set_up(blocks[j], rank, j * size, size, shared_bytes);
    }
    run_together(blocks);
  }
}

// RK_ASSERT of a running thread.
inline void require(bool condition, const char* text, const Location& where = Location::current()) {
  if (!condition) fail(*machine.current, "RK_ASSERT", where, std::string("asserts ") + text);
}

// Asynchronous copies into shared memory. Each is made as late as it may be, when it is waited for.
inline void copy_async(void* to, const void* from, size_t bytes, bool present) {
  Thread& thread = *machine.current;
  thread.copies.push_back({to, present ? from : nullptr, bytes, thread.copy_groups});
}

inline void commit_copies() { ++machine.current->copy_groups; }

template <int kPending>
void wait_for_copies() {
  Thread& thread = *machine.current;
  while (!thread.copies.empty() && thread.copies.front().group + kPending < thread.copy_groups) {
    const Copy& copy = thread.copies.front();
    copy.from ? (void)std::memcpy(copy.to, copy.from, copy.bytes)
              : (void)std::memset(copy.to, 0, copy.bytes);
    thread.copies.pop_front();
  }
}

template <typename T>
T* shared_memory() {
  static_assert(alignof(T) <= 16, "shared memory is aligned to 16 bytes");
  return reinterpret_cast<T*>(machine.current->block->shared.get());
}

// Offers a value to the warp and waits for the other lanes of `mask`; returns what each one
// offered.
inline const uint64_t* exchange(const char* operation, uint32_t mask, uint64_t value,
                                const Location& where) {
  Thread& thread = *machine.current;
  if (!(mask >> thread.rank % kWarp & 1u)) {
    fail(thread, operation, where, "is not in its own mask " + hexadecimal(mask));
  }
  thread.mask = mask;
  thread.offered = value;
  wait(State::at_warp_operation, operation, where);
  thread.mask = 0;
  return thread.block->warps[thread.rank / kWarp].offered;
}

template <typename T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// `source`: from this lane, the first lane of its group of `width` and the last one, to the lane to
// read.
template <Shuffled T, typename Source>
T shuffle(const char* operation, uint32_t mask, T value, int width, const Location& where,
          Source source) {
  if (width < 1 || width > kWarp || !std::has_single_bit(static_cast<unsigned>(width))) {
    fail(*machine.current, operation, where, "asks for width " + std::to_string(width));
  }
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* const offered = exchange(operation, mask, bits, where);
  const Thread& thread = *machine.current;
  const int lane = static_cast<int>(thread.rank % kWarp), first = lane & ~(width - 1);
  const int from = source(lane, first, first + width - 1);
  if (!(thread.participants >> from & 1u)) {
    fail(thread, operation, where, "reads lane " + std::to_string(from) + ", which takes no part");
  }
  std::memcpy(&value, &offered[from], sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_on_cpu::machine.last_error, cudaSuccess);
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorInvalidValue: return "invalid argument";
    default: return "invalid configuration argument";
  }
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const cuda_on_cpu::Device& device = cuda_on_cpu::device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = device.threads; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.shared_bytes; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_bytes_a_block; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = device.reserved_bytes_a_block; break;
  }
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute,
                                 int value) {
  using namespace cuda_on_cpu;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (value > device.shared_bytes_a_block) return machine.last_error = cudaErrorInvalidValue;
  machine.shared_bytes[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

// A thread that looks for what another one writes sleeps between two looks, however short.
inline void __nanosleep(unsigned, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  cuda_on_cpu::wait(cuda_on_cpu::State::asleep, "__nanosleep", where);
}

inline void __threadfence() {}

template <typename T>
T __ldcg(const T* address) {
  return *address;
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
    if (machine.current->participants >> lane & 1u) bits |= uint32_t(offered[lane]) << lane;
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

template <typename T>
  requires(std::is_integral_v<T> && sizeof(T) >= 4)
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}

template <typename T>
  requires(std::is_integral_v<T> && sizeof(T) >= 4)
T atomicOr(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old | value;
  return old;
}

inline unsigned atomicInc(unsigned* address, unsigned most) {
  const unsigned old = *address;
  *address = old >= most ? 0 : old + 1;
  return old;
}
