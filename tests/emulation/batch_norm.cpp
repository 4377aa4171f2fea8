// Runs csrc/cuda/batch_norm.cuh on the CPU and compares it with a scalar reference in double. What
// is shared with it: the formulas of one element and one channel, and the generator; nothing of how
// elements, channels, blocks and threads correspond. Masks, gates and signs are exact.
#include "cuda/batch_norm.cuh"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "driver.h"

namespace {

using driver::Buffer;
using reg_kernels::Activation;
using reg_kernels::ChannelAffine;
using reg_kernels::ChannelLayout;
using reg_kernels::ChannelMoments;
using reg_kernels::ChannelValues;
using reg_kernels::compute_t;
using reg_kernels::DropoutRate;
using reg_kernels::DType;
using reg_kernels::cuda::BatchNormBackward;
using reg_kernels::cuda::BatchNormForward;
using reg_kernels::cuda::Chain;
using reg_kernels::cuda::RngState;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr uint64_t kSeed = 0x9e3779b97f4a7c15ull, kRngOffset = 0x0000000500000007ull;

// ---- What is run.

enum class Data { usual, far_mean, outlier, constant };

struct Case {
  int64_t N, C, L;
  bool channels_last;
  Activation activation;
  bool residual;
  double p;
  Data data = Data::usual;
  int64_t shift = 0;       // elements past a 16-byte boundary, of x and y in turn
  bool affine = true;      // weight and bias
  bool own_dtype = false;  // channel values in the input's dtype instead of float32
  bool averages = false;   // momentum None
  bool on_device = false;  // rng_state behind a pointer
  int64_t mask_offset = 0;

  int64_t count() const { return N * L; }
  int64_t numel() const { return N * C * L; }
  int64_t index(int64_t n, int64_t c, int64_t l) const {
    return channels_last ? (n * L + l) * C + c : (n * C + c) * L + l;
  }
  int64_t channel(int64_t e) const { return channels_last ? e % C : e / L % C; }
  int64_t gate_bytes() const { return C * ((count() + 7) / 8); }
  ChannelLayout layout() const { return {C, L, channels_last}; }
  double slope() const { return 0.125; }

  std::string text() const {
    return "(" + std::to_string(N) + ", " + std::to_string(C) + ", " + std::to_string(L) + ")" +
           (channels_last ? " channels last" : "") + " activation " +
           std::to_string(static_cast<int>(activation)) + (residual ? " residual" : "") + " p " +
           std::to_string(p) + " data " + std::to_string(static_cast<int>(data)) + " shift " +
           std::to_string(shift) + (affine ? "" : " no affine") + (own_dtype ? " own dtype" : "") +
           (averages ? " averages" : "") + (on_device ? " on device" : "") + " mask offset " +
           std::to_string(mask_offset);
  }
};

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// Mean 0, deviation 1, within 4.
double draw(uint64_t seed, int64_t i) {
  const uint64_t bits = mix(seed * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(i));
  double sum = 0.0;
  for (int k = 0; k < 4; ++k) sum += static_cast<double>(bits >> 16 * k & 0xffffu) / 65536.0 - 0.5;
  return sum * std::sqrt(3.0);
}

template <typename T>
void fill(Buffer<T>& x, const Case& c, uint64_t seed) {
  for (int64_t e = 0; e < x.size(); ++e) {
    const auto channel = static_cast<double>(c.channel(e));
    double value = draw(seed, e) * (1.0 + 0.25 * channel) + channel - 2.0;
    if (c.data == Data::far_mean) value = 1e4 + 1e-2 * draw(seed, e);
    if (c.data == Data::constant) value = 1.5 + channel;
    if (c.data == Data::outlier && e == c.index(0, c.channel(e), 0))
      value = sizeof(T) > 2 ? 1e8 : 3e4;
    x.data()[e] = reg_kernels::store<T>(static_cast<compute_t<T>>(value));
  }
}

// Channel values in one of two dtypes, and as doubles.
template <typename T>
struct Channels {
  std::vector<T> own;
  std::vector<float> single;
  bool is_own;

  Channels(int64_t count, bool is_own, double base, double scale, uint64_t seed)
      : own(count), single(count), is_own(is_own) {
    for (int64_t c = 0; c < count; ++c) {
      const double value = base + scale * draw(seed, c);
      own[c] = reg_kernels::store<T>(static_cast<compute_t<T>>(value));
      single[c] = static_cast<float>(value);
    }
  }

  bool same_bits(const Channels& other) const {
    return !std::memcmp(own.data(), other.own.data(), own.size() * sizeof(T)) &&
           !std::memcmp(single.data(), other.single.data(), single.size() * sizeof(float));
  }

