// BatchNorm with residual, activation and dropout, forward and backward, on raw pointers, for CUDA
// and for its emulation on the CPU.
//
// Training needs a channel twice: to reduce it, and to map it with what that gave. One kernel does
// both. Blocks read their slice of an item (channel_slices.cuh) once and keep it in shared memory,
// sum up on the way, exchange their sums through global memory, and map what they have kept. An
// H100 keeps 25 MB; items come one after the other, so only a channel, or a strip of 64 bytes of
// channels last, that is larger than that is read a second time.
//
// Bytes an element, s = sizeof(T), with items that fit the chip (in brackets: that do not), and
// PyTorch's in eager mode; ours plus s for a residual and 1/8 for a gate:
//   forward     2 s (3 s)   PyTorch 3 s, plus 3 s residual, 2 s activation, 2 s + 1 dropout
//   backward    3 s (5 s)   PyTorch 5 s, plus 3 s activation, 2 s + 1 dropout
//   inference   2 s         PyTorch 2 s, plus 3 s residual, 2 s activation
// Across ranks a pass comes before the exchange between them, and another one behind it:
//   forward     1 s + 2 s   backward   2 s + 3 s
// What limits: memory. A dropout's draws cost about as many instructions as all the rest and bring
// 16-bit types near the issue limit; none of this has been measured on a GPU yet.
//
// The numbers: a thread takes mean and squared deviations of a batch of vectors in float, merges
// them as Chan does, all relative to a pivot, the median of three of the channel's values. Beyond
// the thread, sums of x - pivot and of its square are added up in double, where nothing is lost:
// the pivot is one of the values, so at most sqrt(M) deviations off the mean.
#pragma once

#include <type_traits>

#include "batch_norm/backward.cuh"
#include "batch_norm/forward.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

template <typename... T>
bool all_aligned(const T*... data) {
  return ((reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0) && ...);
}

template <typename Arguments>
void launch_map(void (*kernel)(Arguments), const Arguments& a, cudaStream_t stream,
                const char* op) {
  RK_LAUNCH(kernel, a.plan.grid(), a.plan.block(), static_cast<size_t>(a.plan.shared_bytes), stream,
            a);
  check_launch(op);
}

// `allocate(bytes)` returns device memory that lives as long as the stream needs it; the meetings'
// counters in it are zeroed here.
template <typename Arguments, typename Allocate>
void launch_reduction(void (*kernel)(Arguments), Arguments& a, int channels, const Chip& chip,
                      Allocate&& allocate, cudaStream_t stream, const char* op) {
  const ChannelPlan& plan = a.plan;
  constexpr int64_t kUnasked = 48 * 1024;  // shared memory that a kernel has without asking
  if (plan.shared_bytes > kUnasked || plan.blocks > 1) {
    // The most there is, not this launch's own: other threads may be launching the same kernel. And
    // as many blocks at once as the plan has reckoned with.
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(chip.most_shared_bytes));
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                         cudaSharedmemCarveoutMaxShared);
    check_launch(op);
  }
  const auto shared_bytes = static_cast<size_t>(plan.shared_bytes);
  if (plan.blocks == 1) {
    RK_LAUNCH(kernel, plan.grid(), plan.block(), shared_bytes, stream, a);
  } else {
    const int64_t partials = plan.items * plan.blocks * channels;
    void* const workspace = allocate(partials * static_cast<int64_t>(sizeof(Sums)) +
                                     plan.items * static_cast<int64_t>(sizeof(int)));
    a.exchange.partials = static_cast<Sums*>(workspace);
    a.exchange.arrivals = reinterpret_cast<int*>(a.exchange.partials + partials);
    cudaMemsetAsync(a.exchange.arrivals, 0, static_cast<size_t>(plan.items) * sizeof(int), stream);
    check_launch(op);
    RK_LAUNCH_COOPERATIVE(kernel, plan.grid(), plan.block(), shared_bytes, stream, a);
  }
  check_launch(op);
}

template <typename T>
ChannelPlan forward_plan(const BatchNormForward<T>& a, const ChannelLayout& layout, int64_t numel,
                         const Chip& chip) {
  const int residual_vectors = a.residual ? (kAhead<T> + 1) * kParts<T> : 0;
  return plan_reduction<T>(layout, numel, all_aligned(a.x, a.residual, a.y),
                           {.tensors = 1,
                            .ring = kForwardRing<T>,
                            .thread_bytes = kSumsBytes + residual_vectors * kVectorBytes,
                            .block_bytes = Scratch<T>::kBytes},
                           chip);
}

