// BatchNorm's backward: the kernel that reduces and maps, and the one that only maps.
#pragma once

#include "chain.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// Tensors of the input's shape have its storage order; channel values are [C].
template <typename T>
struct BatchNormBackward {
  const T* grad_output;
  const T* x;
  const T* residual;  // or null, also where it is not needed
  ChannelValues weight, bias;
  const double* mean;
  const double* invstd;
  bool training;
  const double* sums;  // of all ranks, [2 C + 1], instead of this batch's; or null
  Chain chain;
  T* grad_input;                         // each of these three or null
  ChannelValues grad_weight, grad_bias;  // both or none
  T* grad_residual;
  double* values;  // their number, M, is written here beside the gradients of the two; or null

  ChannelPlan plan;
  Exchange exchange;

  __device__ bool needs_z() const {
    return needs_preactivation(chain.activation, chain.gate != nullptr, chain.drops);
  }
};

// ---- Its two passes.

template <typename T, bool kChannelsLast>
struct BackwardMap {
  using C = compute_t<T>;
  static constexpr int kCount = kColumns<T, kChannelsLast>;
  // Of the affine and of the gradient, whose k1 is the scale.
  Columns<T, kChannelsLast> shift, scale, offset, k2, k3;

  // What the reduction needs of a channel.
  static __device__ void set(const BatchNormBackward<T>& a, const Scratch<T>& scratch, int channel,
                             int64_t c) {
    const double mean = a.mean[c], invstd = a.invstd[c];
    const double weight = a.weight.at(c, 1.0), bias = a.bias.at(c, 0.0);
    const auto affine = ChannelAffine<C>::of(mean, invstd, weight, bias);
    scratch.constant(0, channel) = affine.shift;
    scratch.constant(1, channel) = affine.scale;
    scratch.constant(2, channel) = affine.offset;
  }

  // And what the map needs in training, from the channel's sums.
  static __device__ void set(const BatchNormBackward<T>& a, const Scratch<T>& scratch, int channel,
                             int64_t c, const Sums& sums) {
    set(scratch, channel,
        ChannelGradient<C>::training(a.mean[c], a.invstd[c], a.weight.at(c, 1.0), sums.a, sums.b,
                                     a.plan.count));
  }

  static __device__ void set(const Scratch<T>& scratch, int channel,
                             const ChannelGradient<C>& gradient) {
    scratch.constant(3, channel) = gradient.k2;
    scratch.constant(4, channel) = gradient.k3;
  }

  __device__ void read_affine(const Scratch<T>& scratch, const ChannelPlan& plan) {
    shift.read(scratch, plan, 0);
    scale.read(scratch, plan, 1);
    offset.read(scratch, plan, 2);
  }

  __device__ void read_gradient(const Scratch<T>& scratch, const ChannelPlan& plan) {
    k2.read(scratch, plan, 3);
    k3.read(scratch, plan, 4);
  }

