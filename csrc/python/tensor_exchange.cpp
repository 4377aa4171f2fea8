#include "tensor_exchange.h"

namespace reg_kernels {
namespace {

PyObject* attribute(PyObject* of, const char* name) {
  return of ? PyObject_GetAttrString(of, name) : nullptr;
}

Descriptor descriptor(PyObject* type, const char* name) {
  Descriptor found{attribute(type, name), nullptr};
  if (found.object == nullptr) return found;
  found.getter =
      reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(found.object), Py_tp_descr_get));
  if (found.getter == nullptr)
    PyErr_Format(PyExc_TypeError, "Tensor.%s must be a descriptor", name);
  return found;
}

}  // namespace

const Exchange* find_exchange() {
  static Exchange found;
  if (found.tell) return &found;
  PyObject* module = PyImport_ImportModule("torch");
  PyObject* nn = attribute(module, "nn");
  PyObject* type = attribute(module, "Tensor");
  PyObject* capsule = attribute(type, "__dlpack_c_exchange_api__");
  const auto* api = capsule ? static_cast<const DLPackExchangeAPI*>(
                                  PyCapsule_GetPointer(capsule, "dlpack_exchange_api"))
                            : nullptr;
  if (api && (api->header.version.major != DLPACK_MAJOR_VERSION ||
              api->dltensor_from_py_object_no_sync == nullptr)) {
    PyErr_SetString(PyExc_RuntimeError, "torch's DLPack exchange is of another version");
  } else if (api) {
    found.tensor = reinterpret_cast<PyTypeObject*>(Py_NewRef(type));
    found.parameter = reinterpret_cast<PyTypeObject*>(attribute(nn, "Parameter"));
    found.grad = descriptor(type, "grad");
    found.requires_grad = descriptor(type, "requires_grad");
    found.is_neg = attribute(type, "is_neg");
    if (!PyErr_Occurred()) found.tell = api->dltensor_from_py_object_no_sync;
  }
  Py_XDECREF(capsule);
  Py_XDECREF(type);
  Py_XDECREF(nn);
  Py_XDECREF(module);
  return found.tell ? &found : nullptr;
}

}  // namespace reg_kernels
