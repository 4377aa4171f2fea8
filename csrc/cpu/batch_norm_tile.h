// What BatchNorm does to a tile: up to kTile elements that lie side by side.
//
// Everything but the plain cases goes through the first-level cache, one stage after the other, so
// that the stages need not be compiled in every combination. A float16 is widened first and rounded
// last: the loops between are those of float.
#pragma once

#include "batch_norm.h"
#include "bits.h"
#include "lanes.h"
#include "narrow.h"
#include "random.h"
#include "reg_kernels/batch_norm_math.h"
#include "reg_kernels/dropout_math.h"
#include "stream.h"

RK_NAMESPACE_BEGIN
namespace {

constexpr int64_t kTile = 512;      // elements of a tile
constexpr int64_t kColumns = 2048;  // the widest strip
constexpr int64_t kBlock = 16384;   // elements whose rows share pivots, or that tiles end with
constexpr int64_t kStretch = 4096;  // values side by side that share a pivot
constexpr int64_t kRowsAtOnce = 4;

// The channel constants of a tile: OneChannel has one set for all of its elements, ChannelColumns
// one for each.
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

// The flags of a gate go to and from bytes a tile at a time: those of more elements, beside what is
// prefetched, would be more than the first-level cache holds.
struct GateSpace {
  alignas(64) uint8_t flags[kTile + 2 * kGroup];

  // Those of elements [first, first + count), `first` counted from the gate's first bit.
  RK_HD const uint8_t* read(const uint8_t* gate, int64_t first, int64_t count) {
    if (!gate) return nullptr;
    unpack_bits(gate + first / 8, first % 8 + count, flags);
    return flags + first % 8;
  }
};

// Writes the bits of one tile after the other. Whole bytes go out; flags short of one wait for the
// next tile, the last ones for finish().
class GateWriter {
 public:
  explicit GateWriter(uint8_t* gate) : bits_(gate) {}

  // Where the next tile's flags go, gate or not.
  RK_HD uint8_t* next() { return space_.flags + waiting_; }

  RK_HD void wrote(int64_t count) {
    if (!bits_) return;
    const int64_t flags = waiting_ + count, whole = flags / 8;
    pack_bits(space_.flags, whole * 8, bits_);
    bits_ += whole;
    waiting_ = flags % 8;
    memcpy(space_.flags, space_.flags + whole * 8, 8);
  }

  RK_HD void finish() {
    if (bits_) pack_bits(space_.flags, waiting_, bits_);
  }

 private:
  uint8_t* bits_;
  int64_t waiting_ = 0;
  GateSpace space_;
};

// `value` where the flag is 1, and 0 where it is 0. But for float with mask registers this works on
// the bits: g++ 12 makes no vector code of a choice by bytes between elements of 64 bits (6 times
// as slow), nor, without mask registers, of 16 bits (7 times).
RK_HD float passed_by(uint8_t flag, float value) {
#if defined(__AVX512F__)
  return flag ? value : 0.0f;
#else
  return bit_cast<float>(bit_cast<uint32_t>(value) & (0u - flag));
#endif
}

RK_HD double passed_by(uint8_t flag, double value) {
  return bit_cast<double>(bit_cast<uint64_t>(value) & (uint64_t{0} - flag));
}

// Elements in storage order, as the loops read them, and up to kTile where they go through a
// buffer. L is the type of the tensors, or float where a float16 has been widened.
template <typename L>
struct Tile {
  int64_t first, count;
  int64_t lead;  // the tensors are prefetched so many elements further on; 0: not at all
  // A tensor that is absent or not read is null.
  const L *x = nullptr, *residual = nullptr, *grad_output = nullptr;
};

// The stages of a tile that work in the type C that it is computed in.
template <typename C>
struct TileStages {
  Activation activation;
  C slope;
  bool drops, keeps_any;
  C scale;             // of dropout
  uint16_t last_kept;  // kept: half-word <= last_kept, since the threshold may not fit into 16 bits
  RngStream rng;
  int64_t mask_offset;
  Draws draws;

  explicit TileStages(const BatchNormTask& task)
      : activation(static_cast<Activation>(task.activation)),
        slope(static_cast<C>(task.slope)),
        drops(task.drops),
        keeps_any(task.threshold != 0),
        scale(static_cast<C>(task.drops ? task.scale : 1.0)),
        last_kept(static_cast<uint16_t>(task.threshold ? task.threshold - 1 : 0)),
        rng(kDropoutTag, task.seed, task.offset),
        mask_offset(task.mask_offset) {}

