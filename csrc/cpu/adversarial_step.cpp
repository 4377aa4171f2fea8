// Adversarial steps on the CPU key: torch's thread pool over the loops of
// adversarial_step.simd.cpp.
#include "adversarial_step.h"

#include "../torch/adversarial_step.h"

#include <cmath>

namespace reg_kernels {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at the least
// Bytes of the samples that are gone over several times, for each thread: the second-level cache
// holds them.
constexpr int64_t kGroup = 3 << 18;
constexpr int64_t kLongPlane = 64;  // elements of a channel from which on its numbers are read once

// The channels' numbers as the loops want them.
struct Rows {
  std::vector<char> values;

  Rows(AdversarialTask& task, const AdversarialArguments& a) {
    const bool in_double = task.dtype == DType::float64;
    in_double ? set<double>(task, a) : set<float>(task, a);
  }

 private:
  template <typename C>
  void set(AdversarialTask& task, const AdversarialArguments& a) {
    const ChannelLayout& layout = a.layout;
    task.length = a.channels ? layout.length : task.numel;
    task.row_length = a.channels ? layout.channels : 1;
    task.rows = a.channels;
    if (!a.channels) {
      const C one[4] = {1, 1, static_cast<C>(a.lower), static_cast<C>(a.upper)};
      values.assign(reinterpret_cast<const char*>(one), reinterpret_cast<const char*>(one + 4));
      task.rows = values.data();
    }
    task.each = a.channels && (layout.channels_last || layout.length < kLongPlane);
    if (!task.each) return;
    const int64_t repeat = layout.channels_last ? 1 : layout.length;
    task.period = layout.channels * repeat;
    task.row_length = task.period + kAdversarialTile;
    values.resize(4 * task.row_length * sizeof(C));
    C* to = reinterpret_cast<C*>(values.data());
    for (int64_t row = 0; row < 4; ++row) {
      const C* from = static_cast<const C*>(a.channels) + row * layout.channels;
      for (int64_t i = 0; i < task.row_length; ++i) *to++ = from[i / repeat % layout.channels];
    }
    task.rows = values.data();
  }
};

// What lies between the clean inputs and where samples [first, last) are pushed, brought into the
// ball: `moves` says how.
class Balls {
 public:
  Balls(const AdversarialTask& task, std::vector<SampleMove>& moves, int64_t chunks)
      : task_(task), moves_(moves), chunks_(chunks) {}

  void find(int64_t first, int64_t last) {
    const bool l2 = task_.norm == BallNorm::l2;
    std::vector<int64_t> counts(last - first, 0), samples(last - first);
    for (int64_t n = first; n < last; ++n) samples[n - first] = n;
    if (l2) samples = not_found_at_once(samples);
    add_up(samples, true);
    for (size_t i = 0; i < samples.size(); ++i) {
      const double total = total_of(i).total;
      moves_[samples[i]].set_gradient(l2 ? std::sqrt(total) : total);
    }
    while (!samples.empty()) {
      add_up(samples, false);
      std::vector<int64_t> left;
      for (size_t i = 0; i < samples.size(); ++i) {
        const AdversarialSum sum = total_of(i);
        SampleMove& move = moves_[samples[i]];
        int64_t& count = counts[samples[i] - first];
        if (l2) {
          move.shorten(std::sqrt(sum.total));
        } else if (!move.shrink(sum.total, sum.count, count)) {
          left.push_back(samples[i]);
        }
        count = sum.count;
      }
      samples = std::move(left);
    }
  }

 private:
  // In L2, what one pass over all three tensors tells; of samples that have numbers which are not
  // finite it does not.
  std::vector<int64_t> not_found_at_once(const std::vector<int64_t>& samples) {
    std::vector<AdversarialProducts> parts(samples.size() * chunks_);
    const auto leaf = RK_LEAF(adversarial_products);
    for_chunks(samples, [&](int64_t item, int64_t n, int64_t begin, int64_t end) {
      parts[item] = leaf(task_, n, begin, end);
    });
    std::vector<int64_t> left;
    for (size_t i = 0; i < samples.size(); ++i) {
      AdversarialProducts sum{};
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const AdversarialProducts& part = parts[static_cast<int64_t>(i) * chunks_ + chunk];
        sum.gradients += part.gradients;
        sum.products += part.products;
        sum.ways += part.ways;
      }
      if (!std::isfinite(sum.gradients + sum.products + sum.ways)) {
        left.push_back(samples[i]);
        continue;
      }
      SampleMove& move = moves_[samples[i]];
      move.set_gradient(std::sqrt(sum.gradients));
      const double length = move.length;
      const double square = sum.ways + length * (2 * sum.products + length * sum.gradients);
      move.shorten(std::sqrt(std::max(square, 0.0)));
    }
    return left;
  }

