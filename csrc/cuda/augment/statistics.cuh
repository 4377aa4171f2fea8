// What CONTRAST, AUTOCONTRAST and EQUALIZE know of a whole image: sums and extrema of integers, by
// atomic operations, so that their order does not matter.
//
// In global memory, all from 0: the sum of the grays, 64 bits; or for each channel the largest key
// and the largest inverted key; or for each channel a histogram.
#pragma once

#include "source.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// Of a block, in shared memory.
template <int kChannels>
struct AugmentKnown {
  float mean;
  Autocontrast stretch[kChannels];
  bool changes[kChannels];
  uint32_t warps[kGrays / kWarp];
  uint32_t step;
  union {
    float table[kChannels * kGrays];         // EQUALIZE's values
    uint32_t histogram[kChannels * kGrays];  // that is being made
    StagedPixels<kChannels> staged;          // before either
  };
};

// Floats as integers of the same order; zeros are one. NaN does not count, as 0 does not.
RK_HD uint32_t ordered_key(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v + 0.0f);
  const uint32_t key = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return v == v ? key : 0;
}
RK_HD uint32_t inverted_key(float v) { return v == v ? ~ordered_key(v) : 0; }
RK_HD float of_key(uint32_t key) {
  return bit_cast<float>(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// The sum of the grays up to each one's own, by a block of as many threads.
__device__ __forceinline__ uint32_t sum_up_to_here(uint32_t value, uint32_t* warps) {
  const int thread = threadIdx.x, lane = thread % kWarp;
  RK_UNROLL
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, value, distance);
    if (lane >= distance) value += before;
  }
  if (lane == kWarp - 1) warps[thread / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < thread / kWarp; ++warp) value += warps[warp];
  __syncthreads();
  return value;
}

// Makes of the statistics what the instruction needs for each pixel. By a block of kGrays threads,
// which may read it after their next barrier.
template <int kChannels>
__device__ __forceinline__ void learn(AugmentOp op, const uint32_t* statistics, int64_t pixels,
                                      int channels, const ImageRange& range,
                                      AugmentKnown<kChannels>& known) {
  const int thread = threadIdx.x;
  const auto channel = [&](int c) { return min(c, channels - 1); };  // see AugmentImage
  if (op == AugmentOp::contrast) {
    if (thread == 0) {
      const auto sum = *reinterpret_cast<const unsigned long long*>(statistics);
      known.mean = gray_mean(static_cast<int64_t>(sum), pixels, range);
    }
  } else if (op == AugmentOp::autocontrast) {
    if (thread < kChannels) {
      const uint32_t* const keys = statistics + 2 * channel(thread);
      known.stretch[thread] = Autocontrast::of(of_key(~keys[1]), of_key(keys[0]), range);
    }
  } else if (op == AugmentOp::equalize) {
    RK_NO_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const uint32_t count = statistics[channel(c) * kGrays + thread];
      const uint32_t up_to = sum_up_to_here(count, known.warps);
      // The last level that there is.
      if (count && up_to == static_cast<uint32_t>(pixels)) {
        known.step = static_cast<uint32_t>(pixels - count) / 255;
      }
      __syncthreads();
      const uint32_t step = known.step;
      if (thread == 0) known.changes[c] = step > 0;
      if (step) {
        const uint64_t below = static_cast<uint64_t>(up_to - count) + step / 2;
        const int64_t level = min(static_cast<int64_t>(below / step), kGrays - 1);
        known.table[c * kGrays + thread] = of_gray_level(static_cast<int32_t>(level), range);
      }
      __syncthreads();
    }
  }
}

// Counts a thread's pixels, of which those are there whose bit is set; by all threads of a block.
template <int kChannels>
__device__ __forceinline__ void count_pixels(AugmentCount what, uint32_t* statistics, int channels,
                                             const AugmentValues<kChannels>& values, unsigned there,
                                             const ImageRange& range,
                                             AugmentKnown<kChannels>& known) {
  const int thread = threadIdx.x;
  if (what == AugmentCount::grays) {
    uint32_t sum = 0;  // of a warp no more than 2^23
    RK_UNROLL
    for (int p = 0; p < kAugmentPixels; ++p) {
      float gray = values[0][p];
      if constexpr (kChannels == 3) {
        gray = gray_of(values[0][p], values[1][p], values[2][p], range);
      }
      if (there >> p & 1u) sum += static_cast<uint32_t>(counted_gray(gray, range));
    }
    RK_UNROLL
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, distance);
    }
    if (thread % kWarp == 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(statistics),
                static_cast<unsigned long long>(sum));
    }
  } else if (what == AugmentCount::extrema) {
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      uint32_t most = 0, least = 0;
      RK_UNROLL
      for (int p = 0; p < kAugmentPixels; ++p) {
        const bool here = there >> p & 1u;
        const uint32_t key = here ? ordered_key(values[c][p]) : 0;
        const uint32_t inverted = here ? inverted_key(values[c][p]) : 0;
        most = most > key ? most : key;
        least = least > inverted ? least : inverted;
      }
      RK_UNROLL
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        const uint32_t key = __shfl_xor_sync(kFullWarp, most, distance);
        const uint32_t inverted = __shfl_xor_sync(kFullWarp, least, distance);
        most = most > key ? most : key;
        least = least > inverted ? least : inverted;
      }
      if (thread % kWarp == 0 && c < channels) {
        atomicMax(statistics + 2 * c, most);
        atomicMax(statistics + 2 * c + 1, least);
      }
    }
  } else if (what == AugmentCount::histogram) {
    __syncthreads();  // the table in its place is still read
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) known.histogram[c * kGrays + thread] = 0;
    __syncthreads();
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      RK_UNROLL
      for (int p = 0; p < kAugmentPixels; ++p) {
        if (there >> p & 1u) {
          const int level = static_cast<int>(gray_level(values[c][p], range));
          atomicAdd(known.histogram + c * kGrays + level, 1u);
        }
      }
    }
    __syncthreads();
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      const uint32_t count = known.histogram[c * kGrays + thread];
      if (count && c < channels) atomicAdd(statistics + c * kGrays + thread, count);
    }
  }
}

}  // namespace cuda
RK_NAMESPACE_END