  // The gradient behind the activation of one vector's elements; `gate`: its bits.
  __device__ void behind(const BatchNormBackward<T>& a, const Vector<T>& grad_output,
                         const Vector<T>& x, const Vector<T>& residual, uint32_t gate,
                         C (&d)[kVector<T>]) const {
    const Chain& chain = a.chain;
    const auto slope = static_cast<C>(chain.slope);
    RK_UNROLL
    for (int j = 0; j < kVector<T>; ++j) d[j] = load(grad_output.v[j]);
    if (chain.gate) {
      const bool relu = chain.activation == Activation::relu;
      const bool sign = chain.activation == Activation::leaky_relu && !chain.drops;
      const C open = chain.drops ? static_cast<C>(chain.rate.scale) : C(1);
      const C shut = sign ? slope : C(0);
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        const bool bit = gate >> j & 1u;
        d[j] = bit || !relu ? d[j] * (bit ? open : shut) : C(0);
      }
    }
    if (!a.needs_z()) return;
    C z[kVector<T>];
    RK_UNROLL
    for (int j = 0; j < kVector<T>; ++j) {
      z[j] = ChannelAffine<C>{shift[j], scale[j], offset[j]}(load(x.v[j]));
    }
    if (a.residual) {
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) z[j] += load(residual.v[j]);
    }
    for_activation(chain.activation, [&]<Activation kActivation>() {
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        if constexpr (kActivation == Activation::relu) {
          d[j] = z[j] <= C(0) ? C(0) : d[j];
        } else {
          d[j] *= activation_derivative<kActivation>(z[j], slope);
        }
      }
    });
  }

  // Calls use(element, valid, x, d) for each of a step's vectors, d the gradient behind the
  // activation.
  template <typename Staged, typename Use>
  __device__ void for_each(const BatchNormBackward<T>& a, const Slice<T, kChannelsLast>& slice,
                           int step, const Staged& grad_output, const Staged& x,
                           const Staged& residual, const Use& use) const {
    slice.for_vectors(step, [&](int k, int64_t element, uint32_t valid) {
      uint32_t gate = 0;
      if (a.chain.gate) {
        gate =
            load_gate<T, kChannelsLast>(element, valid, a.plan.ragged, a.plan.numel, a.chain.gate);
      }
      const Vector<T> values = x.get(step, k);
      Vector<T> added{};
      if (a.residual) added = residual.get(step, k);
      C d[kVector<T>];
      behind(a, grad_output.get(step, k), values, added, gate, d);
      use(element, valid, values, d);
    });
  }

  // One step, from what was read to sums of d and d (x - shift).
  template <typename Staged>
  __device__ void add(const BatchNormBackward<T>& a, const Slice<T, kChannelsLast>& slice, int step,
                      const Staged& grad_output, const Staged& x, const Staged& residual,
                      C (&d_sum)[kCount], C (&dx_sum)[kCount]) const {
    const auto use = [&](int64_t, uint32_t valid, const Vector<T>& values, C(&d)[kVector<T>]) {
      C centred[kVector<T>], d_part[kCount]{}, dx_part[kCount]{};
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) centred[j] = load(values.v[j]) - shift[j];
      if (!kChannelsLast && a.plan.ragged) {
        // Beside a run lie other channels, whose NaN is none of this one's.
        RK_UNROLL
        for (int j = 0; j < kVector<T>; ++j) {
          d[j] = valid >> j & 1u ? d[j] : C(0);
          centred[j] = valid >> j & 1u ? centred[j] : C(0);
        }
      }
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        d_part[column<kChannelsLast>(j)] += d[j];
        dx_part[column<kChannelsLast>(j)] += d[j] * centred[j];
      }
      RK_UNROLL
      for (int i = 0; i < kCount; ++i) {
        d_sum[i] += d_part[i];
        dx_sum[i] += dx_part[i];
      }
    };
    for_each(a, slice, step, grad_output, x, residual, use);
  }

  // One step, from what was read to what is written.
  template <typename Staged>
  __device__ void operator()(const BatchNormBackward<T>& a, const Slice<T, kChannelsLast>& slice,
                             int step, const Staged& grad_output, const Staged& x,
                             const Staged& residual) const {
    const auto use = [&](int64_t element, uint32_t valid, const Vector<T>& values,
                         C(&d)[kVector<T>]) {
      Vector<T> out;
      if (a.grad_residual) {
        RK_UNROLL
        for (int j = 0; j < kVector<T>; ++j) out.v[j] = store<T>(d[j]);
        store_valid(a.grad_residual, a.plan.direct, valid, element, out);
      }
      if (a.grad_input) {
        RK_UNROLL
        for (int j = 0; j < kVector<T>; ++j) {
          const ChannelGradient<C> gradient{shift[j], scale[j], k2[j], k3[j]};
          out.v[j] = store<T>(a.training ? gradient(d[j], load(values.v[j])) : d[j] * scale[j]);
        }
        store_valid(a.grad_input, a.plan.direct, valid, element, out);
      }
    };
    for_each(a, slice, step, grad_output, x, residual, use);
  }
};

// ---- The kernels.

