// BatchNorm's forward: the kernels of training and of inference.
#pragma once

#include "chain.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// What training writes of a channel, [C] each.
struct ChannelStatistics {
  // Moved on in training, read in inference; null together.
  ChannelValues running_mean, running_var;
  int64_t* num_batches_tracked;  // or null
  double momentum;
  bool averages;  // over all batches, instead of by the momentum
  double eps;
  double* mean;  // these two in training; in a map that follows it they are read
  double* invstd;
};

// Tensors of the input's shape have its storage order; channel values are [C].
template <typename T>
struct BatchNormForward : ChannelStatistics {
  const T* x;
  const T* residual;  // or null
  T* y;
  ChannelValues weight, bias;
  Chain chain;
  double* moments;  // [4][C], as of a rank in GatheredMoments: where only these are wanted

  ChannelPlan plan;  // the rest is the launcher's
  Exchange exchange;
};

// ---- Its two passes.

template <typename C>
__device__ __forceinline__ C median(C a, C b, C c) {
  const C low = a < b ? a : b, high = a < b ? b : a;
  return c < low ? low : c < high ? c : high;
}

// A thread's count, means and sums of squared deviations, of x - pivot.
template <typename T, bool kChannelsLast>
struct ThreadMoments {
  using C = compute_t<T>;
  static constexpr int kCount = kColumns<T, kChannelsLast>;
  int count;  // of each column
  C pivot[kCount], mean[kCount], m2[kCount];

  __device__ ThreadMoments() : count(0), pivot{}, mean{}, m2{} {}

  __device__ void set_pivots(const T* x, const Slice<T, kChannelsLast>& slice, int64_t item) {
    const T *const first = x + slice.sample(item, 0), *const middle = x + slice.sample(item, 1),
                   *const last = x + slice.sample(item, 2);
    RK_UNROLL
    for (int k = 0; k < kCount; ++k) {
      if (!slice.has_column(k)) continue;
      const C value = median(load(first[k]), load(middle[k]), load(last[k]));
      pivot[k] = value - value == C(0) ? value : C(0);
    }
  }

  // Whether element j of vector v counts: any of its own, or, with the channels last, one of a
  // position inside. Channels past the last one are summed up like the others, and never asked for.
  template <bool kAll>
  static __device__ bool counts(uint32_t valid, int v, int j) {
    return kAll || (kChannelsLast ? (valid >> 8 * v & 0xffu) != 0 : (valid >> (8 * v + j) & 1u));
  }

  template <bool kAll>
  __device__ void add(const Vector<T> (&x)[kBatch], uint32_t valid) {
    int added = kChannelsLast ? kBatch : kBatch * kVector<T>;
    if constexpr (!kAll) {
      added = 0;
      RK_UNROLL
      for (int v = 0; v < kBatch; ++v) {
        RK_UNROLL
        for (int j = 0; j < (kChannelsLast ? 1 : kVector<T>); ++j) {
          added += counts<kAll>(valid, v, j) ? 1 : 0;
        }
      }
      if (added == 0) return;
    }
    C difference[kBatch][kVector<T>], sum[kCount]{}, squares[kCount]{};
    RK_UNROLL
    for (int v = 0; v < kBatch; ++v) {
      C part[kCount]{};
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        const int k = column<kChannelsLast>(j);
        difference[v][j] = counts<kAll>(valid, v, j) ? load(x[v].v[j]) - pivot[k] : C(0);
        part[k] += difference[v][j];
      }
      RK_UNROLL
      for (int k = 0; k < kCount; ++k) sum[k] += part[k];
    }
    const C each = reciprocal(static_cast<C>(added));
    RK_UNROLL
    for (int k = 0; k < kCount; ++k) sum[k] *= each;  // the batch's mean
    RK_UNROLL
    for (int v = 0; v < kBatch; ++v) {
      C part[kCount]{};
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        const int k = column<kChannelsLast>(j);
        const C rest = counts<kAll>(valid, v, j) ? difference[v][j] - sum[k] : C(0);
        part[k] += rest * rest;
      }
      RK_UNROLL
      for (int k = 0; k < kCount; ++k) squares[k] += part[k];
    }
    // Chan's merge, with means weighted rather than moved: an infinite one stays infinite.
    const C share = static_cast<C>(added) * reciprocal(static_cast<C>(count + added));
    RK_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const C delta = sum[k] - mean[k];
      m2[k] += squares[k] + delta * delta * (share * static_cast<C>(count));
      mean[k] = mean[k] * (C(1) - share) + sum[k] * share;
    }
    count += added;
  }

  // Sums of x - pivot and of its square.
  __device__ void to_sums(Sums (&sums)[kCount]) const {
    const double n = count;
    RK_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const double m = mean[k];
      sums[k] = {n * m, m2[k] + n * m * m};
    }
  }
};

