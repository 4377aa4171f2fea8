// What torch says of a Python tensor to C. Its C++ classes may change between versions; its DLPack
// exchange may not. That is a table of C functions with a version, one of which says where a tensor
// lies and how it is laid out, and makes nothing.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

// A C header that stands for itself; torch keeps it from whoever builds for the stable ABI.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

namespace reg_kernels {

// A descriptor of torch.Tensor, as that of `requires_grad`, and what it gets by.
struct Descriptor {
  PyObject* object = nullptr;
  descrgetfunc getter = nullptr;

  PyObject* of(PyObject* x) const {
    return getter(object, x, reinterpret_cast<PyObject*>(Py_TYPE(x)));
  }
};

struct Exchange {
  // 0, or an exception that says why this tensor cannot be told of.
  int (*tell)(void* tensor, DLTensor* out) = nullptr;
  PyTypeObject* tensor = nullptr;  // torch.Tensor
  PyTypeObject* parameter = nullptr;
  Descriptor grad, requires_grad;
  PyObject* is_neg = nullptr;  // the method
};

// null with an exception where this torch has no such exchange.
const Exchange* find_exchange();

}  // namespace reg_kernels
