// BatchNorm with residual, activation and dropout, forward and backward, on raw pointers, for CUDA
// and for its emulation on the CPU.
//
// Training needs a channel twice: to reduce it, and to map it with what that gave. One kernel does
// both: blocks read their slice of an item (channel_slices.cuh) once and keep it in shared memory,
// sum up on the way, exchange their sums through global memory, and map what they have kept. An H100
// keeps 27 MB; items come one after the other, so only a single channel, or a strip of 64 bytes of
// channels last, larger than that is read a second time, the last part first, which is still in the
// L2 cache.
//
// Bytes an element, s = sizeof(T), where items fit the chip (in brackets where not), PyTorch's in
// eager mode beside it; + s residual, + 1/8 gate:
//   forward            2 s (3 s)   PyTorch 3 s, + 2 s activation, + 3 s residual, + 2 s + 1 dropout
//   backward           3 s (5 s)   PyTorch 5 s, + 3 s activation, + 2 s + 1 dropout
//   inference          2 s         PyTorch 2 s, + 2 s activation, + 3 s residual
// What limits: memory, except that a dropout's draws take about as many instructions as all else
// together and keep 16-bit types near the issue limit.
//
// The numbers: a thread takes mean and sum of squared deviations of a batch of vectors, in float,
// and merges them into its own as Chan does, all relative to a pivot, the median of three of the
// channel's values; beyond the thread, sums of (x - pivot) and its square are added up in double,
// where nothing is lost: the pivot is a value of the channel, so that its distance from the mean is
// at most sqrt(M) deviations.
#pragma once

#include "reg_kernels/batch_norm_math.h"
#include "reg_kernels/channel_slices.cuh"
#include "reg_kernels/dropout_math.h"
#include "reg_kernels/reduce.cuh"
#include "reg_kernels/rng_state.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// ---- Arguments. Tensors of the input's shape have its storage order; channel values are [C].

// Dropout's and the activation's part, the same in both directions. A gate has one bit an element,
// element e's is bit e % 8 of byte e / 8 of the storage order; it is allocated in whole words of
// four bytes. What a bit means: batch_norm_math.h.
struct Chain {
  Activation activation;
  double slope;
  bool drops;
  DropoutRate rate;
  RngState rng;
  uint8_t* gate;  // or null
};

template <typename T>
struct BatchNormForward {
  const T* x;
  const T* residual;  // or null
  T* y;
  ChannelValues weight, bias;
  // Moved on in training, read in inference; null together.
  ChannelValues running_mean, running_var;
  int64_t* num_batches_tracked;  // or null
  double momentum;
  bool averages;  // over all batches, instead of by the momentum
  double eps;
  Chain chain;
  double* mean;  // these two in training
  double* invstd;

  ChannelPlan plan;  // the rest is the launcher's
  Exchange exchange;
};

template <typename T>
struct BatchNormBackward {
  const T* grad_output;
  const T* x;
  const T* residual;  // or null, also where it is not needed
  ChannelValues weight, bias;
  const double* mean;
  const double* invstd;
  bool training;
  Chain chain;
  T* grad_input;                         // each of these three or null
  ChannelValues grad_weight, grad_bias;  // both or none
  T* grad_residual;

  ChannelPlan plan;
  Exchange exchange;

  __device__ bool needs_z() const {
    return needs_preactivation(chain.activation, chain.gate != nullptr, chain.drops);
  }
};

// ---- Shared memory beside what is kept: sums, and up to five constants a channel.

constexpr int kConstants = 5;
constexpr int64_t kSumsBytes = 2 * sizeof(Sums);  // a thread of a reduction

// Blocks a multiprocessor of the kernels that only map: 80 registers a thread, in double 128.
template <typename T>
constexpr int kMapBlocks = sizeof(T) == 8 ? 4 : 6;

template <typename T>
struct Scratch {
  using C = compute_t<T>;
  // An item's channels at the most, 128 bytes of them.
  static constexpr int kChannels = 128 / sizeof(T);
  static constexpr int64_t kBytes = int64_t{kConstants} * kChannels * sizeof(C);

  C* constants;  // [kConstants][kChannels]
  Sums* sums;    // of reductions, [2 blockDim.x]: kChannels a warp

