// Elements of 16 bits as floats, a tile at a time, and back: where a loop does more with an element
// than to move it, one conversion of its own is less work than one in every form of that loop, for
// the compiler as well.
#pragma once

#include "lanes.h"
#include "stream.h"

RK_NAMESPACE_BEGIN

// Element i of an array as what it is computed in, for write_each.
template <typename T>
struct Widened {
  const T* from;

  RK_HD compute_t<T> operator()(int64_t i) const { return load(from[i]); }
};

// And rounded to the type it is stored in.
template <typename T>
struct Narrowed {
  const compute_t<T>* from;

  RK_HD T operator()(int64_t i) const { return store<T>(from[i]); }
};

#if defined(__AVX2__) || defined(__aarch64__)

// The instructions for float16, which no compiler finds in the arithmetic of dtypes.h.
RK_HD void write_eight(const Widened<float16>& widened, int64_t i, float* y) {
  store_floats(y, load_floats(widened.from + i));
}

RK_HD void write_eight(const Narrowed<float16>& narrowed, int64_t i, float16* y) {
  store_floats(y, load_floats(narrowed.from + i));
}

#endif

// The loops that a T takes part in itself: those of a float16 are made of floats.
template <typename T>
struct LoopTypeOf {
  using type = T;
};
template <>
struct LoopTypeOf<float16> {
  using type = float;
};
template <typename T>
using loop_t = typename LoopTypeOf<T>::type;

// to[i] = from[i], as what it is computed in or rounded to what it is stored in.
template <typename T, typename Ahead>
RK_STAGE void widen(const T* from, int64_t count, compute_t<T>* to, const Ahead& ahead) {
  write_each(to, count, false, Widened<T>{from}, ahead);
}

template <typename T, typename Ahead>
RK_STAGE void narrow(const compute_t<T>* from, int64_t count, T* to, bool stream,
                     const Ahead& ahead) {
  write_each(to, count, stream, Narrowed<T>{from}, ahead);
}

// As what loops take: where they lie, or widened into `buffer`.
template <typename T>
RK_HD const loop_t<T>* for_loops(const T* from, int64_t count, compute_t<T>* buffer) {
  if constexpr (sizeof(loop_t<T>) != sizeof(T)) {
    widen(from, count, buffer, NothingAhead{});
    return buffer;
  } else {
    return from;
  }
}

// y[i] = f(i), rounded, by way of `buffer` where loops do not take a T.
template <typename T, typename F>
RK_HD void write_rounded(T* y, int64_t count, bool stream, compute_t<T>* buffer, const F& f) {
  if constexpr (sizeof(loop_t<T>) != sizeof(T)) {
    write_each(buffer, count, false, f);
    narrow(buffer, count, y, stream, NothingAhead{});
  } else {
    write_each(y, count, stream, [=](int64_t i) RK_INLINE { return store<T>(f(i)); });
  }
}

// Elements [first, first + count) of an array as C: where they lie, or widened into `buffer`.
template <typename C>
const C* read_as(const void* array, DType dtype, int64_t first, int64_t count, C* buffer) {
  if constexpr (sizeof(C) == sizeof(float)) {
    if (dtype == DType::float16) {
      widen(static_cast<const float16*>(array) + first, count, buffer, NothingAhead{});
      return buffer;
    }
    if (dtype == DType::bfloat16) {
      widen(static_cast<const bfloat16*>(array) + first, count, buffer, NothingAhead{});
      return buffer;
    }
  }
  return static_cast<const C*>(array) + first;
}

RK_NAMESPACE_END
