// Stores that go past the caches, and loads that are asked for ahead.
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
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Of the lambdas that loops are made of: a call in one would not become vector code.
#define RK_INLINE __attribute__((always_inline))
// Of loops over a tile that several places have: a call a tile costs nothing, while a copy in each
// of them cost most of the time that compiling took.
#define RK_STAGE __attribute__((noinline))

RK_NAMESPACE_BEGIN

constexpr int64_t kLine = 64;  // bytes of a cache line: what one streaming store should fill

// Writes kLine bytes from `source` to `target`, both at a multiple of kLine.
RK_HD void stream_line(void* target, const void* source) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(target), _mm512_load_si512(source));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; ++i) {
    const __m256i* from = static_cast<const __m256i*>(source) + i;
    _mm256_stream_si256(static_cast<__m256i*>(target) + i, _mm256_load_si256(from));
  }
#elif defined(__x86_64__)
  for (int i = 0; i < 4; ++i) {
    const __m128i* from = static_cast<const __m128i*>(source) + i;
    _mm_stream_si128(static_cast<__m128i*>(target) + i, _mm_load_si128(from));
  }
#elif defined(__aarch64__)
  typedef uint8_t Half[kLine / 2];
  for (int i = 0; i < 2; ++i) {
    const uint8_t* from = static_cast<const Half*>(source)[i];
    const uint8x16_t low = vld1q_u8(from), high = vld1q_u8(from + 16);
    asm("stnp %q1, %q2, %0" : "=Q"(static_cast<Half*>(target)[i]) : "w"(low), "w"(high));
  }
#else
  memcpy(target, source, kLine);
#endif
}

// Asks for p[0, count) to be in the cache when its turn comes. Hardware prefetchers lose their way
// at every page and at every jump; asked for kAhead bytes early, a strided walk reads as fast as a
// straight one, and that one a little faster (2026-11-24, EPYC: 2.4 and 1.1 times). What two
// streams are asked for so early, and what is made of them, would be more than a first-level cache
// of 32 KB.
constexpr int64_t kAhead = 12288, kAheadOfTwo = 4096;

template <typename T>
RK_HD void prefetch(const T* p, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(p);
  const int64_t end = count * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < end; i += kLine) __builtin_prefetch(bytes + i);
}

// y[i] = f(i) for i in [begin, end), with no lines to wait for. `write_eight(f, i, y)`, where there
// is one for F, has the instructions for eight elements.
template <typename T, typename F>
RK_HD void fill(T* y, int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  if constexpr (requires { write_eight(f, i, y); }) {
    for (; i + 8 <= end; i += 8) write_eight(f, i, y + i);
    for (; i < end; ++i) y[i] = f(i);
  } else {
#pragma omp simd  // also where y is what f reads: an element depends on no other
    for (int64_t j = i; j < end; ++j) y[j] = f(j);
  }
}

// y[j] = f(i + j) for whole lines of y. `write_lines(f, i, y)`, where there is one for F, may know
// a shorter way and says whether it took it.
template <typename T, typename F>
RK_HD void fill_lines(T* y, int64_t i, int64_t count, const F& f) {
  if constexpr (requires { write_lines(f, i, y); }) {
    if (write_lines(f, i, y)) return;
  }
  if constexpr (requires { write_eight(f, i, y); }) {
    for (int64_t j = 0; j < count; j += 8) write_eight(f, i + j, y + j);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) y[j] = f(i + j);
  }
}

// y[i] = f(i) for i in [0, count), f inlined and vectorised, y streamed in whole lines where
// `stream` says so. A few lines at a time: streaming a larger tile at once leaves the memory idle
// while the next one is computed (measured: 1.2 of the fused loop's time), and so does prefetching
// for one at once. `ahead(i, n)` is called before elements [i, i + n), to prefetch what it will.
//
// Each copy of f is a loop that the compiler takes its time over, for every f that there is: of the
// elements before the first line there are few, and their copy is a scalar one.
template <typename T, typename F, typename Ahead>
RK_HD void write_each(T* y, int64_t count, bool stream, const F& f, const Ahead& ahead) {
  constexpr int64_t kChunk = 4 * kLine / static_cast<int64_t>(sizeof(T));
  int64_t i = 0;
  if (stream) {
    for (; i < count && reinterpret_cast<uintptr_t>(y + i) % kLine; ++i) {
      y[i] = f(i);
      asm volatile("");  // which keeps it scalar
    }
    for (; i + kChunk <= count; i += kChunk) {
      ahead(i, kChunk);
      alignas(kLine) T lines[kChunk];
      fill_lines(lines, i, kChunk, f);
      for (int64_t j = 0; j < 4; ++j) {
        stream_line(reinterpret_cast<char*>(y + i) + j * kLine,
                    reinterpret_cast<char*>(lines) + j * kLine);
      }
    }
  }
  for (; i + kChunk <= count; i += kChunk) {
    ahead(i, kChunk);
    fill_lines(y + i, i, kChunk, f);
  }
  ahead(i, count - i);
  fill(y, i, count, f);
}

struct NothingAhead {
  RK_HD void operator()(int64_t, int64_t) const {}
};

template <typename T, typename F>
RK_HD void write_each(T* y, int64_t count, bool stream, const F& f) {
  write_each(y, count, stream, f, NothingAhead{});
}

// Makes this thread's streamed stores visible before whatever it signals next. On Arm they are
// ordered as any other.
RK_HD void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

RK_NAMESPACE_END
