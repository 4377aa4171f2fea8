// What every mixup kernel does: a few vectors of one sample, and of whom it is mixed with, are read
// and blended.
//
// A vector is `kCount` elements side by side, all of them of one sample, aligned for 16-byte
// access; where a tensor's size or address does not allow for that, vectors are of one element.
#pragma once

#include <type_traits>

#include "reg_kernels/channel_layout.h"
#include "reg_kernels/device_assert.cuh"
#include "reg_kernels/mixup_math.h"
#include "reg_kernels/vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

enum class MixupPass { forward, backward };

template <typename In, typename Out>
using mixup_compute_t =
    std::conditional_t<std::is_same_v<In, double> || std::is_same_v<Out, double>, double, float>;

// Elements a vector: 16 bytes of the wider type. Of pairs of types that nobody trains with, one:
// such have one kernel for all layouts, or compiling them would take longer than all the others.
template <typename In, typename Out>
constexpr int kMixupVector =
    std::is_same_v<In, Out> || (sizeof(In) != sizeof(Out) && sizeof(In) < 8 && sizeof(Out) < 8)
        ? kVectorBytes / (sizeof(In) > sizeof(Out) ? sizeof(In) : sizeof(Out))
        : 1;

// A launch. Of the backward, x is grad_output and y the input's gradient.
template <typename In, typename Out>
struct MixupArguments {
  using C = mixup_compute_t<In, Out>;

  const In* x;  // (N, C, L), as `layout` says
  Out* y;       // the same shape
  MixupBlend blend;
  const int64_t *receivers, *starts;  // of the backward: (N,) and (N + 1,), or null: reversed
  const C *scale, *shift;             // (C,), or null
  ChannelLayout layout;
  bool to_channels_last;  // how y lies
  bool reversed;          // each sample's partner is that of the batch reversed

  // Elements a sample.
  __device__ int64_t numel() const { return layout.channels * layout.length; }
  // The samples in the order in which blocks take them: where the batch is reversed, two that are
  // each other's partners side by side.
  __device__ int64_t sample(int64_t i) const {
    if (!reversed) return i;
    return i % 2 ? blend.samples - 1 - i / 2 : i / 2;
  }
  // Whether anything depends on where in a sample an element lies.
  __device__ bool needs_places() const {
    return blend.boxes || scale || shift || to_channels_last != layout.channels_last;
  }
};

// A vector as it was loaded, in words: what lives across a branch takes a register an element
// otherwise, whatever its size.
template <typename T, int kCount>
struct PackedVector {
  Bits<kCount * sizeof(T)> bits;

  static __device__ __forceinline__ PackedVector load(const T* data) {
    return {*reinterpret_cast<const Bits<kCount * sizeof(T)>*>(in_global_memory(data))};
  }
  __device__ __forceinline__ Vector<T, kCount> unpack() const {
    return bit_cast<Vector<T, kCount>>(bits);
  }
};

template <typename T>
struct PackedVector<T, 1> {
  T value;

  static __device__ __forceinline__ PackedVector load(const T* data) {
    return {*in_global_memory(data)};
  }
  __device__ __forceinline__ Vector<T, 1> unpack() const { return {{value}}; }
};

// Of numbers that are not negative: mostly they fit in 32 bits, where a division takes a fifth.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  const auto n = static_cast<uint64_t>(a), divisor = static_cast<uint64_t>(b);
  if ((n | divisor) >> 32 == 0) return static_cast<uint32_t>(n) / static_cast<uint32_t>(divisor);
  return static_cast<int64_t>(n / divisor);
}

// The channel, and the position in it, that a vector begins with.
struct MixupPlace {
  int64_t c, l;

  // Of element i of a sample.
  static __device__ __forceinline__ MixupPlace of(const ChannelLayout& layout, int64_t i) {
    const int64_t inner = layout.channels_last ? layout.channels : layout.length;
    const int64_t outer = quotient(i, inner), rest = i - outer * inner;
    return layout.channels_last ? MixupPlace{rest, outer} : MixupPlace{outer, rest};
  }
};

// The same number, of which the compiler knows nothing: what follows from it is reckoned anew in
// each turn of a loop, not kept in registers all the while.
__device__ __forceinline__ int64_t afresh(int64_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(value));
#endif
  return value;
}

template <int kCount>
constexpr uint32_t kAllInside = (1u << kCount) - 1;

// Rows and columns of images that have boxes: they are counted in int.
constexpr int64_t kMostColumns = int64_t{1} << 30;

