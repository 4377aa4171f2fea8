// What cuda_on_cpu.h promises: indices, barriers, warp-wide operations, atomics, shared memory,
// asynchronous copies, cooperative and refused launches behave as the CUDA C++ Programming Guide
// says.
#include "cuda_on_cpu.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "driver.h"
#include "reg_kernels/async_copy.cuh"
#include "reg_kernels/reduce.cuh"

namespace {

using cuda_on_cpu::kWarp;
using reg_kernels::cuda::kFullWarp;

template <typename T>
void expect_equal(T actual, T expected, const std::string& what) {
  driver::expect(actual == expected, [&] {
    return what + ": " + std::to_string(actual) + ", expected " + std::to_string(expected);
  });
}

// ---- Indices.

__global__ void write_indices(int* visits, dim3 grid, dim3 block) {
  driver::expect(gridDim.x == grid.x && gridDim.y == grid.y && gridDim.z == grid.z &&
                     blockDim.x == block.x && blockDim.y == block.y && blockDim.z == block.z,
                 [] { return "gridDim or blockDim"; });
  const unsigned thread = (threadIdx.z * block.y + threadIdx.y) * block.x + threadIdx.x;
  const unsigned rank = (blockIdx.z * grid.y + blockIdx.y) * grid.x + blockIdx.x;
  visits[rank * (block.x * block.y * block.z) + thread] += 1;
}

void test_indices() {
  const dim3 grid(3, 2, 2), block(5, 3, 2);
  std::vector<int> visits(3 * 2 * 2 * 5 * 3 * 2);
  RK_LAUNCH(write_indices, grid, block, 0, nullptr, visits.data(), grid, block);
  for (size_t i = 0; i < visits.size(); ++i) {
    expect_equal(visits[i], 1, "visits of thread " + std::to_string(i));
  }
}

// Every thread takes note of its turn.
__global__ void take_turns(int* turns, int* next) {
  turns[blockIdx.x * blockDim.x + threadIdx.x] = (*next)++;
}

void test_order() {
  int turns[6], next = 0;
  RK_LAUNCH(take_turns, 2, 3, 0, nullptr, turns, &next);
  for (int i = 0; i < 6; ++i) {
    expect_equal(turns[i], cuda_on_cpu::reversed ? 5 - i : i,
                 "turn of thread " + std::to_string(i));
  }
}

// ---- Warp-wide operations. Lane i offers 100 + i.

enum class Shuffle { idx, up, down, exclusive_or };

template <typename T>
__global__ void shuffle_kernel(Shuffle kind, int argument, int width, T* out) {
  const T value = static_cast<T>(100 + threadIdx.x);
  T& result = out[threadIdx.x];
  switch (kind) {
    case Shuffle::idx: result = __shfl_sync(kFullWarp, value, argument, width); break;
    case Shuffle::up: result = __shfl_up_sync(kFullWarp, value, argument, width); break;
    case Shuffle::down: result = __shfl_down_sync(kFullWarp, value, argument, width); break;
    case Shuffle::exclusive_or: result = __shfl_xor_sync(kFullWarp, value, argument, width); break;
  }
}

template <typename T>
void test_shuffle(Shuffle kind, int argument, int width, const std::vector<int>& lanes) {
  T out[kWarp];
  RK_LAUNCH(shuffle_kernel<T>, 1, kWarp, 0, nullptr, kind, argument, width, out);
  for (int lane = 0; lane < kWarp; ++lane) {
    expect_equal(out[lane], static_cast<T>(100 + lanes[lane]),
                 "shuffle " + std::to_string(int(kind)) + " by " + std::to_string(argument) +
                     " width " + std::to_string(width) + " lane " + std::to_string(lane));
  }
}

// `f` of each lane: the lane that it reads, written out here from the Programming Guide's words.
template <typename F>
std::vector<int> lanes_by(F f) {
  std::vector<int> lanes(kWarp);
  for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = f(lane);
  return lanes;
}

template <typename T>
void test_shuffles() {
  test_shuffle<T>(Shuffle::idx, 5, 32, lanes_by([](int) { return 5; }));
  test_shuffle<T>(Shuffle::idx, 11, 8, lanes_by([](int l) { return l / 8 * 8 + 3; }));
  test_shuffle<T>(Shuffle::up, 1, 32, lanes_by([](int l) { return l == 0 ? 0 : l - 1; }));
  test_shuffle<T>(Shuffle::up, 3, 8, lanes_by([](int l) { return l % 8 < 3 ? l : l - 3; }));
  test_shuffle<T>(Shuffle::down, 16, 32, lanes_by([](int l) { return l < 16 ? l + 16 : l; }));
  test_shuffle<T>(Shuffle::down, 3, 4, lanes_by([](int l) { return l % 4 == 0 ? l + 3 : l; }));
  test_shuffle<T>(Shuffle::exclusive_or, 31, 32, lanes_by([](int l) { return 31 - l; }));
  test_shuffle<T>(Shuffle::exclusive_or, 1, 2, lanes_by([](int l) { return l ^ 1; }));
  // Across groups, xor reads from earlier ones only.
  test_shuffle<T>(Shuffle::exclusive_or, 8, 8,
                  lanes_by([](int l) { return l / 8 % 2 ? l - 8 : l; }));
}

// Each half of the warp by its own mask, and each at its own pace.
__global__ void half_warp_sums(int* out) {
  const bool upper = threadIdx.x >= 16;
  const uint32_t mask = upper ? 0xffff0000u : 0x0000ffffu;
  int sum = static_cast<int>(threadIdx.x);
  for (int distance = upper ? 8 : 4; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(mask, sum, distance);
  }
  out[threadIdx.x] = sum;
}

void test_masks() {
  int out[kWarp];
  RK_LAUNCH(half_warp_sums, 1, kWarp, 0, nullptr, out);
  for (int lane = 0; lane < kWarp; ++lane) {
    const int first = lane < 16 ? lane / 8 * 8 : 16, count = lane < 16 ? 8 : 16;
    expect_equal(out[lane], count * first + count * (count - 1) / 2,
                 "half-warp sum of lane " + std::to_string(lane));
  }
}

// Lanes that have exited, and those a short warp never had, are not waited for.
__global__ void ballot_kernel(uint32_t* out) {
  __ballot_sync(kFullWarp, 1);  // whose votes must not count again
  if (threadIdx.x % 8 == 7) return;
  out[threadIdx.x] = __ballot_sync(kFullWarp, threadIdx.x % 3 == 0 ? 4 : 0);
  __syncwarp();
}

void test_ballot() {
  constexpr int kThreads = 44;
  uint32_t out[kThreads] = {};
  RK_LAUNCH(ballot_kernel, 1, kThreads, 0, nullptr, out);
  for (int thread = 0; thread < kThreads; ++thread) {
    uint32_t expected = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      const int other = thread / kWarp * kWarp + lane;
      if (other < kThreads && other % 8 != 7 && other % 3 == 0) expected |= 1u << lane;
    }
    expect_equal(out[thread], thread % 8 == 7 ? 0u : expected,
                 "ballot of thread " + std::to_string(thread));
  }
}

