// BatchNorm on the CPU key: which part of a tensor is worked on when, and what is done once a
// channel. The loops are in batch_norm.simd.cpp.
#include "batch_norm.h"

#include "../torch/batch_norm.h"
#include "cache.h"
#include "reg_kernels/dropout_math.h"

#include <memory>
#include <tuple>
#include <utility>

namespace reg_kernels {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at the least
// Elements of a unit: few enough to share out, enough for their sums to cost nothing beside them.
constexpr int64_t kLeastUnit = 16384, kMostUnit = 131072, kUnits = 32;
constexpr int64_t kLeastRows = 64;   // of a unit, each column of which has sums of its own
constexpr int64_t kLongPlane = 256;  // values side by side from which on a plane is worth a loop
// Columns that narrower rows are folded to: a short row shares fewer lines with what is prefetched,
// with dropout a long one takes fewer calls.
constexpr int64_t kWideRow = 128, kWideDrawnRow = 256;
constexpr int64_t kStripColumns = 1024;

int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

BatchNormPlan make_plan(const BatchNormInput& in, bool channels_last, bool drops) {
  const int64_t channels = in.layout.channels, length = in.layout.length;
  const int64_t elements = std::clamp(in.numel / kUnits, kLeastUnit, kMostUnit);
  BatchNormPlan plan{};
  plan.planes = !channels_last && length >= kLongPlane;
  if (plan.planes) {
    plan.unit = round_up(elements, 8);
    plan.units = ceil_div(in.numel, plan.unit);
    plan.pairs = ceil_div(plan.unit, length) + 1;
    return plan;
  }
  if (channels_last) {
    int64_t fold = ceil_div(drops ? kWideDrawnRow : kWideRow, channels);
    while (fold > 1 && fold * channels % 8 != 0) ++fold;  // a row's gate is whole bytes
    if (fold * 8 > in.count || fold * channels > kStripColumns) fold = 1;
    plan.columns = channels * fold;
    plan.strip = round_up(ceil_div(plan.columns, ceil_div(plan.columns, kStripColumns)), 8);
  } else {
    plan.columns = channels * length;
    // Whole channels, by eight: the gate of a strip then begins at a byte.
    plan.strip = 8 * std::max<int64_t>(1, kStripColumns / length / 8) * length;
  }
  plan.strip = std::min(plan.strip, plan.columns);
  plan.strips = ceil_div(plan.columns, plan.strip);
  plan.rows = in.numel / plan.columns;
  plan.rest = in.numel % plan.columns;
  plan.unit = round_up(std::max(elements / plan.strip, kLeastRows), 8);
  plan.units = plan.strips * ceil_div(plan.rows, plan.unit);
  return plan;
}

BatchNormTask make_task(const BatchNormInput& in, double p) {
  BatchNormTask task{};
  const DropoutRate rate = DropoutRate::from_probability(p);
  task.drops = p > 0.0;
  task.threshold = rate.threshold;
  task.scale = rate.scale;
  // Of one value a sample, channels lie last in either layout.
  task.channels_last = in.layout.channels_last || in.layout.length == 1;
  if (in.numel) task.plan = make_plan(in, task.channels_last, task.drops);
  task.dtype = in.dtype;
  task.channels = in.layout.channels;
  task.length = in.layout.length;
  task.count = in.count;
  task.x = in.x;
  task.residual = in.residual;
  task.activation = static_cast<int64_t>(in.activation);
  task.slope = in.slope;
  return task;
}

bool is_streamed(const Tensor& output) {
  return output.numel() * static_cast<int64_t>(output.element_size()) > last_level_cache_bytes();
}

// Calls f(begin, end) for ranges of channels: each has some divisions to do, and pairs of sums to
// merge.
template <typename F>
void each_channel(const BatchNormTask& task, const F& f) {
  constexpr int64_t kChannels = 128;
  torch::stable::parallel_for(0, task.channels, kChannels, f);
}

// Sums of all units, the channels' constants from them, and the elements that need those. `sums`
// and `map` may be left out by null.
template <typename Finish>
void run(const BatchNormTask& task, void (*sums)(const BatchNormTask&, int64_t),
         void (*merge)(const BatchNormTask&, int64_t, int64_t), const Finish& finish,
         void (*map)(const BatchNormTask&, int64_t)) {
  const int64_t units = task.plan.units, numel = task.channels * task.count;
  const auto each = [&](void (*leaf)(const BatchNormTask&, int64_t)) {
    if (units == 0) return;
    const int64_t grain = std::max<int64_t>(1, kGrain * units / numel);
    torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) leaf(task, unit);
    });
  };
  if (sums) each(sums);
  each_channel(task, [&](int64_t begin, int64_t end) {
    if (sums) merge(task, begin, end);
    for (int64_t c = begin; c < end; ++c) finish(c);
  });
  if (map) each(map);
}