// Bit j is set where element j of the vector at `place` lies inside of the box. By runs of one row,
// or with the channels last of one position: mostly a vector has one of those or two.
template <int kCount>
__device__ __forceinline__ uint32_t inside_bits(const MixupBlend& blend,
                                                const ChannelLayout& layout, const MixupBox& box,
                                                const MixupPlace& place) {
  if (box.is_empty()) return 0;
  const auto width = static_cast<int>(blend.width), height = static_cast<int>(blend.height);
  const int64_t rows = quotient(place.l, width);
  int column = static_cast<int>(place.l - rows * width);
  // (N, C, D, H, W): each of D slices begins with a row 0.
  int row = static_cast<int>(rows < height ? rows : rows - quotient(rows, height) * height);
  const auto channels = static_cast<int>(layout.channels < kCount ? layout.channels : kCount);
  int64_t rest = layout.channels - place.c;  // channels of the first position
  uint32_t bits = 0;
  RK_NO_UNROLL
  for (int j = 0; j < kCount;) {
    int first = j, last = kCount, next = kCount;  // elements inside, if the row is; the next run's
    if (layout.channels_last) {
      if (rest < kCount) next = last = j + static_cast<int>(rest);
      rest = channels;
      if (column < box.x1 || column >= box.x2) last = j;
      ++column;
    } else {
      if (box.x1 > column) first += static_cast<int>(box.x1) - column;
      last = j + static_cast<int>(box.x2) - column;
      next = j + width - column;
      column = width;
    }
    if (last > kCount) last = kCount;
    if (box.has_row(row) && first < last) bits |= (1u << last) - (1u << first);
    j = next;
    if (column == width) {
      column = 0;
      if (++row == height) row = 0;
    }
  }
  return bits;
}

// How one sample is mixed, at the vectors of one thread.
template <typename C, int kCount, int kLoads>
struct MixupSample {
  MixupWeights<C> weights;
  uint32_t inside[kLoads];

  template <typename In, typename Out>
  static __device__ __forceinline__ MixupSample at(const MixupArguments<In, Out>& a, int64_t n,
                                                   const MixupPlace (&places)[kLoads]) {
    const double lam = a.blend.lam_of(n);
    RK_ASSERT(lam >= 0 && lam <= 1);
    MixupSample result{MixupWeights<C>::of(lam), {}};
    if (a.blend.boxes) {
      const MixupBox box = a.blend.box_of(n);
      RK_ASSERT(box.fits(a.blend.height, a.blend.width));
      RK_UNROLL
      for (int k = 0; k < kLoads; ++k) {
        result.inside[k] = inside_bits<kCount>(a.blend, a.layout, box, places[k]);
      }
    }
    return result;
  }

  // Whether vector k of the sample itself counts, and that of its partner. What does not is not
  // read.
  __device__ bool takes_own(int k) const {
    return !weights.replaces() && inside[k] != kAllInside<kCount>;
  }
  __device__ bool takes_partner(int k) const { return !weights.keeps() || inside[k] != 0; }

  template <typename T>
  __device__ __forceinline__ void add_own(C (&sums)[kCount], int k,
                                          const PackedVector<T, kCount>& x) const {
    add(sums, x, inside[k], weights.own, C(0));
  }
  template <typename T>
  __device__ __forceinline__ void add_partner(C (&sums)[kCount], int k,
                                              const PackedVector<T, kCount>& x) const {
    add(sums, x, inside[k], weights.partner, C(1));
  }

  // What a sample becomes. Adding to -0 keeps a zero's sign.
  template <typename T>
  __device__ __forceinline__ void blend(C (&sums)[kCount], int k,
                                        const PackedVector<T, kCount>& own,
                                        const PackedVector<T, kCount>& partner) const {
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) sums[j] = C(-0.0);
    add_partner(sums, k, partner);
    add_own(sums, k, own);
  }

 private:
  // A weight of 0 leaves out what may be infinite; one of 1 changes nothing.
  template <typename T>
  static __device__ __forceinline__ void add(C (&sums)[kCount], const PackedVector<T, kCount>& x,
                                             uint32_t bits, C outside_weight, C inside_weight) {
    const Vector<T, kCount> values = x.unpack();
    if (bits == 0 || bits == kAllInside<kCount>) {
      const C weight = bits ? inside_weight : outside_weight;
      if (weight == 0) return;
      RK_UNROLL
      for (int j = 0; j < kCount; ++j) sums[j] += weight * static_cast<C>(load(values.v[j]));
      return;
    }
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) {
      const C weight = bits >> j & 1u ? inside_weight : outside_weight;
      if (weight != 0) sums[j] += weight * static_cast<C>(load(values.v[j]));
    }
  }
};

