// The step of AdamW, Adam, SGDW and SGD on a list of tensors, on raw pointers, for CUDA and for its
// emulation on the CPU.
//
// AdamW reads p, g, m, v and writes p, m, v: 3 * sizeof(T) + 4 * sizeof(S) bytes an element with
// moments of type S (28 B in fp32, 14 B in bf16, 22 B in bf16 with fp32 moments); SGDW with
// momentum five arrays, without three; amsgrad, an EMA and Kahan's compensation two more each.
// Of what has no gradient an EMA alone reads p and itself and writes itself.
//
// Layout: one launch for the whole table, a block for each chunk of kChunk elements of one tensor.
// A thread takes so many consecutive elements at a time that the widest of the arrays is moved in
// vectors of 16 bytes; its neighbour takes the next ones, so that what a warp moves is one stretch
// of memory in every array. What is left at a tensor's end, and all of a tensor that is not
// aligned, goes element by element, neighbours side by side again. Each element is read and written
// by one thread: the update is in place and needs no order among blocks. The steps alone are read
// by many blocks; the last block to finish adds to them.
#pragma once

#include "reg_kernels/launch.cuh"
#include "reg_kernels/optimizer_step_math.h"
#include "reg_kernels/reduce.cuh"
#include "reg_kernels/rng_state.cuh"
#include "reg_kernels/table_chunk.cuh"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kOptimizerThreads = 256;
// How many vectors of each array a thread has in flight, and for how many blocks a multiprocessor
// has to have registers. Adam's kernels take 62 to 82, SGD's at most 64. With two vectors of its
// four arrays, or held to 64 registers, Adam's spill (nvcc 13.0; not timed, for want of a GPU).
template <Algorithm kAlgorithm>
constexpr int kOptimizerUnits = kAlgorithm == Algorithm::adam ? 1 : 2;
template <Algorithm kAlgorithm, typename T>
constexpr int kOptimizerBlocks = kAlgorithm == Algorithm::sgd ? 4 : (sizeof(T) == 8 ? 2 : 3);

// Elements a vector, for parameters of type T and moments of type S.
template <typename T, typename S>
constexpr int kOptimizerVector = sizeof(T) > sizeof(S) ? kVector<T> : kVector<S>;

constexpr int kMostGroups = 32;  // as reg_kernels/ops/optimizer_step.py has it

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
      RK_NO_UNROLL
      for (int64_t i = 0; i < squares_count; ++i) total += squares[i];
      factor *= clip_factor(sqrt(total) * factor, max_norm);
    }
    return factor;
  }
};
static_assert(sizeof(OptimizerStep) <= 4096, "a kernel has 4 KiB of arguments");

// What rounds a parameter: to nearest, or with the draws of `stream`.
struct OptimizerRounding {
  bool stochastic;
  RngStream stream;
  DrawPlaces places;
  int64_t chunk;  // its first element, in the tensor

