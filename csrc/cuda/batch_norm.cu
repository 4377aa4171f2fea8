// BatchNorm on the CUDA key: tensors to raw pointers. The kernels are in batch_norm.cuh.
#include "batch_norm.cuh"

#include <tuple>

#include "../torch/batch_norm.h"
#include "../torch/cuda.cuh"

namespace reg_kernels {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// A gate in whole words, as the kernels write it, of which the op returns the bytes that it has.
Tensor make_gate(const Tensor& x, int64_t bytes) {
  Tensor words = empty_vector(x, (bytes + 3) / 4 * 4, aoti_torch_dtype_uint8());
  return bytes % 4 == 0 ? words : torch::stable::narrow(words, 0, 0, bytes);
}

cuda::Chain make_chain(const BatchNormInput& in, double p) {
  cuda::Chain chain{};
  chain.activation = in.activation;
  chain.slope = in.slope;
  chain.drops = p > 0.0;
  chain.rate = DropoutRate::from_probability(p);
  return chain;
}

template <typename T>
cuda::BatchNormForward<T> forward_arguments(const BatchNormInput& in, const Tensor& output,
                                            ChannelValues running_mean, ChannelValues running_var,
                                            double eps, const cuda::Chain& chain) {
  cuda::BatchNormForward<T> a{};
  a.x = static_cast<const T*>(in.x);
  a.residual = static_cast<const T*>(in.residual);
  a.y = static_cast<T*>(output.mutable_data_ptr());
  a.weight = in.weight;
  a.bias = in.bias;
  a.running_mean = running_mean;
  a.running_var = running_var;
  a.eps = eps;
  a.chain = chain;
  return a;
}

Outputs batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& residual, const std::vector<Tensor>& tracked,
                   std::optional<double> momentum, double eps, int64_t activation, double slope,
                   double p, const OptionalTensor& rng_state, int64_t element_offset,
                   bool keep_gate, const OptionalTensor& gathered,
                   const std::optional<std::string>& /*group*/) {
  const Call call("batch_norm", input);
  const BatchNormInput in =
      batch_norm_input(call, input, weight, bias, residual, activation, slope, p);
  const RunningStatistics running =
      running_statistics(call, in, tracked, momentum, gathered.has_value());
  const GatheredMoments of_ranks = gathered_moments(call, in, gathered);
  check_element_offset(element_offset, call.op);
  const int64_t channels = in.layout.channels;

  const cuda::Launch launch(input);
  cuda::Chain chain = make_chain(in, p);
  if (chain.drops) {
    RK_REQUIRE(rng_state, call.op, "rng_state", "given where something is dropped", "None");
    chain.rng = cuda::read_rng_state(call, *rng_state);
    chain.mask_offset = element_offset;
  }
  const bool gated = keep_gate && has_gate(in.activation, residual.has_value(), chain.drops);
  Tensor output = empty_like_dense(input);
  Tensor mean = empty_vector(input, channels, aoti_torch_dtype_float64());
  Tensor invstd = empty_vector(input, channels, aoti_torch_dtype_float64());
  Tensor gate = make_gate(input, gated ? in.gate_bytes() : 0);
  if (gated) chain.gate = static_cast<uint8_t*>(gate.mutable_data_ptr());

  for_dtype(in.dtype, [&]<typename T>(T) {
    auto a = forward_arguments<T>(in, output, running.mean, running.var, eps, chain);
    a.num_batches_tracked = running.batches;
    a.averages = !momentum;
    a.momentum = momentum.value_or(0.0);
    a.mean = static_cast<double*>(mean.mutable_data_ptr());
    a.invstd = static_cast<double*>(invstd.mutable_data_ptr());
    if (gathered) {
      cuda::launch_batch_norm_of_ranks(a, of_ranks, in.layout, in.numel, launch.stream);
      return;
    }
    OptionalTensor memory;
    cuda::launch_batch_norm(a, in.layout, in.numel, cuda::allocator(input, memory), launch.stream);
  });
  return {output, mean, invstd, gate};
}

// [4][C]: what GatheredMoments has of each rank, zeros of an empty batch.
Tensor moments_of_batch(const Tensor& input) {
  const Call call("batch_norm_moments", input);
  const BatchNormInput in = batch_norm_input(call, input, {}, {}, {}, 0, 0.0, 0.0);
  const cuda::Launch launch(input);
  Tensor moments = empty_matrix(input, 4, in.layout.channels);
  if (in.numel == 0) {
    torch::stable::fill_(moments, 0.0);
    return moments;
  }
  for_dtype(in.dtype, [&]<typename T>(T) {
    cuda::BatchNormForward<T> a{};
    a.x = static_cast<const T*>(in.x);
    a.moments = static_cast<double*>(moments.mutable_data_ptr());
    OptionalTensor memory;
    cuda::launch_batch_norm(a, in.layout, in.numel, cuda::allocator(input, memory), launch.stream);
  });
  return moments;
}

Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& residual,
                            const Tensor& running_mean, const Tensor& running_var, double eps,
                            int64_t activation, double slope) {
  const Call call("batch_norm_inference", input);
  const BatchNormInput in =
      batch_norm_input(call, input, weight, bias, residual, activation, slope, 0.0);
  const int64_t channels = in.layout.channels;
  const ChannelValues mean = channel_values(call, running_mean, channels, "running_mean");
  const ChannelValues var = channel_values(call, running_var, channels, "running_var");
  const cuda::Launch launch(input);
  Tensor output = empty_like_dense(input);
  for_dtype(in.dtype, [&]<typename T>(T) {
    cuda::launch_batch_norm_inference(
        forward_arguments<T>(in, output, mean, var, eps, make_chain(in, 0.0)), in.layout, in.numel,
        launch.stream);
  });
  return output;
}

