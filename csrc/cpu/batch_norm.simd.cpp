// BatchNorm's loops, compiled once for each instruction set (isa.h).
//
// Bytes an element, s = sizeof(T): the moments read x; the forward reads x and writes y: 3 s, or 2
// s where a strip stays in the cache between the two. The backward's sums read grad_output and x,
// its map reads both again and writes grad_input: 5 s, or 3 s. A residual adds one read and one
// write, a gate an eighth of a byte each time. PyTorch's BatchNorm, ReLU and Dropout: 6 s, 2 s and
// 5 s forward.
//
// Everything but plain BatchNorm goes in tiles through the first-level cache, one stage after the
// other, so that the stages need not be compiled in every combination.
#include "batch_norm.h"

#include "bits.h"
#include "lanes.h"
#include "random.h"
#include "reg_kernels/batch_norm_math.h"
#include "reg_kernels/dropout_math.h"
#include "stream.h"

RK_NAMESPACE_BEGIN
namespace {

constexpr int64_t kColumns = 2048;  // the widest strip
constexpr int64_t kBlock = 16384;   // elements whose gate is packed at a time; a multiple of 8 rows
constexpr int64_t kChunk = 4096;    // values that share a pivot
constexpr int64_t kRowsAtOnce = 4;

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Channel constants of a tile: one set for all of its elements, or a column of each.
template <typename C>
struct OneChannel {
  ChannelAffine<C> affine;
  ChannelGradient<C> gradient;

  RK_HD C apply(C x, int64_t) const { return affine(x); }
  RK_HD C input_gradient(C d, C x, int64_t) const { return gradient(d, x); }
  RK_HD C frozen_gradient(C d, int64_t) const { return d * gradient.k1; }
};

template <typename C>
struct ChannelColumns {
  const C *shift, *scale, *offset, *k1, *k2, *k3;

  RK_HD C apply(C x, int64_t i) const { return ChannelAffine<C>{shift[i], scale[i], offset[i]}(x); }
  RK_HD C input_gradient(C d, C x, int64_t i) const {
    return ChannelGradient<C>{shift[i], k1[i], k2[i], k3[i]}(d, x);
  }
  RK_HD C frozen_gradient(C d, int64_t i) const { return d * k1[i]; }
  RK_HD ChannelColumns from(int64_t i) const {
    return {shift + i, scale + i, offset + i, k1 + i, k2 + i, k3 + i};
  }
};

template <typename T>
struct Prefetch {
  const T *x, *also;  // also: or null
  int64_t lead;

  RK_HD void operator()(int64_t i, int64_t count) const {
    if (lead == 0) return;
    prefetch(x + i + lead, count);
    if (also) prefetch(also + i + lead, count);
  }
};

// A task with its types, and what is done to a tile of up to kTile elements in storage order.
template <typename T>
struct Typed {
  using C = compute_t<T>;

  const BatchNormTask& task;
  const T *x, *residual, *grad_output;
  T *y, *grad_input, *grad_residual;
  Activation activation;
  C slope;
  bool drops;
  C scale;             // of dropout
  uint16_t last_kept;  // half-word < threshold, as <= in 16 bits
  RngStream rng;
  Draws draws;

  explicit Typed(const BatchNormTask& task)
      : task(task),
        x(static_cast<const T*>(task.x)),
        residual(static_cast<const T*>(task.residual)),
        grad_output(static_cast<const T*>(task.grad_output)),
        y(static_cast<T*>(task.y)),
        grad_input(static_cast<T*>(task.grad_input)),
        grad_residual(static_cast<T*>(task.grad_residual)),
        activation(static_cast<Activation>(task.activation)),
        slope(static_cast<C>(task.slope)),
        drops(task.drops),
        scale(static_cast<C>(task.drops ? task.scale : 1.0)),
        last_kept(static_cast<uint16_t>(task.threshold ? task.threshold - 1 : 0)),
        rng(RngTag::dropout, task.seed, task.offset) {}

  ~Typed() {
    if (task.stream) stream_fence();
  }