  __device__ explicit Scratch(unsigned char* shared)
      : constants(reinterpret_cast<C*>(shared)), sums(reinterpret_cast<Sums*>(shared + kBytes)) {}

  // What is behind them.
  __device__ void* rest(bool reduces) const { return sums + (reduces ? 2 * blockDim.x : 0); }

  __device__ C& constant(int kind, int channel) const {
    return constants[kind * kChannels + channel];
  }
};

// How many channels a thread's vectors belong to, and which of them element j belongs to.
template <typename T, bool kChannelsLast>
constexpr int kColumns = kChannelsLast ? kVector<T> : 1;
template <bool kChannelsLast>
__device__ __forceinline__ constexpr int column(int j) {
  return kChannelsLast ? j : 0;
}

// A channel's constant of one kind, for each of the thread's columns.
template <typename T, bool kChannelsLast>
struct Columns {
  using C = compute_t<T>;
  C values[kColumns<T, kChannelsLast>];

  __device__ void read(const Scratch<T>& scratch, const ChannelPlan& plan, int kind) {
    RK_UNROLL
    for (int k = 0; k < kColumns<T, kChannelsLast>; ++k) {
      values[k] = scratch.constant(kind, first(plan) + k);
    }
  }
  __device__ C operator[](int j) const { return values[column<kChannelsLast>(j)]; }

  // The thread's first channel, counted in its item.
  static __device__ int first(const ChannelPlan& plan) {
    return kChannelsLast ? static_cast<int>(threadIdx.x) % plan.vectors * kVector<T> : 0;
  }
};

// ---- Gates and masks: the bits of a step's vectors, those of vector k in byte k.

// Whether dropout keeps each element. All lanes of a warp take part in this and in store_gate.
template <typename T, bool kChannelsLast>
__device__ __forceinline__ uint32_t draw(const Slice<T, kChannelsLast>& slice, int step,
                                         bool ragged, uint32_t threshold,
                                         const RngStream& stream) {
  const int64_t first = slice.own_group(step);
  const auto group = static_cast<uint64_t>(first / kGroup);
  uint32_t kept = keep_bits(stream(group), threshold);
  if (kChannelsLast && ragged) {
    kept |= keep_bits(stream(group + 1), threshold) << kGroup;
    kept = kept >> first % kGroup & 0xffu;
  }
  return slice.distribute(kept);
}

// Bytes that hold bits of several runs or positions are put together by atomics, from zeros.
template <typename T, bool kChannelsLast>
__device__ __forceinline__ void store_gate(const Slice<T, kChannelsLast>& slice, int step,
                                           bool ragged, uint32_t valid, uint32_t bits,
                                           uint8_t* gate) {
  bits = slice.collect(bits & valid);
  valid = slice.collect(valid);
  const int64_t first = slice.own_group(step);
  if (!ragged) {
    if (valid) gate[first / kGroup] = static_cast<uint8_t>(bits);
  } else if (bits) {
    auto* const words = reinterpret_cast<uint32_t*>(gate) + first / 32;
    const uint64_t shifted = static_cast<uint64_t>(bits) << first % 32;
    const auto low = static_cast<uint32_t>(shifted), high = static_cast<uint32_t>(shifted >> 32);
    if (low) atomicOr(&words[0], low);
    if (high) atomicOr(&words[1], high);
  }
}

// The bits of one vector.
template <typename T, bool kChannelsLast>
__device__ __forceinline__ uint32_t load_gate(int64_t element, uint32_t valid, bool ragged,
                                              int64_t numel, const uint8_t* gate) {
  if (valid == 0) return 0;
  uint32_t bits = gate[element / kGroup];
  if (kChannelsLast && ragged) {  // the vector may lie in two bytes
    const int64_t end = element + kVector<T> < numel ? element + kVector<T> : numel;
    bits |= uint32_t{gate[(end - 1) / kGroup]} << kGroup;
  }
  return bits >> element % kGroup;
}

