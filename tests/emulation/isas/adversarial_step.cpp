// Calls the leaves of csrc/cpu/adversarial_step.simd.cpp.
#include "cpu/adversarial_step.h"

#include <vector>

#include "isas.h"

namespace isas {

template <typename T>
void call(BallNorm norm, bool each, int64_t numel) {
  using C = compute_t<T>;
  constexpr int64_t kChannels = 3, kSamples = 2;
  Buffer<T> adv = numbers<T>(kSamples * numel, 1.0), clean = numbers<T>(kSamples * numel, 1.0);
  const Buffer<T> any = any_values<T>(kSamples * numel), some = numbers<T>(kSamples * numel);
  AdversarialTask task{};
  task.clean = clean.data();
  task.dtype = kDType<T>;
  task.norm = norm;
  task.numel = numel;
  task.each = each;
  task.length = ceil_div(numel, kChannels);
  task.period = kChannels;
  task.row_length = each ? kChannels + kAdversarialTile : kChannels;
  std::vector<C> rows;
  for (const double row : {0.25, 4.0, -0.5, 0.75}) {
    for (int64_t i = 0; i < task.row_length; ++i) {
      rows.push_back(static_cast<C>(row + static_cast<double>(i % kChannels) / 8));
    }
  }
  task.rows = rows.data();
  for (const bool inside : {true, false}) {
    std::vector<SampleMove> moves(kSamples, SampleMove::of(0.1, 0.3));
    for (SampleMove& move : moves) {
      move.inside = inside;
      if (!inside) move.threshold = 0.01, move.factor = 0.7;
    }
    task.moves = moves.data();
    task.adv = adv.data();
    task.grad = some.data();
    const auto products =
        RK_LEAF(adversarial_products)(task, 1, 0, std::min(numel, kAdversarialChunk));
    Digest of_products;
    of_products.add(&products.gradients, 3);
    of_products.report("adversarial_products, %s, %d elements, %d", kName<T>, int(numel), each);
    for (const bool of_gradient : {true, false}) {
      const AdversarialSum sum =
          RK_LEAF(adversarial_sum)(task, of_gradient, 1, 0, std::min(numel, kAdversarialChunk));
      Digest of_sum;
      of_sum.add(&sum.total, 1);
      of_sum.add(&sum.count, 1);
      of_sum.report("adversarial_sum, %s, norm %d, %d elements, %d%d%d", kName<T>, int(norm),
                    int(numel), each, inside, of_gradient);
    }
    for (const Buffer<T>* grad : {&some, &any}) {
      Buffer<T> y(adv.size(), 0);
      std::memcpy(y.data(), adv.data(), adv.size() * sizeof(T));
      task.adv = y.data();
      task.grad = grad->data();
      share_out(0, kSamples, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) RK_LEAF(adversarial_move)(task, i, 0, numel);
      });
      Digest digest;
      digest.add(y.data() + numel, numel);
      digest.report("adversarial_move, %s, norm %d, %d elements, %d%d%d", kName<T>, int(norm),
                    int(numel), each, inside, grad == &any);
    }
  }
}

void call_leaves() {
  for_types([]<typename T>(T) {
    for (const BallNorm norm : {BallNorm::linf, BallNorm::l1, BallNorm::l2}) {
      for (const int64_t numel : {1, 37, 1500}) {
        for (const bool each : {false, true}) call<T>(norm, each, numel);
      }
    }
  });
}

}  // namespace isas
