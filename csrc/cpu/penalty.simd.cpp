// The penalties' loops, compiled once for each instruction set (isa.h).
//
// A sum reads x: sizeof(T) bytes an element. The gradient reads x and writes as much.
#include "penalty.h"

#include "lanes.h"
#include "stream.h"

RK_NAMESPACE_BEGIN
namespace {

// The sign's bit taken off: a choice between vectors is taken to pieces.
RK_HD Doubles absolute(const Doubles& x) {
  typedef int64_t Words __attribute__((vector_size(sizeof(PartOfDoubles))));
  return Doubles::of([&](int k) RK_INLINE {
    return reinterpret_cast<PartOfDoubles>(reinterpret_cast<Words>(x.parts[k]) & INT64_MAX);
  });
}
RK_HD double absolute(double x) { return x < 0.0 ? -x : x; }

template <Penalty kPenalty, typename V>
RK_HD V term(const V& x) {
  if constexpr (kPenalty == Penalty::l2) {
    return x * x;
  } else {
    return absolute(x);
  }
}

// Four sums of eight lanes each: additions depend on each other, and one is not done every cycle.
template <Penalty kPenalty, typename T>
double sum(const void* data, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(data) + begin;
  const int64_t count = end - begin;
  constexpr int kChains = 4;
  Doubles total[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    prefetch(x + i + kAhead / static_cast<int64_t>(sizeof(T)), kChains * kLanes);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      total[c] += term<kPenalty>(value_at<Doubles>(x + i + c * kLanes));
    }
  }
  double rest = 0;
  for (; i < count; ++i) rest += term<kPenalty>(value_at<double>(x + i));
  return sum_of_lanes((total[0] + total[1]) + (total[2] + total[3])) + rest;
}

template <Penalty kPenalty, typename T>
void gradient(const void* from, void* to, double grad_output, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(from) + begin;
  T* y = static_cast<T*>(to) + begin;
  const auto g = static_cast<compute_t<T>>(grad_output);
  write_each(y, end - begin, false, [=](int64_t i) __attribute__((always_inline)) {
    return store<T>(penalty_gradient<kPenalty>(load(x[i]), g));
  });
}

}  // namespace

double penalty_sum(const void* x, DType dtype, Penalty penalty, int64_t begin, int64_t end) {
  return for_dtype(dtype, [&]<typename T>(T) {
    const auto of = penalty == Penalty::l2 ? sum<Penalty::l2, T> : sum<Penalty::l1, T>;
    return of(x, begin, end);
  });
}

void penalty_gradient_range(const void* x, void* y, DType dtype, Penalty penalty,
                            double grad_output, int64_t begin, int64_t end) {
  for_dtype(dtype, [&]<typename T>(T) {
    const auto of = penalty == Penalty::l2 ? gradient<Penalty::l2, T> : gradient<Penalty::l1, T>;
    of(x, y, grad_output, begin, end);
  });
}

RK_NAMESPACE_END