  ChannelValues values() {
    constexpr DType kOwn = std::is_same_v<T, double>            ? DType::float64
                           : std::is_same_v<T, float>           ? DType::float32
                           : std::is_same_v<T, driver::float16> ? DType::float16
                                                                : DType::bfloat16;
    return is_own ? ChannelValues{own.data(), kOwn} : ChannelValues{single.data(), DType::float32};
  }
  double at(int64_t c) const {
    return is_own ? static_cast<double>(reg_kernels::load(own[c])) : single[c];
  }
  // Half a unit in the last place of 1.
  double rounding() const;
};

template <typename T>
constexpr double kRounding = std::is_same_v<T, double>            ? 0x1p-53
                             : std::is_same_v<T, float>           ? 0x1p-24
                             : std::is_same_v<T, driver::float16> ? 0x1p-11
                                                                  : 0x1p-8;
// Of the type that is computed in.
template <typename T>
constexpr double kEpsilon = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;
// The least normal number of T: what is smaller is rounded more coarsely.
template <typename T>
constexpr double kTiny = std::is_same_v<T, driver::float16> ? 0x1p-24 : 1e-37;

template <typename T>
double Channels<T>::rounding() const {
  return is_own ? kRounding<T> : 0x1p-24;
}

template <typename Describe>
void expect_near(double actual, double expected, double tolerance, const Describe& describe) {
  const bool same = actual == expected || (std::isnan(actual) && std::isnan(expected));
  driver::expect(same || std::abs(actual - expected) <= tolerance, [&] {
    char numbers[128];
    std::snprintf(numbers, sizeof(numbers), ": %.17g, expected %.17g within %.3g", actual, expected,
                  tolerance);
    return std::string(describe()) + numbers;
  });
}

// Device memory as the launchers ask for it, kept until the case ends.
struct Allocator {
  std::vector<std::unique_ptr<Buffer<double>>> buffers;

  auto function() {
    return [this](int64_t bytes) -> void* {
      buffers.push_back(std::make_unique<Buffer<double>>((bytes + 7) / 8, 0));
      return buffers.back()->data();
    };
  }
};

// The contract of philox.h.
bool keeps(int64_t e, uint32_t threshold) {
  const uint64_t key = kSeed ^ 0x64726f706f757431ull;
  const auto words = reg_kernels::philox4x32(key, static_cast<uint64_t>(e / 8), kRngOffset);
  const uint32_t word = words.w[e % 8 / 2];
  return (e % 2 ? word >> 16 : word & 0xffffu) < threshold;
}

double activate(Activation activation, double z, double slope) {
  switch (activation) {
    case Activation::relu: return z <= 0.0 ? 0.0 : z;
    case Activation::leaky_relu: return z > 0.0 ? z : z * slope;
    case Activation::silu: return z / (1.0 + std::exp(-z));
    case Activation::gelu: return z * 0.5 * (1.0 + std::erf(z * std::sqrt(0.5)));
    default: return z;
  }
}

double derivative(Activation activation, double z, double slope) {
  switch (activation) {
    case Activation::relu: return z <= 0.0 ? 0.0 : 1.0;
    case Activation::leaky_relu: return z > 0.0 ? 1.0 : slope;
    case Activation::silu: {
      const double sigmoid = 1.0 / (1.0 + std::exp(-z));
      return sigmoid * (1.0 + z * (1.0 - sigmoid));
    }
    case Activation::gelu:
      return 0.5 * (1.0 + std::erf(z * std::sqrt(0.5))) +
             z * std::exp(-0.5 * z * z) / std::sqrt(2.0 * M_PI);
    default: return 1.0;
  }
}

// ---- A case's buffers, what it ran to, and the checks of that.

template <typename T>
class Run {
  using C = compute_t<T>;

 public:
  explicit Run(const Case& c)
      : c(c),
        x(c.numel(), c.shift),
        residual(c.numel(), c.shift),
        y(c.numel(), c.shift ? c.shift + 1 : 0),
        weight(c.C, c.own_dtype, 1.0, 0.25, 11),
        bias(c.C, c.own_dtype, 0.25, 0.5, 12),
        running_mean(c.C, c.own_dtype, 0.5, 1.0, 13),
        running_var(c.C, c.own_dtype, 4.0, 0.5, 14),
        mean(c.C, 0),
        invstd(c.C, 0),
        gate((c.gate_bytes() + 3) / 4, 0),
        state(2, 0),
        batches(1, 0) {
    fill(x, c, 1);
    for (int64_t e = 0; e < c.numel(); ++e) {
      residual.data()[e] = reg_kernels::store<T>(static_cast<C>(draw(2, e)));
    }
    state.data()[0] = static_cast<int64_t>(kSeed);
    state.data()[1] = static_cast<int64_t>(kRngOffset);
    batches.data()[0] = 3;
  }

