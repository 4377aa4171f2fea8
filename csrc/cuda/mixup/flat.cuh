// Mixup sample by sample in the order in which the input lies in memory: that of the output too, or
// elements go one by one to where they belong.
#pragma once

#include "blend.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kMixupThreads = 256;
// Blocks a multiprocessor: what the registers are held to. A gradient takes more of them, and so
// does float64.
template <MixupPass kPass, typename C>
constexpr int kMixupBlocks = kPass == MixupPass::forward && sizeof(C) == 4 ? 3 : 2;
// Vectors of a thread before its first use of one; of one element, more.
template <int kCount>
constexpr int kMixupLoads = kCount == 1 ? 4 : 2;

// How the work is shared out. A task is a tile of one sample, or of a pair of them, for `lanes`
// threads; those of one tile lie side by side. A block has several where samples are small.
struct MixupTasks {
  bool whole;  // vectors are of 16 bytes, not of one element
  int lanes, tasks_a_block;
  int64_t tasks, tasks_a_tile;
};

// Calls f(i, at, places) for each task of this thread: the i-th one of its tile, and the vectors
// that the thread has of it.
template <int kCount, typename In, typename Out, typename F>
__device__ __forceinline__ void for_tasks(const MixupArguments<In, Out>& a, const MixupTasks& tasks,
                                          const F& f) {
  constexpr int kLoads = kMixupLoads<kCount>;
  const int of_block = static_cast<int>(threadIdx.x) / tasks.lanes;
  const int lane = static_cast<int>(threadIdx.x) % tasks.lanes;
  if (of_block >= tasks.tasks_a_block) return;
  const int64_t vectors = a.numel() / kCount;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * tasks.tasks_a_block + of_block;
       task < tasks.tasks; task += static_cast<int64_t>(gridDim.x) * tasks.tasks_a_block) {
    const int64_t tile = quotient(task, tasks.tasks_a_tile);
    int64_t at[kLoads];
    MixupPlace places[kLoads] = {};
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      const int64_t vector = (tile * kLoads + k) * tasks.lanes + lane;
      at[k] = vector < vectors ? vector * kCount : kNoVector;
      if (a.needs_places() && vector < vectors) places[k] = MixupPlace::of(a.layout, at[k]);
    }
    f(task - tile * tasks.tasks_a_tile, at, places);
  }
}

template <MixupPass kPass, int kCount, typename In, typename Out>
__device__ __forceinline__ void mixup_tasks(const MixupArguments<In, Out>& a,
                                            const MixupTasks& tasks) {
  for_tasks<kCount>(a, tasks, [&](int64_t i, const auto& at, const auto& places) {
    const int64_t n = a.sample(i);
    mixup_vectors<kPass, kCount>(a, n, at, places, [&](int k, const Vector<Out, kCount>& vector) {
      int64_t to = at[k];
      if (kCount == 1 && a.to_channels_last != a.layout.channels_last) {
        const MixupPlace& place = places[k];
        to = a.to_channels_last ? place.l * a.layout.channels + place.c
                                : place.c * a.layout.length + place.l;
      }
      store_whole(a.y + n * a.numel() + to, vector);
    });
  });
}

template <MixupPass kPass, typename In, typename Out>
__global__ void __launch_bounds__(kMixupThreads, kMixupBlocks<kPass, mixup_compute_t<In, Out>>)
    mixup_kernel(const __grid_constant__ MixupArguments<In, Out> a,
                 const __grid_constant__ MixupTasks tasks) {
  constexpr int kCount = kMixupVector<In, Out>;
  if (kCount > 1 && tasks.whole) {
    mixup_tasks<kPass, kCount>(a, tasks);
  } else {
    mixup_tasks<kPass, 1>(a, tasks);
  }
}

}  // namespace cuda
RK_NAMESPACE_END