  // Whether a backward needs z, the value that the activation is applied to.
  bool needs_z(const uint8_t* flags) const {
    return needs_preactivation(activation, flags != nullptr, drops);
  }

  // Applies the activation and dropout to z in place. One that is linear on both sides of 0 and
  // dropout also set the gate's flags: `flags` has room for them, gate or not.
  RK_STAGE void finish_tile(int64_t first, int64_t count, C* z, uint8_t* flags) {
    const uint16_t* drawn = drops ? draws.take(rng, mask_offset + first) : nullptr;
    if (activation == Activation::silu) {
      activate_smooth<Activation::silu>(count, z);
    } else if (activation == Activation::gelu) {
      activate_smooth<Activation::gelu>(count, z);
    }
    if (activation == Activation::relu) {
      finish_linear<Activation::relu>(count, z, drawn, flags);
    } else if (activation == Activation::leaky_relu) {
      finish_linear<Activation::leaky_relu>(count, z, drawn, flags);
    } else if (drops) {
      finish_linear<Activation::none>(count, z, drawn, flags);
    }
  }

  template <Activation kActivation>
  RK_HD void activate_smooth(int64_t count, C* z) const {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] = activate<kActivation>(z[i], C(0));
  }

  template <Activation kActivation>
  RK_HD void finish_linear(int64_t count, C* z, const uint16_t* drawn, uint8_t* flags) const {
    constexpr bool kRelu = kActivation == Activation::relu;
    const C below = slope, multiplier = scale;
    if (drawn) {
      const uint16_t last = last_kept;
      const uint8_t any = keeps_any;
#pragma omp simd  // flags are bytes, which the compiler takes for a part of anything
      for (int64_t i = 0; i < count; ++i) {
        const C value = z[i];
        const bool kept = drawn[i] <= last;
        flags[i] = any & (kept & !(kRelu && value <= C(0)));
        z[i] = activate<kActivation>(value, below) * (kept ? multiplier : C(0));
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const C value = z[i];
        flags[i] = kRelu ? !(value <= C(0)) : value > C(0);
        z[i] = activate<kActivation>(value, below);
      }
    }
  }

  // Multiplies d by the activation's derivative at z.
  RK_HD void chain(const C* z, int64_t count, C* d) const {
    const C below = slope;
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
};

// The loops over a tile that read its tensors.
template <typename L>
struct TileLoops : TileStages<compute_t<L>> {
  using C = compute_t<L>;
  using Stages = TileStages<C>;
  using Stages::activation, Stages::slope, Stages::drops;
  static constexpr bool kWidens = sizeof(L) != sizeof(C);

  using Stages::Stages;

  template <typename P>
  RK_HD void preactivation(const P& p, const Tile<L>& tile, int64_t lead, C* z) const {
    const L *x = tile.x, *residual = tile.residual;
    if (residual) {
      write_each(
          z, tile.count, false,
          [=](int64_t i) RK_INLINE { return p.apply(load(x[i]), i) + load(residual[i]); },
          Prefetch<L>{x, residual, lead});
    } else {
      write_each(
          z, tile.count, false, [=](int64_t i) RK_INLINE { return p.apply(load(x[i]), i); },
          Prefetch<L>{x, nullptr, lead});
    }
  }

  // Writes y, which may lie where x does, and its gate's flags.
  template <typename P>
  RK_STAGE void forward(const P& p, const Tile<L>& tile, L* y, bool stream, uint8_t* flags) {
    if (!tile.residual && !drops) return forward_rows(p, tile, 1, 0, y, stream);
    if constexpr (!kWidens) {
      if (!stream) {
        preactivation(p, tile, tile.lead, y);
        return Stages::finish_tile(tile.first, tile.count, y, flags);
      }
    }
    alignas(64) C z[kTile];
    preactivation(p, tile, tile.lead, z);
    Stages::finish_tile(tile.first, tile.count, z, flags);
    write_each(y, tile.count, stream, Narrowed<L>{z});
  }

  // The same of what goes through no buffer and has no gate, in `rows` that lie `stride` elements
  // apart: a call for each of them would take a tenth of the time of short ones.
  template <typename P>
  RK_STAGE void forward_rows(const P& p, const Tile<L>& tile, int64_t rows, int64_t stride, L* y,
                             bool stream) const {
    const C below = slope;
    for_activation(activation, [&]<Activation kActivation>() RK_INLINE {
      for (int64_t r = 0; r < rows; ++r) {
        const L* x = tile.x + r * stride;
        write_each(
            y + r * stride, tile.count, stream,
            [=](int64_t i) RK_INLINE {
              return store<L>(activate<kActivation>(p.apply(load(x[i]), i), below));
            },
            Prefetch<L>{x, nullptr, tile.lead});
      }
    });
  }