// ---- The forward's two passes.

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
    const C other = static_cast<C>(count) * reciprocal(static_cast<C>(count + added));
    RK_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const C delta = sum[k] - mean[k];
      m2[k] += squares[k] + delta * delta * (share * static_cast<C>(count));
      mean[k] = mean[k] * other + sum[k] * share;
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

  static __device__ void set(const Scratch<T>& scratch, int channel, const ChannelAffine<C>& affine) {
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
    const auto slope = static_cast<C>(chain.slope), scale_kept = static_cast<C>(chain.rate.scale);
    // Whether the gate's bits tell signs.
    const bool relu = chain.activation == Activation::relu;
    const bool signs = relu || (chain.activation == Activation::leaky_relu && !chain.drops);
    uint32_t bits = ~0u, valid = 0;
    if (chain.drops) bits = draw(slice, step, ragged, chain.rate.threshold, stream);
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
      C multiplier[kVector<T>];
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        multiplier[j] = bits >> (8 * k + j) & 1u ? scale_kept : C(0);
      }
      if (chain.gate && signs) {
        RK_UNROLL
        for (int j = 0; j < kVector<T>; ++j) {
          const bool passes = relu ? !(z[j] <= C(0)) : z[j] > C(0);
          bits &= ~((passes ? 0u : 1u) << (8 * k + j));
        }
      }
      for_activation(chain.activation, [&]<Activation kActivation>() {
        RK_UNROLL
        for (int j = 0; j < kVector<T>; ++j) z[j] = activate<kActivation>(z[j], slope);
      });
      if (chain.drops) {
        RK_UNROLL
        for (int j = 0; j < kVector<T>; ++j) z[j] *= multiplier[j];
      }
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) vector.v[j] = store<T>(z[j]);
      store_valid(a.y, direct, own, element, vector);
      valid |= own << 8 * k;
    });
    if (chain.gate) store_gate(slice, step, ragged, valid, bits, chain.gate);
  }
};

// ---- The forward's kernels.

// The channel of an item that this thread finishes, for threads of as many as an item has; else -1.
template <typename T>
__device__ __forceinline__ int64_t finished_channel(const ChannelPlan& plan, int64_t item) {
  const int channels = plan.channels<T>();
  const int64_t c = item * channels + threadIdx.x;
  return static_cast<int>(threadIdx.x) < channels && c < plan.layout.channels ? c : -1;
}

