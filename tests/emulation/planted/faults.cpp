// Kernels with a fault each, which -DPLANTED puts in: without it they are right.
//
//   faults forward|reversed <name>
#include <map>
#include <vector>

#include "driver.h"
#include "reg_kernels/async_copy.cuh"
#include "reg_kernels/reduce.cuh"

#if defined(PLANTED)
constexpr bool kPlanted = true;
#else
constexpr bool kPlanted = false;
#endif

namespace {

__device__ int thread() { return static_cast<int>(threadIdx.x); }

template <typename F>
void expect_each(const std::vector<int>& y, F expected) {
  for (size_t i = 0; i < y.size(); ++i) {
    driver::expect(y[i] == expected(static_cast<int>(i)),
                   [&] { return "element " + std::to_string(i) + " is " + std::to_string(y[i]); });
  }
}

// A copy whose last block does not stop at the last element.
__global__ void copy(const float* x, float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x) + thread();
  if (i < n + (kPlanted ? 1 : 0)) y[i] = x[i < n ? i : 0];
}

void global_out_of_bounds() {
  driver::Buffer<float> x(100, 0), y(100, 0);
  x.fill_with_bits(1);
  RK_LAUNCH(copy, 4, 32, 0, nullptr, x.data(), y.data(), 100);
  driver::expect_same_bits(y, x.data(), [] { return "copy"; });
}

// A halo of one element, for which the launch asks no shared memory.
__global__ void rotate(int* y) {
  RK_SHARED(int, tile);
  tile[thread()] = thread();
  if (thread() == 0) tile[blockDim.x] = 0;
  __syncthreads();
  y[thread()] = tile[thread() + 1];
}

void shared_out_of_bounds() {
  std::vector<int> y(64);
  RK_LAUNCH(rotate, 1, 64, (kPlanted ? 64 : 65) * sizeof(int), nullptr, y.data());
  expect_each(y, [](int i) { return (i + 1) % 64; });
}

// The first thread's value is read before everyone knows that it was written. In forward order it
// always was.
__global__ void broadcast(int* y) {
  RK_SHARED(int, value);
  if (thread() == 0) *value = 42;
  if constexpr (!kPlanted) __syncthreads();
  y[thread()] = *value;
}

void missing_barrier() {
  std::vector<int> y(64);
  RK_LAUNCH(broadcast, 1, 64, sizeof(int), nullptr, y.data());
  expect_each(y, [](int) { return 42; });
}

// A warp's sum that only the lanes with an element take part in.
__global__ void warp_sums(int n, int* y) {
  int sum = thread() < n ? 1 : 0;
  if (!kPlanted || thread() < n) {
    for (int distance = 16; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, distance);  // skipped_shuffle
    }
  }
  __syncthreads();
  y[thread()] = sum;
}

void skipped_shuffle() {
  std::vector<int> y(64);
  RK_LAUNCH(warp_sums, 1, 64, 0, nullptr, 40, y.data());
  expect_each(y, [](int i) { return i < 32 ? 32 : 8; });
}

// Lanes without an element are gone when the others read from them.
__global__ void neighbours(int n, int* y) {
  if (kPlanted && thread() >= n) return;
  const int next = __shfl_down_sync(0xffffffffu, thread(), 1);
  if (thread() < n) y[thread()] = next;
}

void shuffle_from_exited_lane() {
  std::vector<int> y(20);
  RK_LAUNCH(neighbours, 1, 32, 0, nullptr, 20, y.data());
  expect_each(y, [](int i) { return i + 1; });
}

// A mask that leaves out the thread which uses it.
__global__ void votes(int* y) {
  y[thread()] = static_cast<int>(__ballot_sync(kPlanted ? 0x7fffffffu : 0xffffffffu, 1));
}

void lane_outside_its_mask() {
  std::vector<int> y(32);
  RK_LAUNCH(votes, 1, 32, 0, nullptr, y.data());
  expect_each(y, [](int) { return -1; });
}

// A barrier for the threads with an element only; the others go on to the next one.
__global__ void reverse(int n, int* y) {
  RK_SHARED(int, tile);
  if (thread() < n) {
    tile[thread()] = thread();
    if constexpr (kPlanted) __syncthreads();  // skipped_barrier, first
  }
  __syncthreads();  // skipped_barrier, second
  if (thread() < n) y[thread()] = tile[n - 1 - thread()];
}

void skipped_barrier() {
  std::vector<int> y(40);
  RK_LAUNCH(reverse, 1, 64, 40 * sizeof(int), nullptr, 40, y.data());
  expect_each(y, [](int i) { return 39 - i; });
}

// The block's halves wait at two barriers, which share a line of the source.
__global__ void exchange(int* y) {
  RK_SHARED(int, tile);
  tile[thread()] = thread();
  const bool apart = kPlanted && thread() < 32;
  // clang-format off
  if (apart) { __syncthreads(); } else { __syncthreads(); }  // barriers_on_one_line
  // clang-format on
  y[thread()] = tile[thread() ^ 32];
}