// ---- Blocks.

template <typename T>
__global__ void block_sum_kernel(const T* x, int count, T* out) {
  RK_SHARED(T, partial);
  T sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    sum += x[blockIdx.x * count + i];
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(kFullWarp, sum, distance);
  }
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  const unsigned warps = blockDim.x / kWarp;
  sum = threadIdx.x < warps ? partial[threadIdx.x] : T(0);
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, distance);
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Small whole numbers, so that the order of the additions does not matter.
template <typename T>
void test_block_sum() {
  constexpr int kBlocks = 3;
  for (const int threads : {32, 256, 1024}) {
    for (const int count : {1, 127, 1024, 4099}) {
      std::vector<T> x(kBlocks * count);
      for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(i % 1000);
      T out[kBlocks];
      RK_LAUNCH(block_sum_kernel<T>, kBlocks, threads, threads / kWarp * sizeof(T), nullptr,
                x.data(), count, out);
      for (int b = 0; b < kBlocks; ++b) {
        expect_equal(out[b],
                     std::accumulate(x.begin() + b * count, x.begin() + (b + 1) * count, T(0)),
                     "sum of " + std::to_string(count) + " by " + std::to_string(threads));
      }
    }
  }
}

// A thread that has exited is missed by no barrier.
__global__ void exit_before_barrier(int* out) {
  RK_SHARED(int, values);
  if (threadIdx.x % 2) return;
  values[threadIdx.x / 2] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x / 2] = values[31 - threadIdx.x / 2];
  __syncthreads();
}

