// What the losses of logits share on a GPU: rows in vectors wherever they begin, merges of what
// threads have gathered, what a mean of labels divides by, and the sum of the losses.
//
// No floating-point atomics, and every order depends on sizes alone: the same bits in every run.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cross_entropy_math.h"
#include "device_assert.cuh"
#include "reduce.cuh"
#include "vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// A logit that no softmax counts, where there is none.
template <typename C>
inline constexpr C kNoLogit = -std::numeric_limits<C>::infinity();

__device__ __forceinline__ float larger(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return ::fmax(a, b); }

// exp(x) of a logit of type T less the largest one. Of 16-bit logits in two instructions, where 2^t
// takes over t's rounding: within 2^-22 for all that counts in a sum, 1e-5 of what is below 1e-30.
template <typename T>
__device__ __forceinline__ compute_t<T> softmax_exponential(compute_t<T> x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
    return result;
  } else {
    return exponential_below(x);
  }
#else
  return exponential_below(x);
#endif
}

// ---- Rows: the classes of a position, side by side.

// Elements [c, c + kCount) of a row of `classes`; what lies outside is `fill`, and is not read.
template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_classes(const T* row, int64_t c, int64_t classes,
                                                          T fill) {
  const T* const at = row + c;
  constexpr uintptr_t kAligned = kAlignment<kCount * sizeof(T)>;
  if (c >= 0 && c + kCount <= classes && reinterpret_cast<uintptr_t>(at) % kAligned == 0) {
    return load_whole<kCount>(at);
  }
  Vector<T, kCount> result;
  RK_UNROLL
  for (int i = 0; i < kCount; ++i) {
    result.v[i] = c + i >= 0 && c + i < classes ? at[i] : fill;
  }
  return result;
}

// The same of logits: no softmax counts what lies outside.
template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_logits(const T* row, int64_t c, int64_t classes) {
  return load_classes<kCount>(row, c, classes, store<T>(kNoLogit<compute_t<T>>));
}

// All of a vector, on a boundary or not.
template <int kCount, typename T>
__device__ __forceinline__ void store_anywhere(T* at, const Vector<T, kCount>& value) {
  constexpr uintptr_t kAligned = kAlignment<kCount * sizeof(T)>;
  if (reinterpret_cast<uintptr_t>(at) % kAligned == 0) return store_at_once(at, value);
  RK_UNROLL
  for (int i = 0; i < kCount; ++i) at[i] = value.v[i];
}

template <int kCount, typename T>
__device__ __forceinline__ void store_classes(T* row, int64_t c, int64_t classes,
                                              const Vector<T, kCount>& value) {
  T* const at = row + c;
  constexpr uintptr_t kAligned = kAlignment<kCount * sizeof(T)>;
  if (c >= 0 && c + kCount <= classes && reinterpret_cast<uintptr_t>(at) % kAligned == 0) {
    return store_at_once(at, value);
  }
  RK_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (c + i >= 0 && c + i < classes) at[i] = value.v[i];
  }
}

// A row of logits in vectors on boundaries of memory: the first and the last one may reach beyond
// the row. A row of any length may begin anywhere.
template <typename T, int kCount = kVector<T>>
struct LogitRow {
  const T* data;
  int64_t classes;
  int shift;  // elements of the first vector in front of the row

  __device__ LogitRow(const T* data, int64_t classes)
      : data(data),
        classes(classes),
        shift(static_cast<int>(reinterpret_cast<uintptr_t>(data) / sizeof(T) % kCount)) {}

  // The row of a loss's logits whose class 0 is element `first`.
  template <typename Arguments>
  __device__ LogitRow(const Arguments& a, int64_t first) : LogitRow(a.x + first, a.classes) {}

  __device__ int64_t vectors() const { return ceil_div(classes + shift, kCount); }
  __device__ int64_t first_class(int64_t vector) const { return vector * kCount - shift; }
  __device__ bool has(int64_t c) const { return c >= 0 && c < classes; }

  template <int kWidth = kCount>
  __device__ Vector<T, kWidth> load(int64_t vector) const {
    return load_logits<kWidth>(data, first_class(vector), classes);
  }

  // Calls f of the length, as a constant, and the number of every kLoads-th vector of those that
  // `thread` of `threads` takes: fewer than 2^31.
  template <int kLoads, typename F>
  __device__ void each(int thread, int threads, const F& f) const {
    const auto count = static_cast<int>(vectors());
    RK_NO_UNROLL
    for (int vector = thread; vector < count; vector += kLoads * threads) {
      f(std::integral_constant<int, kCount>{}, vector);
    }
  }
};

// The most vectors of `count` that a row takes, of rows the first of which begins at `data`.
template <typename T>
int64_t most_row_vectors(const T* data, int64_t classes, int64_t count = kVector<T>) {
  const int64_t first = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) / sizeof(T)) % count;
  return ceil_div(classes + (classes % count == 0 ? first : count - 1), count);
}

// ---- Merges of what threads have gathered: of a struct of whole words with a `merge`, whose value
// by default is that of nothing. All threads get the same bits.