  // `i`, in the chunk, is a multiple of kCount.
  template <typename T, int kCount>
  __device__ __forceinline__ Vector<T, kCount> operator()(const compute_t<T> (&p)[kCount],
                                                          int i) const {
    Vector<T, kCount> result;
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (stochastic) {
        const int64_t draw = kCount == 1 ? places.of(chunk + i) : places.offset + chunk + i;
        PhiloxWords words = stream(static_cast<uint64_t>(draw) / kGroup);
        if (kCount <= 4 && (draw & 4)) words = {words.w[2], words.w[3], 0, 0};
        if (kCount <= 2 && (draw & 2)) words.w[0] = words.w[1];
        if (kCount <= 1 && (draw & 1)) words.w[0] >>= 16;
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

// What the threads of a block share. The arrays that few optimizers have are here, and not in
// registers: those are what bounds the number of threads.
template <typename T, typename S>
struct OptimizerBlock {
  OptimizerRule<compute_t<T>> rule;
  S* max_second_moment;  // from the chunk's first element on, or null
  compute_t<T>* ema;
  T* compensation;
  OptimizerRounding round;
  bool coupled;   // there is an l2 penalty
  bool proximal;  // there is an l1 penalty
  bool last;
};

// The arrays that most optimizers have, from the chunk's first element on.
template <typename T, typename S>
struct OptimizerArrays {
  T* param;
  const T* grad;
  S* first_moment;  // or null
  S* second_moment;
};

// Whether vectors are aligned in all arrays. Chunks are whole vectors, so it is as at the tensor's
// first element.
__device__ __forceinline__ bool optimizer_aligned(const TableChunk& chunk) {
  int64_t all = 0;
  for (const TableRow row :
       {TableRow::grad, TableRow::param, TableRow::first_moment, TableRow::second_moment,
        TableRow::max_second_moment, TableRow::ema, TableRow::compensation}) {
    all |= chunk.table.at(row, chunk.tensor);
  }
  return all % kVectorBytes == 0;
}

// Whether one draw serves all elements of a vector, where draws are needed.
__device__ __forceinline__ bool optimizer_draws_in_vectors(const OptimizerStep& step,
                                                           int64_t tensor) {
  return step.rounding != Rounding::stochastic || draw_places(step.table, tensor).in_whole_groups();
}

// kSecond: with amsgrad's maximum, or SGD's momentum.
template <Algorithm kAlgorithm, bool kCoupled, bool kSecond, typename C, typename T, typename S,
          int kCount>
__device__ __forceinline__ void update_elements(const OptimizerRule<C>& rule, C (&p)[kCount],
                                                const Vector<T, kCount>& grad,
                                                Vector<S, kCount>& first, Vector<S, kCount>& second,
                                                Vector<S, kCount>& most) {
  RK_UNROLL
  for (int j = 0; j < kCount; ++j) {
    const C g = load(grad.v[j]);
    C m = static_cast<C>(load(first.v[j]));
    if constexpr (kAlgorithm == Algorithm::adam) {
      C v = static_cast<C>(load(second.v[j])), v_max = static_cast<C>(load(most.v[j]));
      adam_element<kCoupled, kSecond>(rule, p[j], g, m, v, v_max);
      second.v[j] = store<S>(v);
      most.v[j] = store<S>(v_max);
    } else {
      sgd_element<kCoupled, kSecond>(rule, p[j], g, m);
    }
    first.v[j] = store<S>(m);
  }
}

// One thread's share of elements [begin, end) of a chunk, which are whole vectors of kCount.
template <int kCount, int kUnits, Algorithm kAlgorithm, typename T, typename S>
__device__ __forceinline__ void update_range(const OptimizerArrays<T, S>& arrays, int begin,
                                             int end, const OptimizerBlock<T, S>& block,
                                             bool& ready) {
  using C = compute_t<T>;
  constexpr bool kAdam = kAlgorithm == Algorithm::adam;
  constexpr int kStride = kOptimizerThreads * kCount;
  constexpr int kStep = kUnits * kStride;
  const bool has_first = kAdam || arrays.first_moment;
  for (int step = begin; step < end; step += kStep) {
    const int mine = step + static_cast<int>(threadIdx.x) * kCount;
    Vector<T, kCount> params[kUnits], grads[kUnits];
    Vector<S, kCount> firsts[kUnits] = {}, seconds[kUnits] = {};
    RK_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int i = mine + u * kStride;
      if (i >= end) continue;
      params[u] = load_whole<kCount>(arrays.param + i);
      grads[u] = load_whole<kCount>(arrays.grad + i);
      if (has_first) firsts[u] = load_whole<kCount>(arrays.first_moment + i);
      if constexpr (kAdam) seconds[u] = load_whole<kCount>(arrays.second_moment + i);
    }
    // The first loads are under way while one thread still works out the constants.
    if (!ready) __syncthreads();
    ready = true;
    RK_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int i = mine + u * kStride;
      if (i >= end) continue;
      const OptimizerRule<C>& rule = block.rule;
      C p[kCount];
      RK_UNROLL
      for (int j = 0; j < kCount; ++j) p[j] = load(params[u].v[j]);
      // What rounding took off the parameter so far is still part of it.
      if (block.compensation) {
        const auto lost = load_whole<kCount>(block.compensation + i);
        RK_UNROLL
        for (int j = 0; j < kCount; ++j) p[j] += load(lost.v[j]);
      }
      const auto update = [&]<bool kCoupled, bool kSecond>(Vector<S, kCount>& most) {
        update_elements<kAlgorithm, kCoupled, kSecond>(rule, p, grads[u], firsts[u], seconds[u],
                                                       most);
      };
      Vector<S, kCount> most{};
      if (kAdam ? block.max_second_moment != nullptr : has_first) {
        if constexpr (kAdam) most = load_whole<kCount>(block.max_second_moment + i);
        block.coupled ? update.template operator()<true, true>(most)
                      : update.template operator()<false, true>(most);
        if constexpr (kAdam) store_whole(block.max_second_moment + i, most);
      } else {
        block.coupled ? update.template operator()<true, false>(most)
                      : update.template operator()<false, false>(most);
      }
      if (has_first) store_whole(arrays.first_moment + i, firsts[u]);
      if constexpr (kAdam) store_whole(arrays.second_moment + i, seconds[u]);
      if (block.proximal) {
        RK_UNROLL
        for (int j = 0; j < kCount; ++j) p[j] = soft_threshold(p[j], rule.threshold);
      }
      if (block.ema) {
        C* const address = block.ema + i;
        auto ema = load_whole<kCount>(address);
        RK_UNROLL
        for (int j = 0; j < kCount; ++j) ema.v[j] = ema_element(rule, ema.v[j], p[j]);
        store_whole(address, ema);
      }
      params[u] = block.round.template operator()<T>(p, i);
      store_whole(arrays.param + i, params[u]);
      if (block.compensation) {
        Vector<T, kCount> lost;
        RK_UNROLL
        for (int j = 0; j < kCount; ++j) {
          lost.v[j] = store<T>(lost_by_rounding(p[j], load(params[u].v[j])));
        }
        store_whole(block.compensation + i, lost);
      }
    }
  }
}

// Adds one to each tensor's step, by one block. Several at a time: all else has finished, and
// nothing hides what these loads wait for.
__device__ __forceinline__ void add_steps(const TensorTable& table) {
  constexpr int kLoads = 4;
  for (int64_t i = threadIdx.x; i < table.count; i += kLoads * kOptimizerThreads) {
    float* steps[kLoads] = {};
    float next[kLoads] = {};
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      const int64_t tensor = i + k * kOptimizerThreads;
      if (tensor < table.count) steps[k] = table.address<float>(TableRow::step, tensor);
    }
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      if (steps[k]) next[k] = *in_global_memory(steps[k]) + 1.0f;
    }
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      if (steps[k]) *in_global_memory(steps[k]) = next[k];
    }
  }
}