template <typename T>
__device__ __forceinline__ void finish_statistics(const BatchNormForward<T>& a, int64_t c,
                                                  const Sums& sums, double pivot, bool writes,
                                                  double& mean, double& invstd) {
  const auto count = static_cast<double>(a.plan.count);
  const double shifted = sums.a / count;
  double m2 = sums.b - sums.a * shifted;
  m2 = m2 < 0.0 ? 0.0 : m2;
  mean = pivot + shifted;
  invstd = inverse_deviation(m2 / count, a.eps);
  if (!writes) return;
  a.mean[c] = mean;
  a.invstd[c] = invstd;
  if (!a.running_mean.data) return;
  // Counted already: see count_batch.
  const double factor =
      a.averages ? 1.0 / static_cast<double>(*a.num_batches_tracked) : a.momentum;
  a.running_mean.set(c, running_average(a.running_mean.at(c, 0.0), mean, factor));
  a.running_var.set(c, running_average(a.running_var.at(c, 0.0), m2 / (count - 1.0), factor));
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
  const RngStream stream = a.chain.rng.stream(RngTag::dropout);
  if (a.num_batches_tracked && !a.averages && blockIdx.x == 0 && threadIdx.x == 0) {
    ++*a.num_batches_tracked;
  }

  for (int64_t item = blockIdx.x / plan.blocks; item < plan.items; item += plan.groups) {
    const Slice<T, kChannelsLast> slice(plan, item, rank);
    const int steps = slice.steps();

    // Reduce.
    const int filled = (steps + kBatchSteps<T> - 1) / kBatchSteps<T> * kBatchSteps<T>;
    const auto read = [&](int step) {
      slice.for_vectors(step, [&](int k, int64_t element, uint32_t valid) {
        x.read(a.x, plan.direct, element, valid, step, k);
      });
    };
    read_ahead<kFarAhead<T>, false>(filled, read);
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
    const int64_t c = finished_channel<T>(plan, item);
    if (c >= 0) {
      double mean, invstd;
      finish_statistics(a, c, total, scratch.constant(3, threadIdx.x), rank == 0, mean, invstd);
      ForwardMap<T, kChannelsLast>::set(
          scratch, threadIdx.x,
          ChannelAffine<compute_t<T>>::training(mean, invstd, a.weight.at(c, 1.0),
                                                a.bias.at(c, 0.0)));
    }
    __syncthreads();

    // Map. What was read last comes first: the caches still have it.
    ForwardMap<T, kChannelsLast> map;
    map.read(scratch, plan);
    __syncthreads();  // the next item's constants may come
    const auto read_again = [&](int step) {
      slice.for_vectors(step, [&](int k, int64_t element, uint32_t valid) {
        if (!x.keeps(step)) x.read(a.x, plan.direct, element, valid, step, k);
        if (a.residual) residual.read(a.residual, plan.direct, element, valid, step, k);
      });
    };
    read_ahead<kAhead<T>, true>(steps, read_again);
    walk<kAhead<T>, true, 1>(steps, read_again, [&](int step) {
      map(a, slice, step, x, residual, stream);
    });
  }
}

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
  const RngStream stream = a.chain.rng.stream(RngTag::dropout);
  const auto read = [&](int step) {
    slice.for_vectors(step, [&](int k, int64_t element, uint32_t valid) {
      x.read(a.x, plan.direct, element, valid, step, k);
      if (a.residual) residual.read(a.residual, plan.direct, element, valid, step, k);
    });
  };
  read_ahead<kFarAhead<T>, false>(slice.steps(), read);

  const int64_t c = finished_channel<T>(plan, item);
  if (c >= 0) {
    ForwardMap<T, kChannelsLast>::set(
        scratch, threadIdx.x,
        ChannelAffine<compute_t<T>>::frozen(
            a.running_mean.at(c, 0.0), inverse_deviation(a.running_var.at(c, 1.0), a.eps),
            a.weight.at(c, 1.0), a.bias.at(c, 0.0)));
  }
  __syncthreads();
  ForwardMap<T, kChannelsLast> map;
  map.read(scratch, plan);
  walk<kFarAhead<T>, false, 1>(slice.steps(), read, [&](int step) {
    map(a, slice, step, x, residual, stream);
  });
}

// Before the statistics where they are averaged over all batches: everyone then reads the new
// number, and nobody has to be waited for before it is written. A launch of its own, but a rare one;
// a ticket would need zeroed memory, which is a launch as well, and always.
template <typename Count>
__global__ void count_batch_kernel(Count* num_batches_tracked) {
  ++*num_batches_tracked;
}

// ---- The backward's two passes.

template <typename T, bool kChannelsLast>
struct BackwardMap {
  using C = compute_t<T>;
  static constexpr int kCount = kColumns<T, kChannelsLast>;
  // Of the affine and of the gradient, whose k1 is the scale; the frozen affine's own shift is 0.
  Columns<T, kChannelsLast> shift, scale, offset, k2, k3;

  // What the reduction needs of a channel.
  static __device__ void set(const BatchNormBackward<T>& a, const Scratch<T>& scratch, int channel,
                             int64_t c) {
    const double mean = a.mean[c], invstd = a.invstd[c];
    const double weight = a.weight.at(c, 1.0), bias = a.bias.at(c, 0.0);
    const auto affine = a.training ? ChannelAffine<C>::training(mean, invstd, weight, bias)
                                   : ChannelAffine<C>::frozen(mean, invstd, weight, bias);
    scratch.constant(0, channel) = static_cast<C>(mean);
    scratch.constant(1, channel) = affine.scale;
    scratch.constant(2, channel) = affine.offset;
  }