  // z, what the activation is applied to. Here and below, `lead` is how many elements on from these
  // to prefetch the same tensors, 0 for not at all.
  template <typename P>
  RK_HD void preactivation(const P& p, int64_t first, int64_t count, int64_t lead, C* z) const {
    const T *from = x + first, *added = residual + first;
    if (residual) {
      write_each(
          z, count, false,
          [=](int64_t i)
              __attribute__((always_inline)) { return p.apply(load(from[i]), i) + load(added[i]); },
          Prefetch<T>{from, added, lead});
    } else {
      write_each(
          z, count, false,
          [=](int64_t i) __attribute__((always_inline)) { return p.apply(load(from[i]), i); },
          Prefetch<T>{from, nullptr, lead});
    }
  }

  // y and, where `flags` is not null, its gate.
  template <typename P>
  void forward_tile(const P& p, int64_t first, int64_t count, int64_t lead, uint8_t* flags) {
    const T* from = x + first;
    if (!residual && !drops) {
      const C below = slope;
      for_activation(activation, [&]<Activation kActivation>() __attribute__((always_inline)) {
        write_each(
            y + first, count, task.stream,
            [=](int64_t i) __attribute__((always_inline)) {
              return store<T>(activate<kActivation>(p.apply(load(from[i]), i), below));
            },
            Prefetch<T>{from, nullptr, lead});
      });
      return;
    }
    alignas(64) C z[kTile];
    preactivation(p, first, count, lead, z);
    for_activation(activation, [&]<Activation kActivation>() __attribute__((always_inline)) {
      if (flags) {
        for (int64_t i = 0; i < count; ++i) {
          flags[i] = kActivation == Activation::relu         ? !(z[i] <= C(0))
                     : kActivation == Activation::leaky_relu ? drops || z[i] > C(0)
                                                             : true;
        }
      }
      if constexpr (kActivation != Activation::none) {
        const C below = slope;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) z[i] = activate<kActivation>(z[i], below);
      }
    });
    if (drops) {
      const uint16_t* drawn = draws.fill(rng, first, count);
      const uint16_t last = last_kept;
      const C kept = scale;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) z[i] *= drawn[i] <= last ? kept : C(0);
      if (flags) {
        const bool any = task.threshold != 0;
        for (int64_t i = 0; i < count; ++i) flags[i] &= any && drawn[i] <= last;
      }
    }
    const C* source = z;
    write_each(y + first, count, task.stream,
               [=](int64_t i) __attribute__((always_inline)) { return store<T>(source[i]); });
  }

  // The gradient behind the activation, in `buffer` or where it lies already.
  template <typename P>
  RK_HD const C* gradient_tile(const P& p, int64_t first, int64_t count, int64_t lead,
                               const uint8_t* flags, C* buffer) const {
    const T* from = grad_output + first;
    if constexpr (sizeof(T) == sizeof(C)) {
      if (activation == Activation::none && !flags) return from;
    }
    const C passed = scale, below = slope;
    const Prefetch<T> ahead{from, x + first, lead};
    if (!flags && !residual) {
      const T* values = x + first;
      for_activation(activation, [&]<Activation kActivation>() __attribute__((always_inline)) {
        write_each(
            buffer, count, false,
            [=](int64_t i) __attribute__((always_inline)) {
              const C g = load(from[i]);
              if constexpr (kActivation == Activation::none) return g;
              const C z = p.apply(load(values[i]), i);
              if constexpr (kActivation == Activation::relu) return z <= C(0) ? C(0) : g;
              return g * activation_derivative<kActivation>(z, below);
            },
            ahead);
      });
      return buffer;
    }
    if (!flags) {
      write_each(
          buffer, count, false,
          [=](int64_t i) __attribute__((always_inline)) { return load(from[i]); }, ahead);
    } else if (activation == Activation::relu) {
      write_each(
          buffer, count, false,
          [=](int64_t i)
              __attribute__((always_inline)) { return flags[i] ? load(from[i]) * passed : C(0); },
          ahead);
    } else {
      const C stopped = activation == Activation::leaky_relu && !drops ? below : C(0);
      write_each(
          buffer, count, false,
          [=](int64_t i) __attribute__((always_inline)) {
            return load(from[i]) * (flags[i] ? passed : stopped);
          },
          ahead);
    }
    if (!needs_preactivation(activation, flags != nullptr, drops)) return buffer;
    alignas(64) C z[kTile];
    preactivation(p, first, count, residual ? lead : 0, z);
    for_activation(activation, [&]<Activation kActivation>() __attribute__((always_inline)) {
      if constexpr (kActivation == Activation::relu) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) buffer[i] = z[i] <= C(0) ? C(0) : buffer[i];
      } else if constexpr (kActivation != Activation::none) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          buffer[i] *= activation_derivative<kActivation>(z[i], below);
        }
      }
    });
    return buffer;
  }

  template <typename P>
  void backward_tile(const P& p, int64_t first, int64_t count, int64_t lead,
                     const uint8_t* flags) const {
    alignas(64) C buffer[kTile];
    const C* d = gradient_tile(p, first, count, lead, flags, buffer);
    const T* from = x + first;
    // A tile of its own has prefetched already.
    Prefetch<T> ahead{grad_output + first, from, d == buffer ? 0 : lead};
    if (grad_residual) {
      write_each(
          grad_residual + first, count, task.stream,
          [=](int64_t i) __attribute__((always_inline)) { return store<T>(d[i]); }, ahead);
      ahead.lead = 0;
    }
    if (grad_input && task.training) {
      write_each(
          grad_input + first, count, task.stream,
          [=](int64_t i) __attribute__((always_inline)) {
            return store<T>(p.input_gradient(d[i], load(from[i]), i));
          },
          ahead);
    } else if (grad_input) {
      write_each(
          grad_input + first, count, task.stream,
          [=](int64_t i)
              __attribute__((always_inline)) { return store<T>(p.frozen_gradient(d[i], i)); },
          ahead);
    }
  }
};