void test_exit_before_barrier() {
  int out[32];
  RK_LAUNCH(exit_before_barrier, 1, 64, sizeof(out), nullptr, out);
  for (int i = 0; i < 32; ++i) {
    expect_equal(out[i], 2 * (31 - i), "a barrier after others have exited");
  }
}

// Each block finds its shared memory as no block left it.
__global__ void read_unwritten(unsigned char* out) {
  RK_SHARED(unsigned char, bytes);
  out[blockIdx.x * blockDim.x + threadIdx.x] = bytes[threadIdx.x];
  bytes[threadIdx.x] = 0;
}

void test_shared_memory_starts_unwritten() {
  unsigned char out[3 * 64];
  RK_LAUNCH(read_unwritten, 3, 64, 64, nullptr, out);
  for (const unsigned char byte : out) {
    expect_equal<int>(byte, cuda_on_cpu::kUnwritten, "unwritten shared memory");
  }
}

template <typename T>
__global__ void count_kernel(T* counter, T* seen) {
  const T before = atomicAdd(counter, 2);
  seen[static_cast<int>(before) / 2] += 1;
}

template <typename T>
void test_atomic_add() {
  T counter = 0, seen[2 * 96] = {};
  RK_LAUNCH(count_kernel<T>, 2, 96, 0, nullptr, &counter, seen);
  expect_equal(counter, T(2 * 2 * 96), "atomicAdd's sum");
  for (const T times : seen) expect_equal(times, T(1), "what atomicAdd returned");
}

template <typename T>
__global__ void set_bits_kernel(T* word, T* seen) {
  seen[threadIdx.x] = atomicOr(word, T{1} << threadIdx.x);
}

template <typename T>
void test_atomic_or() {
  T word = 0, seen[16];
  RK_LAUNCH(set_bits_kernel<T>, 1, 16, 0, nullptr, &word, seen);
  expect_equal<int64_t>(word, 0xffff, "atomicOr's bits");
  for (int i = 0; i < 16; ++i) {
    const T before = cuda_on_cpu::reversed ? (T{0xffff} >> i >> 1) << i << 1 : (T{1} << i) - 1;
    expect_equal<int64_t>(seen[i], before, "what atomicOr returned");
  }
}

__global__ void raise_kernel(unsigned* most, unsigned* seen) {
  seen[threadIdx.x] = atomicMax(most, threadIdx.x * 5 % 16);
}

void test_atomic_max() {
  unsigned most = 3, seen[16], expected = 3;
  RK_LAUNCH(raise_kernel, 1, 16, 0, nullptr, &most, seen);
  for (int i = 0; i < 16; ++i) {
    const int turn = cuda_on_cpu::reversed ? 15 - i : i;
    expect_equal<int64_t>(seen[turn], expected, "what atomicMax returned");
    expected = std::max(expected, static_cast<unsigned>(turn * 5 % 16));
  }
  expect_equal<int64_t>(most, 15, "atomicMax's largest");
}

__global__ void count_and_wrap_kernel(unsigned* counter, unsigned* seen) {
  seen[threadIdx.x] = atomicInc(counter, 3);
}

