// BatchNorm of rows: the tensor is a matrix, and each channel has columns of its own. A unit is
// some rows of a strip of columns, and adds up these columns side by side.
#pragma once

#include "batch_norm_tile.h"

RK_NAMESPACE_BEGIN
namespace {

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

  // Rows that share pivots.
  int64_t block() const { return max(8, kBlock / columns / 8 * 8); }

  // The gate's bit at which row `row` begins.
  int64_t bit(const BatchNormTask& task, int64_t row) const {
    return task.plan.rows * first_column + row * columns;
  }
};

// Whether a unit also takes the elements of the incomplete row, and the slice of that row's sums.
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
    const int64_t first = channel_of(task, part.first_column);
    for (int kind = 0; kind < kinds; ++kind) {
      const double* from = (kind < 3 ? task.affine : task.gradient) + kind % 3 * task.channels;
      C* to = values[kind];
      if (task.channels_last) {  // in stretches of all channels, the first one from `first` on
        int64_t c = first;
        for (int64_t j = 0; j < part.columns; c = 0) {
          const int64_t count = min(task.channels - c, part.columns - j);
          for (int64_t i = 0; i < count; ++i) to[j + i] = static_cast<C>(from[c + i]);
          j += count;
        }
      } else {  // strips begin with a channel
        for (int64_t j = 0; j < part.columns; j += task.length) {
          const auto value = static_cast<C>(from[first + j / task.length]);
          for (int64_t i = 0; i < task.length; ++i) to[j + i] = value;
        }
      }
    }
  }

  ChannelColumns<C> from(int64_t j) const {
    return {values[0] + j, values[1] + j, values[2] + j,
            values[3] + j, values[4] + j, values[5] + j};
  }
};

// Rows of a strip that are `bytes` or less: how far ahead is prefetched. They may lie past the
// tensor's end: a prefetch never faults.
template <typename T>
RK_HD int64_t rows_ahead(int64_t columns, int64_t bytes) {
  return max(1, bytes / (columns * static_cast<int64_t>(sizeof(T))));
}

// Prefetches as much as columns [j, j + kLanes) have of four rows `stride` apart, the first one's
// columns at `first`. Over all columns that is each row whole, one after the other: where the walk
// jumps from row to row as it reads, the hardware's prefetchers lose their way (0.7 of the time).
template <typename T>
RK_HD void prefetch_rows(const T* first, int64_t j, int64_t columns, int64_t stride) {
  const int64_t i = kRowsAtOnce * j;
  const int64_t row = (i >= columns) + (i >= 2 * columns) + (i >= 3 * columns);
  prefetch(first + i + row * (stride - columns), kRowsAtOnce * kLanes);
}

// Adds the rows of a block to the sums of its columns, four rows at a time.
template <typename T>
void add_rows(const T* x, int64_t stride, int64_t rows, int64_t columns, const double* pivot,
              double* sum, double* squares) {
  const int64_t ahead = rows_ahead<T>(columns, kAhead) * stride;
  int64_t r = 0;
  for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) {
    const T *a = x + r * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    for_lanes(columns, [=]<typename V>(V, int64_t j) __attribute__((always_inline)) {
      prefetch_rows(a + ahead, j, columns, stride);
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

// Merges mean and m2 of `count` values a column with those of `other_count`, as Moments::merge.
RK_HD void merge_columns(int64_t columns, int64_t count, double* mean, double* m2,
                         int64_t other_count, const double* other_mean, const double* other_m2) {
  const double share = static_cast<double>(other_count) / static_cast<double>(count + other_count);
  const double weight = share * static_cast<double>(count);
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const double delta = other_mean[j] - mean[j];
    m2[j] += other_m2[j] + delta * delta * weight + (delta - delta);
    mean[j] = delta - delta == 0.0 ? mean[j] + delta * share : mean[j] + other_mean[j];
  }
}

template <typename T>
void row_moments(const BatchNormTask& task, int64_t unit) {
  const RowUnit part(task, unit);
  const int64_t stride = task.plan.columns, columns = part.columns, block = part.block();
  const T* x = static_cast<const T*>(task.x) + part.first_column;
  alignas(64) double base[kColumns], pivot[kColumns], sum[kColumns], squares[kColumns];
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) base[j] = base_at(x + j, stride, task.plan.rows);
  for (int64_t done = 0; done < part.rows; done += block) {
    const int64_t rows = min(block, part.rows - done);
    const T* from = x + (part.first_row + done) * stride;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      pivot[j] = base_at(from + j, stride, rows);
      sum[j] = squares[j] = 0.0;
    }
    add_rows(from, stride, rows, columns, pivot, sum, squares);
    const double n = static_cast<double>(rows);
    if constexpr (sizeof(T) == sizeof(double)) {  // as in plane_moments
      for (int64_t j = 0; j < columns; ++j) {
        pivot[j] = finite_or_zero(pivot[j] + sum[j] / n);
        sum[j] = squares[j] = 0.0;
      }
      add_rows(from, stride, rows, columns, pivot, sum, squares);
    }
    double* mean = done ? sum : part.first_sum;
    double* m2 = done ? squares : part.second_sum;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {  // as moments_of_sums
      const double shift = sum[j] / n;
      m2[j] = squares[j] - sum[j] * shift;
      mean[j] = (pivot[j] - base[j]) + shift;
    }
    if (done) merge_columns(columns, done, part.first_sum, part.second_sum, rows, mean, m2);
  }
  if (takes_rest(task, unit)) {
    double* rest = RowUnit::row_sums(task, rest_slice(task.plan));
    for (int64_t j = 0; j < task.plan.rest; ++j) {
      rest[j] = static_cast<double>(load(x[task.plan.rows * stride + j])) - base[j];
      rest[stride + j] = 0.0;
    }
  }
}

