// The loops of adversarial steps, compiled once for each instruction set (isa.h).
//
// A step reads adv, grad and clean, and writes adv: 4 sizeof(T) bytes an element. L2 reads all
// three once before that, and L1 some times: the samples of a group, which a cache holds.
#include "adversarial_step.h"

#include "narrow.h"

RK_NAMESPACE_BEGIN
namespace {

RK_HD Doubles every(double x) {
  return Doubles::of([=](int) RK_INLINE { return PartOfDoubles{} + x; });
}

template <typename C>
struct OneForAll {
  ChannelNumbers<C> numbers;

  RK_HD Doubles scales(int64_t) const { return every(numbers.scale); }
  RK_HD Doubles inverses(int64_t) const { return every(numbers.inverse); }

  // One by one: a copy of them all keeps them in memory.
  RK_HD ChannelNumbers<C> at(int64_t) const {
    return {numbers.scale, numbers.inverse, numbers.lower, numbers.upper};
  }
};

template <typename C>
struct OneForEach {
  const C* numbers;
  int64_t row_length;

  RK_HD Doubles scales(int64_t i) const { return value_at<Doubles>(numbers + i); }
  RK_HD Doubles inverses(int64_t i) const { return value_at<Doubles>(numbers + row_length + i); }

  RK_HD ChannelNumbers<C> at(int64_t i) const {
    const C* of = numbers + i;
    return {of[0], of[row_length], of[2 * row_length], of[3 * row_length]};
  }
};

// Elements of a sample that lie side by side, at most a tile, as what they are computed in.
template <typename C>
struct Tile {
  const C *adv, *grad, *clean;
  int64_t count;
};

// Calls f(first, count, numbers) for tiles of elements [begin, end) of a sample.
template <typename C, typename F>
RK_HD void for_tiles(const AdversarialTask& task, int64_t begin, int64_t end, const F& f) {
  const C* rows = static_cast<const C*>(task.rows);
  for (int64_t first = begin, count; first < end; first += count) {
    count = min(kAdversarialTile, end - first);
    if (task.each) {
      f(first, count, OneForEach<C>{rows + first % task.period, task.row_length});
    } else {
      const int64_t channel = first / task.length;
      count = min(count, (channel + 1) * task.length - first);
      f(first, count, OneForAll<C>{OneForEach<C>{rows, task.row_length}.at(channel)});
    }
  }
}

template <BroughtBack>
struct How {};

// y[i] = what a step makes of element i.
template <typename C, typename Numbers>
RK_STAGE void step(const Tile<C>& tile, BallNorm norm, const SampleMove& move,
                   const Numbers& numbers, C* y) {
  const C *adv = tile.adv, *grad = tile.grad, *clean = tile.clean;
  if (norm == BallNorm::linf) {
    const C length = static_cast<C>(move.length), eps = static_cast<C>(move.eps);
    write_each(y, tile.count, false, [=](int64_t i) RK_INLINE {
      const auto of = numbers.at(i);
      return linf_step(adv[i], grad[i], clean[i], length * of.inverse, eps * of.inverse, of.lower,
                       of.upper);
    });
  } else {
    const auto own = BallMove<C>::of(move);
    const auto write = [&]<BroughtBack kHow>(How<kHow>) RK_INLINE {
      write_each(y, tile.count, false, [=](int64_t i) RK_INLINE {
        return ball_step<kHow>(adv[i], grad[i], clean[i], own, numbers.at(i));
      });
    };
    if (own.inside) {
      write(How<BroughtBack::not_at_all>{});
    } else if (norm == BallNorm::l2) {
      write(How<BroughtBack::by_factor>{});
    } else {
      write(How<BroughtBack::by_threshold>{});
    }
  }
}

// How far from clean a value may be rounded: store_within in adversarial_step_math.h.
template <typename Numbers>
RK_STAGE void distances(const float* exact, const float* clean, int64_t count, bool linf, float eps,
                        const Numbers& numbers, float* y) {
  if (linf) {
    write_each(y, count, false, [=](int64_t i) RK_INLINE { return eps * numbers.at(i).inverse; });
  } else {
    write_each(y, count, false, [=](int64_t i) RK_INLINE {
      const float away = exact[i] - clean[i];
      return away < 0.0f ? -away : away;
    });
  }
}

// Of rounded values, which are still there as `wide`, those that are further away than `most`.
template <typename T>
RK_STAGE void keep_within(T* values, const float* wide, const T* clean, const float* wide_clean,
                          const float* most, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    values[i].bits = kept_within(values[i].bits, wide[i], clean[i].bits, wide_clean[i], most[i]);
  }
}

