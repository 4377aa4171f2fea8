// The step of AdamW, Adam, SGDW and SGD on a list of tensors, on raw pointers, for CUDA and for its
// emulation on the CPU.
//
// AdamW reads p, g, m, v and writes p, m, v: 4 * sizeof(T) + 3 * sizeof(S) bytes an element with
// moments of type S (28 B in fp32, 14 B in bf16, 22 B in bf16 with fp32 moments); SGDW with
// momentum five arrays, without three; amsgrad, an EMA and Kahan's compensation two more each.
//
// Layout: one launch for the whole table, a block for each chunk of kChunk elements of one tensor.
// A thread takes kWidth consecutive elements at a time, so many that the widest of the arrays is
// moved in vectors of 16 bytes; its neighbour takes the next ones, so that what a warp moves is one
// stretch of memory in every array. Each element is read and written by one thread: the update is
// in place and needs no order among blocks. The steps alone are read by many blocks; the last block
// to finish adds to them.
#pragma once

#include "reg_kernels/launch.cuh"
#include "reg_kernels/optimizer_step_math.h"
#include "reg_kernels/reduce.cuh"
#include "reg_kernels/rng_state.cuh"
#include "reg_kernels/tensor_table.h"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kOptimizerThreads = 256;
constexpr int kOptimizerBlocks = 4;  // a multiprocessor: what fits it at 64 registers a thread
constexpr int kMostGroups = 32;      // as reg_kernels/ops/optimizer_step.py has it

// What a launch reads besides the tensors, by value; the pointers are to device memory, or null.
struct OptimizerStep {
  TensorTable table;
  int64_t chunks;
  unsigned* ticket;  // of the blocks that are done, 0 between launches
  const float* grad_scale;
  const float* found_inf;
  const double* squares;  // [squares_count], they add up to the square of the gradients' norm
  int64_t squares_count;
  double max_norm;
  RngState rng;
  Rounding rounding;
  OptimizerGroup groups[kMostGroups];

  // What the gradients are multiplied by.
  __device__ double gradient() const {
    double factor = grad_scale ? 1.0 / *grad_scale : 1.0;
    if (squares) {
      double total = 0;
      for (int64_t i = 0; i < squares_count; ++i) total += squares[i];
      factor *= clip_factor(sqrt(total) * factor, max_norm);
    }
    return factor;
  }
};
static_assert(sizeof(OptimizerStep) <= 4096, "a kernel has 4 KiB of arguments");

// What the threads of a block share.
template <typename C>
struct OptimizerBlock {
  OptimizerRule<C> rule;
  bool proximal;  // there is an l1 penalty
  bool last;
};

// The arrays of one tensor from the chunk's first element on, or null.
template <typename T, typename S>
struct OptimizerChunk {
  Span<T> param;
  Span<const T> grad;
  Span<S> first_moment, second_moment, max_second_moment;
  Span<compute_t<T>> ema;
  Span<T> compensation;
  int count;              // elements of the chunk
  int64_t first_element;  // among all draws

  __device__ OptimizerChunk(const TensorTable& table, int64_t tensor, int64_t chunk) {
    const int64_t first = (chunk - table.at(TableRow::first_chunk, tensor)) * kChunk;
    const int64_t rest = table.at(TableRow::numel, tensor) - first;
    count = static_cast<int>(rest < kChunk ? rest : kChunk);
    first_element = table.at(TableRow::element_offset, tensor) + first;
    param = span<T>(table, TableRow::param, tensor, first);
    grad = span<const T>(table, TableRow::grad, tensor, first);
    first_moment = span<S>(table, TableRow::first_moment, tensor, first);
    second_moment = span<S>(table, TableRow::second_moment, tensor, first);
    max_second_moment = span<S>(table, TableRow::max_second_moment, tensor, first);
    ema = span<compute_t<T>>(table, TableRow::ema, tensor, first);
    compensation = span<T>(table, TableRow::compensation, tensor, first);
  }

  // Whether everything can be moved in vectors with no further check.
  __device__ bool whole() const {
    const uintptr_t addresses = address(param) | address(grad) | address(first_moment) |
                                address(second_moment) | address(max_second_moment) |
                                address(ema) | address(compensation);
    return count == kChunk && addresses % kVectorBytes == 0;
  }

 private:
  template <typename U>
  __device__ Span<U> span(const TensorTable& table, TableRow row, int64_t tensor,
                          int64_t first) const {
    U* const data = table.address<U>(row, tensor);
    return {data ? data + first : nullptr, 0, count};
  }

  template <typename U>
  static __device__ uintptr_t address(const Span<U>& span) {
    return reinterpret_cast<uintptr_t>(span.data);
  }
};

