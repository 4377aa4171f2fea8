// What BatchNorm does to a tile: elements that lie side by side.
//
// Everything but the plain cases goes through the first-level cache, one stage after the other, so
// that the stages (batch_norm_stages.h) need not be compiled in every combination.
#pragma once

#include "batch_norm.h"
#include "batch_norm_stages.h"
#include "random.h"
#include "reg_kernels/dropout_math.h"

RK_NAMESPACE_BEGIN
namespace {

constexpr int64_t kColumns = 2048;  // the widest strip
constexpr int64_t kBlock = 16384;  // elements of a block: its gate is packed, its rows have a pivot
constexpr int64_t kStretch = 4096;  // values side by side that share a pivot
constexpr int64_t kRowsAtOnce = 4;

// A task with its types, and what is done to a tile in storage order.
template <typename T>
struct Typed {
  using C = compute_t<T>;
  using L = loop_t<T>;
  static constexpr bool kWidens = sizeof(L) != sizeof(T);
  static constexpr int64_t kWide = kWidens ? kTile : 1;  // of a buffer that those need alone

  const BatchNormTask& task;
  const T *x, *residual, *grad_output;
  T *y, *grad_input, *grad_residual;
  Activation activation;
  C slope;
  bool drops;
  C scale;             // of dropout
  uint16_t last_kept;  // half-word < threshold, as <= in 16 bits
  RngStream rng;
  Draws draws;

  explicit Typed(const BatchNormTask& task)
      : task(task),
        x(static_cast<const T*>(task.x)),
        residual(static_cast<const T*>(task.residual)),
        grad_output(static_cast<const T*>(task.grad_output)),
        y(static_cast<T*>(task.y)),
        grad_input(static_cast<T*>(task.grad_input)),
        grad_residual(static_cast<T*>(task.grad_residual)),
        activation(static_cast<Activation>(task.activation)),
        slope(static_cast<C>(task.slope)),
        drops(task.drops),
        scale(static_cast<C>(task.drops ? task.scale : 1.0)),
        last_kept(static_cast<uint16_t>(task.threshold ? task.threshold - 1 : 0)),
        rng(kDropoutTag, task.seed, task.offset) {}

  ~Typed() {
    if (task.stream) stream_fence();
  }

  // Elements of a tile at the most: few enough to stay in the first-level cache from one stage to
  // the next, or more where there is one loop alone.
  int64_t tile(bool forward) const {
    const bool alone = forward
                           ? !kWidens && !residual && !drops
                           : sizeof(T) == sizeof(C) && activation == Activation::none && !task.gate;
    return alone ? kColumns : kTile;
  }

  // Elements as loops read them: where they lie, or widened into a buffer, which asks for those
  // ahead.
  static const L* as_loops_read(const T* from, int64_t count, [[maybe_unused]] C* buffer,
                                [[maybe_unused]] const Prefetch<T>& ahead) {
    if constexpr (kWidens) {
      widen(from, count, buffer, ahead);
      return buffer;
    } else {
      return from;
    }
  }

  // to[i] = from[i], rounded.
  RK_HD void write_rounded(const C* from, int64_t count, T* to, const Prefetch<T>& ahead) const {
    write_each(to, count, task.stream, Narrowed<T>{from}, ahead);
  }

  // What is left to ask for once they are read.
  static Prefetch<L> after_reading([[maybe_unused]] const Prefetch<T>& ahead) {
    if constexpr (kWidens) {
      return {};
    } else {
      return ahead;
    }
  }

  // What the activation is applied to. Here and below, `lead` is how many elements on from these to
  // prefetch the same tensors, 0 for not at all.
  template <typename P>
  RK_HD void preactivation(const P& p, int64_t first, int64_t count, int64_t lead, C* z) const {
    const T *from = x + first, *added = residual ? residual + first : nullptr;
    alignas(64) C wide[kWide];
    const L* values = as_loops_read(from, count, z, {from, added, lead});
    const L* beside = added ? as_loops_read(added, count, wide, {}) : nullptr;
    preactivate<L>(p, values, beside, count, z, kWidens ? 0 : lead);
  }