  // And what the map needs in training, from the channel's sums.
  static __device__ void set(const BatchNormBackward<T>& a, const Scratch<T>& scratch, int channel,
                             int64_t c, const Sums& sums) {
    const auto gradient = ChannelGradient<C>::training(a.mean[c], a.invstd[c], a.weight.at(c, 1.0),
                                                       sums.a, sums.b, a.plan.count);
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
      const C z_shift = a.training ? shift[j] : C(0);
      z[j] = ChannelAffine<C>{z_shift, scale[j], offset[j]}(load(x.v[j]));
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
        gate = load_gate<T, kChannelsLast>(element, valid, a.plan.ragged, a.plan.numel,
                                           a.chain.gate);
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

// ---- The backward's kernels.

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
      }
    }
    __syncthreads();

    // Map. What was read last comes first: the caches still have it.
    map.read_gradient(scratch, plan);
    __syncthreads();  // the next item's constants may come
    if (!a.grad_input && !a.grad_residual) continue;
    const auto read_again = [&](int step) {
      if (!x.keeps(step)) read(step);
    };
    read_ahead<kAhead<T>, true>(steps, read_again);
    walk<kAhead<T>, true, 1>(steps, read_again, [&](int step) {
      map(a, slice, step, grad_output, x, residual);
    });
  }
}

// Where no gradient depends on a sum: of the input with frozen statistics, of the residual.
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks<T>)
    batch_norm_backward_map_kernel(BatchNormBackward<T> a) {
  RK_SHARED(unsigned char, shared);
  const ChannelPlan& plan = a.plan;
  const Scratch<T> scratch(shared);
  const Staging<T, 1> grad_output(scratch.rest(false), plan.kept, 0);
  const Staging<T, 1> x(scratch.rest(false), plan.kept, plan.kept);
  const Staging<T, 1> residual(scratch.rest(false), plan.kept, 2 * plan.kept);
  const int64_t item = blockIdx.x / plan.blocks;
  const Slice<T, kChannelsLast> slice(plan, item, blockIdx.x % plan.blocks);
  const bool reads_x = a.needs_z();
  const auto read = [&](int step) {
    slice.for_vectors(step, [&](int k, int64_t element, uint32_t valid) {
      grad_output.read(a.grad_output, plan.direct, element, valid, step, k);
      if (reads_x) x.read(a.x, plan.direct, element, valid, step, k);
      if (a.residual) residual.read(a.residual, plan.direct, element, valid, step, k);
    });
  };
  read_ahead<kFarAhead<T>, false>(slice.steps(), read);
  const int64_t c = finished_channel<T>(plan, item);
  if (c >= 0) BackwardMap<T, kChannelsLast>::set(a, scratch, threadIdx.x, c);
  __syncthreads();
  BackwardMap<T, kChannelsLast> map;
  map.read_affine(scratch, plan);
  walk<kFarAhead<T>, false, 1>(slice.steps(), read, [&](int step) {
    map(a, slice, step, grad_output, x, residual);
  });
}

// ---- Launchers.

template <typename... T>
bool all_aligned(const T*... data) {
  return ((reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0) && ...);
}

template <typename Arguments>
void launch_map(void (*kernel)(Arguments), const Arguments& a, cudaStream_t stream,
                const char* op) {
  RK_LAUNCH(kernel, a.plan.grid(), a.plan.block(), static_cast<size_t>(a.plan.shared_bytes), stream,
            a);
  check_launch(op);
}

// `allocate(bytes)` returns device memory that lives as long as the stream needs it; the meetings'
// counters in it are zeroed here.
template <typename Arguments, typename Allocate>
void launch_reduction(void (*kernel)(Arguments), Arguments& a, int channels,
                      const Allocate& allocate, cudaStream_t stream, const char* op) {
  const ChannelPlan& plan = a.plan;
  constexpr int64_t kUnasked = 48 * 1024;  // shared memory that a kernel has without asking
  if (plan.shared_bytes > kUnasked) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(plan.shared_bytes));
    check_launch(op);
  }
  const auto shared_bytes = static_cast<size_t>(plan.shared_bytes);
  if (plan.blocks == 1) {
    RK_LAUNCH(kernel, plan.grid(), plan.block(), shared_bytes, stream, a);
  } else {
    const int64_t partials = plan.items * plan.blocks * channels;
    void* const workspace = allocate(partials * static_cast<int64_t>(sizeof(Sums)) +
                                     plan.items * static_cast<int64_t>(sizeof(int)));
    a.exchange.partials = static_cast<Sums*>(workspace);
    a.exchange.arrivals = reinterpret_cast<int*>(a.exchange.partials + partials);
    cudaMemsetAsync(a.exchange.arrivals, 0, static_cast<size_t>(plan.items) * sizeof(int), stream);
    check_launch(op);
    RK_LAUNCH_COOPERATIVE(kernel, plan.grid(), plan.block(), shared_bytes, stream, a);
  }
  check_launch(op);
}