  std::string text() const { return std::string(driver::kName<T>) + " " + c.text(); }

  uint8_t* gate_bytes() { return reinterpret_cast<uint8_t*>(gate.data()); }
  bool gate_bit(int64_t e) { return gate_bytes()[e / 8] >> e % 8 & 1; }

  bool has_gate() const { return reg_kernels::has_gate(c.activation, c.residual, c.p > 0.0); }

  Chain chain(bool gated) {
    const RngState rng =
        c.on_device ? RngState{state.data(), 1, 2} : RngState{nullptr, kSeed, kRngOffset};
    return {c.activation, c.slope(), c.p > 0.0, rate(), rng, gated ? gate_bytes() : nullptr,
            c.mask_offset};
  }

  DropoutRate rate() const { return DropoutRate::from_probability(c.p); }

  BatchNormForward<T> forward_arguments() {
    BatchNormForward<T> a = {};
    a.x = x.data();
    a.residual = c.residual ? residual.data() : nullptr;
    a.y = y.data();
    if (c.affine) {
      a.weight = weight.values();
      a.bias = bias.values();
    }
    a.running_mean = running_mean.values();
    a.running_var = running_var.values();
    a.eps = kEps;
    a.chain = chain(has_gate());
    return a;
  }

  // The affine that both passes apply, as they compute it.
  ChannelAffine<C> affine(int64_t channel, double of_mean, double of_invstd) const {
    const double w = c.affine ? weight.at(channel) : 1.0, b = c.affine ? bias.at(channel) : 0.0;
    return ChannelAffine<C>::of(of_mean, of_invstd, w, b);
  }

  BatchNormForward<T> training_arguments() {
    BatchNormForward<T> a = forward_arguments();
    a.num_batches_tracked = batches.data();
    a.momentum = c.averages ? std::nan("") : 0.125;
    a.averages = c.averages;
    a.mean = mean.data();
    a.invstd = invstd.data();
    return a;
  }

  BatchNormForward<T> launch_training() {
    BatchNormForward<T> a = training_arguments();
    reg_kernels::cuda::launch_batch_norm(a, c.layout(), c.numel(), allocator.function(), nullptr);
    return a;
  }

  // As the second of three ranks, of which the last has no values.
  void train_across() {
    Buffer<double> gathered(12 * c.C, 0);
    double* own = gathered.data() + 4 * c.C;
    std::fill_n(own + 4 * c.C, 4 * c.C, 0.0);
    BatchNormForward<T> a = {};
    a.x = x.data();
    a.moments = own;
    reg_kernels::cuda::launch_batch_norm(a, c.layout(), c.numel(), allocator.function(), nullptr);
    const auto pool = [&](int64_t channel) {
      ChannelMoments all{{7.0, 0.5 * static_cast<double>(channel) - 1.0, 3.0}};
      const ChannelMoments here = exact_moments(channel);
      const double n = all.count + here.count, delta = here.mean - all.mean;
      all.mean += delta * here.count / n;
      all.m2 += here.m2 + delta * delta * all.count * here.count / n;
      all.count = n;
      return all;
    };
    for (int64_t channel = 0; channel < c.C; ++channel) {
      gathered.data()[channel] = 7.0;
      gathered.data()[c.C + channel] = 0.5 * static_cast<double>(channel) - 1.0;
      gathered.data()[2 * c.C + channel] = 0.0;
      gathered.data()[3 * c.C + channel] = 3.0;
      const ChannelMoments of = exact_moments(channel);
      const auto describe = [&] { return "moments " + text(); };
      const double variance = of.m2 / of.count;
      driver::expect(own[channel] == of.count, describe);
      expect_near(own[c.C + channel], of.mean,
                  8.0 * kEpsilon<T> * std::sqrt(variance) + 0x1p-50 * std::abs(of.mean), describe);
      driver::expect(std::abs(own[2 * c.C + channel]) <= 0x1p-53 * std::abs(of.mean), describe);
      expect_near(own[3 * c.C + channel], of.m2,
                  16.0 * kEpsilon<T> * of.m2 + 0x1p-90 * of.mean * of.mean * of.count, describe);
    }
    const Channels<T> mean_before = running_mean, var_before = running_var;
    batches.data()[0] = 3;
    reg_kernels::cuda::launch_batch_norm_of_ranks(training_arguments(), {gathered.data(), 3},
                                                  c.layout(), c.numel(), nullptr);
    check_statistics(mean_before, var_before, pool);
    check_output(true);
    check_gate();
  }