// Sums and constants of a task, and where its pointers to them go.
struct Workspace {
  std::unique_ptr<double[]> values;

  Workspace(BatchNormTask& task, bool with_sums) {
    const BatchNormPlan& plan = task.plan;
    const int64_t slices = plan.planes || !with_sums ? 0 : plan.units / plan.strips + 1;
    const int64_t partials = with_sums ? 2 * (plan.units * plan.pairs + slices * plan.columns) : 0;
    const int64_t channels = task.channels;
    values.reset(new double[partials + 9 * channels]);
    task.partials = values.get();
    task.totals = task.partials + partials;
    task.affine = task.totals + 3 * channels;
    task.gradient = task.affine + 3 * channels;
  }
};

// Constants as the elements compute with them, kept in double, which holds a float.
template <typename Make>
void set_constants(DType dtype, double* values, int64_t c, int64_t channels, const Make& make) {
  const auto put = [&](double first, double second, double third) {
    values[c] = first;
    values[channels + c] = second;
    values[2 * channels + c] = third;
  };
  dtype == DType::float64 ? make(double{}, put) : make(float{}, put);
}

void set_affine(const BatchNormTask& task, const BatchNormInput& in, int64_t c, double mean,
                double invstd) {
  const double weight = in.weight.at(c, 1.0), bias = in.bias.at(c, 0.0);
  set_constants(task.dtype, task.affine, c, task.channels, [&]<typename C>(C, const auto& put) {
    const auto affine = ChannelAffine<C>::of(mean, invstd, weight, bias);
    put(affine.shift, affine.scale, affine.offset);
  });
}

// Of a batch that has values.
ChannelMoments own_moments(const BatchNormTask& task, const BatchNormInput& in, int64_t c) {
  return {{static_cast<double>(in.count), task.totals[c], task.totals[task.channels + c]}};
}

// [4][C]: what GatheredMoments has of each rank, zeros of an empty batch.
Tensor moments_of_batch(const Tensor& input) {
  const Call call("batch_norm_moments", input);
  const BatchNormInput in = batch_norm_input(call, input, {}, {}, {}, 0, 0.0, 0.0);
  const int64_t channels = in.layout.channels;
  Tensor result = empty_matrix(input, 4, channels);
  auto* moments = static_cast<double*>(result.mutable_data_ptr());
  if (in.numel == 0) {
    std::fill_n(moments, 4 * channels, 0.0);
    return result;
  }
  BatchNormTask task = make_task(in, 0.0);
  const Workspace workspace(task, true);
  const auto finish = [&](int64_t c) {
    const ChannelMoments of = own_moments(task, in, c);
    moments[c] = of.count;
    moments[channels + c] = of.mean;
    moments[2 * channels + c] = task.totals[2 * channels + c];
    moments[3 * channels + c] = of.m2;
  };
  run(task, RK_LEAF(batch_norm_moments), RK_LEAF(batch_norm_merge_moments), finish, nullptr);
  return result;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

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
  const bool tracks = running.mean.data != nullptr;
  const double factor = momentum          ? *momentum
                        : running.batches ? 1.0 / (static_cast<double>(*running.batches) + 1.0)
                                          : 0.0;

  BatchNormTask task = make_task(in, p);
  task.training = true;
  if (task.drops) {
    RK_REQUIRE(rng_state, call.op, "rng_state", "given where something is dropped", "None");
    const int64_t* state = rng_state_data(call, *rng_state);
    task.seed = static_cast<uint64_t>(state[0]);
    task.offset = static_cast<uint64_t>(state[1]);
    task.mask_offset = element_offset;
  }
  const bool gated = keep_gate && has_gate(in.activation, residual.has_value(), task.drops);

  Tensor output = empty_like_dense(input);
  Tensor mean = empty_vector(input, task.channels, aoti_torch_dtype_float64());
  Tensor invstd = empty_vector(input, task.channels, aoti_torch_dtype_float64());
  Tensor gate = empty_vector(input, gated ? in.gate_bytes() : 0, aoti_torch_dtype_uint8());
  task.y = output.mutable_data_ptr();
  task.gate = gated ? static_cast<uint8_t*>(gate.mutable_data_ptr()) : nullptr;
  task.stream = is_streamed(output);
  const Workspace workspace(task, !gathered);
  auto* means = static_cast<double*>(mean.mutable_data_ptr());
  auto* invstds = static_cast<double*>(invstd.mutable_data_ptr());

  const auto finish = [&](int64_t c) {
    const ChannelMoments of = gathered ? of_ranks.of(task.channels, c) : own_moments(task, in, c);
    means[c] = of.mean;
    invstds[c] = inverse_deviation(of.variance(), eps);
    set_affine(task, in, c, means[c], invstds[c]);
    if (!tracks || !of.moves()) return;
    running.mean.set(c, running_average(running.mean.at(c, 0.0), means[c], factor));
    running.var.set(c, running_average(running.var.at(c, 0.0), of.unbiased(), factor));
  };
  run(task, gathered ? nullptr : RK_LEAF(batch_norm_moments), RK_LEAF(batch_norm_merge_moments),
      finish, RK_LEAF(batch_norm_map_forward));
  if (running.batches) *running.batches = next_count(*running.batches);
  return {output, mean, invstd, gate};
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
  Tensor output = empty_like_dense(input);
  if (in.numel == 0) return output;
  BatchNormTask task = make_task(in, 0.0);
  task.y = output.mutable_data_ptr();
  task.stream = is_streamed(output);
  const Workspace workspace(task, false);
  const auto finish = [&](int64_t c) {
    set_affine(task, in, c, mean.at(c, 0.0), inverse_deviation(var.at(c, 1.0), eps));
  };
  run(task, nullptr, nullptr, finish, RK_LEAF(batch_norm_map_forward));
  return output;
}

