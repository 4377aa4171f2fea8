// For Python: what a call's checks go by. The function is that of reg_kernels/ops/_signature.py,
// which says what it does.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace reg_kernels {

PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace reg_kernels