  // With what a training left: by sums of two ranks that have the same batch, what the kernel makes
  // that sums for itself, but for the order in which factors are multiplied.
  void backward_across(bool wants_residual) {
    Buffer<T> grad_output(c.numel(), c.shift), grad_residual(c.numel(), 0);
    for (int64_t e = 0; e < c.numel(); ++e) {
      grad_output.data()[e] = reg_kernels::store<T>(static_cast<C>(draw(3, e)));
    }
    Buffer<T> expected(c.numel(), 0), grad_input(c.numel(), c.shift);
    Buffer<double> sums(2 * c.C + 1, 0);
    BatchNormBackward<T> a = {};
    a.grad_output = grad_output.data();
    a.x = x.data();
    if (c.affine) {
      a.weight = weight.values();
      a.bias = bias.values();
    }
    a.mean = mean.data();
    a.invstd = invstd.data();
    a.training = true;
    a.chain = chain(has_gate());
    if (c.residual && a.needs_z()) a.residual = residual.data();
    const auto launch = [&] {
      reg_kernels::cuda::launch_batch_norm_backward(a, c.layout(), c.numel(), allocator.function(),
                                                    nullptr);
    };
    a.grad_input = expected.data();
    launch();
    a.grad_input = nullptr;
    a.grad_bias = {sums.data(), DType::float64};
    a.grad_weight = {sums.data() + c.C, DType::float64};
    a.values = sums.data() + 2 * c.C;
    launch();
    driver::expect(*a.values == static_cast<double>(c.count()),
                   [&] { return "number of values " + text(); });
    for (int64_t i = 0; i < sums.size(); ++i) sums.data()[i] *= 2.0;
    a.grad_bias = a.grad_weight = {};
    a.values = nullptr;
    a.sums = sums.data();
    a.grad_input = grad_input.data();
    a.grad_residual = wants_residual ? grad_residual.data() : nullptr;
    launch();
    double largest = 0.0;
    for (int64_t e = 0; e < c.numel(); ++e) {
      largest = std::max<double>(largest, std::abs(reg_kernels::load(expected.data()[e])));
    }
    for (int64_t e = 0; e < c.numel(); ++e) {
      const double value = reg_kernels::load(expected.data()[e]);
      expect_near(reg_kernels::load(grad_input.data()[e]), value,
                  4.0 * kEpsilon<T> * largest + 2.0 * kRounding<T> * std::abs(value) + kTiny<T>,
                  [&] { return "grad_input across " + text() + " element " + std::to_string(e); });
    }
  }

  void train() {
    const Channels<T> mean_before = running_mean, var_before = running_var;
    BatchNormForward<T> a = launch_training();
    check_statistics(mean_before, var_before, [&](int64_t c) { return exact_moments(c); });
    check_output(true);
    check_gate();

    // Once more: the same bits.
    Buffer<T> again(c.numel(), 0);
    Buffer<double> mean_again(c.C, 0), invstd_again(c.C, 0);
    Buffer<uint32_t> gate_again(gate.size(), 0);
    std::vector<T> first(y.data(), y.data() + c.numel());
    a.running_mean = a.running_var = {};
    a.num_batches_tracked = nullptr;
    a.averages = false;
    a.mean = mean_again.data();
    a.invstd = invstd_again.data();
    if (a.chain.gate) a.chain.gate = reinterpret_cast<uint8_t*>(gate_again.data());
    reg_kernels::cuda::launch_batch_norm(a, c.layout(), c.numel(), allocator.function(), nullptr);
    const auto describe = [&] { return "repeated " + text(); };
    driver::expect_same_bits(y, first.data(), describe);
    driver::expect_same_bits(mean_again, mean.data(), describe);
    driver::expect_same_bits(invstd_again, invstd.data(), describe);
    for (int64_t e = 0; a.chain.gate && e < c.numel(); ++e) {
      driver::expect((a.chain.gate[e / 8] >> e % 8 & 1) == gate_bit(e), describe);
    }
  }

  void infer() {
    BatchNormForward<T> a = forward_arguments();
    a.chain.drops = false;
    a.chain.gate = nullptr;
    for (int64_t channel = 0; channel < c.C; ++channel) {
      mean.data()[channel] = running_mean.at(channel);
      invstd.data()[channel] = 1.0 / std::sqrt(running_var.at(channel) + kEps);
    }
    reg_kernels::cuda::launch_batch_norm_inference(a, c.layout(), c.numel(), nullptr);
    check_output(false);
  }

