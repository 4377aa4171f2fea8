// Stores that go past the caches.
//
// An ordinary store first reads the cache line that it will overwrite; one that streams does not,
// so an output larger than the last-level cache costs one transfer a byte instead of two. Below
// that size ordinary stores win: the next op reads the output from the cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "reg_kernels/portable.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

RK_NAMESPACE_BEGIN

// Copies `bytes` from `source`, which lies in the first-level cache, to `target` by streaming
// stores.
RK_HD void stream_copy(void* target, const void* source, int64_t bytes) {
  auto* to = static_cast<char*>(target);
  const auto* from = static_cast<const char*>(source);
#if defined(__x86_64__)
#if defined(__AVX512F__)
  using V = __m512i;
#elif defined(__AVX2__)
  using V = __m256i;
#else
  using V = __m128i;
#endif
  constexpr int64_t kWidth = sizeof(V);
  int64_t head = -reinterpret_cast<intptr_t>(to) & (kWidth - 1);
  if (head > bytes) head = bytes;
  memcpy(to, from, head);
  int64_t i = head;
  for (; i + kWidth <= bytes; i += kWidth) {
    V value;
    memcpy(&value, from + i, kWidth);
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<V*>(to + i), value);
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<V*>(to + i), value);
#else
    _mm_stream_si128(reinterpret_cast<V*>(to + i), value);
#endif
  }
  memcpy(to + i, from + i, bytes - i);
#else
  memcpy(to, from, bytes);
#endif
}

// Makes this thread's streamed stores visible before whatever it signals next.
RK_HD void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

RK_NAMESPACE_END