template <typename T>
ChannelPlan forward_plan(const BatchNormForward<T>& a, const ChannelLayout& layout,
                         int64_t numel) {
  const int residual_vectors = a.residual ? (kAhead<T> + 1) * kParts<T> : 0;
  return plan_reduction<T>(layout, numel, all_aligned(a.x, a.residual, a.y),
                           {.tensors = 1,
                            .ring = kForwardRing<T>,
                            .thread_bytes = kSumsBytes + residual_vectors * kVectorBytes,
                            .block_bytes = Scratch<T>::kBytes},
                           Chip::current());
}

// Where there is something to reduce.
template <typename T>
ChannelPlan backward_plan(const BatchNormBackward<T>& a, const ChannelLayout& layout,
                          int64_t numel) {
  return plan_reduction<T>(
      layout, numel, all_aligned(a.grad_output, a.x, a.residual, a.grad_input, a.grad_residual),
      {.tensors = a.residual ? 3 : 2,
       .ring = kBackwardRing<T>,
       .thread_bytes = kSumsBytes,
       .block_bytes = Scratch<T>::kBytes},
      Chip::current());
}

// Training. There are elements, and at least two a channel.
template <typename T, typename Allocate>
void launch_batch_norm(BatchNormForward<T> a, const ChannelLayout& layout, int64_t numel,
                       const Allocate& allocate, cudaStream_t stream) {
  const char* op = "batch_norm";
  a.plan = forward_plan(a, layout, numel);
  if (a.chain.gate && a.plan.ragged) {
    cudaMemsetAsync(a.chain.gate, 0, static_cast<size_t>(ceil_div(numel, 8)), stream);
    check_launch(op);
  }
  if (a.num_batches_tracked && a.averages) {
    RK_LAUNCH(count_batch_kernel<int64_t>, dim3(1), dim3(1), 0, stream, a.num_batches_tracked);
    check_launch(op);
  }
  launch_reduction(
      a.plan.layout.channels_last ? batch_norm_kernel<T, true> : batch_norm_kernel<T, false>, a,
      a.plan.template channels<T>(), allocate, stream, op);
}

// With frozen statistics, running_mean and running_var.
template <typename T>
void launch_batch_norm_inference(BatchNormForward<T> a, const ChannelLayout& layout, int64_t numel,
                                 cudaStream_t stream) {
  if (numel == 0) return;
  a.plan = plan_map<T>(layout, numel, all_aligned(a.x, a.residual, a.y), a.residual ? 2 : 1,
                       Scratch<T>::kBytes);
  launch_map(a.plan.layout.channels_last ? batch_norm_inference_kernel<T, true>
                                         : batch_norm_inference_kernel<T, false>,
             a, stream, "batch_norm_inference");
}

template <typename T, typename Allocate>
void launch_batch_norm_backward(BatchNormBackward<T> a, const ChannelLayout& layout, int64_t numel,
                                const Allocate& allocate, cudaStream_t stream) {
  const char* op = "batch_norm_backward";
  if (a.grad_weight.data || (a.grad_input && a.training)) {
    a.plan = backward_plan(a, layout, numel);
    launch_reduction(a.plan.layout.channels_last ? batch_norm_backward_kernel<T, true>
                                                 : batch_norm_backward_kernel<T, false>,
                     a, a.plan.template channels<T>(), allocate, stream, op);
  } else if (a.grad_input || a.grad_residual) {
    // x has its place among what is staged, whether it is read or not.
    a.plan = plan_map<T>(
        layout, numel, all_aligned(a.grad_output, a.x, a.residual, a.grad_input, a.grad_residual),
        a.residual ? 3 : 2, Scratch<T>::kBytes);
    launch_map(a.plan.layout.channels_last ? batch_norm_backward_map_kernel<T, true>
                                           : batch_norm_backward_map_kernel<T, false>,
               a, stream, op);
  }
}

}  // namespace cuda
RK_NAMESPACE_END