  // With what `train` or `infer` left.
  void backward(bool training, bool wants_input, bool wants_parameters, bool wants_residual) {
    const bool gated = training && has_gate();
    const bool drops = training && c.p > 0.0;
    Buffer<T> grad_output(c.numel(), c.shift);
    for (int64_t e = 0; e < c.numel(); ++e) {
      grad_output.data()[e] = reg_kernels::store<T>(static_cast<C>(draw(3, e)));
    }
    Buffer<T> grad_input(c.numel(), c.shift), grad_residual(c.numel(), 0);
    Channels<T> grad_weight(c.C, c.own_dtype, 0.0, 0.0, 0);
    Channels<T> grad_bias(c.C, !c.own_dtype, 0.0, 0.0, 0);
    BatchNormBackward<T> a = {};
    a.grad_output = grad_output.data();
    a.x = x.data();
    const bool needs_z = reg_kernels::needs_preactivation(c.activation, gated, drops);
    a.residual = c.residual && needs_z ? residual.data() : nullptr;
    if (c.affine) {
      a.weight = weight.values();
      a.bias = bias.values();
    }
    a.mean = mean.data();
    a.invstd = invstd.data();
    a.training = training;
    a.chain = chain(gated);
    a.chain.drops = drops;
    a.grad_input = wants_input ? grad_input.data() : nullptr;
    a.grad_residual = wants_residual ? grad_residual.data() : nullptr;
    if (wants_parameters) {
      a.grad_weight = grad_weight.values();
      a.grad_bias = grad_bias.values();
    }
    const auto launch = [&] {
      reg_kernels::cuda::launch_batch_norm_backward(a, c.layout(), c.numel(), allocator.function(),
                                                    nullptr);
    };
    launch();

    const double s = rate().scale;
    for (int64_t channel = 0; channel < c.C; ++channel) {
      const double m = mean.data()[channel], i = invstd.data()[channel];
      const double w = c.affine ? weight.at(channel) : 1.0;
      const auto f = affine(channel, m, i);
      const auto count = static_cast<double>(c.count());
      std::vector<double> d(c.count()), centred(c.count()), slack(c.count());
      std::vector<int64_t> elements(c.count());
      long double d_total = 0.0, dx_total = 0.0;
      double d_size = 0.0, dx_size = 0.0;
      for (int64_t k = 0; k < c.count(); ++k) {
        const int64_t e = elements[k] = c.index(k / c.L, channel, k % c.L);
        const double g = reg_kernels::load(grad_output.data()[e]);
        C z = f(reg_kernels::load(x.data()[e]));
        if (c.residual) z += reg_kernels::load(residual.data()[e]);
        double value = g;
        if (gated && c.activation == Activation::relu) {
          value = gate_bit(e) ? g * (drops ? s : 1.0) : 0.0;
        } else if (gated && c.activation == Activation::leaky_relu && !drops) {
          value = gate_bit(e) ? g : g * c.slope();
        } else {
          if (gated) value *= gate_bit(e) ? s : 0.0;
          value *= derivative(c.activation, z, c.slope());
        }
        d[k] = value;
        // Ten roundings of the factors, and what the roundings of z make of the derivative.
        slack[k] = 10.0 * kEpsilon<T> * std::abs(g) * (drops ? s : 1.0) * (1.0 + std::abs(z));
        if (!needs_z) slack[k] = 4.0 * kEpsilon<T> * std::abs(value);
        centred[k] = reg_kernels::load(x.data()[e]) - m;
        d_total += value;
        dx_total += value * centred[k];
        d_size += std::abs(value) + slack[k] / kEpsilon<T>;
        dx_size += (std::abs(value) + slack[k] / kEpsilon<T>)*std::abs(centred[k]);
      }
      const auto d_sum = static_cast<double>(d_total), dx_sum = static_cast<double>(dx_total);
      // A thread's sum has few terms here; its roundings and the elements' stay below these.
      const double d_error = 8.0 * kEpsilon<T> * d_size, dx_error = 8.0 * kEpsilon<T> * dx_size;
      const auto describe = [&](const char* what, int64_t e) {
        return std::string(what) + " " + text() + (training ? " training" : " frozen") +
               " channel " + std::to_string(channel) + " element " + std::to_string(e);
      };
      if (wants_parameters) {
        expect_near(grad_bias.at(channel), d_sum, d_error + grad_bias.rounding() * std::abs(d_sum),
                    [&] { return describe("grad_bias", -1); });
        expect_near(grad_weight.at(channel), dx_sum * i,
                    dx_error * i + grad_weight.rounding() * std::abs(dx_sum * i) + 1e-30,
                    [&] { return describe("grad_weight", -1); });
      }
      for (int64_t k = 0; k < c.count(); ++k) {
        const int64_t e = elements[k];
        if (wants_residual) {
          expect_near(reg_kernels::load(grad_residual.data()[e]), d[k],
                      slack[k] + kRounding<T> * (std::abs(d[k]) + slack[k]) + kTiny<T>,
                      [&] { return describe("grad_residual", e); });
        }
        if (wants_input) {
          const double factor = w * i, part = dx_sum * i * i / count * centred[k];
          const double expected = training ? factor * (d[k] - d_sum / count - part) : factor * d[k];
          double size = std::abs(d[k]);
          double error = slack[k];
          if (training) {
            size += std::abs(d_sum / count) + std::abs(part);
            error += d_error / count + dx_error * i * i / count * std::abs(centred[k]);
          }
          error += 8.0 * kEpsilon<T> * size;
          expect_near(
              reg_kernels::load(grad_input.data()[e]), expected,
              std::abs(factor) * error + kRounding<T> * std::abs(expected) * 1.01 + kTiny<T>,
              [&] { return describe("grad_input", e); });
        }
      }
    }

    // Once more: the same bits.
    const std::vector<T> input_before(grad_input.data(), grad_input.data() + c.numel());
    const std::vector<T> residual_before(grad_residual.data(), grad_residual.data() + c.numel());
    const Channels<T> weight_before = grad_weight, bias_before = grad_bias;
    launch();
    const auto describe = [&] { return "repeated backward " + text(); };
    driver::expect_same_bits(grad_input, input_before.data(), describe);
    driver::expect_same_bits(grad_residual, residual_before.data(), describe);
    driver::expect(grad_weight.same_bits(weight_before) && grad_bias.same_bits(bias_before),
                   describe);
  }