// f(j, value) for each element j of the vector at `place`, with the value of its channel.
template <int kCount, typename C, typename F>
__device__ __forceinline__ void for_channels(const C* values, const ChannelLayout& layout,
                                             const MixupPlace& place, const F& f) {
  int64_t c = place.c, l = place.l;
  if (!layout.channels_last && l + kCount <= layout.length) {
    const C value = values[c];
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) f(j, value);
    return;
  }
  RK_UNROLL
  for (int j = 0; j < kCount; ++j) {
    f(j, values[c]);
    if (layout.channels_last) {
      if (++c == layout.channels) c = 0;
    } else if (++l == layout.length) {
      l = 0;
      ++c;
    }
  }
}

// The vector at `place`, scaled, shifted and rounded.
template <int kCount, typename In, typename Out, typename C = mixup_compute_t<In, Out>>
__device__ __forceinline__ Vector<Out, kCount> finish(const MixupArguments<In, Out>& a,
                                                      const MixupPlace& place, C (&sums)[kCount]) {
  if (a.scale) {
    for_channels<kCount>(a.scale, a.layout, place, [&](int j, C value) { sums[j] *= value; });
  }
  if (a.shift) {
    for_channels<kCount>(a.shift, a.layout, place, [&](int j, C value) { sums[j] += value; });
  }
  Vector<Out, kCount> result;
  RK_UNROLL
  for (int j = 0; j < kCount; ++j) {
    result.v[j] = store<Out>(static_cast<compute_t<Out>>(sums[j]));
  }
  return result;
}

// A vector that a thread has not got.
constexpr int64_t kNoVector = -1;

// Blends the vectors of sample n that begin at its elements `at`, at `places`, and hands each
// result to emit(k, vector). `at` is kNoVector from some vector on.
template <MixupPass kPass, int kCount, int kLoads, typename In, typename Out, typename Emit>
__device__ __forceinline__ void mixup_vectors(const MixupArguments<In, Out>& a, int64_t n,
                                              const int64_t (&at)[kLoads],
                                              const MixupPlace (&places)[kLoads],
                                              const Emit& emit) {
  using C = mixup_compute_t<In, Out>;
  using Sample = MixupSample<C, kCount, kLoads>;
  const int64_t samples = a.blend.samples;

  const Sample of_n = Sample::at(a, n, places);
  const In* const own = a.x + n * a.numel();
  PackedVector<In, kCount> own_vectors[kLoads];
  RK_UNROLL
  for (int k = 0; k < kLoads; ++k) {
    own_vectors[k] = {};
    if (at[k] != kNoVector && of_n.takes_own(k)) {
      own_vectors[k] = PackedVector<In, kCount>::load(own + at[k]);
    }
  }

  C sums[kLoads][kCount];
  RK_UNROLL
  for (int k = 0; k < kLoads; ++k) {
    RK_UNROLL
    for (int j = 0; j < kCount; ++j) sums[k][j] = C(-0.0);  // adding to it keeps a zero's sign
  }
  // Of sample m, by the weights of the one that takes it.
  const auto take = [&](int64_t m, const Sample& taker) {
    RK_ASSERT(m >= 0 && m < samples);
    const In* const partner = a.x + m * a.numel();
    PackedVector<In, kCount> vectors[kLoads];
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      vectors[k] = {};
      if (at[k] != kNoVector && taker.takes_partner(k)) {
        vectors[k] = PackedVector<In, kCount>::load(partner + at[k]);
      }
    }
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) taker.add_partner(sums[k], k, vectors[k]);
  };
  if constexpr (kPass == MixupPass::forward) {
    take(a.blend.partner_of(n), of_n);
  } else {
    // The gradients of those that n is the partner of.
    int64_t first = n, last = n + 1;
    if (!a.reversed) {
      first = a.starts[n];
      last = a.starts[n + 1];
      RK_ASSERT(0 <= first && first <= last && last <= samples);
    }
    RK_NO_UNROLL
    for (int64_t i = first; i < last; ++i) {
      const int64_t m = a.reversed ? samples - 1 - n : a.receivers[i];
      RK_ASSERT(m >= 0 && m < samples);
      take(m, Sample::at(a, m, places));
    }
  }

  RK_UNROLL
  for (int k = 0; k < kLoads; ++k) {
    if (at[k] == kNoVector) continue;
    of_n.add_own(sums[k], k, own_vectors[k]);
    emit(k, finish(a, places[k], sums[k]));
  }
}

}  // namespace cuda
RK_NAMESPACE_END
