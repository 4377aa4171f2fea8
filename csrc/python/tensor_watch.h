// For Python: whether tensors still lie where they did, and where gradients lie now. The functions
// are those of reg_kernels/optim/_watch.py, which says what they do.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace reg_kernels {

PyObject* describe(PyObject*, PyObject* tensors);
PyObject* look(PyObject*, PyObject* arguments);
PyObject* holds(PyObject*, PyObject* arguments);

}  // namespace reg_kernels
