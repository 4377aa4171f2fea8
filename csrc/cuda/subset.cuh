// Subsets of samples on raw pointers, for CUDA and for its emulation on the CPU.
//
// Reads the residual, where there is one, and x, and writes y: of a sample that is kept 2 or 3
// sizeof(T) bytes an element, of another one 1 or 2. A block takes a tile of one sample, so that
// all of it asks for the sample's place once, and none waits for another.
#pragma once

#include "reg_kernels/device_assert.cuh"
#include "reg_kernels/launch.cuh"
#include "reg_kernels/subset_math.h"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kSubsetThreads = 256;
constexpr int kSubsetLoads = 2;  // vectors of a thread before its first use of one

template <typename T>
struct Subset {
  const T *x, *residual;  // residual: null for zeros
  T* y;
  SubsetRows rows;
  int64_t numel;  // of a sample
  compute_t<T> scale;
  // y has those that are kept, and x the whole batch; else it is the other way round.
  bool gathers;
};

template <int kCount, typename T>
__device__ __forceinline__ void subset_tile(const Subset<T>& a, int64_t i, int64_t first) {
  const bool kept = i < a.rows.count;
  const int64_t row = a.rows.at(i);
  RK_ASSERT(row >= 0 && row < a.rows.samples);
  const T* const x = a.x + (a.gathers ? row : i) * a.numel;
  T* const y = a.y + (a.gathers ? i : row) * a.numel;
  const T* const residual = a.residual ? a.residual + row * a.numel : nullptr;
  const int64_t begin = first + static_cast<int64_t>(threadIdx.x) * kCount;
  constexpr int64_t kStride = kSubsetThreads * kCount;
  Vector<T, kCount> values[kSubsetLoads], beside[kSubsetLoads];
  RK_UNROLL
  for (int k = 0; k < kSubsetLoads; ++k) {
    const int64_t at = begin + k * kStride;
    if (kept && at < a.numel) values[k] = load_whole<kCount>(x + at);
    if (residual != nullptr && at < a.numel) beside[k] = load_whole<kCount>(residual + at);
  }
  RK_UNROLL
  for (int k = 0; k < kSubsetLoads; ++k) {
    const int64_t at = begin + k * kStride;
    if (at >= a.numel) continue;
    Vector<T, kCount> result{};
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) {
      if (residual == nullptr) {
        if (kept) result.v[j] = scaled(values[k].v[j], a.scale);
      } else {
        result.v[j] = kept ? add_scaled(beside[k].v[j], values[k].v[j], a.scale) : beside[k].v[j];
      }
    }
    store_at_once(y + at, result);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSubsetThreads)
    subset_kernel(const __grid_constant__ Subset<T> a, bool whole, int64_t tiles, int64_t items) {
  constexpr int64_t kTile = kSubsetThreads * kSubsetLoads;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t i = item / tiles, tile = item - i * tiles;
    if (whole) {
      subset_tile<kVector<T>>(a, i, tile * kTile * kVector<T>);
    } else {
      subset_tile<1>(a, i, tile * kTile);
    }
  }
}

template <typename T>
void launch_subset(const Subset<T>& a, cudaStream_t stream, int64_t most_blocks = 0x7fffffff) {
  const int64_t written = a.gathers ? a.rows.count : a.rows.samples;
  if (written == 0 || a.numel == 0) return;
  const auto is_aligned = [](const T* data) {
    return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  };
  const bool whole = a.numel % kVector<T> == 0 && is_aligned(a.x) && is_aligned(a.y) &&
                     (a.residual == nullptr || is_aligned(a.residual));
  const int64_t tiles =
      ceil_div(a.numel, int64_t{kSubsetThreads * kSubsetLoads * (whole ? kVector<T> : 1)});
  const int64_t items = tiles * written;
  const dim3 grid(static_cast<unsigned>(items < most_blocks ? items : most_blocks));
  RK_LAUNCH(subset_kernel<T>, grid, dim3(kSubsetThreads), 0, stream, a, whole, tiles, items);
  check_launch(a.gathers ? "subset" : "subset_add");
}

}  // namespace cuda
RK_NAMESPACE_END
