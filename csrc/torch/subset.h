// The arguments of gathering a subset of samples, and of adding to it, as both launchers, CPU and
// CUDA, read them: what ops/subset.py declares, checked for what memory safety rests on.
#pragma once

#include "channel_layout.h"
#include "checks.h"
#include "reg_kernels/subset_math.h"

namespace reg_kernels {

inline SubsetRows subset_rows(const Call& call, const Tensor& kept, const Tensor& dropped) {
  const auto of = [&](const Tensor& x, const char* name) {
    return static_cast<const int64_t*>(call.vector(x, ScalarType::Long, x.numel(), name));
  };
  return {of(kept, "kept"), of(dropped, "dropped"), kept.numel(), kept.numel() + dropped.numel()};
}

// Elements of a sample of x, (N, ...), which may have no samples.
inline int64_t sample_numel(const Tensor& x, const char* op) {
  int64_t numel = 1;
  for (int64_t d = 1; d < x.dim(); ++d) numel = checked_product(numel, x.size(d), op);
  return numel;
}

// Of `count` samples side by side.
inline const void* samples_data(const Call& call, const Tensor& x, int64_t count,
                                const char* name) {
  sample_layout(x, call.op, name);
  RK_REQUIRE(x.size(0) == count, call.op, name, words("of ", count, " samples"), x);
  return call.data(x, name);
}

// That samples of x are like those of `other`: shape, storage order and dtype.
inline void check_samples_like(const Call& call, const Tensor& other, const Tensor& x,
                               const char* name) {
  bool alike = x.dim() == other.dim() && x.scalar_type() == other.scalar_type();
  for (int64_t d = 1; alike && d < x.dim(); ++d) {
    const bool any = x.numel() != 0 && other.numel() != 0 && x.size(d) > 1;
    alike = x.size(d) == other.size(d) && (!any || x.stride(d) == other.stride(d));
  }
  RK_REQUIRE(alike, call.op, name, words("of samples like ", described(other)), x);
}

// An uninitialised batch of `count` samples like those of x.
inline Tensor empty_samples(const Call& call, const Tensor& x, int64_t count) {
  const auto given = x.sizes();
  std::vector<int64_t> sizes(given.begin(), given.end());
  sizes[0] = count;
  std::vector<int64_t> strides = dense_strides(sizes, false, call.op);
  if (x.numel() != 0) {  // else they say nothing
    for (int64_t d = 1; d < x.dim(); ++d) strides[d] = x.stride(d);
  }
  return empty_strided(x, sizes, strides, dtype_number(x));
}

// One of the two ops' calls, with its result.
struct SubsetCall {
  SubsetRows rows;
  Tensor result;
  const void *x, *residual;
  void* y;
  int64_t numel;  // of a sample

  // y[k] = scale x[kept[k]]
  static SubsetCall gathering(const Call& call, const Tensor& input, const Tensor& kept,
                              const Tensor& dropped) {
    const SubsetRows rows = subset_rows(call, kept, dropped);
    const void* x = samples_data(call, input, rows.samples, "input");
    return {rows, call, input, x, nullptr, rows.count};
  }

  // y[kept[k]] = residual[kept[k]] + scale x[k], and the residual elsewhere, which may be 0.
  static SubsetCall adding(const Call& call, const Tensor& input, const OptionalTensor& residual,
                           const Tensor& kept, const Tensor& dropped) {
    const SubsetRows rows = subset_rows(call, kept, dropped);
    const void* x = samples_data(call, input, rows.count, "input");
    if (!residual) return {rows, call, input, x, nullptr, rows.samples};
    const void* r = samples_data(call, *residual, rows.samples, "residual");
    check_samples_like(call, *residual, input, "input");
    return {rows, call, *residual, x, r, rows.samples};
  }

 private:
  SubsetCall(const SubsetRows& rows, const Call& call, const Tensor& like, const void* x,
             const void* residual, int64_t count)
      : rows(rows),
        result(empty_samples(call, like, count)),
        x(x),
        residual(residual),
        y(result.mutable_data_ptr()),
        numel(sample_numel(like, call.op)) {}
};

}  // namespace reg_kernels
