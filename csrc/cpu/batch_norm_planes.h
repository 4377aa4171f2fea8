// BatchNorm of planes: channels first, the L values of a sample's channel side by side. A unit is a
// stretch of storage, whichever planes it cuts.
#pragma once

#include "batch_norm_tile.h"

RK_NAMESPACE_BEGIN
namespace {

// Cuts elements [begin, end) where planes end, and calls f(first, count, plane, index) for each
// part: its storage index, its length, its plane n C + c, and how many parts came before it.
template <typename F>
RK_HD void for_planes(const BatchNormTask& task, int64_t begin, int64_t end, const F& f) {
  int64_t plane = begin / task.length, left = (plane + 1) * task.length - begin;
  for (int64_t index = 0; begin < end; ++index, ++plane, left = task.length) {
    const int64_t count = min(left, end - begin);
    f(begin, count, plane, index);
    begin += count;
  }
}

struct PlaneUnit {
  int64_t begin, end;
  double* sums;  // [pairs][2]

  PlaneUnit(const BatchNormTask& task, int64_t unit)
      : begin(unit * task.plan.unit),
        end(min(begin + task.plan.unit, task.channels * task.count)),
        sums(task.partials + 2 * unit * task.plan.pairs) {}
};

template <typename C>
OneChannel<C> plane_constants(const BatchNormTask& task, int64_t plane, bool with_gradient) {
  const int64_t channels = task.channels, c = plane % channels;
  const auto constant = [&](const double* values, int64_t kind) {
    return static_cast<C>(values[kind * channels + c]);
  };
  OneChannel<C> p{};
  p.affine = {constant(task.affine, 0), constant(task.affine, 1), constant(task.affine, 2)};
  if (with_gradient) {
    p.gradient = {p.affine.shift, constant(task.gradient, 0), constant(task.gradient, 1),
                  constant(task.gradient, 2)};
  }
  return p;
}

// Calls f(pair, channel, first, last) for each part that a unit has of a channel in [begin, end):
// its pair of sums, and the storage indices at which it begins and ends. It goes channel by
// channel, each in storage order.
template <typename F>
RK_HD void for_pairs(const BatchNormTask& task, int64_t begin, int64_t end, const F& f) {
  const BatchNormPlan& plan = task.plan;
  const int64_t samples = task.count / task.length;
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t n = 0; n < samples; ++n) {
      const int64_t plane = n * task.channels + c;
      const int64_t first = plane * task.length, last = first + task.length;
      for (int64_t unit = first / plan.unit; unit * plan.unit < last; ++unit) {
        const int64_t start = unit * plan.unit;
        const int64_t pair = unit * plan.pairs + plane - start / task.length;
        f(task.partials + 2 * pair, c, max(first, start), min(last, start + plan.unit));
      }
    }
  }
}

template <typename T>
constexpr int64_t kLead = kAhead / static_cast<int64_t>(sizeof(T));
template <typename T>
constexpr int64_t kLeadOfTwo = kAheadOfTwo / static_cast<int64_t>(sizeof(T));

// The sums of (x - pivot) and of its square: four of each a lane. They lie part by part, so that
// they stay in registers from the first element to the total where one part has all lanes.
struct PivotSums {
  struct Part {
    PartOfDoubles sums[4] = {}, squares[4] = {};

    RK_HD void add(int k, const PartOfDoubles& d) {
      sums[k] += d;
      squares[k] += d * d;
    }
  };
  Part parts[Doubles::kParts];