// ---- planes: units of consecutive elements

// Calls f(first, count, plane, index) for the parts that elements [begin, end) have in planes:
// storage index, length, the plane n C + c, and how many planes came before it.
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

// Calls f(pair, channel, first, last) for each part of channels [begin, end) in a unit: its pair of
// sums and the storage indices it reaches from and to. Channel by channel, in storage order.
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

// The median of three values, or 0 where that is not finite: close enough to the mean for sums of
// differences from it to keep their digits, one huge outlier or not.
RK_HD double pivot_of(double a, double b, double c) {
  const double low = a < b ? a : b, high = a < b ? b : a;
  const double capped = high < c ? high : c;
  const double median = low > capped ? low : capped;
  return median - median == 0.0 ? median : 0.0;
}

RK_HD Moments<double> moments_of_sums(int64_t count, double pivot, double sum, double squares) {
  const double n = static_cast<double>(count);
  return {count, pivot + sum / n, squares - sum * (sum / n)};
}

struct PivotSums {
  Doubles sum{}, squares{};

  template <typename T>
  RK_HD void add(const T* x, int64_t count, int64_t lead, double pivot) {
    Doubles s[4] = {sum}, q[4] = {squares};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
      prefetch(x + i + lead, 4 * kLanes);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Doubles d = value_at<Doubles>(x + i + k * kLanes) - pivot;
        s[k] += d;
        q[k] += d * d;
      }
    }
    for (; i + kLanes <= count; i += kLanes) {
      const Doubles d = value_at<Doubles>(x + i) - pivot;
      s[0] += d;
      q[0] += d * d;
    }
    for (int j = 0; i < count; ++i, ++j) {
      const double d = static_cast<double>(load(x[i])) - pivot;
      s[1][j] += d;
      q[1][j] += d * d;
    }
    sum = (s[0] + s[1]) + (s[2] + s[3]);
    squares = (q[0] + q[1]) + (q[2] + q[3]);
  }
};

template <typename T>
void plane_moments(const BatchNormTask& task, int64_t unit) {
  const PlaneUnit part(task, unit);
  const T* x = static_cast<const T*>(task.x);
  for_planes(task, part.begin, part.end, [&](int64_t first, int64_t count, int64_t, int64_t index) {
    const T* from = x + first;
    const auto value = [&](int64_t i) {
      return static_cast<double>(load(from[min(i, count - 1)]));
    };
    const double pivot = pivot_of(value(0), value(1), value(2));
    PivotSums sums;
    sums.add(from, count, kLead<T>, pivot);
    const auto moments =
        moments_of_sums(count, pivot, sum_of_lanes(sums.sum), sum_of_lanes(sums.squares));
    part.sums[2 * index] = moments.mean;
    part.sums[2 * index + 1] = moments.m2;
  });
}

