// What BatchNorm does to a tile: up to kTile elements that lie side by side.
//
// Everything but the plain cases goes through the first-level cache, one stage after the other, so
// that the stages need not be compiled in every combination. Elements of 16 bits are widened to
// floats first and rounded last: the loops between are those of float.
#pragma once

#include "batch_norm.h"
#include "lanes.h"
#include "narrow.h"
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

// Up to kTile elements in storage order, as loops compute with them.
template <typename C>
struct Tile {
  int64_t first, count;
  int64_t lead;  // how many elements on from these to prefetch the same tensors, 0 for not at all
  // What is not there or not read is null.
  const C *x = nullptr, *residual = nullptr, *grad_output = nullptr;
};

// The loops over a tile in a type that is computed in, with what they depend on.
template <typename C>
struct TileLoops {
  Activation activation;
  C slope;
  bool drops, keeps_any;
  C scale;             // of dropout
  uint16_t last_kept;  // half-word < threshold, as <= in 16 bits
  bool training;
  RngStream rng;
  Draws draws;

  explicit TileLoops(const BatchNormTask& task)
      : activation(static_cast<Activation>(task.activation)),
        slope(static_cast<C>(task.slope)),
        drops(task.drops),
        keeps_any(task.threshold != 0),
        scale(static_cast<C>(task.drops ? task.scale : 1.0)),
        last_kept(static_cast<uint16_t>(task.threshold ? task.threshold - 1 : 0)),
        training(task.training),
        rng(kDropoutTag, task.seed, task.offset) {}

  // Whether a backward reads x and the residual for z, what the activation is applied to.
  bool reads_z(const uint8_t* flags) const {
    return needs_preactivation(activation, flags != nullptr, drops);
  }

  template <typename P>
  RK_HD void preactivation(const P& p, const Tile<C>& tile, int64_t lead, C* z) const {
    const C *x = tile.x, *residual = tile.residual;
    if (residual) {
      write_each(
          z, tile.count, false, [=](int64_t i) RK_INLINE { return p.apply(x[i], i) + residual[i]; },
          Prefetch<C>{x, residual, lead});
    } else {
      write_each(
          z, tile.count, false, [=](int64_t i) RK_INLINE { return p.apply(x[i], i); },
          Prefetch<C>{x, nullptr, lead});
    }
  }

