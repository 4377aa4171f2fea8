// reg_kernels._C: loading it registers the CPU kernels; what it holds is build facts and the hooks
// that tests and measurements need, what an optimizer's step asks Python's objects
// (tensor_watch.h), and what augmentation draws from (host_draws.h). Python's own interface is
// enough, and compiles in a tenth of the time that a library over it takes.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>

#include "call_signature.h"
#include "cpu/isa.h"
#include "host_draws.h"
#include "reg_kernels/philox.h"
#include "tensor_watch.h"
#include "torch/huge_pages.h"

namespace {

// What f returns, or null with Python's exception for what it throws.
template <typename F>
PyObject* guarded(PyObject* exception, const F& f) {
  try {
    return f();
  } catch (const std::exception& error) {
    PyErr_SetString(exception, error.what());
    return nullptr;
  }
}

PyObject* isa(PyObject*, PyObject*) {
  return guarded(PyExc_RuntimeError, [] {
    return PyUnicode_FromString(
        reg_kernels::kIsas[static_cast<int>(reg_kernels::current_isa())].name);
  });
}

PyObject* isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const auto& [isa, name] : reg_kernels::kIsas) {
    if (names == nullptr || !reg_kernels::has_isa(isa)) continue;
    PyObject* one = PyUnicode_FromString(name);
    if (one == nullptr || PyList_Append(names, one) != 0) Py_CLEAR(names);
    Py_XDECREF(one);
  }
  return names;
}

PyObject* set_isa(PyObject*, PyObject* argument) {
  const char* wanted = PyUnicode_AsUTF8(argument);
  if (wanted == nullptr) return nullptr;
  return guarded(PyExc_ValueError, [=] {
    reg_kernels::set_isa(wanted);
    return Py_NewRef(Py_None);
  });
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
  // A build for one instruction set may have come to a machine that lacks it.
  return guarded(PyExc_ImportError, [] {
    reg_kernels::current_isa();
    PyObject* module = PyModule_Create(&definition);
    if (module &&
        (PyModule_AddStringConstant(module, "compiler", RK_COMPILER) != 0 ||
         PyModule_AddStringConstant(module, "torch_version_built_with", RK_TORCH_VERSION) != 0)) {
      Py_CLEAR(module);
    }
    return module;
  });
}
