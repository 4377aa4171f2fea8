// One call for a whole batch, for which torch takes a hundred small operations.
#include "draw_words.h"

#include <cstdint>

#include "reg_kernels/philox.h"

namespace reg_kernels {

// Of each of `count` groups four rows of n numbers in [0, 1), float64.
PyObject* draw_words(PyObject*, PyObject* arguments) {
  unsigned long long key, indices_at, groups_at, out_at;
  unsigned int epoch;
  Py_ssize_t n, count;
  if (!PyArg_ParseTuple(arguments, "KIKnKnK", &key, &epoch, &indices_at, &n, &groups_at, &count,
                        &out_at)) {
    return nullptr;
  }
  const auto* const indices = reinterpret_cast<const int64_t*>(indices_at);
  const auto* const groups = reinterpret_cast<const int64_t*>(groups_at);
  auto* row = reinterpret_cast<double*>(out_at);
  for (Py_ssize_t group = 0; group < count; ++group, row += 4 * n) {
    const uint64_t high = static_cast<uint64_t>(epoch) << 32 | static_cast<uint64_t>(groups[group]);
    for (Py_ssize_t i = 0; i < n; ++i) {
      const PhiloxWords words = philox4x32(key, static_cast<uint64_t>(indices[i]), high);
      for (int w = 0; w < 4; ++w) row[w * n + i] = words.w[w] * 0x1p-32;
    }
  }
  return Py_NewRef(Py_None);
}

}  // namespace reg_kernels
