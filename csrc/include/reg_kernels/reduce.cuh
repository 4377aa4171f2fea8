// Sums of pairs of numbers over the threads of a block, and over blocks that wait for each other,
// in double and in an order that depends on sizes alone: the same bits in every block and every
// run. And which block of a grid is the last one, where nothing has to wait.
#pragma once

#include <cstdint>

#include "launch.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

struct Sums {
  double a, b;

  __device__ void add(const Sums& other) {
    a += other.a;
    b += other.b;
  }
};

// Each thread brings kColumns sums; they are added up over the threads of equal
// threadIdx.x % classes, `classes` a power of two of at most a warp. Thread t < classes * kColumns
// returns the total of column t % kColumns of class t / kColumns. `scratch` has room for
// classes * kColumns sums a warp, and is read until the block's next barrier.
template <int kColumns>
__device__ __forceinline__ Sums block_sum(Sums (&mine)[kColumns], int classes, Sums* scratch) {
  RK_NO_UNROLL
  for (int distance = kWarp / 2; distance >= classes; distance /= 2) {
    RK_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      mine[k].add({__shfl_xor_sync(kFullWarp, mine[k].a, distance),
                   __shfl_xor_sync(kFullWarp, mine[k].b, distance)});
    }
  }
  const int thread = threadIdx.x, lane = thread % kWarp, totals = classes * kColumns;
  if (lane < classes) {
    Sums* const of_warp = scratch + thread / kWarp * totals;
    RK_UNROLL
    for (int k = 0; k < kColumns; ++k) of_warp[lane * kColumns + k] = mine[k];
  }
  __syncthreads();
  Sums total{};
  if (thread < totals) {
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) {
      total.add(scratch[warp * totals + thread]);
    }
  }
  return total;
}

// Waits until `blocks` blocks have come here; `arrivals` starts at 0 and serves once. What a block
// has written before is then there to be read past the L1 cache by the others.
__device__ __forceinline__ void meet(int* arrivals, int blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrivals, 1);
    while (*static_cast<volatile int*>(arrivals) < blocks) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

// True for the last block of the grid to come here, and for all of its threads: what the others
// have written before is then there to be read past the L1 cache, and nobody reads any more what it
// overwrites. `ticket`, in global memory, is 0 before the launch and again after it, so the next
// launch and a graph's replay need nothing set up; `last` is in shared memory.
__device__ __forceinline__ bool last_block(unsigned* ticket, bool* last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned blocks = gridDim.x;
    __threadfence();
    *last = atomicInc(ticket, blocks - 1) == blocks - 1;  // which wraps to 0
    __threadfence();
  }
  __syncthreads();
  return *last;
}

// Where blocks exchange sums, in global memory.
struct Exchange {
  Sums* partials;  // a row of totals for each block of each meeting
  int* arrivals;   // [meetings], at 0
};

// Adds up what threads t < totals of `blocks` blocks bring, and returns it to those of each block;
// `totals` is a power of two of at most blockDim.x. `scratch` has room for one Sums a thread.
__device__ __forceinline__ Sums exchange_sums(const Sums& mine, int totals,
                                              const Exchange& exchange, int64_t meeting, int rank,
                                              int blocks, Sums* scratch) {
  Sums* const partials = exchange.partials + meeting * blocks * totals;
  const int thread = threadIdx.x;
  if (thread < totals) partials[rank * totals + thread] = mine;
  meet(exchange.arrivals + meeting, blocks);

  // Threads share the blocks' partials out among them, then add up in a tree.
  const int column = thread % totals, part = thread / totals;
  int parts = blockDim.x / totals;
  while (parts / 2 >= blocks) parts /= 2;
  Sums total{};
  if (part < parts) {
    // Eight at a time, as far as there are: a load takes longer than all the rest.
    constexpr int kLoads = 8;
    for (int block = part; block < blocks; block += kLoads * parts) {
      Sums loaded[kLoads] = {};
      RK_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        if (block + i * parts >= blocks) continue;
        const Sums* const partial = partials + (block + i * parts) * totals + column;
        loaded[i] = {__ldcg(&partial->a), __ldcg(&partial->b)};
      }
      RK_UNROLL
      for (int i = 0; i < kLoads; ++i) total.add(loaded[i]);
    }
  }
  scratch[thread] = total;
  for (int half = parts / 2; half > 0; half /= 2) {
    __syncthreads();
    if (part < half) scratch[thread].add(scratch[thread + half * totals]);
  }
  return scratch[thread];
}

}  // namespace cuda
RK_NAMESPACE_END