template <typename T, bool kChannelsLast>
struct ForwardMap {
  using C = compute_t<T>;
  Columns<T, kChannelsLast> shift, scale, offset;

  static __device__ void set(const Scratch<T>& scratch, int channel,
                             const ChannelAffine<C>& affine) {
    scratch.constant(0, channel) = affine.shift;
    scratch.constant(1, channel) = affine.scale;
    scratch.constant(2, channel) = affine.offset;
  }

  __device__ void read(const Scratch<T>& scratch, const ChannelPlan& plan) {
    shift.read(scratch, plan, 0);
    scale.read(scratch, plan, 1);
    offset.read(scratch, plan, 2);
  }

  // One step, from what was read to what is written.
  template <typename X, typename Residual>
  __device__ void operator()(const BatchNormForward<T>& a, const Slice<T, kChannelsLast>& slice,
                             int step, const X& x, const Residual& residual,
                             const RngStream& stream) const {
    const Chain& chain = a.chain;
    const bool direct = a.plan.direct, ragged = a.plan.ragged;
    const auto slope = static_cast<C>(chain.slope), multiplier = static_cast<C>(chain.rate.scale);
    // Whether the gate's bits tell signs.
    const bool relu = chain.activation == Activation::relu;
    const bool signs = relu || (chain.activation == Activation::leaky_relu && !chain.drops);
    uint32_t kept = ~0u, passes = ~0u, valid = 0;
    if (chain.drops) kept = draw(slice, step, ragged, chain, stream);
    slice.for_vectors(step, [&](int k, int64_t element, uint32_t own) {
      Vector<T> vector = x.get(step, k);
      C z[kVector<T>];
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        z[j] = ChannelAffine<C>{shift[j], scale[j], offset[j]}(load(vector.v[j]));
      }
      if (a.residual) {
        vector = residual.get(step, k);
        RK_UNROLL
        for (int j = 0; j < kVector<T>; ++j) z[j] += load(vector.v[j]);
      }
      if (chain.gate && signs) {
        RK_UNROLL
        for (int j = 0; j < kVector<T>; ++j) {
          const bool above = relu ? !(z[j] <= C(0)) : z[j] > C(0);
          passes &= ~((above ? 0u : 1u) << (8 * k + j));
        }
      }
      for_activation(chain.activation, [&]<Activation kActivation>() {
        RK_UNROLL
        for (int j = 0; j < kVector<T>; ++j) z[j] = activate<kActivation>(z[j], slope);
      });
      if (chain.drops) {
        RK_UNROLL
        for (int j = 0; j < kVector<T>; ++j) {
          z[j] *= kept >> (8 * k + j) & 1u ? multiplier : C(0);
        }
      }
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) vector.v[j] = store<T>(z[j]);
      store_valid(a.y, direct, own, element, vector);
      valid |= own << 8 * k;
    });
    if (chain.gate) store_gate(slice, step, ragged, valid, kept & passes, chain.gate);
  }
};

// ---- The kernels.

// A channel's values, read while the elements are on their way.
template <typename T>
struct ChannelInputs {
  double weight, bias, running_mean, running_var;

  __device__ ChannelInputs(const BatchNormForward<T>& a, int64_t c)
      : weight(1.0), bias(0.0), running_mean(0.0), running_var(1.0) {
    if (c < 0) return;
    weight = a.weight.at(c, 1.0);
    bias = a.bias.at(c, 0.0);
    running_mean = a.running_mean.at(c, 0.0);
    running_var = a.running_var.at(c, 1.0);
  }
};

// The moments of a channel from the sums of x - pivot and of its square.
__device__ __forceinline__ ChannelMoments finish_moments(int64_t values, const Sums& sums,
                                                         double pivot) {
  const auto count = static_cast<double>(values);
  const double shifted = sums.a / count;
  const double m2 = sums.b - sums.a * shifted;
  return {{count, pivot + shifted, m2 < 0.0 ? 0.0 : m2}};  // NaN stays
}

