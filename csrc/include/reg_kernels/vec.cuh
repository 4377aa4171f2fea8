// 16-byte vector access to a tensor in storage order, with its odd ends element by element.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtypes.h"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kVector = kVectorBytes / sizeof(T);  // elements a vector

// Of another length where arrays of several element types are walked side by side.
template <typename T, int kCount = kVector<T>>
struct Vector {
  T v[kCount];
};

template <int kBytes>
constexpr int kAlignment = kBytes < kVectorBytes ? kBytes : kVectorBytes;

// What vectors are moved as, 16 bytes at a time. Words, not elements: nvcc then keeps one LDG.128.
template <int kBytes>
#if defined(__CUDACC__)
struct alignas(kAlignment<kBytes>) Bits {
#else
struct __attribute__((aligned(kAlignment<kBytes>), may_alias)) Bits {
#endif
  uint32_t w[kBytes / 4];
};
using VectorBits = Bits<kVectorBytes>;

// Says that an address, which may have come by way of an integer, is one in global memory: the
// compiler then need not ask at each access, nor take a store for one into shared memory.
template <typename T>
__device__ __forceinline__ T* in_global_memory(T* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// The vector at `data`, aligned to its size or to 16 bytes; a vector of one needs no more than
// that.
template <int kCount, typename E, typename T = std::remove_const_t<E>>
__device__ __forceinline__ Vector<T, kCount> vector_at(E* data) {
  if constexpr (kCount == 1) {
    return {{*data}};
  } else {
    // By way of a local: a bit_cast straight from memory loads byte by byte.
    using B = Bits<kCount * sizeof(T)>;
    const B bits = *reinterpret_cast<const B*>(data);
    return bit_cast<Vector<T, kCount>>(bits);
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void put_vector(T* data, const Vector<T, kCount>& value) {
  if constexpr (kCount == 1) {
    *data = value.v[0];
  } else {
    using B = Bits<kCount * sizeof(T)>;
    const auto bits = bit_cast<B>(value);
    *reinterpret_cast<B*>(data) = bits;
  }
}

// The same in global memory.
template <int kCount, typename E>
__device__ __forceinline__ auto load_whole(E* data) {
  return vector_at<kCount>(in_global_memory(data));
}

template <typename T, int kCount>
__device__ __forceinline__ void store_whole(T* data, const Vector<T, kCount>& value) {
  put_vector(in_global_memory(data), value);
}

// The same in one STG.128 or STG.64, come what may: nvcc takes some plain stores apart into STG.32.
// The loads and stores around it keep their order: none is moved past it.
template <typename T, int kCount>
__device__ __forceinline__ void store_at_once(T* data, const Vector<T, kCount>& value) {
#if defined(__CUDA_ARCH__)
  constexpr int kBytes = kCount * sizeof(T);
  if constexpr (kBytes == 8 || kBytes == kVectorBytes) {
    const auto bits = bit_cast<Bits<kBytes>>(value);
    data = in_global_memory(data);
    if constexpr (kBytes == 8) {
      __stwb(reinterpret_cast<uint2*>(data), make_uint2(bits.w[0], bits.w[1]));
    } else {
      __stwb(reinterpret_cast<uint4*>(data),
             make_uint4(bits.w[0], bits.w[1], bits.w[2], bits.w[3]));
    }
    return;
  }
#endif
  store_whole(data, value);
}

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
  return load_whole<kVector<T>>(span.at(i));
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
  store_at_once(span.at(i), value);
}

}  // namespace cuda
RK_NAMESPACE_END
