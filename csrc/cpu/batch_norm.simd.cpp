// BatchNorm's loops, compiled once for each instruction set (isa.h).
//
// Bytes an element, s = sizeof(T). Forward: the moments read x, the map reads x and writes y, 3 s.
// Backward: the sums read grad_output and x, the map reads both again and writes grad_input, 5 s. A
// residual adds a read forward and a write backward, a gate an eighth of a byte each time. With
// ReLU and Dropout behind it that stays so, where PyTorch moves another 14 s: each of the two reads
// and writes both ways, and Dropout a mask as well. Kept for the backward beside x: 16 bytes a
// channel and the gate; PyTorch keeps ReLU's output and the mask, 2 s.
#include "batch_norm.h"

#include "batch_norm_planes.h"
#include "batch_norm_rows.h"

RK_NAMESPACE_BEGIN
namespace {

// What the means of channel c's parts are differences from; of rows, of those in column j.
double base_of_channel(const BatchNormTask& task, int64_t c) {
  double base = 0.0;
  for_dtype(task.dtype, [&]<typename T>(T) {
    base = base_at(static_cast<const T*>(task.x) + c * task.length, 1, task.length);
  });
  return base;
}

double base_of_column(const BatchNormTask& task, int64_t j) {
  double base = 0.0;
  for_dtype(task.dtype, [&]<typename T>(T) {
    base = base_at(static_cast<const T*>(task.x) + j, task.plan.columns, task.plan.rows);
  });
  return base;
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
    (task.plan.planes ? map_planes_forward<T> : map_rows<T, true>)(task, unit);
  });
}

void batch_norm_map_backward(const BatchNormTask& task, int64_t unit) {
  for_dtype(task.dtype, [&]<typename T>(T) {
    (task.plan.planes ? map_planes_backward<T> : map_rows<T, false>)(task, unit);
  });
}

void batch_norm_merge_moments(const BatchNormTask& task, int64_t begin, int64_t end) {
  const BatchNormPlan& plan = task.plan;
  double *means = task.totals, *m2s = means + task.channels, *rests = m2s + task.channels;
  Moments<double> total{};
  const auto put = [&](int64_t c, double base) {
    means[c] = base + total.mean;
    m2s[c] = total.m2;
    rests[c] = rest_of_sum(base, total.mean, means[c]);
    total = {};
  };
  if (plan.planes) {
    for (int64_t c = begin; c < end; ++c) {
      for_pairs(task, c, c + 1, [&](const double* pair, int64_t, int64_t first, int64_t last) {
        total.merge({last - first, pair[0], pair[1]});
      });
      put(c, base_of_channel(task, c));
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
    const double base = base_of_column(task, task.channels_last ? c : c * task.length);
    for_column_ranges(task, c, c + 1, [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        const double own = mean[j] + (base_of_column(task, j) - base);
        total.merge({plan.rows + (j < plan.rest), own, m2[j]});
      }
    });
    put(c, base);
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
  });
  for (int64_t c = begin; c < end; ++c) {
    for_column_ranges(task, c, c + 1, [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        d_sums[c] += d_sum[j];
        dx_sums[c] += dx_sum[j];
      }
    });
  }
}

RK_NAMESPACE_END
