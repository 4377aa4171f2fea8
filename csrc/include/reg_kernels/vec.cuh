// 16-byte vector access to a tensor in storage order, with its odd ends element by element.
#pragma once

#include <cstdint>

#include "dtypes.h"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVector = kVectorBytes / sizeof(T);  // elements a vector

template <typename T>
struct Vector {
  T v[kVector<T>];
};

// The unit of a 16-byte access. Four words, not kVector<T> elements: nvcc then keeps one LDG.128.
#if defined(__CUDACC__)
struct alignas(kVectorBytes) VectorBits {
#else
struct __attribute__((aligned(kVectorBytes), may_alias)) VectorBits {
#endif
  uint32_t w[4];
};

// Elements [begin, end) of a tensor, `data` the one numbered `begin`. Numbers need not start at 0:
// a sharded batch starts anywhere in a mask group and still uses the same code.
template <typename T>
struct Span {
  T* data;
  int64_t begin, end;

  __device__ T* at(int64_t i) const { return data + (i - begin); }

  // Whether [first, last) can be moved in 16-byte vectors with no further check.
  __device__ bool whole(int64_t first, int64_t last) const {
    return first >= begin && last <= end &&
           reinterpret_cast<uintptr_t>(at(first)) % kVectorBytes == 0;
  }
};

// The vector at element i. A block asks once whether all of its elements are `whole`, so that its
// loads stand in a row with no branch between them; elsewhere each vector asks for itself, and what
// is not whole goes element by element.
template <bool kWhole, typename T>
__device__ __forceinline__ Vector<T> load_vector(const Span<const T>& span, int64_t i) {
  if constexpr (!kWhole) {
    if (!span.whole(i, i + kVector<T>)) {
      Vector<T> result{};
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        if (i + j >= span.begin && i + j < span.end) result.v[j] = *span.at(i + j);
      }
      return result;
    }
  }
  // By way of a local: a bit_cast straight from memory loads byte by byte.
  const VectorBits bits = *reinterpret_cast<const VectorBits*>(span.at(i));
  return bit_cast<Vector<T>>(bits);
}

template <bool kWhole, typename T>
__device__ __forceinline__ void store_vector(const Span<T>& span, int64_t i,
                                             const Vector<T>& value) {
  if constexpr (!kWhole) {
    if (!span.whole(i, i + kVector<T>)) {
      RK_UNROLL
      for (int j = 0; j < kVector<T>; ++j) {
        if (i + j >= span.begin && i + j < span.end) *span.at(i + j) = value.v[j];
      }
      return;
    }
  }
  const auto bits = bit_cast<VectorBits>(value);
  *reinterpret_cast<VectorBits*>(span.at(i)) = bits;
}

}  // namespace cuda
RK_NAMESPACE_END
