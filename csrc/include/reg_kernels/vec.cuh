// Vector access to a tensor in storage order, 16 bytes at a time as a rule, with its odd ends element
// by element.
#pragma once

#include <cstdint>

#include "dtypes.h"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVector = kVectorBytes / sizeof(T);  // elements a vector

// kCount other than that where arrays of several element types are walked side by side: the same
// elements are 8 bytes of one and 16 of another, or 16 and two times 16.
template <typename T, int kCount = kVector<T>>
struct Vector {
  T v[kCount];
};

template <int kBytes>  // of a vector
constexpr int kAccessBytes = kBytes < kVectorBytes ? kBytes : kVectorBytes;

// What is moved in accesses of up to 16 bytes. Words, not elements: nvcc then keeps one LDG.128.
template <int kBytes>
#if defined(__CUDACC__)
struct alignas(kAccessBytes<kBytes>) Bits {
#else
struct __attribute__((aligned(kAccessBytes<kBytes>), may_alias)) Bits {
#endif
  uint32_t w[kBytes / 4];
};
using VectorBits = Bits<kVectorBytes>;

// Elements [begin, end) of a tensor, `data` the one numbered `begin`. Numbers need not start at 0:
// a sharded batch starts anywhere in a mask group and still uses the same code.
template <typename T>
struct Span {
  T* data;
  int64_t begin, end;

  __device__ T* at(int64_t i) const { return data + (i - begin); }

  // Whether [first, last) can be moved in accesses of so many bytes with no further check.
  __device__ bool whole(int64_t first, int64_t last, int bytes = kVectorBytes) const {
    return first >= begin && last <= end && reinterpret_cast<uintptr_t>(at(first)) % bytes == 0;
  }
};

// The vector at element i. A block asks once whether all of its elements are `whole`, so that its
// loads stand in a row with no branch between them; elsewhere each vector asks for itself, and what
// is not whole goes element by element.
template <bool kWhole, typename T, int kCount = kVector<T>>
__device__ __forceinline__ Vector<T, kCount> load_vector(const Span<const T>& span, int64_t i) {
  constexpr int kBytes = kCount * sizeof(T);
  if constexpr (!kWhole) {
    if (!span.whole(i, i + kCount, kAccessBytes<kBytes>)) {
      Vector<T, kCount> result{};
      RK_UNROLL
      for (int j = 0; j < kCount; ++j) {
        if (i + j >= span.begin && i + j < span.end) result.v[j] = *span.at(i + j);
      }
      return result;
    }
  }
  // By way of a local: a bit_cast straight from memory loads byte by byte.
  const Bits<kBytes> bits = *reinterpret_cast<const Bits<kBytes>*>(span.at(i));
  return bit_cast<Vector<T, kCount>>(bits);
}

template <bool kWhole, typename T, int kCount>
__device__ __forceinline__ void store_vector(const Span<T>& span, int64_t i,
                                             const Vector<T, kCount>& value) {
  constexpr int kBytes = kCount * sizeof(T);
  if constexpr (!kWhole) {
    if (!span.whole(i, i + kCount, kAccessBytes<kBytes>)) {
      RK_UNROLL
      for (int j = 0; j < kCount; ++j) {
        if (i + j >= span.begin && i + j < span.end) *span.at(i + j) = value.v[j];
      }
      return;
    }
  }
  const auto bits = bit_cast<Bits<kBytes>>(value);
  *reinterpret_cast<Bits<kBytes>*>(span.at(i)) = bits;
}

}  // namespace cuda
RK_NAMESPACE_END