template <typename T>
void row_gradient_sums(const BatchNormTask& task, int64_t unit) {
  using C = compute_t<T>;
  using L = loop_t<T>;
  const BatchNormPlan& plan = task.plan;
  const RowUnit part(task, unit);
  const Typed<T> typed(task);
  const StripConstants<C> constants(task, part, 3);
  TileSpace<T> space_of[kRowsAtOnce];
  GateSpace gate;
  const int64_t stride = plan.columns;

  // Adds `rows` rows, at most kRowsAtOnce.
  const auto add = [&](int64_t row, int64_t rows, int64_t columns, double* d_sum,
                       double* dx_sum) RK_STAGE {
    const int64_t lead = rows_ahead<T>(columns, kAheadOfTwo) * stride;
    for (int64_t j = 0; j < columns; j += kTile) {
      const int64_t n = min(kTile, columns - j);
      const ChannelColumns<C> p = constants.from(j);
      const int64_t first = row * stride + part.first_column + j;
      const C* d[kRowsAtOnce];
      const L* x[kRowsAtOnce];
      for (int64_t r = 0; r < rows; ++r) {
        const uint8_t* flags = gate.read(task.gate, part.bit(task, row + r) + j, n);
        const Tile<L> tile = typed.backward_of(first + r * stride, n, 0, true, flags, space_of[r]);
        d[r] = typed.loops.gradient(p, tile, flags, space_of[r].d);
        x[r] = tile.x;
      }
      double *s = d_sum + j, *q = dx_sum + j;
      if (rows == kRowsAtOnce) {
        const C *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3];
        const L *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
        // Here and not where a row's gradient is made, even if nothing reads it here: asked for
        // a row at a time, while this loop reads four, they come too late (0.75 of the time).
        const T *grad_ahead = typed.grad_output + first + lead, *x_ahead = typed.x + first + lead;
        for_lanes(n, [=]<typename V>(V, int64_t i) RK_INLINE {
          prefetch_rows(x_ahead, i, n, stride);
          prefetch_rows(grad_ahead, i, n, stride);
          const V shift = value_at<V>(p.shift + i);
          const V g0 = value_at<V>(d0 + i), g1 = value_at<V>(d1 + i);
          const V g2 = value_at<V>(d2 + i), g3 = value_at<V>(d3 + i);
          const V u0 = value_at<V>(x0 + i) - shift, u1 = value_at<V>(x1 + i) - shift;
          const V u2 = value_at<V>(x2 + i) - shift, u3 = value_at<V>(x3 + i) - shift;
          put_value(s + i, value_at<V>(s + i) + ((g0 + g1) + (g2 + g3)));
          put_value(q + i, value_at<V>(q + i) + ((g0 * u0 + g1 * u1) + (g2 * u2 + g3 * u3)));
        });
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const C* dr = d[r];
        const L* xr = x[r];
        for_lanes(n, [=]<typename V>(V, int64_t i) RK_INLINE {
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
    for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
      add(row + r, min(kRowsAtOnce, rows - r), part.columns, part.first_sum, part.second_sum);
    }
  }
  if (takes_rest(task, unit)) {
    double* rest = RowUnit::row_sums(task, rest_slice(plan));
    for (int64_t j = 0; j < plan.rest; ++j) rest[j] = rest[stride + j] = 0.0;
    add(plan.rows, 1, plan.rest, rest, rest + stride);
  }
}

template <typename T, bool kForward>
void map_rows(const BatchNormTask& task, int64_t unit) {
  using C = compute_t<T>;
  const BatchNormPlan& plan = task.plan;
  const RowUnit part(task, unit);
  Typed<T> typed(task);
  const StripConstants<C> constants(task, part, kForward ? 3 : 6);

  const auto map = [&](int64_t row, int64_t rows, int64_t columns) RK_STAGE {
    const int64_t lead = rows_ahead<T>(columns, kForward ? kAhead : kAheadOfTwo) * plan.columns;
    if constexpr (kForward && !Typed<T>::kWidens) {
      if (!typed.buffers_forward()) {
        const int64_t first = row * plan.columns + part.first_column;
        const Tile<T> tile{first, columns, lead, typed.x + first};
        return typed.loops.forward_rows(constants.from(0), tile, rows, plan.columns,
                                        typed.y + first, typed.stream);
      }
    }
    const int64_t bit = part.bit(task, row);
    GateWriter writer(task.gate ? task.gate + bit / 8 : nullptr);
    GateSpace gate;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0, n; j < columns; j += n) {
        const int64_t first = (row + r) * plan.columns + part.first_column + j;
        n = min(kForward ? typed.forward_tile_at(first) : kTile, columns - j);
        if constexpr (kForward) {
          typed.forward_tile(constants.from(j), first, n, lead, writer.next());
          writer.wrote(n);
        } else {
          const uint8_t* flags = gate.read(task.gate, bit + r * part.columns + j, n);
          typed.backward_tile(constants.from(j), first, n, lead, flags);
        }
      }
    }
    if constexpr (kForward) writer.finish();
  };

  map(part.first_row, part.rows, part.columns);
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

}  // namespace
RK_NAMESPACE_END