template <typename T>
struct GradientSums {
  using C = compute_t<T>;
  Doubles d_sum{}, dx_sum{};

  // `ahead` prefetches.
  RK_HD void add(const C* d, const T* x, int64_t count, const Prefetch<T>& ahead, double shift) {
    Doubles s[4] = {d_sum}, q[4] = {dx_sum};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
      ahead(i, 4 * kLanes);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Doubles g = value_at<Doubles>(d + i + k * kLanes);
        s[k] += g;
        q[k] += g * (value_at<Doubles>(x + i + k * kLanes) - shift);
      }
    }
    for (; i + kLanes <= count; i += kLanes) {
      const Doubles g = value_at<Doubles>(d + i);
      s[0] += g;
      q[0] += g * (value_at<Doubles>(x + i) - shift);
    }
    for (int j = 0; i < count; ++i, ++j) {
      const double g = static_cast<double>(d[i]);
      s[1][j] += g;
      q[1][j] += g * (static_cast<double>(load(x[i])) - shift);
    }
    d_sum = (s[0] + s[1]) + (s[2] + s[3]);
    dx_sum = (q[0] + q[1]) + (q[2] + q[3]);
  }
};

// Calls f(p, first, count, flags, index) for the tiles of a unit, with the flags of the gate where
// there is one: unpacked before, or, for a forward, packed after f has set them.
template <typename T, bool kForward, typename F>
RK_HD void for_plane_tiles(const BatchNormTask& task, int64_t unit, bool with_gradient,
                           const F& f) {
  using C = compute_t<T>;
  const PlaneUnit part(task, unit);
  alignas(64) uint8_t space[kBlock + 8];
  for_planes(task, part.begin, part.end,
             [&](int64_t first, int64_t count, int64_t plane, int64_t index) {
               const OneChannel<C> p = plane_constants<C>(task, plane, with_gradient);
               const int64_t end = first + count;
               while (first < end) {
                 // Tiles end at blocks, whose gates are whole bytes.
                 const int64_t block = first / kBlock * kBlock;
                 const int64_t next = min(block + kBlock, part.end);
                 const int64_t n = min(min(kTile, end - first), next - first);
                 const bool opens = first == block || first == part.begin;
                 const int64_t opened = max(block, part.begin);
                 if (task.gate && !kForward && opens) {
                   unpack_bits(task.gate + opened / 8, next - opened, space + (opened - block));
                 }
                 f(p, first, n, task.gate ? space + (first - block) : nullptr, index);
                 first += n;
                 if (task.gate && kForward && first == next) {
                   pack_bits(space + (opened - block), next - opened, task.gate + opened / 8);
                 }
               }
             });
}

template <typename T>
void plane_gradient_sums(const BatchNormTask& task, int64_t unit) {
  using C = compute_t<T>;
  const Typed<T> typed(task);
  const PlaneUnit part(task, unit);
  GradientSums<T> sums;
  alignas(64) C buffer[kTile];
  int64_t current = 0;
  const auto finish = [&] {
    part.sums[2 * current] = sum_of_lanes(sums.d_sum);
    part.sums[2 * current + 1] = sum_of_lanes(sums.dx_sum);
  };
  for_plane_tiles<T, false>(
      task, unit, false,
      [&](const OneChannel<C>& p, int64_t first, int64_t n, const uint8_t* flags, int64_t index) {
        if (index != current) {
          finish();
          sums = {};
          current = index;
        }
        const C* d = typed.gradient_tile(p, first, n, kLead<T>, flags, buffer);
        const Prefetch<T> ahead{typed.grad_output + first, typed.x + first,
                                d == buffer ? 0 : kLead<T>};
        sums.add(d, typed.x + first, n, ahead, static_cast<double>(p.affine.shift));
      });
  finish();
}

template <typename T, bool kForward>
void map_planes(const BatchNormTask& task, int64_t unit) {
  using C = compute_t<T>;
  Typed<T> typed(task);
  for_plane_tiles<T, kForward>(
      task, unit, !kForward,
      [&](const OneChannel<C>& p, int64_t first, int64_t n, uint8_t* flags, int64_t) {
        if constexpr (kForward) {
          typed.forward_tile(p, first, n, kLead<T>, flags);
        } else {
          typed.backward_tile(p, first, n, kLead<T>, flags);
        }
      });
}

