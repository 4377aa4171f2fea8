// Mixup in place.
//
// From sample to partner and on to its partner, a permutation falls apart into cycles. A sample is
// written when its partner has been read, and the first one's values are kept for the last. Nobody
// else touches that part of these samples, so blocks need not wait for each other.
//
// Where the batch is reversed the cycles are pairs: a thread reads both samples, then writes both.
// Otherwise a block takes the cycles that begin in a group of samples, at one tile, and walks them;
// the samples ahead are on their way to shared memory meanwhile.
#pragma once

#include "flat.cuh"
#include "reg_kernels/async_copy.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kMixupPairBlocks = 2;  // a multiprocessor: with three, four bytes are spilled

// Sample n and its partner, in a reversed batch.
template <int kCount, int kLoads, typename T>
__device__ __forceinline__ void mixup_pair(const MixupArguments<T, T>& a, int64_t n,
                                           const int64_t (&at)[kLoads],
                                           const MixupPlace (&places)[kLoads]) {
  using C = compute_t<T>;
  int64_t m = a.blend.samples - 1 - n;
  PackedVector<T, kCount> own[kLoads], partner[kLoads];
  RK_UNROLL
  for (int k = 0; k < kLoads; ++k) {
    if (at[k] == kNoVector) continue;
    own[k] = PackedVector<T, kCount>::load(a.x + n * a.numel() + at[k]);
    partner[k] = PackedVector<T, kCount>::load(a.x + m * a.numel() + at[k]);
  }
  RK_NO_UNROLL
  for (int samples = n == m ? 1 : 2; samples > 0; --samples) {
    MixupPlace here[kLoads];
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) here[k] = {afresh(places[k].c), afresh(places[k].l)};
    const auto sample = MixupSample<C, kCount, kLoads>::at(a, n, here);
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      if (at[k] == kNoVector) continue;
      C sums[kCount];
      sample.blend(sums, k, own[k], partner[k]);
      store_whole(a.y + n * a.numel() + at[k], finish(a, here[k], sums));
      const PackedVector<T, kCount> other = partner[k];
      partner[k] = own[k];
      own[k] = other;
    }
    const int64_t other = m;
    m = n;
    n = other;
  }
}

template <typename T>
__global__ void __launch_bounds__(kMixupThreads, kMixupPairBlocks)
    mixup_pairs_kernel(const __grid_constant__ MixupArguments<T, T> a,
                       const __grid_constant__ MixupTasks tasks) {
  const auto run = [&]<int kCount>() {
    for_tasks<kCount>(a, tasks, [&](int64_t n, const auto& at, const auto& places) {
      mixup_pair<kCount>(a, n, at, places);
    });
  };
  if (tasks.whole) {
    run.template operator()<kMixupVector<T, T>>();
  } else {
    run.template operator()<1>();
  }
}

constexpr int kCycleAhead = 4;  // samples that a walk has on their way

// How the work is shared out: a task is a tile, of a vector for each thread, and a group of 32
// samples. The tasks of one tile lie side by side.
struct MixupWalks {
  bool whole;  // vectors are of 16 bytes, not of one element
  int64_t groups, tasks;
};

__device__ __forceinline__ int64_t checked_partner(const MixupBlend& blend, int64_t n) {
  const int64_t partner = blend.partner_of(n);
  RK_ASSERT(partner >= 0 && partner < blend.samples);
  return partner;
}

// Whether n is the first of the samples of its cycle.
__device__ __forceinline__ bool begins_cycle(const MixupBlend& blend, int64_t n) {
  if (n >= blend.samples) return false;
  int64_t at = checked_partner(blend, n);
  for (int64_t steps = 1; at != n; ++steps) {
    if (at < n) return false;
    RK_ASSERT(steps < blend.samples);  // in a permutation the walk comes back
    at = checked_partner(blend, at);
  }
  return true;
}

// Asserts that each sample of a group is somebody's partner: if all are, index is a permutation. By
// one warp.
__device__ __forceinline__ void check_group(const MixupBlend& blend, int64_t first) {
  uint32_t partners = 0;
  for (auto n = static_cast<int64_t>(threadIdx.x % kWarp); n < blend.samples; n += kWarp) {
    const int64_t from_first = blend.index[n] - first;
    if (from_first >= 0 && from_first < kWarp) partners |= 1u << from_first;
  }
  RK_UNROLL
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    partners |= __shfl_xor_sync(kFullWarp, partners, lanes);
  }
  const int64_t rest = blend.samples - first;
  const uint32_t all = rest < kWarp ? (1u << rest) - 1 : kFullWarp;
  RK_ASSERT(partners == all);
}

