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

const double* statistic(const Tensor& tensor, int64_t channels, const char* op) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.numel() == channels &&
                      tensor.is_contiguous(),
                  op, ": mean and invstd must be contiguous float64 [C]");
  return static_cast<const double*>(tensor.const_data_ptr());
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
                   double p, const OptionalTensor& rng_state, bool keep_gate) {
  const char* op = "batch_norm";
  const Tracked moved(tracked, op);
  const OptionalTensor &running_mean = moved.running_mean, &running_var = moved.running_var;
  const OptionalTensor& num_batches_tracked = moved.num_batches_tracked;
  const BatchNormInput in = batch_norm_input(input, weight, bias, residual, activation, slope, op);
  const int64_t channels = in.layout.channels;
  STD_TORCH_CHECK(in.count > 1, op, ": expected more than 1 value a channel");
  const bool tracks = running_mean && running_var;
  int64_t* batches = nullptr;
  if (num_batches_tracked) {
    STD_TORCH_CHECK(num_batches_tracked->scalar_type() == ScalarType::Long &&
                        num_batches_tracked->numel() == 1 && !num_batches_tracked->is_cpu(),
                    op, ": num_batches_tracked must be one int64 on the input's device");
    batches = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
  }
  STD_TORCH_CHECK(momentum || batches || !tracks, op, ": momentum None needs num_batches_tracked");

  const cuda::Launch launch(input);
  cuda::Chain chain = make_chain(in, p);
  if (chain.drops) {
    STD_TORCH_CHECK(rng_state, op, ": dropout needs rng_state");
    chain.rng = cuda::read_rng_state(input, *rng_state, op);
  }
  const bool gated = keep_gate && has_gate(in.activation, residual.has_value(), chain.drops);
  Tensor output = empty_like_dense(input);
  Tensor mean = empty_vector(input, channels, aoti_torch_dtype_float64());
  Tensor invstd = empty_vector(input, channels, aoti_torch_dtype_float64());
  Tensor gate = make_gate(input, gated ? in.gate_bytes() : 0);
  if (gated) chain.gate = static_cast<uint8_t*>(gate.mutable_data_ptr());

  cuda::for_dtype(input, op, [&]<typename T>(T) {
    auto a = forward_arguments<T>(
        in, output, tracks ? channel_values(running_mean, channels, op) : ChannelValues{},
        tracks ? channel_values(running_var, channels, op) : ChannelValues{}, eps, chain);
    a.num_batches_tracked = batches;
    a.averages = !momentum;
    a.momentum = momentum.value_or(0.0);
    a.mean = static_cast<double*>(mean.mutable_data_ptr());
    a.invstd = static_cast<double*>(invstd.mutable_data_ptr());
    OptionalTensor memory;
    cuda::launch_batch_norm(a, in.layout, in.numel, cuda::allocator(input, memory), launch.stream);
  });
  return {output, mean, invstd, gate};
}

Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, const OptionalTensor& residual,
                            const Tensor& running_mean, const Tensor& running_var, double eps,
                            int64_t activation, double slope) {
  const char* op = "batch_norm_inference";
  const BatchNormInput in = batch_norm_input(input, weight, bias, residual, activation, slope, op);
  const ChannelValues mean = channel_values(running_mean, in.layout.channels, op);
  const ChannelValues var = channel_values(running_var, in.layout.channels, op);
  const cuda::Launch launch(input);
  Tensor output = empty_like_dense(input);
  cuda::for_dtype(input, op, [&]<typename T>(T) {
    cuda::launch_batch_norm_inference(
        forward_arguments<T>(in, output, mean, var, eps, make_chain(in, 0.0)), in.layout, in.numel,
        launch.stream);
  });
  return output;
}

Outputs batch_norm_backward(const Tensor& grad_output, const Tensor& input,
                            const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& residual, const Tensor& mean,
                            const Tensor& invstd, const OptionalTensor& gate,
                            const OptionalTensor& /*rng_state*/, bool training, int64_t activation,
                            double slope, double p, bool wants_input, bool wants_parameters,
                            bool wants_residual) {
  const char* op = "batch_norm_backward";
  const BatchNormInput in = batch_norm_input(input, weight, bias, residual, activation, slope, op);
  const int64_t channels = in.layout.channels;
  cuda::Chain chain = make_chain(in, p);
  if (gate) {
    STD_TORCH_CHECK(gate->scalar_type() == ScalarType::Byte && gate->numel() == in.gate_bytes(), op,
                    ": gate is not this forward's");
    chain.gate = static_cast<uint8_t*>(const_cast<void*>(gate->const_data_ptr()));
  }
  STD_TORCH_CHECK(gate || !chain.drops, op, ": dropout needs the forward's gate");
  const bool needs_z = needs_preactivation(in.activation, gate.has_value(), chain.drops);

  const cuda::Launch launch(input);
  const int32_t own = dtype_number(input);
  const auto like_input = [&](bool wanted) {
    return wanted ? empty_like_dense(input) : empty_vector(input, 0, own);
  };
  const auto like_channels = [&](const OptionalTensor& values) {
    return empty_vector(input, wants_parameters ? channels : 0,
                        values ? dtype_number(*values) : own);
  };
  Tensor grad_input = like_input(wants_input), grad_residual = like_input(wants_residual);
  Tensor grad_weight = like_channels(weight), grad_bias = like_channels(bias);

  cuda::for_dtype(input, op, [&]<typename T>(T) {
    cuda::BatchNormBackward<T> a{};
    a.grad_output = static_cast<const T*>(data_like(input, grad_output, op));
    a.x = static_cast<const T*>(in.x);
    a.residual = needs_z ? static_cast<const T*>(in.residual) : nullptr;
    a.weight = in.weight;
    a.bias = in.bias;
    a.mean = statistic(mean, channels, op);
    a.invstd = statistic(invstd, channels, op);
    a.training = training;
    a.chain = chain;
    if (wants_input) a.grad_input = static_cast<T*>(grad_input.mutable_data_ptr());
    if (wants_residual) a.grad_residual = static_cast<T*>(grad_residual.mutable_data_ptr());
    if (wants_parameters) {
      a.grad_weight = {grad_weight.mutable_data_ptr(), dtype_of(grad_weight, op)};
      a.grad_bias = {grad_bias.mutable_data_ptr(), dtype_of(grad_bias, op)};
    }
    OptionalTensor memory;
    cuda::launch_batch_norm_backward(a, in.layout, in.numel, cuda::allocator(input, memory),
                                     launch.stream);
  });
  return {grad_input, grad_weight, grad_bias, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CUDA, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_inference", TORCH_BOX(&batch_norm_inference));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace reg_kernels
