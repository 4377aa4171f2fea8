// What BatchNorm does to a tile: up to kTile elements that lie side by side.
//
// Everything but the plain cases goes through the first-level cache, one stage after the other, so
// that the stages need not be compiled in every combination.
#pragma once

#include "batch_norm.h"
#include "lanes.h"
#include "random.h"
#include "reg_kernels/batch_norm_math.h"
#include "reg_kernels/dropout_math.h"
#include "stream.h"

RK_NAMESPACE_BEGIN
namespace {

constexpr int64_t kColumns = 2048;  // the widest strip
constexpr int64_t kBlock = 16384;  // elements of a block: its gate is packed, its rows have a pivot
constexpr int64_t kStretch = 4096;  // values side by side that share a pivot
constexpr int64_t kRowsAtOnce = 4;

// Channel constants of a tile: one set for all of its elements, or a column of each.
template <typename C>
struct OneChannel {
  ChannelAffine<C> affine;
  ChannelGradient<C> gradient;

  RK_HD C apply(C x, int64_t) const { return affine(x); }
  RK_HD C input_gradient(C d, C x, int64_t) const { return gradient(d, x); }
  RK_HD C frozen_gradient(C d, int64_t) const { return d * gradient.k1; }
};

template <typename C>
struct ChannelColumns {
  const C *shift, *scale, *offset, *k1, *k2, *k3;

  RK_HD C apply(C x, int64_t i) const { return ChannelAffine<C>{shift[i], scale[i], offset[i]}(x); }
  RK_HD C input_gradient(C d, C x, int64_t i) const {
    return ChannelGradient<C>{shift[i], k1[i], k2[i], k3[i]}(d, x);
  }
  RK_HD C frozen_gradient(C d, int64_t i) const { return d * k1[i]; }
  RK_HD ChannelColumns from(int64_t i) const {
    return {shift + i, scale + i, offset + i, k1 + i, k2 + i, k3 + i};
  }
};

template <typename T>
struct Prefetch {
  const T *x, *also;  // also: or null
  int64_t lead;

  RK_HD void operator()(int64_t i, int64_t count) const {
    if (lead == 0) return;
    prefetch(x + i + lead, count);
    if (also) prefetch(also + i + lead, count);
  }
};

// A task with its types, and what is done to a tile of up to kTile elements in storage order.
template <typename T>
struct Typed {
  using C = compute_t<T>;

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

  // z, what the activation is applied to. Here and below, `lead` is how many elements on from these
  // to prefetch the same tensors, 0 for not at all.
  template <typename P>
  RK_HD void preactivation(const P& p, int64_t first, int64_t count, int64_t lead, C* z) const {
    const T *from = x + first, *added = residual + first;
    if (residual) {
      write_each(
          z, count, false,
          [=](int64_t i)
              __attribute__((always_inline)) { return p.apply(load(from[i]), i) + load(added[i]); },
          Prefetch<T>{from, added, lead});
    } else {
      write_each(
          z, count, false,
          [=](int64_t i) __attribute__((always_inline)) { return p.apply(load(from[i]), i); },
          Prefetch<T>{from, nullptr, lead});
    }
  }