  template <typename T>
  RK_HD PivotSums(const T* x, int64_t count, int64_t lead, double pivot) {
    // The parts read the same elements in turn, so these are few enough to stay in the first-level
    // cache.
    constexpr int64_t kAtOnce = kPartLanes == kLanes ? kStretch : kTile;
    const int64_t whole = count / (4 * kLanes) * (4 * kLanes), eights = count / kLanes * kLanes;
    for (int64_t begin = 0, end = -1; end < whole; begin = end) {
      end = min(begin + kAtOnce, whole);
      for (int lane = 0; lane < kLanes; lane += kPartLanes) {
        Part part = parts[lane / kPartLanes];
        const T* from = x + lane;
        for (int64_t i = begin; i < end; i += 4 * kLanes) {
          if (lane == 0) prefetch(x + i + lead, 4 * kLanes);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) part.add(k, part_at(from + i + k * kLanes) - pivot);
        }
        for (int64_t i = end; end == whole && i < eights; i += kLanes) {
          part.add(0, part_at(from + i) - pivot);
        }
        parts[lane / kPartLanes] = part;
      }
    }
    if (eights == count) return;
    alignas(64) double rest[kLanes] = {};  // the last few, one a lane
    for (int64_t i = eights; i < count; ++i) {
      rest[i - eights] = static_cast<double>(load(x[i])) - pivot;
    }
    for (int k = 0; k < Doubles::kParts; ++k) parts[k].add(1, part_at(rest + k * kPartLanes));
  }

  RK_HD double total(PartOfDoubles (Part::*of)[4]) const {
    return sum_of_lanes(Doubles::of([&](int part) RK_INLINE {
      const PartOfDoubles(&v)[4] = parts[part].*of;
      return (v[0] + v[1]) + (v[2] + v[3]);
    }));
  }
};

// The moments of values side by side; the mean is less `base`. Those of float64 are to be as exact
// as its own rounding, so a second pass sums about the mean that the first one gave.
template <typename T>
Moments<double> stretch_moments(const T* x, int64_t count, double base) {
  double pivot = base_at(x, 1, count);
  Moments<double> result{};
  for (int pass = 0; pass < (sizeof(T) == sizeof(double) ? 2 : 1); ++pass) {
    const PivotSums of(x, count, kLead<T>, pivot);
    result = moments_of_sums(count, pivot - base, of.total(&PivotSums::Part::sums),
                             of.total(&PivotSums::Part::squares));
    pivot = finite_or_zero(base + result.mean);
  }
  return result;
}

template <typename T>
void plane_moments(const BatchNormTask& task, int64_t unit) {
  const PlaneUnit part(task, unit);
  const T* x = static_cast<const T*>(task.x);
  const int64_t length = task.length;
  for_planes(task, part.begin, part.end,
             [&](int64_t first, int64_t count, int64_t plane, int64_t index) {
               const double base = base_at(x + plane % task.channels * length, 1, length);
               Moments<double> total{};
               for (int64_t i = 0; i < count; i += kStretch) {
                 total.merge(stretch_moments(x + first + i, min(kStretch, count - i), base));
               }
               part.sums[2 * index] = total.mean;
               part.sums[2 * index + 1] = total.m2;
             });
}

template <typename L>
struct GradientSums {
  using C = compute_t<L>;
  alignas(64) double d_sum[kLanes] = {}, dx_sum[kLanes] = {};

  // Adds d and d (x - shift); `ahead` prefetches.
  RK_HD void add(const C* d, const L* x, int64_t count, const Prefetch<L>& ahead, double shift) {
    const int64_t rest = count / kLanes * kLanes;  // the last few, one a lane
    alignas(64) double d_rest[kLanes] = {}, dx_rest[kLanes] = {};
    for (int64_t i = rest; i < count; ++i) {
      d_rest[i - rest] = static_cast<double>(d[i]);
      dx_rest[i - rest] = d_rest[i - rest] * (static_cast<double>(load(x[i])) - shift);
    }
    for (int lane = 0; lane < kLanes; lane += kPartLanes) {
      PartOfDoubles s[4] = {part_at(d_sum + lane)}, q[4] = {part_at(dx_sum + lane)};
      const C* dl = d + lane;
      const L* xl = x + lane;
      int64_t i = 0;
      for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        if (lane == 0) ahead(i, 4 * kLanes);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          const PartOfDoubles g = part_at(dl + i + k * kLanes);
          s[k] += g;
          q[k] += g * (part_at(xl + i + k * kLanes) - shift);
        }
      }
      for (; i < rest; i += kLanes) {
        const PartOfDoubles g = part_at(dl + i);
        s[0] += g;
        q[0] += g * (part_at(xl + i) - shift);
      }
      s[1] += part_at(d_rest + lane);
      q[1] += part_at(dx_rest + lane);
      put_value(d_sum + lane, (s[0] + s[1]) + (s[2] + s[3]));
      put_value(dx_sum + lane, (q[0] + q[1]) + (q[2] + q[3]));
    }
  }
};

