// reg_kernels._C: build facts, the hooks that tests and measurements need, and what is asked of
// Python's objects: what a call's checks go by (call_signature.h), an optimizer's step
// (tensor_watch.h), and what augmentation draws from (host_draws.h). No kernel is here. By Python's
// limited interface alone, so that one build serves every Python from 3.11 on; setup.py holds the
// compiler to it.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

#include "call_signature.h"
#include "cpu/isa_names.h"
#include "host_draws.h"
#include "reg_kernels/philox.h"
#include "tensor_watch.h"
#include "torch/huge_pages.h"

namespace {

PyObject* isa(PyObject*, PyObject*) {
  const char* name = reg_kernels_isa();
  return name ? PyUnicode_FromString(name) : Py_NewRef(Py_None);
}

PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (int i = 0; names && reg_kernels_isa_at(i); ++i) {
    PyObject* one = PyUnicode_FromString(reg_kernels_isa_at(i));
    if (one == nullptr || PyList_Append(names, one) != 0) Py_CLEAR(names);
    Py_XDECREF(one);
  }
  return names;
}

PyObject* set_isa(PyObject* module, PyObject* argument) {
  const char* wanted = PyUnicode_AsUTF8AndSize(argument, nullptr);
  if (wanted == nullptr) return nullptr;
  if (reg_kernels_set_isa(wanted)) return Py_NewRef(Py_None);
  PyObject* names = isas(module, nullptr);
  PyObject* comma = PyUnicode_FromString(", ");
  PyObject* joined = names && comma ? PyUnicode_Join(comma, names) : nullptr;
  if (joined) {
    PyErr_Format(PyExc_ValueError,
                 "set_isa: name must be one that was built and that this CPU has (%U), got %U",
                 joined, argument);
  }
  Py_XDECREF(joined);
  Py_XDECREF(comma);
  Py_XDECREF(names);
  return nullptr;
}

PyObject* hint_huge_pages(PyObject*, PyObject* arguments) {
  unsigned long long address, bytes;
  if (!PyArg_ParseTuple(arguments, "KK", &address, &bytes)) return nullptr;
  reg_kernels::hint_huge_pages(reinterpret_cast<const void*>(address), bytes);
  return Py_NewRef(Py_None);
}

PyObject* philox4x32(PyObject*, PyObject* arguments) {
  PyObject* given[3];
  if (!PyArg_ParseTuple(arguments, "OOO", &given[0], &given[1], &given[2])) return nullptr;
  uint64_t numbers[3];
  for (int i = 0; i < 3; ++i) numbers[i] = PyLong_AsUnsignedLongLong(given[i]);
  if (PyErr_Occurred()) return nullptr;
  const auto words = reg_kernels::philox4x32(numbers[0], numbers[1], numbers[2]);
  return Py_BuildValue("(IIII)", words.w[0], words.w[1], words.w[2], words.w[3]);
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set that the CPU kernels run."},
    {"isas", isas, METH_NOARGS,
     "Those that they were built for and this machine has, the least capable one first."},
    {"set_isa", set_isa, METH_O, "Run the CPU kernels of the one of this name, one of isas()."},
    {"hint_huge_pages", hint_huge_pages, METH_VARARGS,
     "Of so many bytes at an address, as torch/huge_pages.h has it."},
    {"philox4x32", philox4x32, METH_VARARGS,
     "One Philox4x32-10 block, of key, counter_low and counter_high, as "
     "csrc/include/reg_kernels/philox.h draws it."},
    {"draw_words", reg_kernels::draw_words, METH_VARARGS,
     "As reg_kernels/ops/_host_draws.py has it."},
    {"first_rectangle", reg_kernels::first_rectangle, METH_VARARGS, "Likewise."},
    {"describe", reg_kernels::describe, METH_O, "As reg_kernels/optim/_watch.py has it."},
    {"look", reg_kernels::look, METH_VARARGS, "Likewise."},
    {"holds", reg_kernels::holds, METH_VARARGS, "Likewise."},
    {"signature",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(reg_kernels::signature)),
     METH_FASTCALL, "As reg_kernels/ops/_signature.py has it."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Build facts, test hooks, and what a call and an optimizer's step ask "
                          "of Python's objects.",
                          -1,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module &&
      (PyModule_AddStringConstant(module, "compiler", RK_COMPILER) != 0 ||
       PyModule_AddStringConstant(module, "torch_version_built_with", RK_TORCH_VERSION) != 0)) {
    Py_CLEAR(module);
  }
  return module;
}