// What training returns and updates of channel c.
__device__ __forceinline__ void store_statistics(const ChannelStatistics& a, int64_t c,
                                                 double running_mean, double running_var,
                                                 const ChannelMoments& of, double invstd) {
  a.mean[c] = of.mean;
  a.invstd[c] = invstd;
  if (!a.running_mean.data || !of.moves()) return;
  // Counted already: see count_batch_kernel.
  const double factor = a.averages ? 1.0 / static_cast<double>(*a.num_batches_tracked) : a.momentum;
  a.running_mean.set(c, running_average(running_mean, of.mean, factor));
  a.running_var.set(c, running_average(running_var, of.unbiased(), factor));
}

__device__ __forceinline__ void count_batch(const ChannelStatistics& a) {
  if (a.num_batches_tracked && !a.averages && blockIdx.x == 0 && threadIdx.x == 0) {
    *a.num_batches_tracked = next_count(*a.num_batches_tracked);
  }
}

template <typename T>
constexpr int kForwardRing = kFarAhead<T> + kBatchSteps<T>;

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kResidentThreads, 1) batch_norm_kernel(BatchNormForward<T> a) {
  RK_SHARED(unsigned char, shared);
  constexpr int kCount = kColumns<T, kChannelsLast>;
  const ChannelPlan& plan = a.plan;
  const Scratch<T> scratch(shared);
  const Staging<T, kForwardRing<T>> x(scratch.rest(true), plan.kept, 0);
  const Staging<T, kAhead<T> + 1> residual(scratch.rest(true), 0, plan.kept + plan.ring);
  const int rank = blockIdx.x % plan.blocks, channels = plan.channels<T>();
  const int classes = kChannelsLast ? plan.vectors : 1;
  const RngStream stream = a.chain.rng.stream(kDropoutTag);
  count_batch(a);

  for (int64_t item = blockIdx.x / plan.blocks; item < plan.items; item += plan.groups) {
    const Slice<T, kChannelsLast> slice(plan, item, rank);
    const int steps = slice.steps();

    // Reduce.
    const int filled = ceil_div(steps, kBatchSteps<T>) * kBatchSteps<T>;
    const auto read = [&](int step) {
      slice.for_vectors(step, [&](int k, int64_t element, uint32_t valid) {
        x.read(a.x, plan.direct, element, valid, step, k);
      });
    };
    read_ahead<kFarAhead<T>, false>(filled, read);
    const int64_t c = finished_channel<T>(plan, item);
    const ChannelInputs<T> inputs(a, c);
    ThreadMoments<T, kChannelsLast> moments;
    moments.set_pivots(a.x, slice, item);
    walk<kFarAhead<T>, false, kBatchSteps<T>>(filled, read, [&](int step) {
      Vector<T> batch[kBatch];
      RK_UNROLL
      for (int v = 0; v < kBatch; ++v) batch[v] = x.get(step + v / kParts<T>, v % kParts<T>);
      if (slice.whole_before(step + kBatchSteps<T>)) {
        moments.template add<true>(batch, 0);
        return;
      }
      uint32_t valid = 0;
      RK_UNROLL
      for (int u = 0; u < kBatchSteps<T>; ++u) {
        slice.for_vectors(step + u, [&](int k, int64_t, uint32_t own) {
          valid |= own << 8 * (u * kParts<T> + k);
        });
      }
      moments.template add<false>(batch, valid);
    });

    // Exchange.
    Sums sums[kCount];
    moments.to_sums(sums);
    if (static_cast<int>(threadIdx.x) < classes) {
      RK_UNROLL
      for (int k = 0; k < kCount; ++k) {
        scratch.constant(3, Columns<T, kChannelsLast>::first(plan) + k) = moments.pivot[k];
      }
    }
    Sums total = block_sum(sums, classes, scratch.sums);
    if (plan.blocks > 1) {
      total = exchange_sums(total, channels, a.exchange, item, rank, plan.blocks, scratch.sums);
    }
    if (c >= 0) {
      const double pivot = scratch.constant(3, threadIdx.x);
      const ChannelMoments of = finish_moments(plan.count, total, pivot);
      if (a.moments) {
        if (rank == 0) {
          const int64_t channels_of_all = plan.layout.channels;
          a.moments[c] = of.count;
          a.moments[channels_of_all + c] = of.mean;
          a.moments[2 * channels_of_all + c] = rest_of_sum(pivot, total.a / of.count, of.mean);
          a.moments[3 * channels_of_all + c] = of.m2;
        }
      } else {
        // The first block of an item writes.
        const double invstd = inverse_deviation(of.variance(), a.eps);
        if (rank == 0) {
          store_statistics(a, c, inputs.running_mean, inputs.running_var, of, invstd);
        }
        ForwardMap<T, kChannelsLast>::set(
            scratch, threadIdx.x,
            ChannelAffine<compute_t<T>>::of(of.mean, invstd, inputs.weight, inputs.bias));
      }
    }
    __syncthreads();
    if (a.moments) continue;

    // Map. What was read last comes first: the caches still have it.
    ForwardMap<T, kChannelsLast> map;
    map.read(scratch, plan);
    const auto read_again = [&](int step) {
      slice.for_vectors(step, [&](int k, int64_t element, uint32_t valid) {
        if (!x.keeps(step)) x.read(a.x, plan.direct, element, valid, step, k);
        if (a.residual) residual.read(a.residual, plan.direct, element, valid, step, k);
      });
    };
    read_ahead<kAhead<T>, true>(steps, read_again);
    walk<kAhead<T>, true, 1>(steps, read_again,
                             [&](int step) { map(a, slice, step, x, residual, stream); });
  }
}

