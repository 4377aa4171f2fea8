// For Python: what a batch's augmentation is drawn from. The functions are those of
// reg_kernels/ops/_host_draws.py, which says what they do.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace reg_kernels {

PyObject* draw_words(PyObject*, PyObject* arguments);
PyObject* first_rectangle(PyObject*, PyObject* arguments);

}  // namespace reg_kernels