  // y and, where `flags` is not null, its gate.
  template <typename P>
  void forward_tile(const P& p, int64_t first, int64_t count, int64_t lead, uint8_t* flags) {
    const T* from = x + first;
    if (!residual && !drops) {
      const C below = slope;
      for_activation(activation, [&]<Activation kActivation>() __attribute__((always_inline)) {
        write_each(
            y + first, count, task.stream,
            [=](int64_t i) __attribute__((always_inline)) {
              return store<T>(activate<kActivation>(p.apply(load(from[i]), i), below));
            },
            Prefetch<T>{from, nullptr, lead});
      });
      return;
    }
    alignas(64) C z[kTile];
    preactivation(p, first, count, lead, z);
    for_activation(activation, [&]<Activation kActivation>() __attribute__((always_inline)) {
      if (flags) {
        for (int64_t i = 0; i < count; ++i) {
          flags[i] = kActivation == Activation::relu         ? !(z[i] <= C(0))
                     : kActivation == Activation::leaky_relu ? drops || z[i] > C(0)
                                                             : true;
        }
      }
      if constexpr (kActivation != Activation::none) {
        const C below = slope;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) z[i] = activate<kActivation>(z[i], below);
      }
    });
    if (drops) {
      const uint16_t* drawn = draws.fill(rng, first, count);
      const uint16_t last = last_kept;
      const C kept = scale;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) z[i] *= drawn[i] <= last ? kept : C(0);
      if (flags) {
        const bool any = task.threshold != 0;
        for (int64_t i = 0; i < count; ++i) flags[i] &= any && drawn[i] <= last;
      }
    }
    const C* source = z;
    write_each(y + first, count, task.stream,
               [=](int64_t i) __attribute__((always_inline)) { return store<T>(source[i]); });
  }

  // The gradient behind the activation, in `buffer` or where it lies already.
  template <typename P>
  RK_HD const C* gradient_tile(const P& p, int64_t first, int64_t count, int64_t lead,
                               const uint8_t* flags, C* buffer) const {
    const T* from = grad_output + first;
    if constexpr (sizeof(T) == sizeof(C)) {
      if (activation == Activation::none && !flags) return from;
    }
    const C passed = scale, below = slope;
    const Prefetch<T> ahead{from, x + first, lead};
    if (!flags && !residual) {
      const T* values = x + first;
      for_activation(activation, [&]<Activation kActivation>() __attribute__((always_inline)) {
        write_each(
            buffer, count, false,
            [=](int64_t i) __attribute__((always_inline)) {
              const C g = load(from[i]);
              if constexpr (kActivation == Activation::none) return g;
              const C z = p.apply(load(values[i]), i);
              if constexpr (kActivation == Activation::relu) return z <= C(0) ? C(0) : g;
              return g * activation_derivative<kActivation>(z, below);
            },
            ahead);
      });
      return buffer;
    }
    if (!flags) {
      write_each(
          buffer, count, false,
          [=](int64_t i) __attribute__((always_inline)) { return load(from[i]); }, ahead);
    } else if (activation == Activation::relu) {
      write_each(
          buffer, count, false,
          [=](int64_t i)
              __attribute__((always_inline)) { return flags[i] ? load(from[i]) * passed : C(0); },
          ahead);
    } else {
      const C stopped = activation == Activation::leaky_relu && !drops ? below : C(0);
      write_each(
          buffer, count, false,
          [=](int64_t i) __attribute__((always_inline)) {
            return load(from[i]) * (flags[i] ? passed : stopped);
          },
          ahead);
    }
    if (!needs_preactivation(activation, flags != nullptr, drops)) return buffer;
    alignas(64) C z[kTile];
    preactivation(p, first, count, residual ? lead : 0, z);
    for_activation(activation, [&]<Activation kActivation>() __attribute__((always_inline)) {
      if constexpr (kActivation == Activation::relu) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) buffer[i] = z[i] <= C(0) ? C(0) : buffer[i];
      } else if constexpr (kActivation != Activation::none) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          buffer[i] *= activation_derivative<kActivation>(z[i], below);
        }
      }
    });
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
      write_each(
          grad_residual + first, count, task.stream,
          [=](int64_t i) __attribute__((always_inline)) { return store<T>(d[i]); }, ahead);
      ahead.lead = 0;
    }
    if (grad_input && task.training) {
      write_each(
          grad_input + first, count, task.stream,
          [=](int64_t i) __attribute__((always_inline)) {
            return store<T>(p.input_gradient(d[i], load(from[i]), i));
          },
          ahead);
    } else if (grad_input) {
      write_each(
          grad_input + first, count, task.stream,
          [=](int64_t i)
              __attribute__((always_inline)) { return store<T>(p.frozen_gradient(d[i], i)); },
          ahead);
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