// Two constants a channel more have to stay in registers: 96 a thread.
template <typename T>
constexpr int kRankMapBlocks = sizeof(T) == 8 ? 4 : 5;
template <typename T>
constexpr int kBackwardRing = kAhead<T> + 1;

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kResidentThreads, 1)
    batch_norm_backward_kernel(BatchNormBackward<T> a) {
  using C = compute_t<T>;
  constexpr int kCount = kColumns<T, kChannelsLast>;
  RK_SHARED(unsigned char, shared);
  const ChannelPlan& plan = a.plan;
  const Scratch<T> scratch(shared);
  const int staged = plan.kept + plan.ring;
  const Staging<T, kBackwardRing<T>> grad_output(scratch.rest(true), plan.kept, 0);
  const Staging<T, kBackwardRing<T>> x(scratch.rest(true), plan.kept, staged);
  const Staging<T, kBackwardRing<T>> residual(scratch.rest(true), plan.kept, 2 * staged);
  const int rank = blockIdx.x % plan.blocks, channels = plan.channels<T>();
  const int classes = kChannelsLast ? plan.vectors : 1;

  for (int64_t item = blockIdx.x / plan.blocks; item < plan.items; item += plan.groups) {
    const Slice<T, kChannelsLast> slice(plan, item, rank);
    const int steps = slice.steps();
    const auto read = [&](int step) {
      slice.for_vectors(step, [&](int k, int64_t element, uint32_t valid) {
        grad_output.read(a.grad_output, plan.direct, element, valid, step, k);
        x.read(a.x, plan.direct, element, valid, step, k);
        if (a.residual) residual.read(a.residual, plan.direct, element, valid, step, k);
      });
    };

    // Reduce.
    read_ahead<kAhead<T>, false>(steps, read);
    const int64_t c = finished_channel<T>(plan, item);
    if (c >= 0) BackwardMap<T, kChannelsLast>::set(a, scratch, threadIdx.x, c);
    __syncthreads();
    BackwardMap<T, kChannelsLast> map;
    map.read_affine(scratch, plan);
    C d_sum[kCount]{}, dx_sum[kCount]{};
    walk<kAhead<T>, false, 1>(steps, read, [&](int step) {
      map.add(a, slice, step, grad_output, x, residual, d_sum, dx_sum);
    });

    // Exchange.
    Sums sums[kCount];
    RK_UNROLL
    for (int k = 0; k < kCount; ++k) sums[k] = {d_sum[k], dx_sum[k]};
    Sums total = block_sum(sums, classes, scratch.sums);
    if (plan.blocks > 1) {
      total = exchange_sums(total, channels, a.exchange, item, rank, plan.blocks, scratch.sums);
    }
    if (c >= 0) {
      if (a.training) {
        BackwardMap<T, kChannelsLast>::set(a, scratch, threadIdx.x, c, total);
      }
      if (rank == 0 && a.grad_weight.data) {
        a.grad_weight.set(c,
                          ChannelGradient<C>::of_weight(a.mean[c], a.invstd[c], total.a, total.b));
        a.grad_bias.set(c, total.a);
        if (a.values && c == 0) *a.values = static_cast<double>(plan.count);
      }
    }
    __syncthreads();

    // Map. What was read last comes first: the caches still have it.
    map.read_gradient(scratch, plan);
    if (!a.grad_input && !a.grad_residual) continue;
    const auto read_again = [&](int step) {
      if (!x.keeps(step)) read(step);
    };
    read_ahead<kAhead<T>, true>(steps, read_again);
    walk<kAhead<T>, true, 1>(steps, read_again,
                             [&](int step) { map(a, slice, step, grad_output, x, residual); });
  }
}

// Where no gradient depends on a sum that is not known: of the input with frozen statistics or by
// the sums of all ranks, of the residual.
template <typename T, bool kChannelsLast, bool kOfRanks>
__global__ void __launch_bounds__(kMapThreads, kOfRanks ? kRankMapBlocks<T> : kMapBlocks<T>)
    batch_norm_backward_map_kernel(BatchNormBackward<T> a) {
  RK_SHARED(unsigned char, shared);
  const ChannelPlan& plan = a.plan;
  const Scratch<T> scratch(shared);
  const Staging<T, 1> grad_output(scratch.rest(false), plan.kept, 0);
  const Staging<T, 1> x(scratch.rest(false), plan.kept, plan.kept);
  const Staging<T, 1> residual(scratch.rest(false), plan.kept, 2 * plan.kept);
  const int64_t item = blockIdx.x / plan.blocks;
  const Slice<T, kChannelsLast> slice(plan, item, blockIdx.x % plan.blocks);
  const bool reads_x = kOfRanks || a.needs_z();
  const auto read = [&](int step) {
    slice.for_vectors(step, [&](int k, int64_t element, uint32_t valid) {
      grad_output.read(a.grad_output, plan.direct, element, valid, step, k);
      if (reads_x) x.read(a.x, plan.direct, element, valid, step, k);
      if (a.residual) residual.read(a.residual, plan.direct, element, valid, step, k);
    });
  };
  read_ahead<kFarAhead<T>, false>(slice.steps(), read);
  const int64_t c = finished_channel<T>(plan, item);
  if (c >= 0) {
    BackwardMap<T, kChannelsLast>::set(a, scratch, threadIdx.x, c);
    if constexpr (kOfRanks) {
      BackwardMap<T, kChannelsLast>::set(
          scratch, threadIdx.x,
          ChannelGradient<compute_t<T>>::of_ranks(a.mean[c], a.invstd[c], a.weight.at(c, 1.0),
                                                  a.sums, plan.layout.channels, c));
    }
  }
  __syncthreads();
  BackwardMap<T, kChannelsLast> map;
  map.read_affine(scratch, plan);
  if constexpr (kOfRanks) map.read_gradient(scratch, plan);
  walk<kFarAhead<T>, false, 1>(slice.steps(), read,
                               [&](int step) { map(a, slice, step, grad_output, x, residual); });
}

}  // namespace cuda
RK_NAMESPACE_END
