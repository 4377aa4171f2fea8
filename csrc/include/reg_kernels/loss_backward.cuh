// The gradient of a loss of labels from its statistics, one pass over the logits: what is to be
// known of a position is read, and each class goes by itself.
//
// `Gradient` is a loss's: made of its arguments, a position, where the position's class 0 lies and
// how far its classes are apart. Before its first use of one a thread loads kRowLoads vectors of a
// row, or kClassLoads classes where they lie apart; of_row and of_class turn what load_row and
// load_class of the arguments give into gradients.
#pragma once

#include "loss.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kBackwardThreads = 256;
constexpr int64_t kMostBlocks = 0x7fffffff;

// Rows in pieces of up to kRowLoads vectors a thread, each of `lanes` threads.
template <typename Gradient>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    rows_backward_kernel(typename Gradient::Arguments a, int lanes, int64_t pieces) {
  constexpr int kCount = Gradient::Arguments::kCount, kLoads = Gradient::kRowLoads;
  const int64_t classes = a.classes;
  const int thread = threadIdx.x, pieces_a_block = kBackwardThreads / lanes;
  for (int64_t piece = int64_t{blockIdx.x} * pieces_a_block + thread / lanes;
       piece < a.positions * pieces; piece += int64_t{gridDim.x} * pieces_a_block) {
    const int64_t position = piece / pieces, first = position * classes;
    const LogitRow<typename Gradient::Element, kCount> row(a.x + first, classes);
    const int64_t vector = piece % pieces * (kLoads * lanes) + thread % lanes;
    typename Gradient::Arguments::template Logits<kCount> logits[kLoads];
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      logits[k] = a.load_row(first, row.first_class(vector + k * lanes), classes);
    }
    const Gradient gradient(a, position, row.data, 1);
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      const int64_t c = row.first_class(vector + k * lanes);
      if (c >= classes) continue;
      store_classes(a.gradient + first, c, classes, gradient.of_row(c, logits[k]));
    }
  }
}

// A thread a position: blockIdx.y takes `some` classes, a whole number of kClassLoads, of blocks'
// positions.
template <typename Gradient>
__global__ void __launch_bounds__(kPlaneThreads, kPlaneBlocks)
    planes_backward_kernel(typename Gradient::Arguments a, int64_t some) {
  using Logits = typename Gradient::Arguments::template Logits<1>;
  constexpr int kLoads = Gradient::kClassLoads;
  const int threads = blockDim.x;
  const int64_t classes = a.classes, length = a.length;
  const int64_t begin = blockIdx.y * some, end = begin + some < classes ? begin + some : classes;
  for (int64_t position = int64_t{blockIdx.x} * threads + threadIdx.x; position < a.positions;
       position += int64_t{gridDim.x} * threads) {
    const int64_t first = start_of(position, classes, length);
    const Gradient gradient(a, position, a.x + first, length);
    // How many are left as an int, where class c lies carried along, and something in the place of
    // what is missing: that takes a third fewer instructions, and fewer registers.
    int64_t at = first + begin * length;
    RK_NO_UNROLL
    for (int64_t c = begin; c < end; c += kLoads, at += kLoads * length) {
      const auto count = static_cast<int>(min(end - c, kLoads));
      Logits logits[kLoads];
      RK_UNROLL
      for (int k = 0; k < kLoads; ++k) {
        logits[k] = k < count ? a.load_class(at + k * length) : Logits{};
      }
      RK_UNROLL
      for (int k = 0; k < kLoads; ++k) {
        if (k < count) a.gradient[at + k * length] = gradient.of_class(c + k, length, logits[k]);
      }
    }
  }
}

template <typename Gradient>
void launch_gradient(const typename Gradient::Arguments& a, cudaStream_t stream,
                     int64_t most_blocks, const char* op) {
  if (a.in_rows()) {
    const int64_t vectors = a.most_vectors();
    const int lanes = power_of_two_from(ceil_div(vectors, Gradient::kRowLoads), kBackwardThreads);
    const int64_t pieces = ceil_div(vectors, Gradient::kRowLoads * lanes);
    const int64_t blocks = ceil_div(a.positions * pieces, kBackwardThreads / lanes);
    RK_LAUNCH(rows_backward_kernel<Gradient>,
              dim3(static_cast<unsigned>(std::min(blocks, most_blocks))), dim3(kBackwardThreads), 0,
              stream, a, lanes, pieces);
  } else {
    LossPlan plan = LossPlan::of_small_blocks(LossPlan::Way::planes, a.positions, 1, kPlaneThreads);
    plan.set_blocks(a.positions, most_blocks);
    // Of few positions, the classes are shared out.
    constexpr int64_t kLoads = Gradient::kClassLoads, kLeastClasses = 64;
    const int64_t parts = std::min(ceil_div(a.classes, kLeastClasses),
                                   ceil_div(2 * kFewBlocks, ceil_div(a.positions, plan.threads)));
    const int64_t some = ceil_div(ceil_div(a.classes, parts), kLoads) * kLoads;
    const dim3 grid(static_cast<unsigned>(plan.blocks),
                    static_cast<unsigned>(ceil_div(a.classes, some)));
    RK_LAUNCH(planes_backward_kernel<Gradient>, grid, dim3(plan.threads), 0, stream, a, some);
  }
  check_launch(op);
}

}  // namespace cuda
RK_NAMESPACE_END
