// What the losses of logits have in common on a GPU: their arguments, what the labels of a position
// make of it, how positions are shared out, and what goes before the launch.
#pragma once

#include <algorithm>

#include "softmax.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// Of logits (N, C, S) of type T, and of a gradient in the same storage order. Positions are counted
// n S + s.
template <typename T>
struct LossArguments {
  using C = compute_t<T>;

  const T* x;
  T* gradient;        // or null
  int64_t positions;  // N S
  int64_t classes;
  int64_t length;  // S where the classes of a position lie so far apart; 1 where side by side
  LabelOptions labels;
  const C* weight;  // (C,), or null
  Reduction reduction;
  C* stats;   // a number of (N S,), or null
  C* losses;  // (N S,), or null where they are summed up or not asked for
  LossSum<C> sum;
  ChannelValues grad_output;  // (N S,), or one number, or null and it is 1
  bool one_grad_output;

  const TargetSums* sums;  // the launcher's: null without a mean and without weights to smooth over

  RK_HD bool in_rows() const { return length == 1; }
  RK_HD bool is_mean() const { return reduction == Reduction::mean; }
  RK_HD int64_t mean_of() const { return is_mean() ? positions : 1; }

  // The gradient of the loss.
  __device__ C factor(int64_t position) const {
    return static_cast<C>(grad_output.at(one_grad_output ? 0 : position, 1.0));
  }
  __device__ TargetSums target_sums() const {
    return sums ? *sums : TargetSums{{1.0, 1.0}, static_cast<double>(classes)};
  }
};

// Where a position's class 0 lies. A function of what a kernel holds in registers: as a member of
// the arguments it cost the kernels of planes up to forty more.
__device__ __forceinline__ int64_t start_of(int64_t position, int64_t classes, int64_t length) {
  return position / length * classes * length + position % length;
}

// What the labels of a position ask of it, before its classes are.
template <typename C>
struct Position {
  LabelTerms<C> terms;
  C x_a, x_b;   // the labels' logits
  bool counts;  // or all of its labels are ignored; each vector would find that out again
};

// `x` is the position's class 0, and its classes are `stride` apart.
template <bool kSmooths = true, typename T>
__device__ __forceinline__ Position<compute_t<T>> read_labels(const LossArguments<T>& a,
                                                              int64_t position, const T* x,
                                                              int64_t stride) {
  using C = compute_t<T>;
  if (a.labels.labels) RK_ASSERT(a.labels.is_valid(a.labels.labels[position]));
  if (a.labels.partner_labels) {
    RK_ASSERT(a.labels.is_valid(a.labels.partner_labels[position]));
    RK_ASSERT(a.labels.lam_of(position) >= 0 && a.labels.lam_of(position) <= 1);
  }
  const TargetSums sums = a.target_sums();
  Position<C> result{};
  result.terms =
      LabelTerms<C>::template at<kSmooths>(a.labels, sums.labels, a.weight, sums.weights, position);
  if (result.terms.a >= 0) result.x_a = load(x[result.terms.a * stride]);
  if (result.terms.b >= 0) result.x_b = load(x[result.terms.b * stride]);
  result.counts = !result.terms.is_nothing();
  return result;
}

// ---- How positions are shared out.

constexpr int64_t kFewBlocks = 512;  // up to so many, blocks become smaller
constexpr int kPlaneThreads = 128;   // at most, where a thread takes a position
constexpr int kPlaneBlocks = 4;      // of a multiprocessor, then at least

struct LossPlan {
  enum class Way { short_rows, long_rows, planes };

  Way way;
  int lanes;    // threads a position
  int threads;  // a block
  int64_t blocks = 0;
  int64_t kept = 0;  // of a position, as much as a block has shared memory for

  LossPlan(Way way, int lanes, int threads) : way(way), lanes(lanes), threads(threads) {}

  // One of at most `threads` threads a block, and of fewer where that makes for more blocks.
  static LossPlan of_small_blocks(Way way, int64_t positions, int lanes, int threads) {
    while (threads > kWarp && ceil_div(positions, threads / lanes) < kFewBlocks) threads /= 2;
    return {way, lanes, threads};
  }

  void set_blocks(int64_t positions, int64_t most_blocks) {
    blocks = std::min(ceil_div(positions, threads / lanes), most_blocks);
  }
};

inline int power_of_two_from(int64_t count, int most) {
  int result = 1;
  while (result < count && result < most) result *= 2;
  return result;
}

// ---- Before the launch of `blocks` blocks: the labels' sums, and a place for the losses'.
// allocate(bytes) returns device memory to be used on the stream.
template <typename T, typename Allocate>
void prepare_loss(LossArguments<T>& a, int64_t blocks, Allocate&& allocate, cudaStream_t stream) {
  if (!a.sum.loss && !(a.labels.labels && (a.is_mean() || (a.weight && a.labels.smooths())))) {
    return;
  }
  const int64_t partials = a.sum.loss ? blocks : 0;
  const LossScratch scratch(allocate(LossScratch::bytes(a.positions, a.classes, partials)),
                            partials);
  a.sums = launch_target_sums(a.labels, a.weight, a.positions, a.is_mean(), scratch, stream);
  a.sum.partials = scratch.partials;
  a.sum.ticket = scratch.tickets;
}

}  // namespace cuda
RK_NAMESPACE_END