  // One sum a chunk, so that the order of additions depends on sizes alone.
  void add_up(const std::vector<int64_t>& samples, bool of_gradient) {
    sums_.resize(samples.size() * chunks_);
    const auto leaf = RK_LEAF(adversarial_sum);
    for_chunks(samples, [&](int64_t item, int64_t n, int64_t begin, int64_t end) {
      sums_[item] = leaf(task_, of_gradient, n, begin, end);
    });
  }

  // Calls f(number, n, begin, end) for each chunk of the samples.
  template <typename F>
  void for_chunks(const std::vector<int64_t>& samples, const F& f) const {
    const int64_t items = static_cast<int64_t>(samples.size()) * chunks_;
    const int64_t grain = std::max<int64_t>(1, kGrain * chunks_ / task_.numel);
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t at = item % chunks_ * kAdversarialChunk;
        f(item, samples[item / chunks_], at, std::min(at + kAdversarialChunk, task_.numel));
      }
    });
  }

  AdversarialSum total_of(size_t i) const {
    AdversarialSum total{};
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const AdversarialSum& part = sums_[static_cast<int64_t>(i) * chunks_ + chunk];
      total.total += part.total;
      total.count += part.count;
    }
    return total;
  }

  const AdversarialTask& task_;
  std::vector<SampleMove>& moves_;
  int64_t chunks_;
  std::vector<AdversarialSum> sums_;
};

void adversarial_step_(const Tensor& adv, const Tensor& grad, const Tensor& clean,
                       const OptionalTensor& step_sizes, double step_size,
                       const OptionalTensor& radii, double eps, int64_t norm, double lower,
                       double upper, const OptionalTensor& channels) {
  const Call call("adversarial_step_", adv);
  const AdversarialArguments a = adversarial_arguments(
      call, adv, grad, clean, step_sizes, step_size, radii, eps, norm, lower, upper, channels);
  if (adv.numel() == 0) return;
  AdversarialTask task{};
  task.adv = a.adv;
  task.grad = a.grad;
  task.clean = a.clean;
  task.dtype = dtype_of(adv, call.op, "adv");
  task.norm = a.norm;
  task.numel = a.numel();
  const Rows rows(task, a);
  std::vector<SampleMove> moves;
  for (int64_t n = 0; n < a.samples; ++n) {
    moves.push_back(SampleMove::of(a.step_sizes.at(n), a.eps.at(n)));
  }
  task.moves = moves.data();
  const int64_t chunks = ceil_div(task.numel, kAdversarialChunk);
  const auto leaf = RK_LEAF(adversarial_move);
  const auto move = [&](int64_t first, int64_t last) {
    const int64_t grain = std::max<int64_t>(1, kGrain * chunks / task.numel);
    torch::stable::parallel_for(first * chunks, last * chunks, grain, [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        const int64_t at = i % chunks * kAdversarialChunk;
        leaf(task, i / chunks, at, std::min(at + kAdversarialChunk, task.numel));
      }
    });
  };
  if (a.norm == BallNorm::linf) return move(0, a.samples);
  const int64_t sample = 3 * task.numel * static_cast<int64_t>(adv.element_size());
  const auto groups = [&](int64_t first, int64_t end, int64_t threads) {
    const int64_t group = std::max<int64_t>(1, kGroup * threads / sample);
    Balls balls(task, moves, chunks);
    for (; first < end; first += group) {
      const int64_t last = std::min(first + group, end);
      balls.find(first, last);
      move(first, last);
    }
  };
  // As many samples as each thread can have of its own, all passes over them without a word to the
  // others: to wake a thread and wait for it, pass by pass, takes longer than a pass over an image.
  // What is left is shared out by chunks.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t own = a.samples / threads * threads;
  torch::stable::parallel_for(0, own, ceil_div(kGrain, task.numel),
                              [&](int64_t first, int64_t end) { groups(first, end, 1); });
  groups(own, a.samples, threads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("adversarial_step_", TORCH_BOX(&adversarial_step_));
}

}  // namespace reg_kernels
