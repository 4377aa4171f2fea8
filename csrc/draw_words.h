// For Python: the table of words that a batch's augmentation is drawn from. The function is that of
// reg_kernels/ops/_draw_words.py, which says what it holds.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

namespace reg_kernels {

PyObject* draw_words(PyObject*, PyObject* arguments);

}  // namespace reg_kernels