void barriers_on_one_line() {
  std::vector<int> y(64);
  RK_LAUNCH(exchange, 1, 64, 64 * sizeof(int), nullptr, y.data());
  expect_each(y, [](int i) { return i ^ 32; });
}

// What one block writes is read by the others before they know that it was written. In forward
// order it always was.
struct Blocks {
  int* arrivals;
  int* value;
  int* y;
};

__global__ void broadcast_to_blocks(Blocks b) {
  if (blockIdx.x == 0 && thread() == 0) *b.value = 42;
  if constexpr (!kPlanted) reg_kernels::cuda::meet(b.arrivals, static_cast<int>(gridDim.x));
  b.y[blockIdx.x * blockDim.x + thread()] = *b.value;
}

void missing_grid_barrier() {
  int arrivals = 0, value = 0;
  std::vector<int> y(3 * 32);
  const Blocks b{&arrivals, &value, y.data()};
  RK_LAUNCH_COOPERATIVE(broadcast_to_blocks, 3, 32, 0, nullptr, b);
  expect_each(y, [](int) { return 42; });
}

// A block without work that goes home before the others have met.
__global__ void meet_with_work(Blocks b) {
  if (kPlanted && blockIdx.x == 2) return;
  reg_kernels::cuda::meet(b.arrivals, static_cast<int>(gridDim.x));
  b.y[blockIdx.x * blockDim.x + thread()] = *b.arrivals;
}

void skipped_grid_barrier() {
  int arrivals = 0;
  std::vector<int> y(3 * 32);
  const Blocks b{&arrivals, nullptr, y.data()};
  RK_LAUNCH_COOPERATIVE(meet_with_work, 3, 32, 0, nullptr, b);
  expect_each(y, [](int) { return 3; });
}

// Blocks that wait for others which need not run at the same time.
__global__ void meet_all(Blocks b) {
  reg_kernels::cuda::meet(b.arrivals, static_cast<int>(gridDim.x));
  b.y[blockIdx.x * blockDim.x + thread()] = *b.arrivals;
}

void blocks_not_together() {
  int arrivals = 0;
  std::vector<int> y(3 * 32);
  const Blocks b{&arrivals, nullptr, y.data()};
  if constexpr (kPlanted) {
    RK_LAUNCH(meet_all, 3, 32, 0, nullptr, b);
  } else {
    RK_LAUNCH_COOPERATIVE(meet_all, 3, 32, 0, nullptr, b);
  }
  expect_each(y, [](int) { return 3; });
}

// The copy that was asked for last is read as well, which the wait leaves out.
__global__ void copies(const int* x, int* y) {
  using namespace reg_kernels::cuda;
  RK_SHARED(VectorBits, words);
  for (int i = 0; i < 2; ++i) {
    copy_async(&words[2 * thread() + i], x + 8 * thread() + 4 * i, true);
    commit_copies();
  }
  wait_for_copies<kPlanted ? 1 : 0>();
  for (int i = 0; i < 8; ++i) {
    y[8 * thread() + i] = static_cast<int>(words[2 * thread() + i / 4].w[i % 4]);
  }
}

void missing_wait_for_copy() {
  std::vector<int> x(256), y(256);
  for (int i = 0; i < 256; ++i) x[i] = i;
  RK_LAUNCH(copies, 1, 32, 1024, nullptr, x.data(), y.data());
  expect_each(y, [](int i) { return i; });
}

// An element's index in 32 bits, where a tensor has more elements than they count.
__global__ void last_row(int rows, int columns, int64_t* y) {
  *y = kPlanted ? (rows - 1) * columns : static_cast<int64_t>(rows - 1) * columns;
}

void signed_overflow() {
  int64_t y = 0;
  RK_LAUNCH(last_row, 1, 1, 0, nullptr, 65537, 65536, &y);
  driver::expect(y == int64_t{65536} * 65536, [] { return "last_row"; });
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string_view, void (*)()> faults = {
      {"global_out_of_bounds", global_out_of_bounds},
      {"shared_out_of_bounds", shared_out_of_bounds},
      {"missing_barrier", missing_barrier},
      {"skipped_shuffle", skipped_shuffle},
      {"shuffle_from_exited_lane", shuffle_from_exited_lane},
      {"lane_outside_its_mask", lane_outside_its_mask},
      {"skipped_barrier", skipped_barrier},
      {"barriers_on_one_line", barriers_on_one_line},
      {"missing_grid_barrier", missing_grid_barrier},
      {"skipped_grid_barrier", skipped_grid_barrier},
      {"blocks_not_together", blocks_not_together},
      {"missing_wait_for_copy", missing_wait_for_copy},
      {"signed_overflow", signed_overflow},
  };
  if (argc != 3 || !faults.contains(argv[2]) || !driver::set_order(argv[1])) return 2;
  // As often as a program launches a kernel, and less.
  for (int i = cuda_on_cpu::mixed ? 8 : 1; i > 0; --i) faults.at(argv[2])();
  return driver::finish();
}