// Four sums of eight lanes each, as in penalty.simd.cpp; `values` are counted() ones. Meanwhile
// memory is asked for what the next tile is made of, `a` and `b`, which it would wait for then: a
// displacement's sum takes a sixth less (2026-11-29, EPYC; further ahead it does not, nor is a step
// alone, or what reads one stream, faster for being asked for).
template <BallNorm kNorm, typename C, typename T>
RK_STAGE AdversarialSum sum(const C* values, int64_t count, const T* a, const T* b) {
  constexpr int kChains = 4;
  Doubles total[kChains] = {};
  int64_t i = 0;
  const auto term = [](const auto& x) RK_INLINE {
    if constexpr (kNorm == BallNorm::l2) {
      return x * x;
    } else {
      return x;
    }
  };
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    prefetch(a + i, kChains * kLanes);
    prefetch(b + i, kChains * kLanes);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) total[c] += term(value_at<Doubles>(values + i + c * kLanes));
  }
  double rest = 0;
  for (; i < count; ++i) rest += term(value_at<double>(values + i));
  int32_t above = 0;
  if constexpr (kNorm == BallNorm::l1) {
#pragma omp simd reduction(+ : above)
    for (int64_t j = 0; j < count; ++j) above += values[j] > C(0);
  }
  return {sum_of_lanes((total[0] + total[1]) + (total[2] + total[3])) + rest, above};
}

template <BallNorm kNorm, typename C, typename Numbers>
RK_STAGE void count_gradients(const C* grad, int64_t n, const Numbers& numbers, C* y) {
  write_each(y, n, false, [=](int64_t i) RK_INLINE {
    return counted<kNorm>(pixel_gradient(grad[i], numbers.at(i).inverse), C(0));
  });
}

template <BallNorm kNorm, typename C, typename Numbers>
RK_STAGE void count_displacements(const Tile<C>& tile, const BallMove<C>& move,
                                  const Numbers& numbers, C* y) {
  const C *adv = tile.adv, *grad = tile.grad, *clean = tile.clean;
  write_each(y, tile.count, false, [=](int64_t i) RK_INLINE {
    const C way = displacement(adv[i], grad[i], clean[i], move.length, numbers.at(i));
    return counted<kNorm>(way, move.threshold);
  });
}

template <BallNorm kNorm, typename T>
AdversarialSum sum_of(const AdversarialTask& task, bool of_gradient, int64_t n, int64_t begin,
                      int64_t end) {
  using C = compute_t<T>;
  const int64_t at = n * task.numel;
  const T* adv = static_cast<const T*>(task.adv) + at;
  const T* grad = static_cast<const T*>(task.grad) + at;
  const T* clean = static_cast<const T*>(task.clean) + at;
  AdversarialSum all{};
  for_tiles<C>(task, begin, end, [&](int64_t first, int64_t count, const auto& numbers) {
    alignas(kLine) C own[kAdversarialTile], slope[kAdversarialTile], from[kAdversarialTile];
    alignas(kLine) C values[kAdversarialTile];
    const C* wide = read_as<C>(grad, task.dtype, first, count, slope);
    if (of_gradient) {
      count_gradients<kNorm>(wide, count, numbers, values);
    } else {
      const Tile<C> tile{read_as<C>(adv, task.dtype, first, count, own), wide,
                         read_as<C>(clean, task.dtype, first, count, from), count};
      count_displacements<kNorm>(tile, BallMove<C>::of(task.moves[n]), numbers, values);
    }
    const int64_t next = first + kAdversarialTile;
    const AdversarialSum part = of_gradient ? sum<kNorm>(values, count, grad + next, grad + next)
                                            : sum<kNorm>(values, count, adv + next, clean + next);
    all.total += part.total;
    all.count += part.count;
  });
  return all;
}

