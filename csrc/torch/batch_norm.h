// BatchNorm's arguments as both launchers, CPU and CUDA, read them: what ops/batch_norm.py
// declares, checked for what memory safety rests on, as raw pointers.
#pragma once

#include <string>
#include <tuple>

#include "channel_layout.h"
#include "checks.h"
#include "reg_kernels/batch_norm_math.h"

namespace reg_kernels {

// An input (N, C, L) and what is done to it; tensors of the input's shape have its storage order.
struct BatchNormInput {
  DType dtype;
  ChannelLayout layout;
  int64_t numel;
  int64_t count;  // M = N L, values a channel
  const void* x;
  const void* residual;  // or null
  ChannelValues weight, bias;
  Activation activation;
  double slope;

  // [C] bits of M values each, rounded up to bytes: the size of a gate.
  int64_t gate_bytes() const { return layout.channels * ceil_div(count, 8); }
};

inline ChannelValues channel_values(const Call& call, const OptionalTensor& tensor,
                                    int64_t channels, const char* name, bool written = false) {
  if (!tensor) return {nullptr, DType::float32};
  RK_REQUIRE(tensor->numel() == channels && tensor->is_contiguous(), call.op, name,
             words("contiguous, one value for each of ", channels, " channels"), *tensor);
  const DType dtype = dtype_of(*tensor, call.op, name);
  return {written ? call.written(*tensor, name) : const_cast<void*>(call.data(*tensor, name)),
          dtype};
}

inline BatchNormInput batch_norm_input(const Call& call, const Tensor& x,
                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                       const OptionalTensor& residual, int64_t activation,
                                       double slope, double p) {
  BatchNormInput in{};
  in.dtype = dtype_of(x, call.op);
  in.layout = channel_layout(x, call.op);
  in.numel = x.numel();
  in.count = in.layout.channels ? in.numel / in.layout.channels : 0;
  in.x = call.data(x, "input");
  in.residual = data_like(call, x, residual, "residual");
  in.weight = channel_values(call, weight, in.layout.channels, "weight");
  in.bias = channel_values(call, bias, in.layout.channels, "bias");
  RK_REQUIRE(activation >= 0 && activation <= static_cast<int64_t>(Activation::gelu), call.op,
             "activation", "in [0, 4]", activation);
  check_number(p, kProbability, call.op);
  in.activation = static_cast<Activation>(activation);
  in.slope = slope;
  return in;
}

// What a training forward moves on: the running statistics, both or none, and the counter.
struct RunningStatistics {
  ChannelValues mean, var;
  int64_t* batches;
};

// Of what the op is given: [running_mean, running_var], and behind them, or by itself,
// num_batches_tracked.
inline RunningStatistics running_statistics(const Call& call, const BatchNormInput& in,
                                            const std::vector<Tensor>& tracked,
                                            const std::optional<double>& momentum,
                                            bool of_all_ranks) {
  RK_REQUIRE(in.count > 1 || of_all_ranks, call.op, "input", "of more than 1 value a channel",
             words(in.count, " of them"));
  RK_REQUIRE(tracked.size() <= 3, call.op, "tracked", "at most 3 tensors", tracked.size());
  const bool averages = tracked.size() > 1, counts = tracked.size() % 2 == 1;
  RK_REQUIRE(momentum || counts || !averages, call.op, "momentum",
             "a float, or come with num_batches_tracked", "None");
  RunningStatistics running{};
  if (averages) {
    running.mean = channel_values(call, tracked[0], in.layout.channels, "running_mean", true);
    running.var = channel_values(call, tracked[1], in.layout.channels, "running_var", true);
  }
  if (counts) {
    running.batches = static_cast<int64_t*>(
        call.written_vector(tracked.back(), ScalarType::Long, 1, "num_batches_tracked"));
  }
  return running;
}

inline GatheredMoments gathered_moments(const Call& call, const BatchNormInput& in,
                                        const OptionalTensor& gathered) {
  if (!gathered) return {};
  const auto sizes = gathered->sizes();
  const bool fits = sizes.size() == 3 && sizes[0] > 0 && sizes[1] == 4;
  RK_REQUIRE(fits && sizes[2] == in.layout.channels, call.op, "gathered",
             words("of shape (ranks, 4, ", in.layout.channels, ")"), *gathered);
  return {static_cast<const double*>(
              call.vector(*gathered, ScalarType::Double, gathered->numel(), "gathered")),
          sizes[0]};
}

// [2 C + 1]: the sums of d and of d xhat of all ranks and the number of values, or null.
inline const double* reduced_sums(const Call& call, const BatchNormInput& in,
                                  const OptionalTensor& sums, bool wants_parameters) {
  if (!sums) return nullptr;
  RK_REQUIRE(!wants_parameters, call.op, "wants_parameters", "False where sums are given", "True");
  return static_cast<const double*>(
      call.vector(*sums, ScalarType::Double, 2 * in.layout.channels + 1, "sums"));
}

// What a backward reads beside the input.
struct BatchNormSaved {
  const void* grad_output;
  const double *mean, *invstd;  // [C]
  uint8_t* gate;                // or null
};

inline BatchNormSaved batch_norm_saved(const Call& call, const BatchNormInput& in, const Tensor& x,
                                       const Tensor& grad_output, const Tensor& mean,
                                       const Tensor& invstd, const OptionalTensor& gate, double p) {
  const auto statistic = [&](const Tensor& values, const char* name) {
    return static_cast<const double*>(
        call.vector(values, ScalarType::Double, in.layout.channels, name));
  };
  BatchNormSaved saved{};
  saved.grad_output = data_like(call, x, grad_output, "grad_output");
  saved.mean = statistic(mean, "mean");
  saved.invstd = statistic(invstd, "invstd");
  RK_REQUIRE(gate || p == 0.0, call.op, "gate", "the forward's, where something was dropped",
             "None");
  if (gate) {
    saved.gate = static_cast<uint8_t*>(
        const_cast<void*>(call.vector(*gate, ScalarType::Byte, in.gate_bytes(), "gate")));
  }
  return saved;
}

// The gradients that a backward returns; those that are not wanted have no elements.
struct BatchNormGradients {
  Tensor input, weight, bias, residual;

  BatchNormGradients(const Tensor& x, const OptionalTensor& of_weight,
                     const OptionalTensor& of_bias, int64_t channels, bool wants_input,
                     bool wants_parameters, bool wants_residual)
      : input(like_input(x, wants_input)),
        weight(like_channels(x, of_weight, wants_parameters ? channels : 0)),
        bias(like_channels(x, of_bias, wants_parameters ? channels : 0)),
        residual(like_input(x, wants_residual)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const { return {input, weight, bias, residual}; }

  // Those of no elements at all: sums over nothing.
  std::tuple<Tensor, Tensor, Tensor, Tensor> of_nothing() {
    torch::stable::fill_(weight, 0.0);
    torch::stable::fill_(bias, 0.0);
    return all();
  }

 private:
  static Tensor like_input(const Tensor& x, bool wanted) {
    return wanted ? empty_like_dense(x) : empty_vector(x, 0, dtype_number(x));
  }
  static Tensor like_channels(const Tensor& x, const OptionalTensor& values, int64_t channels) {
    return empty_vector(x, channels, dtype_number(values ? *values : x));
  }
};

}  // namespace reg_kernels