// ---- rows: units of rows of a strip of columns

struct RowUnit {
  int64_t first_column, columns;
  int64_t first_row, rows;
  double *first_sum, *second_sum;  // [columns] each

  RowUnit(const BatchNormTask& task, int64_t unit) {
    const BatchNormPlan& plan = task.plan;
    const int64_t slice = unit / plan.strips;
    first_column = unit % plan.strips * plan.strip;
    columns = min(plan.strip, plan.columns - first_column);
    first_row = slice * plan.unit;
    rows = min(plan.unit, plan.rows - first_row);
    first_sum = row_sums(task, slice) + first_column;
    second_sum = first_sum + plan.columns;
  }

  // [2][columns] of a slice of rows.
  static double* row_sums(const BatchNormTask& task, int64_t slice) {
    return task.partials + 2 * slice * task.plan.columns;
  }

  // Rows that are worked on together: a whole number of bytes of a gate.
  int64_t block() const { return max(8, kBlock / columns / 8 * 8); }

  // The byte of the gate that row `row` begins in, a multiple of 8 or the row after the last.
  uint8_t* bits(const BatchNormTask& task, int64_t row) const {
    return task.gate ? task.gate + (task.plan.rows * first_column + row * columns) / 8 : nullptr;
  }
};

// Whether a unit has the elements of the incomplete row as well, and the slice of that row's sums.
bool takes_rest(const BatchNormTask& task, int64_t unit) { return task.plan.rest && unit == 0; }
int64_t rest_slice(const BatchNormPlan& plan) { return plan.units / plan.strips; }

int64_t channel_of(const BatchNormTask& task, int64_t column) {
  return task.channels_last ? column % task.channels : column / task.length;
}

// The channel constants of a strip's columns, in the compute type.
template <typename C>
struct StripConstants {
  alignas(64) C values[6][kColumns];

  // `kinds`: 3 for the affine ones, 6 with the gradient's.
  StripConstants(const BatchNormTask& task, const RowUnit& part, int kinds) {
    for (int kind = 0; kind < kinds; ++kind) {
      const double* from = (kind < 3 ? task.affine : task.gradient) + kind % 3 * task.channels;
      for (int64_t j = 0; j < part.columns; ++j) {
        values[kind][j] = static_cast<C>(from[channel_of(task, part.first_column + j)]);
      }
    }
  }

  ChannelColumns<C> from(int64_t j) const {
    return {values[0] + j, values[1] + j, values[2] + j,
            values[3] + j, values[4] + j, values[5] + j};
  }
};

// Rows of a strip to prefetch ahead. They may lie past the tensor's end: a prefetch never faults.
template <typename T>
RK_HD int64_t rows_ahead(int64_t columns) {
  return max(1, kAhead / (columns * static_cast<int64_t>(sizeof(T))));
}

// Columns side by side: the rows of a block, added four at a time.
template <typename T>
void add_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, const double* pivot,
              double* sum, double* squares) {
  const int64_t ahead = rows_ahead<T>(columns) * stride;
  int64_t r = 0;
  for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) {
    const T *a = x + r * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    for_lanes(columns, [=]<typename V>(V, int64_t j) __attribute__((always_inline)) {
      const T* two =
          (j & kLanes ? c : a) + j + ahead;  // every line of two rows, then of the others
      prefetch(two, 1);
      prefetch(two + stride, 1);
      const V p = value_at<V>(pivot + j);
      const V u = value_at<V>(a + j) - p, v = value_at<V>(b + j) - p;
      const V w = value_at<V>(c + j) - p, z = value_at<V>(d + j) - p;
      put_value(sum + j, value_at<V>(sum + j) + ((u + v) + (w + z)));
      put_value(squares + j, value_at<V>(squares + j) + ((u * u + v * v) + (w * w + z * z)));
    });
  }
  for (; r < rows; ++r) {
    const T* a = x + r * stride;
    for_lanes(columns, [=]<typename V>(V, int64_t j) __attribute__((always_inline)) {
      const V u = value_at<V>(a + j) - value_at<V>(pivot + j);
      put_value(sum + j, value_at<V>(sum + j) + u);
      put_value(squares + j, value_at<V>(squares + j) + u * u);
    });
  }
}