  // y and, where `flags` is not null, its gate.
  template <typename P>
  void forward_tile(const P& p, int64_t first, int64_t count, int64_t lead, uint8_t* flags) {
    const T* from = x + first;
    if (!residual && !drops) {
      if constexpr (kWidens) {
        alignas(64) C wide[kWide];
        widen(from, count, wide, Prefetch<T>{from, nullptr, lead});
        map_activated<L>(p, activation, slope, wide, count, wide, false, 0);
        narrow(wide, count, y + first, task.stream, Prefetch<T>{});
      } else {
        map_activated<L>(p, activation, slope, from, count, y + first, task.stream, lead);
      }
      return;
    }
    alignas(64) C z[kTile];
    preactivation(p, first, count, lead, z);
    activate_tile(activation, slope, drops, count, z, flags);
    if (drops) {
      const uint16_t* drawn = draws.fill(rng, first, count);
      drop_tile(drawn, last_kept, task.threshold != 0, scale, count, z, flags);
    }
    write_rounded(z, count, y + first, Prefetch<T>{});
  }

  // The gradient behind the activation, in `buffer` or where it lies already.
  template <typename P>
  RK_HD const C* gradient_tile(const P& p, int64_t first, int64_t count, int64_t lead,
                               const uint8_t* flags, C* buffer) const {
    const T* given = grad_output + first;
    const bool plain = activation == Activation::none && !flags;
    if constexpr (sizeof(T) == sizeof(C)) {
      if (plain) return given;
    }
    const Prefetch<T> ahead{given, x + first, lead};
    const L* grad = as_loops_read(given, count, buffer, ahead);
    if (kWidens && plain) return buffer;
    if (!flags && !residual) {
      alignas(64) C wide[kWide];
      const L* from = as_loops_read(x + first, count, wide, {});
      differentiate<L>(p, activation, slope, grad, from, count, buffer, kWidens ? 0 : lead);
      return buffer;
    }
    if (flags) {
      const C stopped = activation == Activation::leaky_relu && !drops ? slope : C(0);
      pass_gate<L>(flags, activation == Activation::relu, scale, stopped, grad, count, buffer,
                   after_reading(ahead));
    } else if (!kWidens) {
      widen(given, count, buffer, ahead);
    }
    if (!needs_preactivation(activation, flags != nullptr, drops)) return buffer;
    alignas(64) C z[kTile];
    preactivation(p, first, count, residual ? lead : 0, z);
    chain_derivative(activation, slope, z, count, buffer);
    return buffer;
  }

  template <typename P>
  void backward_tile(const P& p, int64_t first, int64_t count, int64_t lead,
                     const uint8_t* flags) const {
    alignas(64) C buffer[kTile];
    const C* d = gradient_tile(p, first, count, lead, flags, buffer);
    const T* from = x + first;
    // A tile of its own has prefetched already.
    Prefetch<T> ahead{grad_output + first, from, d == buffer ? 0 : lead};
    if (grad_residual) {
      write_rounded(d, count, grad_residual + first, ahead);
      ahead.lead = 0;
    }
    if (!grad_input) return;
    alignas(64) C wide[kWide];
    const L* values = as_loops_read(from, count, wide, ahead);
    if constexpr (kWidens) {
      input_gradient<L>(p, task.training, d, values, count, wide, false, {});
      narrow(wide, count, grad_input + first, task.stream, Prefetch<T>{});
    } else {
      input_gradient<L>(p, task.training, d, values, count, grad_input + first, task.stream, ahead);
    }
  }
};

RK_HD double finite_or_zero(double value) { return value - value == 0.0 ? value : 0.0; }

// The median of three values, or 0 where that is not finite: close enough to the mean for sums of
// differences from it to keep their digits, one huge outlier or not.
RK_HD double pivot_of(double a, double b, double c) {
  const double low = a < b ? a : b, high = a < b ? b : a;
  const double capped = high < c ? high : c;
  const double median = low > capped ? low : capped;
  return finite_or_zero(median);
}

// About the mean of some values, by the first three of `count` that lie `step` apart. The first
// ones of a channel, or of a column of it, are also what the means of its parts are kept as
// differences from until they are merged: a mean that is large beside the deviation costs them no
// digits then.
template <typename T>
RK_HD double base_at(const T* x, int64_t step, int64_t count) {
  return pivot_of(load(x[0]), load(x[min(1, count - 1) * step]), load(x[min(2, count - 1) * step]));
}

RK_HD Moments<double> moments_of_sums(int64_t count, double pivot, double sum, double squares) {
  const double n = static_cast<double>(count);
  return {count, pivot + sum / n, squares - sum * (sum / n)};
}

}  // namespace
RK_NAMESPACE_END