template <Algorithm kAlgorithm, typename T, typename S>
__global__ void __launch_bounds__(kOptimizerThreads, kOptimizerBlocks<kAlgorithm, T>)
    optimizer_step_kernel(const __grid_constant__ OptimizerStep a) {
  using C = compute_t<T>;
  if (a.found_inf && *a.found_inf != 0.0f) return;  // and so does every block
  using Block = OptimizerBlock<T, S>;
  RK_SHARED(Block, block);
  if (blockIdx.x < a.chunks) {
    const TableChunk chunk(a.table, blockIdx.x);
    if (threadIdx.x == 0) {
      const OptimizerGroup& group = a.groups[a.table.at(TableRow::group, chunk.tensor)];
      const auto* step = a.table.address<const float>(TableRow::step, chunk.tensor);
      const float next = step ? *step + 1.0f : 1.0f;
      const OptimizerConstants k = optimizer_constants(kAlgorithm, group, next, a.gradient());
      block->rule = OptimizerRule<C>(k, kAlgorithm);
      block->round = {a.rounding == Rounding::stochastic, a.rng.stream(kRoundingTag),
                      draw_places(a.table, chunk.tensor), chunk.first};
      block->coupled = group.decay == Decay::l2 && group.weight_decay != 0;
      block->proximal = k.threshold > 0;
      block->max_second_moment = chunk.address<S>(TableRow::max_second_moment);
      block->ema = chunk.address<C>(TableRow::ema);
      block->compensation = chunk.address<T>(TableRow::compensation);
    }
    const OptimizerArrays<T, S> arrays{
        chunk.address<T>(TableRow::param), chunk.address<const T>(TableRow::grad),
        chunk.address<S>(TableRow::first_moment), chunk.address<S>(TableRow::second_moment)};
    constexpr int kCount = kOptimizerVector<T, S>;
    const bool vectors = optimizer_aligned(chunk) && optimizer_draws_in_vectors(a, chunk.tensor);
    const int whole = vectors ? chunk.count / kCount * kCount : 0;
    bool ready = false;
    update_range<kCount, kOptimizerUnits<kAlgorithm>, kAlgorithm>(arrays, 0, whole, *block, ready);
    update_range<1, 1, kAlgorithm>(arrays, whole, chunk.count, *block, ready);
  }
  if (last_block(a.ticket, &block->last)) add_steps(a.table);
}

