// Calls the leaf of csrc/cpu/subset.simd.cpp.
#include "cpu/subset.h"

#include "isas.h"

namespace isas {

void call_leaves() {
  for_types([]<typename T>(T) {
    for (const int64_t numel : {1, 37, 300}) {
      constexpr int64_t kSources[] = {1, -1, 0, -1, 2};
      const Buffer<T> x = any_values<T>(3 * numel), residual = any_values<T>(5 * numel);
      for (const double scale : {1.0, 1.7}) {
        for (const bool adds : {false, true}) {
          for (const bool stream : {false, true}) {
            Buffer<T> y(5 * numel, 0);
            SubsetTask task{x.data(), nullptr, y.data(), kDType<T>, numel, kSources, scale, stream};
            if (adds) task.residual = residual.data();
            share_out(0, 5 * numel, 1,
                      [&](int64_t begin, int64_t end) { RK_LEAF(subset_range)(task, begin, end); });
            Digest digest;
            digest.add(y);
            digest.report("subset_range, %s, %d elements, scale %g, %d%d", kName<T>, int(numel),
                          scale, adds, stream);
          }
        }
      }
    }
  });
}

}  // namespace isas