// mean and m2 of `count` values a column, merged with those of `other_count`: Moments::merge.
RK_HD void merge_columns(int64_t columns, int64_t count, double* mean, double* m2,
                         int64_t other_count, const double* other_mean, const double* other_m2) {
  const double share = static_cast<double>(other_count) / static_cast<double>(count + other_count);
  const double weight = share * static_cast<double>(count);
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const double delta = other_mean[j] - mean[j];
    m2[j] += other_m2[j] + delta * delta * weight;
    mean[j] = delta - delta == 0.0 ? mean[j] + delta * share : mean[j] + other_mean[j];
  }
}

template <typename T>
void row_moments(const BatchNormTask& task, int64_t unit) {
  const RowUnit part(task, unit);
  const int64_t stride = task.plan.columns, columns = part.columns, block = part.block();
  const T* x = static_cast<const T*>(task.x) + part.first_column;
  alignas(64) double pivot[kColumns], sum[kColumns], squares[kColumns];
  for (int64_t done = 0; done < part.rows; done += block) {
    const int64_t rows = min(block, part.rows - done);
    const T* from = x + (part.first_row + done) * stride;
    const T *second = from + min(1, rows - 1) * stride, *third = from + min(2, rows - 1) * stride;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      pivot[j] = pivot_of(load(from[j]), load(second[j]), load(third[j]));
      sum[j] = squares[j] = 0.0;
    }
    add_rows(from, stride, rows, columns, pivot, sum, squares);
    const double n = static_cast<double>(rows);
    double* mean = done ? sum : part.first_sum;
    double* m2 = done ? squares : part.second_sum;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {  // as moments_of_sums
      const double shift = sum[j] / n;
      m2[j] = squares[j] - sum[j] * shift;
      mean[j] = pivot[j] + shift;
    }
    if (done) merge_columns(columns, done, part.first_sum, part.second_sum, rows, mean, m2);
  }
  if (takes_rest(task, unit)) {
    double* rest = RowUnit::row_sums(task, rest_slice(task.plan));
    for (int64_t j = 0; j < task.plan.rest; ++j) {
      rest[j] = load(x[task.plan.rows * stride + j]);
      rest[stride + j] = 0.0;
    }
  }
}