template <typename A, typename Shuffle>
__device__ __forceinline__ A shuffle_words(const A& mine, const Shuffle& shuffle) {
  static_assert(sizeof(A) % sizeof(uint32_t) == 0, "a struct of whole words");
  struct Words {
    uint32_t w[sizeof(A) / sizeof(uint32_t)];
  };
  Words words = bit_cast<Words>(mine);
  RK_UNROLL
  for (uint32_t& word : words.w) word = shuffle(word);
  A result;
  memcpy(static_cast<void*>(&result), &words, sizeof(A));
  return result;
}

// Over `lanes` threads side by side, a power of two of at most a warp. The whole warp takes part.
template <typename A>
__device__ __forceinline__ A merge_lanes(A mine, int lanes) {
  RK_NO_UNROLL
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    mine.merge(shuffle_words(
        mine, [&](uint32_t word) { return __shfl_xor_sync(kFullWarp, word, distance); }));
  }
  // Which of two comes first may matter to a bit.
  return shuffle_words(mine, [&](uint32_t word) { return __shfl_sync(kFullWarp, word, 0, lanes); });
}

// Over the block, of whole warps. `scratch` has room for one a warp, and is read until the block's
// next barrier; what the block has written to shared memory before is there afterwards.
template <typename A>
__device__ __forceinline__ A merge_block(const A& mine, A* scratch) {
  const int thread = threadIdx.x, lane = thread % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const A of_warp = merge_lanes(mine, kWarp);
  if (lane == 0) scratch[thread / kWarp] = of_warp;
  __syncthreads();
  return merge_lanes(lane < warps ? scratch[lane] : A{}, kWarp);
}

// Over `lanes` threads side by side, as merge_lanes.
template <typename C>
__device__ __forceinline__ C largest_of_lanes(C mine, int lanes) {
  RK_NO_UNROLL
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    mine = larger(mine, __shfl_xor_sync(kFullWarp, mine, distance));
  }
  return mine;
}

template <typename C>
__device__ __forceinline__ C sum_of_lanes(C mine, int lanes) {
  RK_NO_UNROLL
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    mine += __shfl_xor_sync(kFullWarp, mine, distance);
  }
  return mine;
}

// ---- The sum of the losses.

// In global memory. `partials` has room for one double a block; `ticket` is 0 before the launch.
template <typename C>
struct LossSum {
  C* loss;
  double* partials;
  unsigned* ticket;
};

struct LossShared {
  Sums scratch[1024 / kWarp];
  bool last;
};

// *loss = what all threads of all blocks bring, plus `more`. To be called by whole blocks, once.
template <typename C>
__device__ __forceinline__ void sum_losses(double mine, const LossSum<C>& sum, double more,
                                           LossShared* shared) {
  const auto of_block = [&](double own) {
    Sums sums[1] = {{own, 0.0}};
    return block_sum(sums, 1, shared->scratch).a;
  };
  const double total = of_block(mine);
  if (threadIdx.x == 0) sum.partials[blockIdx.x] = total;
  if (!last_block(sum.ticket, &shared->last)) return;
  double rest = 0;
  RK_NO_UNROLL
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) rest += __ldcg(sum.partials + i);
  const double all = of_block(rest);
  if (threadIdx.x == 0) *sum.loss = static_cast<C>(all + more);
}

// ---- What a mean divides by, and the sum of the classes' weights: a launch before the loss's own.

struct TargetSums {
  LabelTotals labels;  // ones without a mean
  double weights;      // of all classes
};

// A mean over labels whose weights sum up to 0, as where all are ignored, is NaN: to be added.
__device__ __forceinline__ double mean_of_nothing(const LabelTotals& totals) {
  return 0.0 / totals.labels + 0.0 / totals.partner_labels;
}

constexpr int kTotalsThreads = 256;
constexpr int kTotalsEach = 8;  // labels, and weights, of a thread before blocks become more
constexpr int64_t kMostTotalsBlocks = 256;

template <typename C>
struct TotalsArguments {
  LabelOptions options;
  const C* weight;    // or null
  int64_t positions;  // N S
  bool is_mean;
  bool weighs;  // asks for the sum of the weights
  TargetSums* sums;
  Sums* partials;         // two a block
  unsigned* ticket;       // of this launch: 0 before it, and after it
  unsigned* next_ticket;  // of the launch that follows, set to 0 here
};

struct TotalsShared {
  Sums scratch[2 * kTotalsThreads / kWarp];
  bool last;
};

template <typename C>
__device__ __forceinline__ double label_weight(const LabelOptions& options, const C* weight,
                                               int64_t label) {
  RK_ASSERT(options.is_valid(label));
  if (options.is_ignored(label)) return 0;
  return weight ? static_cast<double>(weight[label]) : 1.0;
}