  const Case c;
  Buffer<T> x, residual, y;
  Channels<T> weight, bias, running_mean, running_var;
  Buffer<double> mean, invstd;
  Buffer<uint32_t> gate;
  Buffer<int64_t> state, batches;

 private:
  Allocator allocator;

  static constexpr double kEps = 1e-5;

  ChannelMoments exact_moments(int64_t channel) const {
    long double sum = 0.0, squares = 0.0;
    for (int64_t k = 0; k < c.count(); ++k) {
      sum += reg_kernels::load(x.data()[c.index(k / c.L, channel, k % c.L)]);
    }
    const auto m = static_cast<double>(sum / c.count());
    for (int64_t k = 0; k < c.count(); ++k) {
      const double value = reg_kernels::load(x.data()[c.index(k / c.L, channel, k % c.L)]);
      squares += (value - m) * (value - m);
    }
    return {{static_cast<double>(c.count()), m, static_cast<double>(squares)}};
  }

  // `pool`: the moments of a channel that it was normalised by.
  template <typename Pool>
  void check_statistics(const Channels<T>& mean_before, const Channels<T>& var_before,
                        const Pool& pool) {
    driver::expect(batches.data()[0] == 4, [&] { return "num_batches_tracked " + text(); });
    for (int64_t channel = 0; channel < c.C; ++channel) {
      const ChannelMoments of = pool(channel);
      const double m = of.mean, variance = of.m2 / of.count, unbiased = of.m2 / (of.count - 1.0);
      const auto describe = [&](const char* what) {
        return std::string(what) + " of channel " + std::to_string(channel) + " " + text();
      };
      // Eight roundings beside the deviation, not beside the mean; double's own for both.
      const double mean_error = 8.0 * kEpsilon<T> * std::sqrt(variance) + 0x1p-50 * std::abs(m);
      const double var_error = 16.0 * kEpsilon<T> * variance + 0x1p-50 * std::abs(m * m) * 0x1p-40;
      expect_near(mean.data()[channel], m, mean_error, [&] { return describe("mean"); });
      const double expected = 1.0 / std::sqrt(variance + kEps);
      expect_near(invstd.data()[channel], expected,
                  (var_error / (variance + kEps) + 0x1p-50) * expected,
                  [&] { return describe("invstd"); });
      const double factor = c.averages ? 0.25 : 0.125;
      const double running = (1.0 - factor) * mean_before.at(channel) + factor * m;
      expect_near(running_mean.at(channel), running,
                  mean_error + running_mean.rounding() * std::abs(running),
                  [&] { return describe("running_mean"); });
      const double moved = (1.0 - factor) * var_before.at(channel) + factor * unbiased;
      if (std::abs(moved) < 6e4 || sizeof(T) > 2) {
        expect_near(running_var.at(channel), moved,
                    2.0 * var_error + running_var.rounding() * std::abs(moved) * 1.01,
                    [&] { return describe("running_var"); });
      }
    }
  }