  // y, which may be where x is, and, where `flags` is not null, its gate.
  template <typename P>
  RK_STAGE void forward(const P& p, const Tile<C>& tile, C* y, bool stream, uint8_t* flags) {
    const int64_t count = tile.count;
    const C below = slope;
    if (!tile.residual && !drops) {
      const C* x = tile.x;
      for_activation(activation, [&]<Activation kActivation>() RK_INLINE {
        write_each(
            y, count, stream,
            [=](int64_t i) RK_INLINE { return activate<kActivation>(p.apply(x[i], i), below); },
            Prefetch<C>{x, nullptr, tile.lead});
      });
      return;
    }
    alignas(64) C z[kTile];
    preactivation(p, tile, tile.lead, z);
    for_activation(activation, [&]<Activation kActivation>() RK_INLINE {
      if (flags) {
        for (int64_t i = 0; i < count; ++i) {
          flags[i] = kActivation == Activation::relu         ? !(z[i] <= C(0))
                     : kActivation == Activation::leaky_relu ? drops || z[i] > C(0)
                                                             : true;
        }
      }
      if constexpr (kActivation != Activation::none) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) z[i] = activate<kActivation>(z[i], below);
      }
    });
    if (drops) {
      const uint16_t* drawn = draws.fill(rng, tile.first, count);
      const uint16_t last = last_kept;
      const C kept = scale;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) z[i] *= drawn[i] <= last ? kept : C(0);
      if (flags) {
        for (int64_t i = 0; i < count; ++i) flags[i] &= keeps_any && drawn[i] <= last;
      }
    }
    const C* source = z;
    write_each(y, count, stream, [=](int64_t i) RK_INLINE { return source[i]; });
  }

  // The gradient behind the activation, in `buffer` or where it lies already.
  template <typename P>
  RK_HD const C* gradient(const P& p, const Tile<C>& tile, const uint8_t* flags, C* buffer) const {
    const C *from = tile.grad_output, *x = tile.x;
    const int64_t count = tile.count;
    if (activation == Activation::none && !flags) return from;
    const C passed = scale, below = slope;
    const Prefetch<C> ahead{from, x, tile.lead};
    if (!flags && !tile.residual) {
      for_activation(activation, [&]<Activation kActivation>() RK_INLINE {
        if constexpr (kActivation != Activation::none) {
          write_each(
              buffer, count, false,
              [=](int64_t i) RK_INLINE {
                const C g = from[i], z = p.apply(x[i], i);
                if constexpr (kActivation == Activation::relu) return z <= C(0) ? C(0) : g;
                return g * activation_derivative<kActivation>(z, below);
              },
              ahead);
        }
      });
      return buffer;
    }
    if (!flags) {
      write_each(buffer, count, false, [=](int64_t i) RK_INLINE { return from[i]; }, ahead);
    } else if (activation == Activation::relu) {
      write_each(
          buffer, count, false,
          [=](int64_t i) RK_INLINE { return flags[i] ? from[i] * passed : C(0); }, ahead);
    } else {
      const C stopped = activation == Activation::leaky_relu && !drops ? below : C(0);
      write_each(
          buffer, count, false,
          [=](int64_t i) RK_INLINE { return from[i] * (flags[i] ? passed : stopped); }, ahead);
    }
    if (!reads_z(flags)) return buffer;
    alignas(64) C z[kTile];
    preactivation(p, tile, tile.residual ? tile.lead : 0, z);
    for_activation(activation, [&]<Activation kActivation>() RK_INLINE {
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
  RK_STAGE const C* gradient_apart(const P& p, const Tile<C>& tile, const uint8_t* flags,
                                   C* buffer) const {
    return gradient(p, tile, flags, buffer);
  }

  // The input's gradient, which may lie where x is, from the one behind the activation.
  template <typename P, typename Ahead>
  RK_HD void input_gradient(const P& p, const Tile<C>& tile, const C* d, C* y, bool stream,
                            const Ahead& ahead) const {
    const C* x = tile.x;
    if (training) {
      write_each(
          y, tile.count, stream,
          [=](int64_t i) RK_INLINE { return p.input_gradient(d[i], x[i], i); }, ahead);
    } else {
      write_each(
          y, tile.count, stream, [=](int64_t i) RK_INLINE { return p.frozen_gradient(d[i], i); },
          ahead);
    }
  }
};

// Where a tile of 16 bits is widened to, and the gradient behind the activation of any tile.
template <typename T>
struct TileSpace {
  static constexpr bool kWidens = sizeof(T) != sizeof(compute_t<T>);
  static constexpr int64_t kWide = kWidens ? kTile : 1;

  alignas(64) compute_t<T> d[kTile];
  alignas(64) compute_t<T> x[kWide], residual[kWide];
};

// A task with its types, and what is done to a tile of up to kTile elements in storage order.
template <typename T>
struct Typed {
  using C = compute_t<T>;
  static constexpr bool kWidens = TileSpace<T>::kWidens;

  TileLoops<C> loops;
  const T *x, *residual, *grad_output;
  T *y, *grad_input, *grad_residual;
  bool stream;

  explicit Typed(const BatchNormTask& task)
      : loops(task),
        x(static_cast<const T*>(task.x)),
        residual(static_cast<const T*>(task.residual)),
        grad_output(static_cast<const T*>(task.grad_output)),
        y(static_cast<T*>(task.y)),
        grad_input(static_cast<T*>(task.grad_input)),
        grad_residual(static_cast<T*>(task.grad_residual)),
        stream(task.stream) {}

  ~Typed() {
    if (stream) stream_fence();
  }

  // Elements as they are computed with: where they lie, or widened into a buffer, which asks for
  // those `lead` elements on.
  static RK_HD const C* wide(const T* from, int64_t count, int64_t lead, C* buffer) {
    if constexpr (kWidens) {
      widen(from, count, buffer, Prefetch<T>{from, nullptr, lead});
      return buffer;
    } else {
      return from;
    }
  }

  template <typename P>
  void forward_tile(const P& p, int64_t first, int64_t count, int64_t lead, uint8_t* flags) {
    TileSpace<T> space;
    Tile<C> tile{first, count, kWidens ? 0 : lead, wide(x + first, count, lead, space.x)};
    if (residual) tile.residual = wide(residual + first, count, lead, space.residual);
    if constexpr (kWidens) {
      loops.forward(p, tile, space.x, false, flags);
      narrow(space.x, count, y + first, stream, NothingAhead{});
    } else {
      loops.forward(p, tile, y + first, stream, flags);
    }
  }

  // A tile of a backward; `reads_x`: whether x is read for more than z.
  RK_HD Tile<C> backward_of(int64_t first, int64_t count, int64_t lead, bool reads_x,
                            const uint8_t* flags, TileSpace<T>& space) const {
    const bool reads_z = loops.reads_z(flags);
    Tile<C> tile{first, count, kWidens ? 0 : lead};
    if (!kWidens || reads_x || reads_z) tile.x = wide(x + first, count, lead, space.x);
    if (residual && reads_z) tile.residual = wide(residual + first, count, lead, space.residual);
    tile.grad_output = wide(grad_output + first, count, lead, space.d);
    return tile;
  }

  // The gradient behind the activation, in `space.d` or where it lies already.
  template <typename P>
  RK_HD const C* gradient(const P& p, const Tile<C>& tile, const uint8_t* flags,
                          TileSpace<T>& space) const {
    if constexpr (kWidens) return loops.gradient_apart(p, tile, flags, space.d);
    return loops.gradient(p, tile, flags, space.d);
  }

  template <typename P>
  void backward_tile(const P& p, int64_t first, int64_t count, int64_t lead,
                     const uint8_t* flags) const {
    TileSpace<T> space;
    const Tile<C> tile = backward_of(first, count, lead, loops.training, flags, space);
    const C* d = gradient(p, tile, flags, space);
    // A tile of its own has prefetched already.
    Prefetch<T> ahead{grad_output + first, x + first, d == space.d ? 0 : lead};
    if (grad_residual) {
      write_each(grad_residual + first, count, stream, Narrowed<T>{d}, ahead);
      ahead.lead = 0;
    }
    if (!grad_input) return;
    if constexpr (kWidens) {
      loops.input_gradient(p, tile, d, space.x, false, NothingAhead{});
      narrow(space.x, count, grad_input + first, stream, NothingAhead{});
    } else {
      loops.input_gradient(p, tile, d, grad_input + first, stream, ahead);
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