void test_atomic_inc() {
  unsigned counter = 0, seen[10];
  RK_LAUNCH(count_and_wrap_kernel, 1, 10, 0, nullptr, &counter, seen);
  for (int i = 0; i < 10; ++i) {
    const int turn = cuda_on_cpu::reversed ? 9 - i : i;
    expect_equal<int64_t>(seen[i], turn % 4, "what atomicInc returned");
  }
  expect_equal<int64_t>(counter, 2, "what atomicInc left");
  counter = 7;  // beyond the most there should be
  RK_LAUNCH(count_and_wrap_kernel, 1, 1, 0, nullptr, &counter, seen);
  expect_equal<int64_t>(counter, 0, "atomicInc's wrap");
}

// ---- The last block of a grid.

__global__ void last_block_kernel(unsigned* ticket, int* arrived, int* told) {
  RK_SHARED(bool, last);
  if (threadIdx.x == 0) ++*arrived;
  if (reg_kernels::cuda::last_block(ticket, last)) told[threadIdx.x] += *arrived;
}

void test_last_block() {
  unsigned ticket = 0;
  for (const int blocks : {1, 2, 5, 3}) {
    int arrived = 0, told[64] = {};
    RK_LAUNCH(last_block_kernel, blocks, 64, sizeof(bool), nullptr, &ticket, &arrived, told);
    for (const int count : told) expect_equal(count, blocks, "what the last block finds");
    expect_equal<int64_t>(ticket, 0, "the ticket after a launch");
  }
}

// ---- Asynchronous copies. Three groups of one 16-byte word each, the last one not present.

__global__ void copy_kernel(const uint32_t* x, uint32_t* y) {
  using namespace reg_kernels::cuda;
  RK_SHARED(VectorBits, words);
  for (int i = 0; i < 3; ++i) {
    copy_async(&words[i], x + 4 * i, i < 2);
    commit_copies();
  }
  const auto note = [&](int at) {
    for (int i = 0; i < 3; ++i) y[at + i] = words[i].w[3];
  };
  wait_for_copies<3>();
  note(0);
  wait_for_copies<1>();
  note(3);
  commit_copies();  // an empty group counts as one
  wait_for_copies<1>();
  note(6);
}