// Where there is something to reduce.
template <typename T>
ChannelPlan backward_plan(const BatchNormBackward<T>& a, const ChannelLayout& layout, int64_t numel,
                          const Chip& chip) {
  return plan_reduction<T>(
      layout, numel, all_aligned(a.grad_output, a.x, a.residual, a.grad_input, a.grad_residual),
      {.tensors = a.residual ? 3 : 2,
       .ring = kBackwardRing<T>,
       .thread_bytes = kSumsBytes,
       .block_bytes = Scratch<T>::kBytes},
      chip);
}

template <typename T>
void zero_gate(const BatchNormForward<T>& a, cudaStream_t stream, const char* op) {
  if (!a.chain.gate || !a.plan.ragged) return;
  cudaMemsetAsync(a.chain.gate, 0, static_cast<size_t>(ceil_div(a.plan.numel, 8)), stream);
  check_launch(op);
}

inline void count_if_averaged(const ChannelStatistics& a, cudaStream_t stream, const char* op) {
  if (!a.num_batches_tracked || !a.averages) return;
  RK_LAUNCH(count_batch_kernel<int64_t>, dim3(1), dim3(1), 0, stream, a.num_batches_tracked);
  check_launch(op);
}

// Training, or the moments alone. There are elements; in training at least two a channel.
template <typename T, typename Allocate>
void launch_batch_norm(BatchNormForward<T> a, const ChannelLayout& layout, int64_t numel,
                       Allocate&& allocate, cudaStream_t stream) {
  const char* op = a.moments ? "batch_norm_moments" : "batch_norm";
  const Chip chip = Chip::current();
  a.plan = forward_plan(a, layout, numel, chip);
  zero_gate(a, stream, op);
  count_if_averaged(a, stream, op);
  launch_reduction(
      a.plan.layout.channels_last ? batch_norm_kernel<T, true> : batch_norm_kernel<T, false>, a,
      a.plan.template channels<T>(), chip, allocate, stream, op);
}

// With frozen statistics, running_mean and running_var, or with those in mean and invstd.
template <typename T>
void launch_batch_norm_inference(BatchNormForward<T> a, const ChannelLayout& layout, int64_t numel,
                                 cudaStream_t stream, const char* op = "batch_norm_inference") {
  if (numel == 0) return;
  a.plan = plan_map<T>(layout, numel, all_aligned(a.x, a.residual, a.y), a.residual ? 2 : 1,
                       Scratch<T>::kBytes);
  zero_gate(a, stream, op);
  launch_map(a.plan.layout.channels_last ? batch_norm_inference_kernel<T, true>
                                         : batch_norm_inference_kernel<T, false>,
             a, stream, op);
}

// Training by the moments of all ranks; of this one's batch there may be no elements.
template <typename T>
void launch_batch_norm_of_ranks(const BatchNormForward<T>& a, const GatheredMoments& gathered,
                                const ChannelLayout& layout, int64_t numel, cudaStream_t stream) {
  const char* op = "batch_norm";
  constexpr int kThreads = 128;
  if (layout.channels == 0) return;
  count_if_averaged(a, stream, op);
  RK_LAUNCH(batch_norm_ranks_kernel<int64_t>,
            dim3(static_cast<unsigned>(ceil_div(layout.channels, kThreads))), dim3(kThreads), 0,
            stream, a, gathered, layout.channels);
  check_launch(op);
  launch_batch_norm_inference(a, layout, numel, stream, op);
}

template <typename T, typename Allocate>
void launch_batch_norm_backward(BatchNormBackward<T> a, const ChannelLayout& layout, int64_t numel,
                                Allocate&& allocate, cudaStream_t stream) {
  const char* op = "batch_norm_backward";
  if (a.grad_weight.data || (a.grad_input && a.training && !a.sums)) {
    const Chip chip = Chip::current();
    a.plan = backward_plan(a, layout, numel, chip);
    launch_reduction(a.plan.layout.channels_last ? batch_norm_backward_kernel<T, true>
                                                 : batch_norm_backward_kernel<T, false>,
                     a, a.plan.template channels<T>(), chip, allocate, stream, op);
  } else if (a.grad_input || a.grad_residual) {
    // x has its place among what is staged, whether it is read or not.
    a.plan = plan_map<T>(layout, numel,
                         all_aligned(a.grad_output, a.x, a.residual, a.grad_input, a.grad_residual),
                         a.residual ? 3 : 2, Scratch<T>::kBytes);
    const auto launch = [&]<bool kOfRanks>(std::bool_constant<kOfRanks>) {
      launch_map(a.plan.layout.channels_last ? batch_norm_backward_map_kernel<T, true, kOfRanks>
                                             : batch_norm_backward_map_kernel<T, false, kOfRanks>,
                 a, stream, op);
    };
    a.sums ? launch(std::true_type{}) : launch(std::false_type{});
  }
}

}  // namespace cuda
RK_NAMESPACE_END