template <typename T>
cuda::BatchNormBackward<T> backward_arguments(const BatchNormInput& in, const BatchNormSaved& saved,
                                              double p) {
  cuda::BatchNormBackward<T> a{};
  a.grad_output = static_cast<const T*>(saved.grad_output);
  a.x = static_cast<const T*>(in.x);
  a.weight = in.weight;
  a.bias = in.bias;
  a.mean = saved.mean;
  a.invstd = saved.invstd;
  a.chain = make_chain(in, p);
  a.chain.gate = saved.gate;
  if (needs_preactivation(in.activation, saved.gate != nullptr, a.chain.drops)) {
    a.residual = static_cast<const T*>(in.residual);
  }
  return a;
}

// [2 C + 1]: the sums of d and of d xhat of each channel, which are the gradients of bias and
// weight, and the number of values.
Tensor batch_norm_sums(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& residual,
                       const Tensor& mean, const Tensor& invstd, const OptionalTensor& gate,
                       int64_t activation, double slope, double p) {
  const Call call("batch_norm_sums", input);
  const BatchNormInput in =
      batch_norm_input(call, input, weight, bias, residual, activation, slope, p);
  const BatchNormSaved saved =
      batch_norm_saved(call, in, input, grad_output, mean, invstd, gate, p);
  const int64_t channels = in.layout.channels;
  const cuda::Launch launch(input);
  Tensor result = empty_vector(input, 2 * channels + 1, aoti_torch_dtype_float64());
  if (in.numel == 0) {
    torch::stable::fill_(result, 0.0);
    return result;
  }
  auto* sums = static_cast<double*>(result.mutable_data_ptr());
  for_dtype(in.dtype, [&]<typename T>(T) {
    auto a = backward_arguments<T>(in, saved, p);
    a.grad_bias = {sums, DType::float64};
    a.grad_weight = {sums + channels, DType::float64};
    a.values = sums + 2 * channels;
    OptionalTensor memory;
    cuda::launch_batch_norm_backward(a, in.layout, in.numel, cuda::allocator(input, memory),
                                     launch.stream);
  });
  return result;
}

Outputs batch_norm_backward(const Tensor& grad_output, const Tensor& input,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, const Tensor& mean,
                            const Tensor& invstd, const OptionalTensor& gate,
                            const OptionalTensor& /*rng_state*/, int64_t /*element_offset*/,
                            bool training, int64_t activation, double slope, double p,
                            bool wants_input, bool wants_parameters, bool wants_residual,
                            const OptionalTensor& sums) {
  const Call call("batch_norm_backward", input);
  const BatchNormInput in =
      batch_norm_input(call, input, weight, bias, residual, activation, slope, p);
  const BatchNormSaved saved =
      batch_norm_saved(call, in, input, grad_output, mean, invstd, gate, p);
  const double* of_ranks = reduced_sums(call, in, sums, wants_parameters);
  const cuda::Launch launch(input);
  BatchNormGradients gradients(input, weight, bias, in.layout.channels, wants_input,
                               wants_parameters, wants_residual);
  if (in.numel == 0) return gradients.of_nothing();

  for_dtype(in.dtype, [&]<typename T>(T) {
    auto a = backward_arguments<T>(in, saved, p);
    a.training = training;
    a.sums = training && wants_input ? of_ranks : nullptr;
    if (wants_input) a.grad_input = static_cast<T*>(gradients.input.mutable_data_ptr());
    if (wants_residual) a.grad_residual = static_cast<T*>(gradients.residual.mutable_data_ptr());
    if (wants_parameters) {
      const auto parameter = [&](const Tensor& gradient) {
        return ChannelValues{gradient.mutable_data_ptr(), dtype_of(gradient, call.op)};
      };
      a.grad_weight = parameter(gradients.weight);
      a.grad_bias = parameter(gradients.bias);
    }
    OptionalTensor memory;
    cuda::launch_batch_norm_backward(a, in.layout, in.numel, cuda::allocator(input, memory),
                                     launch.stream);
  });
  return gradients.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_inference", TORCH_BOX(&batch_norm_inference));
  m.impl("batch_norm_moments", TORCH_BOX(&moments_of_batch));
  m.impl("batch_norm_sums", TORCH_BOX(&batch_norm_sums));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace reg_kernels