  // From the statistics in mean and invstd, checked by themselves.
  void check_output(bool training) {
    const uint32_t threshold = rate().threshold;
    const bool drops = training && c.p > 0.0;
    for (int64_t e = 0; e < c.numel(); ++e) {
      const int64_t channel = c.channel(e);
      const double w = c.affine ? weight.at(channel) : 1.0, b = c.affine ? bias.at(channel) : 0.0;
      const double m = mean.data()[channel], factor = invstd.data()[channel] * w;
      const double value = reg_kernels::load(x.data()[e]);
      const double added =
          c.residual ? static_cast<double>(reg_kernels::load(residual.data()[e])) : 0.0;
      const double z = (value - m) * factor + b + added;
      const double size = std::abs((value - m) * factor) + std::abs(b) + std::abs(added);
      double expected = activate(c.activation, z, c.slope());
      double error = 8.0 * kEpsilon<T> * size * 1.2;
      const double actual = reg_kernels::load(y.data()[e]);
      if (drops) {
        const bool kept = keeps(c.mask_offset + e, threshold);
        driver::expect(kept || actual == 0.0, [&] { return "mask of " + text(); });
        expected *= kept ? rate().scale : 0.0;
        error *= kept ? rate().scale : 0.0;
      }
      expect_near(
          actual, expected, error + kRounding<T> * (std::abs(expected) + error) + kTiny<T>, [&] {
            return (training ? "output " : "inference ") + text() + " element " + std::to_string(e);
          });
    }
    driver::expect(y.untouched(), [&] { return text() + ": wrote in front of its output"; });
  }