void test_async_copies() {
  const uint32_t x[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  uint32_t y[9];
  RK_LAUNCH(copy_kernel, 1, 1, 48, nullptr, x, y);
  constexpr uint32_t kNone = 0x7f7f7f7fu;  // kUnwritten
  const uint32_t expected[9] = {kNone, kNone, kNone, 4, 8, kNone, 4, 8, 0};
  for (int i = 0; i < 9; ++i) expect_equal(y[i], expected[i], "a copy that was waited for");
}

// ---- Cooperative launches.

struct Exchanged {
  int meetings;
  reg_kernels::cuda::Exchange exchange;
  double* out;  // [meetings][blocks][2]
};

// Each block brings 1 and its number, doubled from meeting to meeting.
__global__ void exchange_kernel(Exchanged e) {
  using namespace reg_kernels::cuda;
  RK_SHARED(Sums, scratch);
  const int blocks = static_cast<int>(gridDim.x), rank = static_cast<int>(blockIdx.x);
  for (int meeting = 0; meeting < e.meetings; ++meeting) {
    const double factor = 1 << meeting, number = rank;
    const Sums mine{factor * threadIdx.x, factor * number};
    const Sums total = exchange_sums(mine, 2, e.exchange, meeting, rank, blocks, scratch);
    if (threadIdx.x < 2) {
      double* const out = e.out + (meeting * blocks + rank) * 2;
      out[threadIdx.x] = threadIdx.x == 0 ? total.b : total.a;
    }
  }
}

void test_exchange() {
  for (const int blocks : {2, 3, 13, 100}) {
    constexpr int kMeetings = 3;
    std::vector<reg_kernels::cuda::Sums> partials(kMeetings * blocks * 2);
    std::vector<int> arrivals(kMeetings);
    std::vector<double> out(kMeetings * blocks * 2);
    const Exchanged e{kMeetings, {partials.data(), arrivals.data()}, out.data()};
    RK_LAUNCH_COOPERATIVE(exchange_kernel, blocks, 64, 64 * sizeof(partials[0]), nullptr, e);
    for (int i = 0; i < kMeetings * blocks; ++i) {
      const double factor = 1 << i / blocks;
      expect_equal(out[2 * i], factor * blocks * (blocks - 1) / 2, "blocks' sum");
      expect_equal(out[2 * i + 1], factor * blocks, "blocks' count");
    }
  }
}

// ---- Launches.

__global__ void touch(int* launches) { ++*launches; }

void test_refused_cooperation() {
  const cuda_on_cpu::Device h100 = cuda_on_cpu::device;
  cuda_on_cpu::device = {4, 128, 100 * 1024, 60 * 1024, 1024};
  int launches = 0;
  int* const argument = &launches;
  const auto accepted = [&](unsigned blocks, unsigned threads, size_t shared) {
    launches = 0;
    RK_LAUNCH_COOPERATIVE(touch, blocks, threads, shared, nullptr, argument);
    return cudaGetLastError() == cudaSuccess && launches > 0;
  };
  driver::expect(accepted(8, 64, 0) && !accepted(9, 64, 0), [] { return "blocks by threads"; });
  driver::expect(accepted(8, 32, 40 * 1024) && !accepted(9, 32, 40 * 1024),
                 [] { return "blocks by shared memory"; });
  driver::expect(!accepted(1, 32, 49 * 1024), [] { return "shared memory not asked for"; });
  const auto ask = [](int bytes) {
    return cudaFuncSetAttribute(touch, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  driver::expect(ask(60 * 1024) == cudaSuccess && accepted(1, 32, 60 * 1024),
                 [] { return "shared memory asked for"; });
  driver::expect(ask(60 * 1024 + 1) != cudaSuccess && cudaGetLastError() != cudaSuccess,
                 [] { return "too much shared memory asked for"; });
  cuda_on_cpu::device = h100;
  ask(48 * 1024);
}

void test_refused_launches() {
  int launches = 0;
  const auto refused = [&](dim3 grid, dim3 block, size_t shared) {
    RK_LAUNCH(touch, grid, block, shared, nullptr, &launches);
    bool thrown = false;
    try {
      reg_kernels::cuda::check_launch("touch");
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    return thrown;
  };
  const auto expect_refused = [&](dim3 grid, dim3 block, size_t shared) {
    driver::expect(refused(grid, block, shared) && launches == 0,
                   [] { return "an impossible launch was made"; });
  };
  expect_refused(0, 32, 0);  // an empty tensor's grid
  expect_refused(0x80000000u, 32, 0);
  expect_refused(dim3(1, 65536), 32, 0);
  expect_refused(1, 0, 0);
  expect_refused(1, 1025, 0);
  expect_refused(1, dim3(1, 1, 65), 0);
  expect_refused(1, 32, 48 * 1024 + 1);
  driver::expect(!refused(1, 1, 48 * 1024) && launches == 1,
                 [] { return "a launch after refused ones"; });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  test_indices();
  test_order();
  test_shuffles<float>();
  test_shuffles<uint64_t>();
  test_masks();
  test_ballot();
  test_block_sum<float>();
  test_exit_before_barrier();
  test_shared_memory_starts_unwritten();
  test_atomic_add<int>();
  test_atomic_add<double>();
  test_atomic_or<uint32_t>();
  test_atomic_or<int64_t>();
  test_atomic_max();
  test_atomic_inc();
  test_last_block();
  test_async_copies();
  test_exchange();
  test_refused_cooperation();
  test_refused_launches();
  return driver::finish();
}