  // The gradient with respect to z where the activation alone changes it.
  template <Activation kActivation, typename P>
  RK_HD void differentiate(const P& p, const Tile<L>& tile, C* d) const {
    const L *grad = tile.grad_output, *x = tile.x;
    const C below = slope;
    write_each(
        d, tile.count, false,
        [=](int64_t i) RK_INLINE {
          const C g = load(grad[i]), z = p.apply(load(x[i]), i);
          if constexpr (kActivation == Activation::relu) return z <= C(0) ? C(0) : g;
          return g * activation_derivative<kActivation>(z, below);
        },
        Prefetch<L>{grad, x, tile.lead});
  }

  // The part of the output's gradient that the gate lets through.
  RK_HD void pass_gate(const Tile<L>& tile, const uint8_t* flags, C* d) const {
    const L* grad = tile.grad_output;
    const Prefetch<L> ahead{grad, tile.x, tile.lead};
    const C passed = Stages::scale;
    if (activation == Activation::leaky_relu && !drops) {
      const C stopped = slope;
      write_each(
          d, tile.count, false,
          [=](int64_t i) RK_INLINE {
            return load(grad[i]) * (passed_by(flags[i], passed) + passed_by(!flags[i], stopped));
          },
          ahead);
    } else if (activation == Activation::relu) {
      write_each(
          d, tile.count, false,
          [=](int64_t i) RK_INLINE { return passed_by(flags[i], load(grad[i]) * passed); }, ahead);
    } else {
      write_each(
          d, tile.count, false,
          [=](int64_t i) RK_INLINE { return load(grad[i]) * passed_by(flags[i], passed); }, ahead);
    }
  }

  template <Activation kActivation, typename P>
  RK_STAGE void differentiate_apart(const P& p, const Tile<L>& tile, C* d) const {
    differentiate<kActivation>(p, tile, d);
  }

  // The gradient with respect to z, in `buffer`, or where the output's lies if it is the same.
  // Loops that are short beside a call are inlined.
  template <typename P>
  RK_HD const C* gradient(const P& p, const Tile<L>& tile, const uint8_t* flags, C* buffer) const {
    const L* grad = tile.grad_output;
    const bool needs_z = Stages::needs_z(flags);
    if (flags) {
      pass_gate(tile, flags, buffer);
    } else if (!needs_z) {
      if constexpr (!kWidens) return grad;
      widen(grad, tile.count, buffer, Prefetch<L>{grad, tile.x, tile.lead});
    }
    if (!needs_z) return buffer;
    if (flags || tile.residual) {
      gradient_by_z(p, tile, flags != nullptr, buffer);
    } else if (activation == Activation::relu) {
      differentiate<Activation::relu>(p, tile, buffer);
    } else if (activation == Activation::leaky_relu) {
      differentiate<Activation::leaky_relu>(p, tile, buffer);
    } else if (activation == Activation::silu) {
      differentiate_apart<Activation::silu>(p, tile, buffer);
    } else {
      differentiate_apart<Activation::gelu>(p, tile, buffer);
    }
    return buffer;
  }

  template <typename P>
  RK_STAGE void gradient_by_z(const P& p, const Tile<L>& tile, bool gated, C* d) const {
    if (!gated) {
      write_each(d, tile.count, false, Widened<L>{tile.grad_output},
                 Prefetch<L>{tile.grad_output, tile.x, tile.lead});
    }
    alignas(64) C z[kTile];
    preactivation(p, tile, tile.residual ? tile.lead : 0, z);
    Stages::chain(z, tile.count, d);
  }

  // Writes the input's gradient, which may lie where x does, from d, the gradient with respect to
  // z.
  template <typename P>
  RK_HD void input_gradient(const P& p, bool training, const Tile<L>& tile, const C* d, L* y,
                            bool stream, const Prefetch<L>& ahead) const {
    const L* x = tile.x;
    if (training) {
      write_each(
          y, tile.count, stream,
          [=](int64_t i) RK_INLINE { return store<L>(p.input_gradient(d[i], load(x[i]), i)); },
          ahead);
    } else {
      write_each(
          y, tile.count, stream,
          [=](int64_t i) RK_INLINE { return store<L>(p.frozen_gradient(d[i], i)); }, ahead);
    }
  }
};

// The buffers of a backward's tile: d, the gradient with respect to z, and the elements that loops
// do not read where they lie.
template <typename T>
struct TileSpace {
  using C = compute_t<T>;
  static constexpr bool kWidens = sizeof(loop_t<T>) != sizeof(T);
  static constexpr int64_t kWide = kWidens ? kTile : 1;

