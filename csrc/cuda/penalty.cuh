// L1 and L2 penalties over a list of tensors, and their gradient, on raw pointers, for CUDA and for
// its emulation on the CPU.
//
// A sum reads x: sizeof(T) bytes an element. The gradient reads x and writes as much.
//
// Layout: one launch for the whole table, a block for each chunk of kChunk elements of one tensor.
// A block leaves its sum in a place of its own, and the last block to finish adds those up: no
// floating-point atomics, and an order that depends on the sizes alone.
#pragma once

#include "reg_kernels/launch.cuh"
#include "reg_kernels/penalty_math.h"
#include "reg_kernels/reduce.cuh"
#include "reg_kernels/table_chunk.cuh"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kPenaltyThreads = 256;
constexpr int kPenaltyLoads = 4;  // of a thread before its first use of one

struct PenaltyShared {
  Sums scratch[kPenaltyThreads / kWarp];
  bool last;
};

template <Penalty kPenalty>
__device__ __forceinline__ double penalty_term(double x) {
  if constexpr (kPenalty == Penalty::l2) return x * x;
  return x < 0.0 ? -x : x;
}

// The sum over what a thread has of a chunk: the same vectors in the same order whether they are
// moved as such or element by element. What is not there counts as zero.
template <bool kWhole, Penalty kPenalty, typename T>
__device__ __forceinline__ double penalty_of(const Span<const T>& x) {
  constexpr int kStride = kPenaltyThreads * kVector<T>;
  constexpr int kLoads = kWhole ? kPenaltyLoads : 1;
  static_assert(kChunk % (kStride * kLoads) == 0, "a chunk is whole steps");
  double total = 0;
  for (int64_t i = static_cast<int>(threadIdx.x) * kVector<T>; i < (kWhole ? kChunk : x.end);
       i += kLoads * kStride) {
    Vector<T> vectors[kLoads];
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) vectors[k] = load_vector<kWhole>(x, i + k * kStride);
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      double of_vector = 0;
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        of_vector += penalty_term<kPenalty>(static_cast<double>(load(vectors[k].v[j])));
      }
      total += of_vector;
    }
  }
  return total;
}

// The total of what threads bring, for thread 0.
__device__ __forceinline__ double penalty_block_sum(double mine, Sums* scratch) {
  Sums sums[1] = {{mine, 0.0}};
  return block_sum(sums, 1, scratch).a;
}

template <Penalty kPenalty, typename T>
__global__ void __launch_bounds__(kPenaltyThreads)
    penalty_kernel(TensorTable table, int64_t chunks, unsigned* ticket, double* partials,
                   double* sum) {
  RK_SHARED(PenaltyShared, shared);
  if (blockIdx.x < chunks) {
    const auto x = TableChunk(table, blockIdx.x).span<const T>(TableRow::grad);
    const double mine =
        x.whole(0, kChunk) ? penalty_of<true, kPenalty>(x) : penalty_of<false, kPenalty>(x);
    const double total = penalty_block_sum(mine, shared->scratch);
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
  }
  if (!last_block(ticket, &shared->last)) return;

  // Eight at a time, as far as there are: a load takes longer than all the rest.
  constexpr int kLoads = 8;
  double mine = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kLoads * kPenaltyThreads) {
    double loaded[kLoads] = {};
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      const int64_t at = i + k * kPenaltyThreads;
      if (at < chunks) loaded[k] = __ldcg(partials + at);
    }
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) mine += loaded[k];
  }
  const double total = penalty_block_sum(mine, shared->scratch);
  if (threadIdx.x == 0) *sum = total;
}

template <bool kWhole, Penalty kPenalty, typename T>
__device__ __forceinline__ void penalty_gradient_of(const Span<const T>& x, const Span<T>& y,
                                                    compute_t<T> grad_output) {
  constexpr int kStride = kPenaltyThreads * kVector<T>;
  constexpr int kLoads = kWhole ? kPenaltyLoads : 1;
  for (int64_t i = static_cast<int>(threadIdx.x) * kVector<T>; i < (kWhole ? kChunk : x.end);
       i += kLoads * kStride) {
    Vector<T> vectors[kLoads];
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) vectors[k] = load_vector<kWhole>(x, i + k * kStride);
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        vectors[k].v[j] = store<T>(penalty_gradient<kPenalty>(load(vectors[k].v[j]), grad_output));
      }
      store_vector<kWhole>(y, i + k * kStride, vectors[k]);
    }
  }
}

template <Penalty kPenalty, typename T>
__global__ void __launch_bounds__(kPenaltyThreads)
    penalty_backward_kernel(TensorTable table, const double* grad_output) {
  const TableChunk chunk(table, blockIdx.x);
  const auto x = chunk.span<const T>(TableRow::grad);
  const auto y = chunk.span<T>(TableRow::param);
  const auto g = static_cast<compute_t<T>>(*grad_output);
  if (x.whole(0, kChunk) && y.whole(0, kChunk)) {
    penalty_gradient_of<true, kPenalty>(x, y, g);
  } else {
    penalty_gradient_of<false, kPenalty>(x, y, g);
  }
}

// *sum = the sum over the table's first row. scratch: [1 + chunks], the ticket of the blocks that
// are done, 0 between launches, then a sum for each chunk.
template <typename T>
void launch_penalty(Penalty penalty, const TensorTable& table, int64_t chunks, double* sum,
                    double* scratch, cudaStream_t stream) {
  // Without an element the sum is written all the same.
  const dim3 grid(static_cast<unsigned>(chunks > 0 ? chunks : 1));
  const auto kernel =
      penalty == Penalty::l1 ? penalty_kernel<Penalty::l1, T> : penalty_kernel<Penalty::l2, T>;
  RK_LAUNCH(kernel, grid, dim3(kPenaltyThreads), sizeof(PenaltyShared), stream, table, chunks,
            reinterpret_cast<unsigned*>(scratch), scratch + 1, sum);
  check_launch("penalty");
}

// The table's parameters = the gradients at its first row.
template <typename T>
void launch_penalty_backward(Penalty penalty, const TensorTable& table, int64_t chunks,
                             const double* grad_output, cudaStream_t stream) {
  if (chunks == 0) return;
  const dim3 grid(static_cast<unsigned>(chunks));
  const auto kernel = penalty == Penalty::l1 ? penalty_backward_kernel<Penalty::l1, T>
                                             : penalty_backward_kernel<Penalty::l2, T>;
  RK_LAUNCH(kernel, grid, dim3(kPenaltyThreads), 0, stream, table, grad_output);
  check_launch("penalty_backward");
}

}  // namespace cuda
RK_NAMESPACE_END