template <typename T>
void row_gradient_sums(const BatchNormTask& task, int64_t unit) {
  using C = compute_t<T>;
  const BatchNormPlan& plan = task.plan;
  const RowUnit part(task, unit);
  const Typed<T> typed(task);
  const StripConstants<C> constants(task, part, 3);
  alignas(64) C buffer[kRowsAtOnce][kTile];
  alignas(64) uint8_t space[kBlock + 8];
  const int64_t stride = plan.columns;

  // `rows` rows, at most kRowsAtOnce; `flags` of the first one's first column, or null.
  const auto add = [&](int64_t row, int64_t rows, int64_t columns, const uint8_t* flags,
                       double* d_sum, double* dx_sum) {
    const int64_t lead = rows_ahead<T>(columns) * stride;
    for (int64_t j = 0; j < columns; j += kTile) {
      const int64_t n = min(kTile, columns - j);
      const ChannelColumns<C> p = constants.from(j);
      const int64_t first = row * stride + part.first_column + j;
      const C* d[kRowsAtOnce];
      for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* tile = flags ? flags + r * part.columns + j : nullptr;
        d[r] = typed.gradient_tile(p, first + r * stride, n, lead, tile, buffer[r]);
      }
      const T *x = typed.x + first, *g = typed.grad_output + first;
      double *s = d_sum + j, *q = dx_sum + j;
      if (rows == kRowsAtOnce) {
        const C *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3];
        const bool fetch = d0 != buffer[0];
        for_lanes(n, [=]<typename V>(V, int64_t i) __attribute__((always_inline)) {
          if (fetch) {
            const int64_t two = (i & kLanes ? 2 * stride : 0) + i + lead;  // as in add_rows
            prefetch(x + two, 1);
            prefetch(x + two + stride, 1);
            prefetch(g + two, 1);
            prefetch(g + two + stride, 1);
          }
          const V shift = value_at<V>(p.shift + i);
          const V g0 = value_at<V>(d0 + i), g1 = value_at<V>(d1 + i);
          const V g2 = value_at<V>(d2 + i), g3 = value_at<V>(d3 + i);
          const V x0 = value_at<V>(x + i) - shift, x1 = value_at<V>(x + stride + i) - shift;
          const V x2 = value_at<V>(x + 2 * stride + i) - shift;
          const V x3 = value_at<V>(x + 3 * stride + i) - shift;
          put_value(s + i, value_at<V>(s + i) + ((g0 + g1) + (g2 + g3)));
          put_value(q + i, value_at<V>(q + i) + ((g0 * x0 + g1 * x1) + (g2 * x2 + g3 * x3)));
        });
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const C* dr = d[r];
        const T* xr = x + r * stride;
        for_lanes(n, [=]<typename V>(V, int64_t i) __attribute__((always_inline)) {
          const V gr = value_at<V>(dr + i);
          put_value(s + i, value_at<V>(s + i) + gr);
          put_value(q + i,
                    value_at<V>(q + i) + gr * (value_at<V>(xr + i) - value_at<V>(p.shift + i)));
        });
      }
    }
  };

  for (int64_t j = 0; j < part.columns; ++j) part.first_sum[j] = part.second_sum[j] = 0.0;
  for (int64_t done = 0; done < part.rows; done += part.block()) {
    const int64_t rows = min(part.block(), part.rows - done), row = part.first_row + done;
    const uint8_t* bits = part.bits(task, row);
    if (bits) unpack_bits(bits, rows * part.columns, space);
    for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
      add(row + r, min(kRowsAtOnce, rows - r), part.columns,
          bits ? space + r * part.columns : nullptr, part.first_sum, part.second_sum);
    }
  }
  if (takes_rest(task, unit)) {
    double* rest = RowUnit::row_sums(task, rest_slice(plan));
    for (int64_t j = 0; j < plan.rest; ++j) rest[j] = rest[stride + j] = 0.0;
    const uint8_t* bits = part.bits(task, plan.rows);
    if (bits) unpack_bits(bits, plan.rest, space);
    add(plan.rows, 1, plan.rest, bits ? space : nullptr, rest, rest + stride);
  }
}

template <typename T, bool kForward>
void map_rows(const BatchNormTask& task, int64_t unit) {
  using C = compute_t<T>;
  const BatchNormPlan& plan = task.plan;
  const RowUnit part(task, unit);
  Typed<T> typed(task);
  const StripConstants<C> constants(task, part, kForward ? 3 : 6);
  alignas(64) uint8_t space[kBlock + 8];

  const auto map = [&](int64_t row, int64_t rows, int64_t columns) {
    uint8_t* bits = part.bits(task, row);
    const int64_t count = (rows - 1) * part.columns + columns;
    const int64_t lead = rows_ahead<T>(columns) * plan.columns;
    if (!kForward && bits) unpack_bits(bits, count, space);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; j += kTile) {
        const int64_t n = min(kTile, columns - j);
        const int64_t first = (row + r) * plan.columns + part.first_column + j;
        uint8_t* flags = bits ? space + r * part.columns + j : nullptr;
        if constexpr (kForward) {
          typed.forward_tile(constants.from(j), first, n, lead, flags);
        } else {
          typed.backward_tile(constants.from(j), first, n, lead, flags);
        }
      }
    }
    if (kForward && bits) pack_bits(space, count, bits);
  };

  for (int64_t done = 0; done < part.rows; done += part.block()) {
    map(part.first_row + done, min(part.block(), part.rows - done), part.columns);
  }
  if (takes_rest(task, unit)) map(plan.rows, 1, plan.rest);
}

// Calls f(begin, end) for the ranges of columns that channels [begin, end) have.
template <typename F>
RK_HD void for_column_ranges(const BatchNormTask& task, int64_t begin, int64_t end, const F& f) {
  if (!task.channels_last) return f(begin * task.length, end * task.length);
  for (int64_t column = 0; column < task.plan.columns; column += task.channels) {
    f(column + begin, column + end);
  }
}

template <typename F>
void for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float64: return f(double{});
    case DType::float32: return f(float{});
    case DType::float16: return f(float16{});
    case DType::bfloat16: return f(bfloat16{});
  }
}

}  // namespace