// With frozen statistics, and with those of all ranks.
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks<T>)
    batch_norm_inference_kernel(BatchNormForward<T> a) {
  RK_SHARED(unsigned char, shared);
  const ChannelPlan& plan = a.plan;
  const Scratch<T> scratch(shared);
  const Staging<T, 1> x(scratch.rest(false), plan.kept, 0);
  const Staging<T, 1> residual(scratch.rest(false), plan.kept, plan.kept);
  const int64_t item = blockIdx.x / plan.blocks;
  const Slice<T, kChannelsLast> slice(plan, item, blockIdx.x % plan.blocks);
  const RngStream stream = a.chain.rng.stream(kDropoutTag);
  const auto read = [&](int step) {
    slice.for_vectors(step, [&](int k, int64_t element, uint32_t valid) {
      x.read(a.x, plan.direct, element, valid, step, k);
      if (a.residual) residual.read(a.residual, plan.direct, element, valid, step, k);
    });
  };
  read_ahead<kFarAhead<T>, false>(slice.steps(), read);

  const int64_t c = finished_channel<T>(plan, item);
  if (c >= 0) {
    const ChannelInputs<T> inputs(a, c);
    const double mean = a.mean ? a.mean[c] : inputs.running_mean;
    const double invstd = a.mean ? a.invstd[c] : inverse_deviation(inputs.running_var, a.eps);
    ForwardMap<T, kChannelsLast>::set(
        scratch, threadIdx.x,
        ChannelAffine<compute_t<T>>::of(mean, invstd, inputs.weight, inputs.bias));
  }
  __syncthreads();
  ForwardMap<T, kChannelsLast> map;
  map.read(scratch, plan);
  walk<kFarAhead<T>, false, 1>(slice.steps(), read,
                               [&](int step) { map(a, slice, step, x, residual, stream); });
}

// The statistics of all ranks, a thread for each channel.
template <typename Count>
__global__ void batch_norm_ranks_kernel(ChannelStatistics a, GatheredMoments gathered,
                                        Count channels) {
  count_batch(a);
  const Count c = Count{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const ChannelMoments of = gathered.of(channels, c);
  store_statistics(a, c, a.running_mean.at(c, 0.0), a.running_var.at(c, 1.0), of,
                   inverse_deviation(of.variance(), a.eps));
}

// Before the statistics where they are averaged over all batches: everyone then reads the new
// number, and nobody has to be waited for before it is written. A launch of its own, but a rare
// one; a ticket would need zeroed memory, which is a launch as well, and always.
template <typename Count>
__global__ void count_batch_kernel(Count* num_batches_tracked) {
  *num_batches_tracked = next_count(*num_batches_tracked);
}

}  // namespace cuda
RK_NAMESPACE_END