  void check_gate() {
    if (!has_gate()) return;
    const bool drops = c.p > 0.0;
    for (int64_t e = 0; e < c.numel(); ++e) {
      const int64_t channel = c.channel(e);
      C z = affine(channel, mean.data()[channel],
                   invstd.data()[channel])(reg_kernels::load(x.data()[e]));
      if (c.residual) z += reg_kernels::load(residual.data()[e]);
      bool bit = !drops || keeps(c.mask_offset + e, rate().threshold);
      if (c.activation == Activation::relu) bit = bit && !(z <= C(0));
      if (c.activation == Activation::leaky_relu && !drops) bit = z > C(0);
      driver::expect(gate_bit(e) == bit,
                     [&] { return "gate of " + text() + " element " + std::to_string(e); });
    }
  }
};

// ---- Which cases.

// A GPU so small that tensors of a few thousand elements fill it. Multiprocessors, and what one has
// of shared memory.
void play(int multiprocessors, int shared_bytes) {
  cuda_on_cpu::device = {multiprocessors, 128, shared_bytes, shared_bytes - 1024, 1024};
}

template <typename T>
void run(const Case& c, int turn) {
  Run<T> run(c);
  run.train();
  // What is wanted, in turn; each needs something else of the kernels.
  run.backward(true, true, true, turn % 2 == 0);
  if (turn % 3 == 0) run.backward(true, true, false, false);
  if (turn % 3 == 1) run.backward(true, false, true, true);
  if (turn % 3 == 2) run.backward(true, false, false, true);
  if (turn % 2 == 0) {
    run.train_across();
    run.backward_across(turn % 4 == 0);
  }
  if (c.data != Data::usual) return;
  run.infer();
  run.backward(false, true, turn % 2 == 0, turn % 3 == 0);
  if (turn % 4 == 0) run.backward(false, true, false, true);
}

constexpr Activation kActivations[] = {Activation::none, Activation::relu, Activation::leaky_relu,
                                       Activation::silu, Activation::gelu};

struct Shape {
  int64_t N, C, L;
};

// Several blocks an item. On the GPU that is played, one block keeps 2048 vectors of x, and three
// of that size, or six of half of it, run at once.
template <typename T>
void test_sharing(int& turn) {
  constexpr int64_t V = reg_kernels::cuda::kVector<T>;
  struct Sharing {
    int64_t vectors, items;  // of 16 bytes an item
    bool keeps_all;
    int64_t groups;
  };
  play(3, 40 * 1024);
  for (const Sharing& s :
       {Sharing{2240, 3, true, 2}, {2240, 2, true, 2}, {4000, 2, true, 1}, {7000, 1, false, 1}}) {
    for (const bool channels_last : {false, true}) {
      for (const bool ragged : {false, true}) {
        const int t = turn++;
        Case c{.N = 4,
               .C = channels_last ? s.items * 4 * V : s.items,
               .L = channels_last ? s.vectors / 16 : s.vectors * V / 4,
               .channels_last = channels_last,
               .activation = kActivations[t % 5],
               .residual = t % 3 == 0,
               .p = t % 4 == 1 ? 0.5 : 0.0,
               .averages = t % 2 == 0};
        if (ragged) (channels_last ? c.C : c.L) -= 3;
        Run<T> run(c);
        const auto plan = reg_kernels::cuda::forward_plan(
            run.forward_arguments(), c.layout(), c.numel(), reg_kernels::cuda::Chip::current());
        driver::expect(
            plan.blocks > 1 && plan.items == s.items &&
                // The residual's own ring leaves less to keep.
                (c.residual || ((plan.ring == 0) == s.keeps_all && plan.groups == s.groups)),
            [&] {
              return "plan of " + run.text() + ": blocks " + std::to_string(plan.blocks) +
                     " ring " + std::to_string(plan.ring) + " groups " +
                     std::to_string(plan.groups) + " items " + std::to_string(plan.items);
            });
        ::run<T>(c, t);
      }
    }
  }
  for (const Data data : {Data::far_mean, Data::outlier, Data::constant}) {
    for (const bool channels_last : {false, true}) {
      Case c{4, 3, 600 * V, channels_last, Activation::none, false, 0.0, data};
      if (channels_last) c = {4, 12 * V, 150, true, Activation::none, false, 0.0, data};
      run<T>(c, turn++);
    }
  }
}

// What is not finite stays in its channel, and next to it nothing changes.
template <typename T>
void test_not_finite() {
  using C = compute_t<T>;
  for (const Shape& s : {Shape{3, 8, 49}, {5, 8, 24}, {4, 5, 9000 / (4 * 5) * 5}}) {
    for (const bool channels_last : {false, true}) {
      const Case c{s.N, s.C, s.L, channels_last, Activation::relu, false, 0.0};
      Run<T> clean(c), dirty(c);
      const auto put = [&](int64_t n, int64_t channel, int64_t l, double value) {
        dirty.x.data()[c.index(n, channel, l)] = reg_kernels::store<T>(static_cast<C>(value));
      };
      put(1, 1, c.L / 2, std::nan(""));
      put(1, 2, 0, kInfinity);
      put(2, 3, c.L - 1, -kInfinity);
      put(0, 4, 0, kInfinity);
      put(1, 4, c.L / 2, kInfinity);
      put(2, 4, 1, -kInfinity);
      for (Run<T>* r : {&clean, &dirty}) r->launch_training();
      const double means[] = {0.0, std::nan(""), kInfinity, -kInfinity, std::nan("")};
      const auto describe = [&] { return "not finite " + dirty.text(); };
      for (int64_t e = 0; e < c.numel(); ++e) {
        const int64_t channel = c.channel(e);
        driver::expect(channel >= 1 && channel <= 4
                           ? std::isnan(reg_kernels::load(dirty.y.data()[e]))
                           : !std::memcmp(dirty.y.data() + e, clean.y.data() + e, sizeof(T)),
                       describe);
      }
      for (int64_t channel = 0; channel < c.C; ++channel) {
        if (channel >= 1 && channel <= 4) {
          expect_near(dirty.mean.data()[channel], means[channel], 0.0, describe);
          expect_near(dirty.running_mean.at(channel), means[channel], 0.0, describe);
          driver::expect(std::isnan(dirty.invstd.data()[channel]), describe);
        } else {
          expect_near(dirty.mean.data()[channel], clean.mean.data()[channel], 0.0, describe);
          expect_near(dirty.invstd.data()[channel], clean.invstd.data()[channel], 0.0, describe);
        }
      }
    }
  }
}

template <typename T>
void test_dtype() {
  int turn = 0;
  const auto next = [&](const Shape& s, bool channels_last) {
    const int t = turn++;
    run<T>({.N = s.N,
            .C = s.C,
            .L = s.L,
            .channels_last = channels_last,
            .activation = kActivations[t % 5],
            .residual = t / 2 % 2 == 1,
            .p = t % 3 == 0   ? 0.0
                 : t % 3 == 1 ? 0.5
                              : 0.1,
            .shift = t % 7 == 3 ? 1 : 0,
            .affine = t % 11 != 5,
            .own_dtype = t % 4 == 1,
            .averages = t % 5 == 2,
            .on_device = t % 2 == 0,
            .mask_offset = t % 4 == 3 ? (int64_t{1} << 40) + t : t % 4 * 8},
           t);
  };

  // One block an item, whatever the shape.
  play(4, 100 * 1024);
  for (const bool channels_last : {false, true}) {
    for (const Shape& s : {Shape{2, 1, 1},
                           {5, 3, 1},
                           {2, 3, 3},
                           {3, 8, 8},
                           {4, 16, 9},
                           {3, 13, 49},
                           {2, 24, 196},
                           {2, 9, 257},
                           {1, 5, 1003},
                           {70, 40, 16},
                           {129, 67, 1}}) {
      next(s, channels_last);
    }
  }
  // All activations, with and without residual and dropout.
  for (const bool channels_last : {false, true}) {
    for (const Activation activation : kActivations) {
      for (const bool residual : {false, true}) {
        for (const double p : {0.0, 0.25}) {
          run<T>({3, 16, 24, channels_last, activation, residual, p}, turn++);
        }
      }
    }
    run<T>({3, 8, 24, channels_last, Activation::silu, true, 1.0}, turn++);
    run<T>({3, 8, 24, channels_last, Activation::relu, false, 1.0}, turn++);
  }
  test_sharing<T>(turn);
  test_not_finite<T>();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  test_dtype<double>();
  test_dtype<float>();
  test_dtype<driver::float16>();
  test_dtype<driver::bfloat16>();
  return driver::finish();
}