void set_affines(const BatchNormTask& task, const BatchNormInput& in, const BatchNormSaved& saved) {
  each_channel(task, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) set_affine(task, in, c, saved.mean[c], saved.invstd[c]);
  });
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
  Tensor result = empty_vector(input, 2 * channels + 1, aoti_torch_dtype_float64());
  auto* sums = static_cast<double*>(result.mutable_data_ptr());
  if (in.numel == 0) {
    std::fill_n(sums, 2 * channels + 1, 0.0);
    return result;
  }
  BatchNormTask task = make_task(in, p);
  task.training = true;
  task.grad_output = saved.grad_output;
  task.gate = saved.gate;
  const Workspace workspace(task, true);
  set_affines(task, in, saved);
  const auto finish = [&](int64_t c) {
    const double d_sum = task.totals[c], dx_sum = task.totals[channels + c];
    sums[c] = d_sum;
    for_dtype(task.dtype, [&]<typename T>(T) {
      sums[channels + c] =
          ChannelGradient<compute_t<T>>::of_weight(saved.mean[c], saved.invstd[c], d_sum, dx_sum);
    });
  };
  run(task, RK_LEAF(batch_norm_gradient_sums), RK_LEAF(batch_norm_merge_sums), finish, nullptr);
  sums[2 * channels] = static_cast<double>(in.count);
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
  const int64_t channels = in.layout.channels;
  const double *means = saved.mean, *invstds = saved.invstd;
  BatchNormGradients gradients(input, weight, bias, channels, wants_input, wants_parameters,
                               wants_residual);
  if (in.numel == 0) return gradients.of_nothing();
  BatchNormTask task = make_task(in, p);
  task.training = training;
  task.grad_output = saved.grad_output;
  task.gate = saved.gate;
  const auto parameter = [&](const Tensor& gradient) {
    return ChannelValues{gradient.mutable_data_ptr(), dtype_of(gradient, call.op)};
  };
  const ChannelValues weight_gradient = parameter(gradients.weight);
  const ChannelValues bias_gradient = parameter(gradients.bias);
  if (wants_input) task.grad_input = gradients.input.mutable_data_ptr();
  if (wants_residual) task.grad_residual = gradients.residual.mutable_data_ptr();
  task.stream = is_streamed(input);

  const bool reduces = wants_parameters || (wants_input && training && !of_ranks);
  const Workspace workspace(task, reduces);
  set_affines(task, in, saved);
  const auto finish = [&](int64_t c) {
    const double factor = in.weight.at(c, 1.0);
    const double d_sum = task.totals[c], dx_sum = task.totals[channels + c];
    set_constants(task.dtype, task.gradient, c, channels, [&]<typename C>(C, const auto& put) {
      if (of_ranks && training) {
        const auto k =
            ChannelGradient<C>::of_ranks(means[c], invstds[c], factor, of_ranks, channels, c);
        put(k.k1, k.k2, k.k3);
      } else if (training) {
        const auto k =
            ChannelGradient<C>::training(means[c], invstds[c], factor, d_sum, dx_sum, in.count);
        put(k.k1, k.k2, k.k3);
      } else {
        put(ChannelGradient<C>::frozen(invstds[c], factor), 0.0, 0.0);
      }
      if (!wants_parameters) return;
      weight_gradient.set(c, ChannelGradient<C>::of_weight(means[c], invstds[c], d_sum, dx_sum));
      bias_gradient.set(c, d_sum);
    });
  };
  run(task, reduces ? RK_LEAF(batch_norm_gradient_sums) : nullptr, RK_LEAF(batch_norm_merge_sums),
      finish, wants_input || wants_residual ? RK_LEAF(batch_norm_map_backward) : nullptr);
  return gradients.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_inference", TORCH_BOX(&batch_norm_inference));
  m.impl("batch_norm_moments", TORCH_BOX(&moments_of_batch));
  m.impl("batch_norm_sums", TORCH_BOX(&batch_norm_sums));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace reg_kernels
