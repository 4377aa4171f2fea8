// The size past which an output is streamed (stream.h).
#pragma once

#include <unistd.h>

#include <cstdint>

namespace reg_kernels {

inline int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t size = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (size <= 0) size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return size > 0 ? size : int64_t{32} << 20;  // where the system does not say
  }();
  return bytes;
}

}  // namespace reg_kernels
