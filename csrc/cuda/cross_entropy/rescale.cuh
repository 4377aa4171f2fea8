// x *= factor, where the factor lies on the device: what a loss that has kept its gradient still
// has to do in the backward.
//
// Reads and writes x once; where the factor is exactly 1, nothing but the factor is read.
#pragma once

#include <algorithm>

#include "reg_kernels/launch.cuh"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kRescaleThreads = 256;
constexpr int kRescaleLoads = 4;              // of a thread before its first use of one
constexpr int64_t kMostRescaleBlocks = 2048;  // few, for all of them start to learn it is 1

template <typename T>
__global__ void __launch_bounds__(kRescaleThreads) rescale_kernel(Span<T> x, ChannelValues factor) {
  using C = compute_t<T>;
  const auto by = static_cast<C>(factor.at(0, 1.0));
  if (by == C(1)) return;
  constexpr int64_t kStride = kRescaleThreads * kVector<T>, kBlock = kStride * kRescaleLoads;
  const Span<const T> source{x.data, x.begin, x.end};
  const auto scale = [&]<bool kWhole>(int64_t begin) {
    Vector<T> vectors[kRescaleLoads];
    RK_UNROLL
    for (int k = 0; k < kRescaleLoads; ++k) {
      vectors[k] = load_vector<kWhole>(source, begin + k * kStride);
    }
    RK_UNROLL
    for (int k = 0; k < kRescaleLoads; ++k) {
      RK_UNROLL
      for (int i = 0; i < kVector<T>; ++i) {
        vectors[k].v[i] = store<T>(load(vectors[k].v[i]) * by);
      }
      store_vector<kWhole>(x, begin + k * kStride, vectors[k]);
    }
  };
  for (int64_t block = int64_t{blockIdx.x} * kBlock; block < x.end;
       block += int64_t{gridDim.x} * kBlock) {
    const int64_t begin = block + static_cast<int>(threadIdx.x) * kVector<T>;
    if (x.whole(block, block + kBlock)) {
      scale.template operator()<true>(begin);
    } else {
      scale.template operator()<false>(begin);
    }
  }
}

template <typename T>
void launch_rescale(T* x, int64_t numel, const ChannelValues& factor, cudaStream_t stream) {
  if (numel == 0) return;
  const int64_t blocks = ceil_div(numel, int64_t{kRescaleThreads} * kVector<T> * kRescaleLoads);
  const dim3 grid(static_cast<unsigned>(std::min(blocks, kMostRescaleBlocks)));
  RK_LAUNCH(rescale_kernel<T>, grid, dim3(kRescaleThreads), 0, stream, Span<T>{x, 0, numel},
            factor);
  check_launch("rescale_");
}

}  // namespace cuda
RK_NAMESPACE_END