// One thread's share of elements [begin, end) of a chunk's parameters and their average.
template <int kCount, int kUnits, typename T>
__device__ __forceinline__ void average_range(const OptimizerRule<compute_t<T>>& rule,
                                              const T* param, compute_t<T>* ema, int begin,
                                              int end) {
  using C = compute_t<T>;
  constexpr int kStride = kOptimizerThreads * kCount;
  // Unrolled it spills.
  RK_NO_UNROLL
  for (int step = begin; step < end; step += kUnits * kStride) {
    const int mine = step + static_cast<int>(threadIdx.x) * kCount;
    Vector<T, kCount> params[kUnits];
    RK_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int i = mine + u * kStride;
      if (i < end) params[u] = load_whole<kCount>(param + i);
    }
    RK_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int i = mine + u * kStride;
      if (i >= end) continue;
      C p[kCount];
      RK_UNROLL
      for (int j = 0; j < kCount; ++j) p[j] = load(params[u].v[j]);
      // Loaded here and not with the parameters: nvcc 13.0 would store element by element.
      C* const address = ema + i;
      auto next = load_whole<kCount>(address);
      RK_UNROLL
      for (int j = 0; j < kCount; ++j) next.v[j] = ema_element(rule, next.v[j], p[j]);
      store_whole(address, next);
    }
  }
}

// Algorithm::average: reads p and the EMA and writes the EMA.
template <typename T>
__global__ void __launch_bounds__(kOptimizerThreads)
    optimizer_average_kernel(const __grid_constant__ OptimizerStep a) {
  using C = compute_t<T>;
  if (a.found_inf && *a.found_inf != 0.0f) return;
  const TableChunk chunk(a.table, blockIdx.x);
  RK_SHARED(OptimizerRule<C>, rule);
  if (threadIdx.x == 0) {
    OptimizerConstants k{};
    k.ema_rest = 1.0 - a.groups[a.table.at(TableRow::group, chunk.tensor)].ema_decay;
    *rule = OptimizerRule<C>(k, Algorithm::average);
  }
  __syncthreads();
  const T* param = chunk.address<const T>(TableRow::param);
  C* ema = chunk.address<C>(TableRow::ema);
  if (!ema) return;
  constexpr int kCount = kVector<C>;
  const int whole = optimizer_aligned(chunk) ? chunk.count / kCount * kCount : 0;
  average_range<kCount, 4>(*rule, param, ema, 0, whole);
  average_range<1, 1>(*rule, param, ema, whole, chunk.count);
}

// Parameters and gradients of type T, moments of type S.
template <typename T, typename S>
void launch_optimizer_step(Algorithm algorithm, const OptimizerStep& step, cudaStream_t stream) {
  if (step.table.count == 0) return;
  if (algorithm == Algorithm::average) {
    if (step.chunks == 0) return;
    RK_LAUNCH(optimizer_average_kernel<T>, dim3(static_cast<unsigned>(step.chunks)),
              dim3(kOptimizerThreads), sizeof(OptimizerRule<compute_t<T>>), stream, step);
    check_launch("optimizer_step");
    return;
  }
  // Tensors without an element count their steps too: there is a block for that at least.
  const dim3 grid(static_cast<unsigned>(step.chunks > 0 ? step.chunks : 1));
  const auto kernel = algorithm == Algorithm::adam ? optimizer_step_kernel<Algorithm::adam, T, S>
                                                   : optimizer_step_kernel<Algorithm::sgd, T, S>;
  RK_LAUNCH(kernel, grid, dim3(kOptimizerThreads), sizeof(OptimizerBlock<T, S>), stream, step);
  check_launch("optimizer_step");
}

}  // namespace cuda
RK_NAMESPACE_END
