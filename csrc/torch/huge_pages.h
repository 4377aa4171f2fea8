// Fresh memory comes from the kernel page by page, at the first write to each: in pages of 4 KiB
// that takes two to eight times as long as the loop that writes them, in pages of 2 MiB a fifth of
// it. Linux gives huge pages to those who ask, as most distributions set it, so a large result
// asks.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace reg_kernels {

// From here on, one huge page at the least lies inside of a result.
constexpr size_t kHugePage = size_t{2} << 20, kLeastHinted = 2 * kHugePage;

// For memory about to be written whole: what is asked for are the huge pages that lie inside of it,
// so that no memory is taken that it would not take. Pages that are there already stay, and a
// kernel that has no huge pages, or is told to give none, does as it would: the memory is as good.
inline void hint_huge_pages(const void* data, size_t bytes) {
  if (bytes < kLeastHinted) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace reg_kernels
