// The size past which an output is streamed (stream.h).
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>

namespace reg_kernels {

// Bytes of the largest cache that the first core sees. Linux's own account of it comes first: on a
// virtual machine sysconf may count the caches of the whole host (320 MiB seen for 32).
inline int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    int64_t largest = 0;
    for (int index = 0; index < 8; ++index) {
      std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) +
                         "/size");
      int64_t size = 0;
      char unit = 0;
      if (file >> size >> unit) {
        largest = std::max(largest, size * (unit == 'M' ? int64_t{1} << 20 : int64_t{1} << 10));
      }
    }
#if defined(_SC_LEVEL3_CACHE_SIZE)
    if (largest == 0) largest = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return largest > 0 ? largest : int64_t{32} << 20;  // where nobody says
  }();
  return bytes;
}

}  // namespace reg_kernels
