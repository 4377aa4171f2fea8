// Subsets of samples: the loops, compiled once for each instruction set (isa.h).
//
// Reads the residual, where there is one, and x, and writes y: of a sample that is kept 2 or 3
// sizeof(T) bytes an element, of another one 1 or 2. y goes past the caches where it is larger.
#include "subset.h"

#include "stream.h"

RK_NAMESPACE_BEGIN
namespace {

// `count` elements of one sample.
template <typename T>
struct Part {
  T* y;
  int64_t count;
  bool stream;

  void copy(const T* from) const {
    write_each(y, count, stream, [=](int64_t i) RK_INLINE { return from[i]; });
  }

  void clear() const {
    write_each(y, count, stream, [=](int64_t) RK_INLINE { return T{}; });
  }

  void scale(const T* x, compute_t<T> by) const {
    write_each(y, count, stream, [=](int64_t i) RK_INLINE { return scaled(x[i], by); });
  }

  void add(const T* residual, const T* x, compute_t<T> by) const {
    write_each(y, count, stream,
               [=](int64_t i) RK_INLINE { return add_scaled(residual[i], x[i], by); });
  }
};

template <typename T>
void samples(const SubsetTask& task, int64_t begin, int64_t end) {
  const T* const x = static_cast<const T*>(task.x);
  const T* const residual = static_cast<const T*>(task.residual);
  const auto scale = static_cast<compute_t<T>>(task.scale);
  for (int64_t at = begin; at < end;) {
    const int64_t n = at / task.numel, first = n * task.numel;
    const int64_t next = min(end, first + task.numel);
    const Part<T> part{static_cast<T*>(task.y) + at, next - at, task.stream};
    const T* const own = residual ? residual + at : nullptr;
    if (const int64_t source = task.sources[n]; source < 0) {
      own ? part.copy(own) : part.clear();
    } else {
      const T* const from = x + source * task.numel + (at - first);
      if (own) {
        part.add(own, from, scale);
      } else if (scale == 1) {
        part.copy(from);
      } else {
        part.scale(from, scale);
      }
    }
    at = next;
  }
  if (task.stream) stream_fence();
}

}  // namespace

void subset_range(const SubsetTask& task, int64_t begin, int64_t end) {
  for_dtype(task.dtype, [&]<typename T>(T) { samples<T>(task, begin, end); });
}

RK_NAMESPACE_END
