// The loops that BatchNorm's tiles are made of, each compiled once for the types it is about.
//
// L is the type that a tensor's elements are read in: its own, or float, to which a float16 has
// been widened; C is the type that is computed in, and P the channel constants of a tile.
#pragma once

#include "lanes.h"
#include "narrow.h"
#include "reg_kernels/batch_norm_math.h"
#include "stream.h"

RK_NAMESPACE_BEGIN
namespace {

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
};

// `lead`: how many elements on from these to prefetch the same tensors, 0 for not at all.
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

// Calls `plain` for no activation and for relu, whose loops are short beside a call, and `other`
// for those that compute longer.
template <typename Plain, typename Other>
RK_HD void for_plain(Activation activation, const Plain& plain, const Other& other) {
  if (activation == Activation::none) {
    plain.template operator()<Activation::none>();
  } else if (activation == Activation::relu) {
    plain.template operator()<Activation::relu>();
  } else {
    other();
  }
}

template <typename F>
RK_HD void for_other(Activation activation, const F& f) {
  if (activation == Activation::leaky_relu) {
    f.template operator()<Activation::leaky_relu>();
  } else if (activation == Activation::silu) {
    f.template operator()<Activation::silu>();
  } else {
    f.template operator()<Activation::gelu>();
  }
}

// y = activation(x scale + offset) in one go.
template <Activation kActivation, typename L, typename P>
RK_HD void map_as(const P& p, compute_t<L> below, const L* x, int64_t count, L* y, bool stream,
                  int64_t lead) {
  write_each(
      y, count, stream,
      [=](int64_t i)
          RK_INLINE { return store<L>(activate<kActivation>(p.apply(load(x[i]), i), below)); },
      Prefetch<L>{x, nullptr, lead});
}

template <typename L, typename P>
RK_STAGE void map_other(const P& p, Activation activation, compute_t<L> below, const L* x,
                        int64_t count, L* y, bool stream, int64_t lead) {
  for_other(activation, [&]<Activation kActivation>() RK_INLINE {
    map_as<kActivation>(p, below, x, count, y, stream, lead);
  });
}

template <typename L, typename P>
RK_HD void map_activated(const P& p, Activation activation, compute_t<L> below, const L* x,
                         int64_t count, L* y, bool stream, int64_t lead) {
  for_plain(
      activation,
      [&]<Activation kActivation>()
          RK_INLINE { map_as<kActivation>(p, below, x, count, y, stream, lead); },
      [&]() RK_INLINE { map_other(p, activation, below, x, count, y, stream, lead); });
}

// z, what the activation is applied to; `residual` may be null.
template <typename L, typename P>
RK_HD void preactivate(const P& p, const L* x, const L* residual, int64_t count, compute_t<L>* z,
                       int64_t lead) {
  const Prefetch<L> ahead{x, residual, lead};
  if (residual) {
    write_each(
        z, count, false,
        [=](int64_t i) RK_INLINE { return p.apply(load(x[i]), i) + load(residual[i]); }, ahead);
  } else {
    write_each(z, count, false, [=](int64_t i) RK_INLINE { return p.apply(load(x[i]), i); }, ahead);
  }
}

// z = activation(z), and the flags of its gate where they are wanted.
template <typename C>
RK_STAGE void activate_tile(Activation activation, C below, bool drops, int64_t count, C* z,
                            uint8_t* flags) {
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
}

// Drops elements of z by their half-words, and clears their flags.
template <typename C>
RK_STAGE void drop_tile(const uint16_t* drawn, uint16_t last_kept, bool any_kept, C scale,
                        int64_t count, C* z, uint8_t* flags) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) z[i] *= drawn[i] <= last_kept ? scale : C(0);
  if (flags) {
    for (int64_t i = 0; i < count; ++i) flags[i] &= any_kept && drawn[i] <= last_kept;
  }
}

// The gradient behind the activation, which nothing else follows.
template <Activation kActivation, typename L, typename P>
RK_HD void differentiate_as(const P& p, compute_t<L> below, const L* grad, const L* x,
                            int64_t count, compute_t<L>* d, int64_t lead) {
  using C = compute_t<L>;
  write_each(
      d, count, false,
      [=](int64_t i) RK_INLINE {
        const C g = load(grad[i]);
        if constexpr (kActivation == Activation::none) return g;
        const C z = p.apply(load(x[i]), i);
        if constexpr (kActivation == Activation::relu) return z <= C(0) ? C(0) : g;
        return g * activation_derivative<kActivation>(z, below);
      },
      Prefetch<L>{grad, x, lead});
}

template <typename L, typename P>
RK_STAGE void differentiate_other(const P& p, Activation activation, compute_t<L> below,
                                  const L* grad, const L* x, int64_t count, compute_t<L>* d,
                                  int64_t lead) {
  for_other(activation, [&]<Activation kActivation>() RK_INLINE {
    differentiate_as<kActivation>(p, below, grad, x, count, d, lead);
  });
}

template <typename L, typename P>
RK_HD void differentiate(const P& p, Activation activation, compute_t<L> below, const L* grad,
                         const L* x, int64_t count, compute_t<L>* d, int64_t lead) {
  for_plain(
      activation,
      [&]<Activation kActivation>()
          RK_INLINE { differentiate_as<kActivation>(p, below, grad, x, count, d, lead); },
      [&]() RK_INLINE { differentiate_other(p, activation, below, grad, x, count, d, lead); });
}

// What the gate lets through of a gradient: `passed` times it, or `stopped` times it; of relu
// nothing at all, whatever the gradient is.
template <typename L>
RK_HD void pass_gate(const uint8_t* flags, bool relu, compute_t<L> passed, compute_t<L> stopped,
                     const L* grad, int64_t count, compute_t<L>* d, const Prefetch<L>& ahead) {
  using C = compute_t<L>;
  if (relu) {
    write_each(
        d, count, false,
        [=](int64_t i) RK_INLINE { return flags[i] ? load(grad[i]) * passed : C(0); }, ahead);
  } else {
    write_each(
        d, count, false,
        [=](int64_t i) RK_INLINE { return load(grad[i]) * (flags[i] ? passed : stopped); }, ahead);
  }
}

// d times the activation's derivative at z.
template <typename C>
RK_STAGE void chain_derivative(Activation activation, C below, const C* z, int64_t count, C* d) {
  for_activation(activation, [&]<Activation kActivation>() RK_INLINE {
    if constexpr (kActivation == Activation::relu) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) d[i] = z[i] <= C(0) ? C(0) : d[i];
    } else if constexpr (kActivation != Activation::none) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) d[i] *= activation_derivative<kActivation>(z[i], below);
    }
  });
}

// The input's gradient from the one behind the activation; x is read in training alone.
template <typename L, typename P>
RK_HD void input_gradient(const P& p, bool training, const compute_t<L>* d, const L* x,
                          int64_t count, L* y, bool stream, const Prefetch<L>& ahead) {
  if (training) {
    write_each(
        y, count, stream,
        [=](int64_t i) RK_INLINE { return store<L>(p.input_gradient(d[i], load(x[i]), i)); },
        ahead);
  } else {
    write_each(
        y, count, stream, [=](int64_t i) RK_INLINE { return store<L>(p.frozen_gradient(d[i], i)); },
        ahead);
  }
}

}  // namespace
RK_NAMESPACE_END
