// Cross-entropy's loops, compiled once for each instruction set (isa.h).
//
// Reads the logits and, where a gradient is wanted, writes it: 2 sizeof(T) bytes a logit, in one
// pass. A row's exponentials, each relative to the largest logit of its block, stay in the
// second-level cache until the row's sum is known. While a row's gradient is written past the
// caches, the next row is asked for. The backward pass alone moves the same bytes again.
#include "cross_entropy_planes.h"
#include "cross_entropy_rows.h"

RK_NAMESPACE_BEGIN
namespace {

template <bool kBackward>
void units(const LossTask& task, int64_t begin, int64_t end) {
  for_dtype(task.dtype, [&]<typename T>(T) {
    if (task.in_rows) {
      Rows<T> rows(task);
      for (int64_t unit = begin; unit < end; ++unit) rows.template run<kBackward>(unit);
    } else {
      Planes<T> planes(task);
      for (int64_t unit = begin; unit < end; ++unit) planes.template run<kBackward>(unit);
    }
  });
  if (task.stream) stream_fence();
}

}  // namespace

void cross_entropy_units(const LossTask& task, int64_t begin, int64_t end) {
  units<false>(task, begin, end);
}

void cross_entropy_backward_units(const LossTask& task, int64_t begin, int64_t end) {
  units<true>(task, begin, end);
}

RK_NAMESPACE_END
