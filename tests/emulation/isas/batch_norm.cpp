// Calls the leaves of csrc/cpu/batch_norm.simd.cpp: a forward and a backward, as
// csrc/cpu/batch_norm.cpp puts them together.
#include "cpu/batch_norm.h"

#include "isas.h"
#include "reg_kernels/batch_norm_math.h"

namespace isas {

struct Shape {
  int64_t samples, channels, length;
  bool channels_last;
};
// Planes; columns of folded rows with an incomplete row, of whole rows and of several strips; and
// rows of short planes.
constexpr Shape kShapes[] = {{3, 2, 700, false},
                             {5, 4, 31, true},
                             {9, 40, 5, true},
                             {3, 1100, 3, true},
                             {20, 24, 13, false}};

BatchNormPlan plan_of(const Shape& shape) {
  const int64_t numel = shape.samples * shape.channels * shape.length;
  BatchNormPlan plan{};
  plan.planes = !shape.channels_last && shape.length >= 256;
  if (plan.planes) {
    plan.unit = 1000;  // planes begin and end within units
    plan.units = ceil_div(numel, plan.unit);
    plan.pairs = ceil_div(plan.unit, shape.length) + 1;
    return plan;
  }
  plan.columns = shape.channels_last ? shape.channels : shape.channels * shape.length;
  if (plan.columns == 4) plan.columns *= 16;
  plan.strip = shape.channels_last ? min(plan.columns, 552) : plan.columns;
  plan.strips = ceil_div(plan.columns, plan.strip);
  plan.rows = numel / plan.columns;
  plan.rest = numel % plan.columns;
  plan.unit = 16;
  plan.units = plan.strips * ceil_div(plan.rows, plan.unit);
  return plan;
}

struct Options {
  Activation activation;
  bool residual, drops, stream;
};
constexpr Options kOptions[] = {
    {Activation::none, false, false, false},      {Activation::none, false, true, true},
    {Activation::relu, false, false, false},      {Activation::relu, true, false, true},
    {Activation::relu, true, true, false},        {Activation::leaky_relu, false, true, false},
    {Activation::leaky_relu, true, false, false}, {Activation::silu, true, false, false},
    {Activation::gelu, false, true, false}};

template <typename T>
void call(const Shape& shape, const Options& options) {
  using C = compute_t<T>;
  const int64_t channels = shape.channels, count = shape.samples * shape.length;
  const int64_t numel = channels * count;
  // Far from zero beside their deviation; and one channel holds an infinity.
  auto x = numbers<T>(numel, 1.0);
  for (int64_t i = 0; i < numel; ++i) x.data()[i] = store<T>(load(x.data()[i]) + C(20));
  x.data()[numel - 1] = store<T>(C(INFINITY));
  const auto residual = numbers<T>(numel), grad_output = numbers<T>(numel);
  Buffer<T> y(numel, 0), grad_input(numel, 0), grad_residual(numel, 0);
  Buffer<uint8_t> gate(numel / 8 + 1, 0);
  const bool gated = has_gate(options.activation, options.residual, options.drops);

  BatchNormTask task{};
  task.plan = plan_of(shape);
  const BatchNormPlan& plan = task.plan;
  task.dtype = kDType<T>;
  task.channels = channels;
  task.length = shape.length;
  task.count = count;
  task.channels_last = shape.channels_last;
  task.x = x.data();
  task.residual = options.residual ? residual.data() : nullptr;
  task.y = y.data();
  task.gate = gated ? gate.data() : nullptr;
  task.stream = options.stream;
  task.activation = static_cast<int64_t>(options.activation);
  task.slope = 0.1;
  task.drops = options.drops;
  task.threshold = 40000;
  task.scale = 65536.0 / 40000;
  task.seed = 0x9e3779b97f4a7c15ull;
  task.offset = 0x0000000500000007ull;
  task.mask_offset = 700;
  task.training = true;
  const int64_t slices = plan.planes ? 0 : plan.units / plan.strips + 1;
  const int64_t sums = 2 * (plan.units * plan.pairs + slices * plan.columns);
  Buffer<double> partials(sums, 0), totals(3 * channels, 0);
  Buffer<double> affine(3 * channels, 0), gradient(3 * channels, 0);
  task.partials = partials.data();
  task.totals = totals.data();
  task.affine = affine.data();
  task.gradient = gradient.data();

  const auto report = [&](const char* leaf, const Digest& digest) {
    digest.report("%s, %s, (%d, %d, %d)%s, activation %d%s%s%s", leaf, kName<T>,
                  static_cast<int>(shape.samples), static_cast<int>(channels),
                  static_cast<int>(shape.length), shape.channels_last ? " channels_last" : "",
                  static_cast<int>(options.activation), options.residual ? ", residual" : "",
                  options.drops ? ", drops" : "", options.stream ? ", streamed" : "");
  };
  const auto each_unit = [&](const char* name, void (*leaf)(const BatchNormTask&, int64_t),
                             const auto&... outputs) {
    share_out(0, plan.units, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) leaf(task, unit);
    });
    Digest digest;
    (digest.add(outputs), ...);
    report(name, digest);
  };
  const auto merge = [&](const char* name, void (*leaf)(const BatchNormTask&, int64_t, int64_t)) {
    share_out(0, channels, 1, [&](int64_t begin, int64_t end) { leaf(task, begin, end); });
    Digest digest;
    digest.add(totals);
    report(name, digest);
  };

  each_unit("batch_norm_moments", RK_LEAF(batch_norm_moments), partials);
  merge("batch_norm_merge_moments", RK_LEAF(batch_norm_merge_moments));
  std::unique_ptr<double[]> means(new double[channels]), invstds(new double[channels]);
  for (int64_t c = 0; c < channels; ++c) {
    means[c] = totals.data()[c];
    invstds[c] = inverse_deviation(totals.data()[channels + c] / static_cast<double>(count), 1e-5);
    const auto of = ChannelAffine<C>::of(means[c], invstds[c], 1.5, 0.25);
    affine.data()[c] = of.shift;
    affine.data()[channels + c] = of.scale;
    affine.data()[2 * channels + c] = of.offset;
  }
  each_unit("batch_norm_map_forward", RK_LEAF(batch_norm_map_forward), y, gate);

  task.grad_output = grad_output.data();
  task.grad_input = grad_input.data();
  task.grad_residual = options.residual ? grad_residual.data() : nullptr;
  each_unit("batch_norm_gradient_sums", RK_LEAF(batch_norm_gradient_sums), partials);
  merge("batch_norm_merge_sums", RK_LEAF(batch_norm_merge_sums));
  for (int64_t c = 0; c < channels; ++c) {
    const auto k = ChannelGradient<C>::training(means[c], invstds[c], 1.5, totals.data()[c],
                                                totals.data()[channels + c], count);
    gradient.data()[c] = k.k1;
    gradient.data()[channels + c] = k.k2;
    gradient.data()[2 * channels + c] = k.k3;
  }
  each_unit("batch_norm_map_backward", RK_LEAF(batch_norm_map_backward), grad_input, grad_residual);
}

void call_leaves() {
  for_types([]<typename T>(T) {
    for (const Shape& shape : kShapes) {
      for (const Options& options : kOptions) call<T>(shape, options);
    }
  });
}

}  // namespace isas
