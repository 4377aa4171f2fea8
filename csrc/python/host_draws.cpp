// One call for a whole batch, where torch takes some forty small operations: each of them costs
// more than what it computes of a batch's few hundred numbers.
#include "host_draws.h"

#include <cmath>
#include <cstdint>

#include "reg_kernels/philox.h"

namespace reg_kernels {
namespace {

constexpr int kTries = 10;

template <typename T>
T* at(unsigned long long address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

// Of each of `count` groups four rows of n numbers in [0, 1).
PyObject* draw_words(PyObject*, PyObject* arguments) {
  unsigned long long key, indices_at, groups_at, out_at;
  unsigned int epoch;
  Py_ssize_t n, count;
  if (!PyArg_ParseTuple(arguments, "KIKnKnK", &key, &epoch, &indices_at, &n, &groups_at, &count,
                        &out_at)) {
    return nullptr;
  }
  const auto* const indices = at<const int64_t>(indices_at);
  const auto* const groups = at<const int64_t>(groups_at);
  auto* row = at<double>(out_at);
  for (Py_ssize_t group = 0; group < count; ++group, row += 4 * n) {
    const uint64_t high = static_cast<uint64_t>(epoch) << 32 | static_cast<uint64_t>(groups[group]);
    for (Py_ssize_t i = 0; i < n; ++i) {
      const PhiloxWords words = philox4x32(key, static_cast<uint64_t>(indices[i]), high);
      for (int w = 0; w < 4; ++w) row[w * n + i] = words.w[w] * 0x1p-32;
    }
  }
  return Py_NewRef(Py_None);
}

// u is (22, n), stretches (10, n), size (2, n), out (4, n); returns how many samples have a valid
// candidate.
PyObject* first_rectangle(PyObject*, PyObject* arguments) {
  unsigned long long u_at, stretches_at, size_at, out_at;
  Py_ssize_t n;
  double low, span;
  int is_crop;
  if (!PyArg_ParseTuple(arguments, "KKKnddpK", &u_at, &stretches_at, &size_at, &n, &low, &span,
                        &is_crop, &out_at)) {
    return nullptr;
  }
  const auto* const u = at<const double>(u_at);
  const auto* const stretches = at<const double>(stretches_at);
  const auto* const size = at<const double>(size_at);
  auto* const out = at<double>(out_at);
  Py_ssize_t valid = 0;
  for (Py_ssize_t i = 0; i < n; ++i) {
    const double whole_height = size[i], whole_width = size[n + i];
    const double area = whole_height * whole_width;
    double height = 0, width = 0;
    bool is_valid = false;
    for (int k = 0; k < kTries && !is_valid; ++k) {
      const double target = (u[k * n + i] * span + low) * area, stretch = stretches[k * n + i];
      const double along = std::rint(std::sqrt(target * stretch));
      const double across = std::rint(std::sqrt(target / stretch));
      height = is_crop ? across : along;
      width = is_crop ? along : across;
      is_valid = is_crop ? height > 0 && width > 0 && height <= whole_height && width <= whole_width
                         : height < whole_height && width < whole_width;
    }
    valid += is_valid;
    if (!is_valid || width == 0) height = 0;
    const double top = std::floor((whole_height - height + 1) * u[2 * kTries * n + i]);
    const double left = std::floor((whole_width - width + 1) * u[(2 * kTries + 1) * n + i]);
    out[i] = top;
    out[n + i] = left < 0 ? 0 : left;
    out[2 * n + i] = height;
    out[3 * n + i] = width;
  }
  return PyLong_FromSsize_t(valid);
}

}  // namespace reg_kernels
