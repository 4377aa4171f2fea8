// What a call's checks go by, as bytes: of a tensor its dtype, device, shape, strides and whether
// it requires grad, of anything else its value. Here is no rule of what an argument has to be: a
// call that looks like one whose checks have passed needs no others. What is not told apart by
// these bytes has no signature: whoever else than autograd may look at the call, and what is no
// plain tensor in memory.
#include "call_signature.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <cstring>

#include "tensor_exchange.h"

namespace reg_kernels {
namespace {

// Bytes one behind the other, as long as there is room.
class Written {
 public:
  void add(const void* data, size_t bytes) {
    if (bytes > sizeof(bytes_) - size_) {
      fits_ = false;
    } else if (bytes) {
      memcpy(bytes_ + size_, data, bytes);
      size_ += bytes;
    }
  }
  template <typename T>
  void add(const T& value) {
    add(&value, sizeof(value));
  }

  bool fits() const { return fits_; }
  PyObject* bytes() const { return PyBytes_FromStringAndSize(bytes_, size_); }

 private:
  char bytes_[1000];
  size_t size_ = 0;
  bool fits_ = true;
};

bool is_nothing(PyObject* x) { return x == Py_None || x == Py_False; }

// Whether the answer to each question is None, False or 0.
bool all_are_quiet(PyObject* questions) {
  const Py_ssize_t count = PyTuple_Size(questions);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* answer = PyObject_CallNoArgs(PyTuple_GetItem(questions, i));
    if (answer == nullptr) return false;
    const bool quiet =
        is_nothing(answer) || (PyLong_CheckExact(answer) && !PyObject_IsTrue(answer));
    Py_DECREF(answer);
    if (!quiet) return false;
  }
  return true;
}

bool add_tensor(const Exchange& exchange, PyObject* x, Written& out) {
  DLTensor of;
  if (exchange.tell(x, &of) != 0) return false;
  int64_t elements = 1;
  for (int32_t i = 0; i < of.ndim; ++i) elements *= of.shape[i];
  if (of.data == nullptr && elements != 0) return false;
  PyObject* requires_grad = exchange.requires_grad.of(x);
  out.add('T');
  out.add(requires_grad == Py_True);
  out.add(of.dtype);
  out.add(of.device);
  out.add(of.ndim);
  out.add(of.shape, of.ndim * sizeof(int64_t));
  out.add(of.strides, of.ndim * sizeof(int64_t));
  Py_XDECREF(requires_grad);
  return requires_grad != nullptr;
}

// Writes what a value is of; false where it has none of the types that are told apart.
bool add_value(const Exchange& exchange, PyObject* x, Written& out) {
  if (x == Py_None || x == Py_True || x == Py_False) {
    out.add(x == Py_None ? 'N' : x == Py_True ? '1' : '0');
    return true;
  }
  if (Py_IS_TYPE(x, exchange.tensor) || Py_IS_TYPE(x, exchange.parameter)) {
    return add_tensor(exchange, x, out);
  }
  if (PyFloat_CheckExact(x)) {
    out.add('f');
    out.add(PyFloat_AsDouble(x));
    return true;
  }
  if (PyLong_CheckExact(x)) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(x, &overflow);
    out.add('i');
    out.add(value);
    return overflow == 0;
  }
  Py_ssize_t size = 0;
  const char* text = PyUnicode_CheckExact(x) ? PyUnicode_AsUTF8AndSize(x, &size) : nullptr;
  if (text == nullptr) return false;
  out.add('s');
  out.add(size);
  out.add(text, size);
  return true;
}

}  // namespace

PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const Exchange* exchange = find_exchange();
  if (exchange == nullptr) return nullptr;
  if (count == 0 || !PyTuple_Check(arguments[0])) {
    return PyErr_Format(PyExc_TypeError, "signature: expected a tuple of questions first");
  }
  Written out;
  out.add(aoti_torch_grad_mode_is_enabled());
  bool all = all_are_quiet(arguments[0]);
  for (Py_ssize_t i = 1; i < count && all; ++i) all = add_value(*exchange, arguments[i], out);
  PyErr_Clear();  // of what has no address, a sparse one for example: its checks say what is wrong
  return all && out.fits() ? out.bytes() : Py_NewRef(Py_None);
}

}  // namespace reg_kernels