  alignas(64) C d[kTile];
  alignas(64) C x[kWide], residual[kWide];
};

// A task with its types, and its work on a tile of up to kTile elements in storage order.
template <typename T>
struct Typed {
  using C = compute_t<T>;
  using L = loop_t<T>;
  static constexpr bool kWidens = TileSpace<T>::kWidens;

  TileLoops<L> loops;
  const T *x, *residual, *grad_output;
  T *y, *grad_input, *grad_residual;
  bool training, stream;

  explicit Typed(const BatchNormTask& task)
      : loops(task),
        x(static_cast<const T*>(task.x)),
        residual(static_cast<const T*>(task.residual)),
        grad_output(static_cast<const T*>(task.grad_output)),
        y(static_cast<T*>(task.y)),
        grad_input(static_cast<T*>(task.grad_input)),
        grad_residual(static_cast<T*>(task.grad_residual)),
        training(task.training),
        stream(task.stream) {}

  ~Typed() {
    if (stream) stream_fence();
  }

  // Elements as the loops read them: where they lie, or widened into a buffer. Widening prefetches
  // the elements `lead` further on.
  static RK_HD const L* as_read(const T* from, int64_t count, int64_t lead, C* buffer) {
    if constexpr (kWidens) {
      widen(from, count, buffer, Prefetch<T>{from, nullptr, lead});
      return buffer;
    } else {
      return from;
    }
  }

  // Whether a forward's elements go through a buffer. Else they may be more than a tile, and
  // several rows, which takes fewer calls.
  bool buffers_forward() const { return kWidens || residual || loops.drops; }

  // How many elements a forward takes from `first` on: in a buffer up to where draws end.
  int64_t forward_tile_at(int64_t first) const {
    if (!buffers_forward()) return kColumns;
    return min(kTile, kDrawTile - (loops.mask_offset + first) % kDrawTile);
  }

  template <typename P>
  void forward_tile(const P& p, int64_t first, int64_t count, int64_t lead, uint8_t* flags) {
    alignas(64) C wide[TileSpace<T>::kWide], added[TileSpace<T>::kWide];
    Tile<L> tile{first, count, kWidens ? 0 : lead, as_read(x + first, count, lead, wide)};
    if (residual) tile.residual = as_read(residual + first, count, lead, added);
    if constexpr (kWidens) {
      loops.forward(p, tile, wide, false, flags);
      narrow(wide, count, y + first, stream, NothingAhead{});
    } else {
      if (!buffers_forward()) return loops.forward_rows(p, tile, 1, 0, y + first, stream);
      loops.forward(p, tile, y + first, stream, flags);
    }
  }

  // A tile of a backward. `reads_x`: whether x is read, also where z is not needed.
  RK_HD Tile<L> backward_of(int64_t first, int64_t count, int64_t lead, bool reads_x,
                            const uint8_t* flags, TileSpace<T>& space) const {
    const bool needs_z = loops.needs_z(flags);
    Tile<L> tile{first, count, kWidens ? 0 : lead};
    if (reads_x || needs_z) tile.x = as_read(x + first, count, lead, space.x);
    if (residual && needs_z) tile.residual = as_read(residual + first, count, lead, space.residual);
    tile.grad_output = as_read(grad_output + first, count, lead, space.d);
    return tile;
  }

  template <typename P>
  void backward_tile(const P& p, int64_t first, int64_t count, int64_t lead,
                     const uint8_t* flags) const {
    TileSpace<T> space;
    const Tile<L> tile = backward_of(first, count, lead, training && grad_input, flags, space);
    const C* d = loops.gradient(p, tile, flags, space.d);
    // The loops that write d into the buffer have prefetched already.
    int64_t ahead = d == space.d ? 0 : lead;
    if (grad_residual) {
      write_each(grad_residual + first, count, stream, Narrowed<T>{d},
                 Prefetch<L>{tile.grad_output, tile.x, ahead});
      ahead = 0;
    }
    if (!grad_input) return;
    if constexpr (kWidens) {
      loops.input_gradient(p, training, tile, d, space.x, false, {});
      narrow(space.x, count, grad_input + first, stream, NothingAhead{});
    } else {
      loops.input_gradient(p, training, tile, d, grad_input + first, stream,
                           {tile.grad_output, tile.x, ahead});
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

// A value near the mean of `count` values that lie `step` apart, from the first three. That of a
// whole channel, or of a column of it, has a second use: until the means of the parts are merged,
// they are kept as differences from it. So a mean that is large beside the deviation costs them no
// digits.
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
