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
// What limits: memory. A dropout's draws cost about as many instructions as all the rest and bring
// 16-bit types near the issue limit; none of this has been measured on a GPU yet.
//
// The numbers: a thread takes mean and squared deviations of a batch of vectors in float, merges
// them as Chan does, all relative to a pivot, the median of three of the channel's values. Beyond
// the thread, sums of x - pivot and of its square are added up in double, where nothing is lost:
// the pivot is one of the values, so at most sqrt(M) deviations off the mean.
#pragma once

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

// Training. There are elements, and at least two a channel.
template <typename T, typename Allocate>
void launch_batch_norm(BatchNormForward<T> a, const ChannelLayout& layout, int64_t numel,
                       Allocate&& allocate, cudaStream_t stream) {
  const char* op = "batch_norm";
  const Chip chip = Chip::current();
  a.plan = forward_plan(a, layout, numel, chip);
  if (a.chain.gate && a.plan.ragged) {
    cudaMemsetAsync(a.chain.gate, 0, static_cast<size_t>(ceil_div(numel, 8)), stream);
    check_launch(op);
  }
  if (a.num_batches_tracked && a.averages) {
    RK_LAUNCH(count_batch_kernel<int64_t>, dim3(1), dim3(1), 0, stream, a.num_batches_tracked);
    check_launch(op);
  }
  launch_reduction(
      a.plan.layout.channels_last ? batch_norm_kernel<T, true> : batch_norm_kernel<T, false>, a,
      a.plan.template channels<T>(), chip, allocate, stream, op);
}

// With frozen statistics, running_mean and running_var.
template <typename T>
void launch_batch_norm_inference(BatchNormForward<T> a, const ChannelLayout& layout, int64_t numel,
                                 cudaStream_t stream) {
  if (numel == 0) return;
  a.plan = plan_map<T>(layout, numel, all_aligned(a.x, a.residual, a.y), a.residual ? 2 : 1,
                       Scratch<T>::kBytes);
  launch_map(a.plan.layout.channels_last ? batch_norm_inference_kernel<T, true>
                                         : batch_norm_inference_kernel<T, false>,
             a, stream, "batch_norm_inference");
}

template <typename T, typename Allocate>
void launch_batch_norm_backward(BatchNormBackward<T> a, const ChannelLayout& layout, int64_t numel,
                                Allocate&& allocate, cudaStream_t stream) {
  const char* op = "batch_norm_backward";
  if (a.grad_weight.data || (a.grad_input && a.training)) {
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
    launch_map(a.plan.layout.channels_last ? batch_norm_backward_map_kernel<T, true>
                                           : batch_norm_backward_map_kernel<T, false>,
               a, stream, op);
  }
}

}  // namespace cuda
RK_NAMESPACE_END