template <typename T, typename S>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T) > sizeof(S) ? sizeof(T)
                                                                             : sizeof(S));

// kWidth elements of each array, in a thread's registers.
template <typename T, typename S>
struct OptimizerUnit {
  using C = compute_t<T>;
  static constexpr int kCount = kWidth<T, S>;

  Vector<T, kCount> param, grad, compensation;
  Vector<S, kCount> first_moment, second_moment, max_second_moment;
  Vector<C, kCount> ema;

  template <bool kWhole, Algorithm kAlgorithm>
  __device__ __forceinline__ void load_from(const OptimizerChunk<T, S>& chunk, int i) {
    load_array<kWhole>(chunk.param, i, param);
    load_array<kWhole>(chunk.grad, i, grad);
    if constexpr (kAlgorithm == Algorithm::adam) {
      load_array<kWhole>(chunk.first_moment, i, first_moment);
      load_array<kWhole>(chunk.second_moment, i, second_moment);
      if (chunk.max_second_moment.data) {
        load_array<kWhole>(chunk.max_second_moment, i, max_second_moment);
      }
    } else if (chunk.first_moment.data) {
      load_array<kWhole>(chunk.first_moment, i, first_moment);
    }
    if (chunk.ema.data) load_array<kWhole>(chunk.ema, i, ema);
    if (chunk.compensation.data) load_array<kWhole>(chunk.compensation, i, compensation);
  }

  template <bool kWhole, Algorithm kAlgorithm>
  __device__ __forceinline__ void store_to(const OptimizerChunk<T, S>& chunk, int i) const {
    store_vector<kWhole>(chunk.param, i, param);
    if constexpr (kAlgorithm == Algorithm::adam) {
      store_vector<kWhole>(chunk.first_moment, i, first_moment);
      store_vector<kWhole>(chunk.second_moment, i, second_moment);
      if (chunk.max_second_moment.data) {
        store_vector<kWhole>(chunk.max_second_moment, i, max_second_moment);
      }
    } else if (chunk.first_moment.data) {
      store_vector<kWhole>(chunk.first_moment, i, first_moment);
    }
    if (chunk.ema.data) store_vector<kWhole>(chunk.ema, i, ema);
    if (chunk.compensation.data) store_vector<kWhole>(chunk.compensation, i, compensation);
  }

  // kSecond: amsgrad's maximum, or SGD's momentum.
  template <Algorithm kAlgorithm, bool kCoupled, bool kSecond>
  __device__ __forceinline__ void update(const OptimizerRule<C>& rule, C (&p)[kCount]) {
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const C g = load(grad.v[j]);
      C m = kAlgorithm == Algorithm::adam || kSecond ? of(first_moment.v[j]) : C{};
      if constexpr (kAlgorithm == Algorithm::adam) {
        C v = of(second_moment.v[j]), v_max = kSecond ? of(max_second_moment.v[j]) : C{};
        adam_element<kCoupled, kSecond>(rule, p[j], g, m, v, v_max);
        second_moment.v[j] = store<S>(v);
        if constexpr (kSecond) max_second_moment.v[j] = store<S>(v_max);
      } else {
        sgd_element<kCoupled, kSecond>(rule, p[j], g, m);
      }
      if constexpr (kAlgorithm == Algorithm::adam || kSecond) first_moment.v[j] = store<S>(m);
    }
  }

 private:
  static __device__ C of(S value) { return static_cast<C>(load(value)); }

  template <bool kWhole, typename U>
  static __device__ __forceinline__ void load_array(const Span<U>& span, int i,
                                                    Vector<std::remove_const_t<U>, kCount>& to) {
    using V = std::remove_const_t<U>;
    to = load_vector<kWhole, V, kCount>({span.data, span.begin, span.end}, i);
  }
};

// What rounds a parameter: to nearest, or with the draws of `stream`.
struct OptimizerRounding {
  bool stochastic;
  RngStream stream;

  // `first` is a multiple of kCount, so one draw serves all of the elements.
  template <typename T, int kCount>
  __device__ __forceinline__ Vector<T, kCount> operator()(const compute_t<T> (&p)[kCount],
                                                          int64_t first) const {
    Vector<T, kCount> result;
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (stochastic) {
        PhiloxWords words = stream(static_cast<uint64_t>(first) / kGroup);
        if (kCount < kGroup && first % kGroup != 0) words = {words.w[2], words.w[3], 0, 0};
        RK_UNROLL
        for (int j = 0; j < kCount; ++j) {
          result.v[j] = store_stochastic(p[j], half_word(words, j));
        }
        return result;
      }
    }
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) result.v[j] = store<T>(p[j]);
    return result;
  }
};