void batch_norm_moments(const BatchNormTask& task, int64_t unit) {
  for_dtype(task.dtype, [&]<typename T>(T) {
    (task.plan.planes ? plane_moments<T> : row_moments<T>)(task, unit);
  });
}

void batch_norm_gradient_sums(const BatchNormTask& task, int64_t unit) {
  for_dtype(task.dtype, [&]<typename T>(T) {
    (task.plan.planes ? plane_gradient_sums<T> : row_gradient_sums<T>)(task, unit);
  });
}

void batch_norm_map_forward(const BatchNormTask& task, int64_t unit) {
  for_dtype(task.dtype, [&]<typename T>(T) {
    (task.plan.planes ? map_planes<T, true> : map_rows<T, true>)(task, unit);
  });
}

void batch_norm_map_backward(const BatchNormTask& task, int64_t unit) {
  for_dtype(task.dtype, [&]<typename T>(T) {
    (task.plan.planes ? map_planes<T, false> : map_rows<T, false>)(task, unit);
  });
}

void batch_norm_merge_moments(const BatchNormTask& task, int64_t begin, int64_t end) {
  const BatchNormPlan& plan = task.plan;
  double *means = task.totals, *m2s = task.totals + task.channels;
  Moments<double> total{};
  const auto put = [&](int64_t c) {
    means[c] = total.mean;
    m2s[c] = total.m2;
    total = {};
  };
  if (plan.planes) {
    for (int64_t c = begin; c < end; ++c) {
      for_pairs(task, c, c + 1, [&](const double* pair, int64_t, int64_t first, int64_t last) {
        total.merge({last - first, pair[0], pair[1]});
      });
      put(c);
    }
    return;
  }
  // Slice by slice, columns side by side; then the columns of each channel.
  double *mean = RowUnit::row_sums(task, 0), *m2 = mean + plan.columns;
  for_column_ranges(task, begin, end, [&](int64_t first, int64_t last) {
    for (int64_t slice = 1; slice < rest_slice(plan); ++slice) {
      const double* other = RowUnit::row_sums(task, slice);
      merge_columns(last - first, slice * plan.unit, mean + first, m2 + first,
                    min(plan.unit, plan.rows - slice * plan.unit), other + first,
                    other + plan.columns + first);
    }
    if (first < plan.rest) {
      const double* other = RowUnit::row_sums(task, rest_slice(plan));
      merge_columns(min(last, plan.rest) - first, plan.rows, mean + first, m2 + first, 1,
                    other + first, other + plan.columns + first);
    }
  });
  for (int64_t c = begin; c < end; ++c) {
    for_column_ranges(task, c, c + 1, [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        total.merge({plan.rows + (j < plan.rest), mean[j], m2[j]});
      }
    });
    put(c);
  }
}

void batch_norm_merge_sums(const BatchNormTask& task, int64_t begin, int64_t end) {
  const BatchNormPlan& plan = task.plan;
  double *d_sums = task.totals, *dx_sums = task.totals + task.channels;
  for (int64_t c = begin; c < end; ++c) d_sums[c] = dx_sums[c] = 0.0;
  if (plan.planes) {
    for_pairs(task, begin, end, [&](const double* pair, int64_t c, int64_t, int64_t) {
      d_sums[c] += pair[0];
      dx_sums[c] += pair[1];
    });
    return;
  }
  double *d_sum = RowUnit::row_sums(task, 0), *dx_sum = d_sum + plan.columns;
  for_column_ranges(task, begin, end, [&](int64_t first, int64_t last) {
    for (int64_t slice = 1; slice <= rest_slice(plan); ++slice) {
      const double* other = RowUnit::row_sums(task, slice);
      const int64_t stop = slice < rest_slice(plan) ? last : min(last, plan.rest);
#pragma omp simd
      for (int64_t j = first; j < stop; ++j) {
        d_sum[j] += other[j];
        dx_sum[j] += other[plan.columns + j];
      }
    }
    for (int64_t j = first; j < last; ++j) {
      const int64_t c = channel_of(task, j);
      d_sums[c] += d_sum[j];
      dx_sums[c] += dx_sum[j];
    }
  });
}

RK_NAMESPACE_END