template <typename C>
__global__ void __launch_bounds__(kTotalsThreads) target_sums_kernel(TotalsArguments<C> a) {
  RK_SHARED(TotalsShared, shared);
  const int64_t first = int64_t{blockIdx.x} * kTotalsThreads + threadIdx.x;
  const int64_t stride = int64_t{gridDim.x} * kTotalsThreads;
  Sums sums[2]{};  // of the labels and their partners; of the weights
  if (a.is_mean) {
    for (int64_t i = first; i < a.positions; i += stride) {
      sums[0].a += label_weight(a.options, a.weight, a.options.labels[i]);
      if (a.options.partner_labels) {
        sums[0].b += label_weight(a.options, a.weight, a.options.partner_labels[i]);
      }
    }
  }
  if (a.weighs) {
    for (int64_t c = first; c < a.options.classes; c += stride) sums[1].a += a.weight[c];
  }
  Sums total = block_sum(sums, 1, shared->scratch);
  const int thread = threadIdx.x;
  if (gridDim.x > 1) {
    if (thread < 2) a.partials[2 * blockIdx.x + thread] = total;
    if (!last_block(a.ticket, &shared->last)) return;
    Sums rest[2]{};
    for (unsigned block = thread; block < gridDim.x; block += kTotalsThreads) {
      RK_UNROLL
      for (int k = 0; k < 2; ++k) {
        const Sums* const partial = a.partials + 2 * block + k;
        rest[k].add({__ldcg(&partial->a), __ldcg(&partial->b)});
      }
    }
    total = block_sum(rest, 1, shared->scratch);
  }
  if (thread == 0) {
    a.sums->labels = {a.is_mean ? total.a : 1.0,
                      a.is_mean && a.options.partner_labels ? total.b : 1.0};
    *a.next_ticket = 0;
  }
  if (thread == 1) a.sums->weights = a.weighs ? total.a : static_cast<double>(a.options.classes);
}

// ---- Shared memory.

// The most that a block can have if it asks: 227 KiB on sm_90, 163 KiB on sm_80.
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  check_launch("cudaDeviceGetAttribute");
  return bytes;
}

// To be called before a launch of `kernel` with so many.
template <typename... Parameters>
void allow_shared_bytes(void (*kernel)(Parameters...), int64_t bytes) {
  constexpr int64_t kUnasked = 48 * 1024;
  if (bytes <= kUnasked) return;
  // The most there is, not this launch's own: other threads may be launching the same kernel.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(most_shared_bytes()));
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                       cudaSharedmemCarveoutMaxShared);
  check_launch("cudaFuncSetAttribute");
}

// ---- Device memory of a loss's launches, and the first of them.

inline int64_t target_sums_blocks(int64_t positions, int64_t classes) {
  const int64_t each = int64_t{kTotalsThreads} * kTotalsEach;
  return std::min(ceil_div(std::max(positions, classes), each), kMostTotalsBlocks);
}

// In one allocation, in this order.
struct LossScratch {
  unsigned* tickets;  // of the loss's blocks, and of those before them
  TargetSums* sums;
  double* partials;  // of the loss's blocks
  Sums* totals;      // of the blocks before them

  static constexpr int64_t kTicketBytes = 2 * sizeof(unsigned);

  LossScratch(void* memory, int64_t blocks)
      : tickets(static_cast<unsigned*>(memory)),
        sums(reinterpret_cast<TargetSums*>(static_cast<char*>(memory) + kTicketBytes)),
        partials(reinterpret_cast<double*>(sums + 1)),
        totals(reinterpret_cast<Sums*>(partials + blocks)) {}

  static int64_t bytes(int64_t positions, int64_t classes, int64_t blocks) {
    return kTicketBytes + static_cast<int64_t>(sizeof(TargetSums)) +
           blocks * static_cast<int64_t>(sizeof(double)) +
           2 * target_sums_blocks(positions, classes) * static_cast<int64_t>(sizeof(Sums));
  }
};

// Sets the tickets to 0, and launches the sums where a loss of labels needs them: returns where
// they are, null where a mean is not taken and all classes weigh the same.
template <typename C>
const TargetSums* launch_target_sums(const LabelOptions& options, const C* weight,
                                     int64_t positions, bool is_mean, const LossScratch& scratch,
                                     cudaStream_t stream) {
  const bool weighs = weight && options.smooths();
  const bool needed = options.labels && (is_mean || weighs);
  const int64_t blocks = needed ? target_sums_blocks(positions, weighs ? options.classes : 0) : 0;
  if (blocks != 1) {  // a block of its own sets the other's ticket
    cudaMemsetAsync(scratch.tickets, 0, LossScratch::kTicketBytes, stream);
    check_launch("cudaMemsetAsync");
  }
  if (!needed) return nullptr;
  const TotalsArguments<C> a{options,        weight,       positions,      is_mean,
                             weighs,         scratch.sums, scratch.totals, scratch.tickets + 1,
                             scratch.tickets};
  RK_LAUNCH(target_sums_kernel<C>, dim3(static_cast<unsigned>(blocks)), dim3(kTotalsThreads),
            sizeof(TotalsShared), stream, a);
  check_launch("target_sums");
  return scratch.sums;
}

}  // namespace cuda
RK_NAMESPACE_END