// Straight from memory, so that its transfers and the arithmetic go on side by side.
template <typename T>
AdversarialProducts products_of(const AdversarialTask& task, int64_t n, int64_t begin,
                                int64_t end) {
  using C = compute_t<T>;
  const int64_t at = n * task.numel;
  AdversarialProducts all{};
  for_tiles<C>(task, begin, end, [&](int64_t first, int64_t count, const auto& numbers) {
    const T* adv = static_cast<const T*>(task.adv) + at + first;
    const T* grad = static_cast<const T*>(task.grad) + at + first;
    const T* clean = static_cast<const T*>(task.clean) + at + first;
    constexpr int kChains = 2;
    Doubles gradients[kChains] = {}, products[kChains] = {}, ways[kChains] = {};
    int64_t i = 0;
    for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c) {
        const int64_t j = i + c * kLanes;
        const Doubles g = value_at<Doubles>(grad + j) * numbers.inverses(j);
        const Doubles away = value_at<Doubles>(adv + j) - value_at<Doubles>(clean + j);
        const Doubles way = away * numbers.scales(j);
        gradients[c] += g * g;
        products[c] += g * way;
        ways[c] += way * way;
      }
    }
    AdversarialProducts rest{};
    for (; i < count; ++i) {
      const ChannelNumbers<C> of = numbers.at(i);
      const double g = value_at<double>(grad + i) * static_cast<double>(of.inverse);
      const double way =
          (value_at<double>(adv + i) - value_at<double>(clean + i)) * static_cast<double>(of.scale);
      rest.gradients += g * g;
      rest.products += g * way;
      rest.ways += way * way;
    }
    all.gradients += sum_of_lanes(gradients[0] + gradients[1]) + rest.gradients;
    all.products += sum_of_lanes(products[0] + products[1]) + rest.products;
    all.ways += sum_of_lanes(ways[0] + ways[1]) + rest.ways;
  });
  return all;
}

template <typename T>
void move_of(const AdversarialTask& task, int64_t n, int64_t begin, int64_t end) {
  const SampleMove& move = task.moves[n];
  using C = compute_t<T>;
  const int64_t at = n * task.numel;
  T* adv = static_cast<T*>(task.adv) + at;
  const T* grad = static_cast<const T*>(task.grad) + at;
  const T* clean = static_cast<const T*>(task.clean) + at;
  for_tiles<C>(task, begin, end, [&](int64_t first, int64_t count, const auto& numbers) {
    T* const y = adv + first;
    if constexpr (sizeof(T) == sizeof(C)) {
      step(Tile<C>{y, grad + first, clean + first, count}, task.norm, move, numbers, y);
    } else {
      alignas(kLine) C own[kAdversarialTile], slope[kAdversarialTile], from[kAdversarialTile];
      widen(y, count, own, NothingAhead{});
      widen(grad + first, count, slope, NothingAhead{});
      widen(clean + first, count, from, NothingAhead{});
      step(Tile<C>{own, slope, from, count}, task.norm, move, numbers, own);
      narrow(own, count, y, false, NothingAhead{});
      distances(own, from, count, task.norm == BallNorm::linf, static_cast<float>(move.eps),
                numbers, slope);
      widen(y, count, own, NothingAhead{});
      keep_within(y, own, clean + first, from, slope, count);
    }
  });
}

}  // namespace

AdversarialSum adversarial_sum(const AdversarialTask& task, bool of_gradient, int64_t n,
                               int64_t begin, int64_t end) {
  return for_dtype(task.dtype, [&]<typename T>(T) {
    const auto of = task.norm == BallNorm::l2 ? sum_of<BallNorm::l2, T> : sum_of<BallNorm::l1, T>;
    return of(task, of_gradient, n, begin, end);
  });
}

AdversarialProducts adversarial_products(const AdversarialTask& task, int64_t n, int64_t begin,
                                         int64_t end) {
  return for_dtype(task.dtype, [&]<typename T>(T) { return products_of<T>(task, n, begin, end); });
}

void adversarial_move(const AdversarialTask& task, int64_t n, int64_t begin, int64_t end) {
  for_dtype(task.dtype, [&]<typename T>(T) { move_of<T>(task, n, begin, end); });
}

RK_NAMESPACE_END