// What a thread of one block reads ahead: a vector a sample, in a ring.
template <int kCount, typename T>
class CycleAhead {
 public:
  __device__ CycleAhead(const MixupArguments<T, T>& a, VectorBits* shared, int64_t leader,
                        int64_t at)
      : a_(a), ring_(shared + threadIdx.x), leader_(leader), n_(leader), at_(at) {}

  // Asks for the next sample of the cycle, if it is not the leader again.
  __device__ __forceinline__ void ask() {
    if (n_ != leader_ || asked_ == 0) n_ = checked_partner(a_.blend, n_);
    VectorBits* const to = slot(asked_++);
    if (n_ != leader_) {
      const T* const from = a_.x + n_ * a_.numel() + at_;
      if constexpr (kCount == 1) {
        *reinterpret_cast<T*>(to) = *from;
      } else {
        copy_async(to, from, true);
      }
    }
    commit_copies();
  }

  // The sample that was asked for kCycleAhead calls of ask() ago, the last one included.
  __device__ __forceinline__ PackedVector<T, kCount> next() {
    wait_for_copies<kCycleAhead - 1>();
    const VectorBits* const from = slot(asked_ - kCycleAhead);
    if constexpr (kCount == 1) {
      return {*reinterpret_cast<const T*>(from)};
    } else {
      return {*from};
    }
  }

 private:
  __device__ VectorBits* slot(uint32_t i) const { return ring_ + i % kCycleAhead * blockDim.x; }

  const MixupArguments<T, T>& a_;
  VectorBits* ring_;
  int64_t leader_, n_, at_;
  uint32_t asked_ = 0;
};

// The cycle of samples that begins with `leader`, at one vector of them.
template <int kCount, typename T>
__device__ __forceinline__ void mixup_cycle(const MixupArguments<T, T>& a, VectorBits* shared,
                                            int64_t leader, int64_t at, const MixupPlace& place) {
  using C = compute_t<T>;
  const PackedVector<T, kCount> first =
      PackedVector<T, kCount>::load(a.x + leader * a.numel() + at);
  CycleAhead<kCount, T> ahead(a, shared, leader, at);
  RK_UNROLL
  for (int k = 1; k < kCycleAhead; ++k) ahead.ask();
  PackedVector<T, kCount> own = first;
  int64_t n = leader;
  RK_NO_UNROLL
  for (;;) {
    ahead.ask();
    const int64_t partner = checked_partner(a.blend, n);
    const PackedVector<T, kCount> next = partner == leader ? first : ahead.next();
    const MixupPlace here{afresh(place.c), afresh(place.l)};
    const auto sample = MixupSample<C, kCount, 1>::at(a, n, {here});
    C sums[kCount];
    sample.blend(sums, 0, own, next);
    store_whole(a.y + n * a.numel() + at, finish(a, here, sums));
    if (partner == leader) return;
    own = next;
    n = partner;
  }
}

template <int kCount, typename T>
__device__ __forceinline__ void mixup_walks(const MixupArguments<T, T>& a, const MixupWalks& walks,
                                            VectorBits* shared) {
  const int64_t vectors = a.numel() / kCount;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t task = blockIdx.x; task < walks.tasks; task += gridDim.x) {
    const int64_t tile = task / walks.groups, group = task - tile * walks.groups;
    const int64_t first = group * kWarp;
    if (tile == 0 && threadIdx.x < kWarp) check_group(a.blend, first);
    const uint32_t leaders = __ballot_sync(kFullWarp, begins_cycle(a.blend, first + lane));
    const int64_t vector = tile * blockDim.x + threadIdx.x;
    if (vector >= vectors) continue;
    const int64_t at = vector * kCount;
    const MixupPlace place = a.needs_places() ? MixupPlace::of(a.layout, at) : MixupPlace{};
    RK_NO_UNROLL
    for (int i = 0; i < kWarp; ++i) {
      if (leaders >> i & 1u) mixup_cycle<kCount>(a, shared, first + i, at, place);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kMixupThreads, kMixupBlocks<MixupPass::forward, compute_t<T>>)
    mixup_walk_kernel(const __grid_constant__ MixupArguments<T, T> a,
                      const __grid_constant__ MixupWalks walks) {
  RK_SHARED(VectorBits, shared);
  if (walks.whole) {
    mixup_walks<kMixupVector<T, T>>(a, walks, shared);
  } else {
    mixup_walks<1>(a, walks, shared);
  }
}

}  // namespace cuda
RK_NAMESPACE_END