// How many elements a backward takes from `first` on. The sums are added up tile by tile, so where
// one ends is a matter of bits.
RK_HD int64_t backward_tile_at(int64_t first) { return min(kTile, kBlock - first % kBlock); }

// Calls f(p, first, count, index) for the tiles of a unit, of tile_at(first) elements at the most.
template <typename T, typename TileAt, typename F>
RK_HD void for_plane_tiles(const BatchNormTask& task, const PlaneUnit& part, bool with_gradient,
                           const TileAt& tile_at, const F& f) {
  using C = compute_t<T>;
  for_planes(task, part.begin, part.end,
             [&](int64_t first, int64_t count, int64_t plane, int64_t index) {
               const OneChannel<C> p = plane_constants<C>(task, plane, with_gradient);
               for (const int64_t end = first + count; first < end;) {
                 const int64_t n = min(tile_at(first), end - first);
                 f(p, first, n, index);
                 first += n;
               }
             });
}

template <typename T>
void plane_gradient_sums(const BatchNormTask& task, int64_t unit) {
  using C = compute_t<T>;
  using L = loop_t<T>;
  const Typed<T> typed(task);
  const PlaneUnit part(task, unit);
  GradientSums<L> sums;
  TileSpace<T> space;
  GateSpace gate;
  int64_t current = 0;
  const auto finish = [&] {
    part.sums[2 * current] = sum_of_lanes(value_at<Doubles>(sums.d_sum));
    part.sums[2 * current + 1] = sum_of_lanes(value_at<Doubles>(sums.dx_sum));
  };
  for_plane_tiles<T>(
      task, part, false, backward_tile_at,
      [&](const OneChannel<C>& p, int64_t first, int64_t n, int64_t index) {
        if (index != current) {
          finish();
          sums = {};
          current = index;
        }
        const uint8_t* flags = gate.read(task.gate, first, n);
        const Tile<L> tile = typed.backward_of(first, n, kLeadOfTwo<T>, true, flags, space);
        const C* d = typed.loops.gradient(p, tile, flags, space.d);
        const Prefetch<L> ahead{tile.grad_output, tile.x, d == space.d ? 0 : tile.lead};
        sums.add(d, tile.x, n, ahead, static_cast<double>(p.affine.shift));
      });
  finish();
}

template <typename T>
void map_planes_forward(const BatchNormTask& task, int64_t unit) {
  using C = compute_t<T>;
  Typed<T> typed(task);
  const PlaneUnit part(task, unit);
  GateWriter gate(task.gate ? task.gate + part.begin / 8 : nullptr);
  for_plane_tiles<T>(
      task, part, false, [&](int64_t first) { return typed.forward_tile_at(first); },
      [&](const OneChannel<C>& p, int64_t first, int64_t n, int64_t) {
        typed.forward_tile(p, first, n, kLead<T>, gate.next());
        gate.wrote(n);
      });
  gate.finish();
}

template <typename T>
void map_planes_backward(const BatchNormTask& task, int64_t unit) {
  using C = compute_t<T>;
  const Typed<T> typed(task);
  GateSpace gate;
  for_plane_tiles<T>(task, PlaneUnit(task, unit), true, backward_tile_at,
                     [&](const OneChannel<C>& p, int64_t first, int64_t n, int64_t) {
                       typed.backward_tile(p, first, n, kLeadOfTwo<T>,
                                           gate.read(task.gate, first, n));
                     });
}

}  // namespace
RK_NAMESPACE_END
