// One pass over an optimizer's parameters, their gradients and their state: each Python object, and
// what torch keeps of it, is touched once. After a forward and a backward hardly any of it is in a
// cache, and what counts is how often memory is waited for.
//
// A gradient comes by the descriptor that `p.grad` comes by.
#include "tensor_watch.h"

#include <cstdint>
#include <cstring>
#include <vector>

#include "tensor_exchange.h"

namespace reg_kernels {
namespace {

// What `describe` writes of a tensor; its shape and its strides are behind it.
struct Facts {
  const void* data;
  // The Python object, and inside of what torch keeps of the tensor: to be asked for, nothing is
  // read there.
  const void* object;
  const char* inside;
  DLDevice device;
  DLDataType dtype;
  int32_t dimensions;

  const int64_t* shape() const { return reinterpret_cast<const int64_t*>(this + 1); }
  const int64_t* strides() const { return shape() + dimensions; }
  size_t bytes() const { return sizeof(Facts) + 2 * dimensions * sizeof(int64_t); }

  // Whether x is of the same dtype, shape and device.
  bool are_kind_of(const DLTensor& x) const {
    return x.ndim == dimensions && x.dtype.code == dtype.code && x.dtype.bits == dtype.bits &&
           x.device.device_type == device.device_type && x.device.device_id == device.device_id &&
           memcmp(x.shape, shape(), dimensions * sizeof(int64_t)) == 0;
  }

  // Whether x is what was described.
  bool are_of(const DLTensor& x) const {
    return x.data == data && are_kind_of(x) &&
           memcmp(x.strides, strides(), dimensions * sizeof(int64_t)) == 0;
  }

  // Whether kernels take x beside what was described, wherever it lies.
  bool fit(const DLTensor& x) const {
    if (!are_kind_of(x)) return false;
    int64_t elements = 1;
    bool alike = true;
    for (int32_t i = 0; i < dimensions; ++i) {
      elements *= x.shape[i];
      alike &= x.shape[i] == 1 || x.strides[i] == strides()[i];
    }
    return elements == 0 || (alike && x.data != nullptr);
  }
};
static_assert(sizeof(Facts) % sizeof(int64_t) == 0);

// The facts of one tensor after the other; null where there are no more.
class Described {
 public:
  explicit Described(PyObject* bytes)
      : at_(PyBytes_AsString(bytes)), end_(at_ + PyBytes_Size(bytes)) {}

  const Facts* next() {
    const auto* facts = reinterpret_cast<const Facts*>(at_);
    if (at_ + sizeof(Facts) > end_ || at_ + facts->bytes() > end_) return nullptr;
    at_ += facts->bytes();
    return facts;
  }

 private:
  const char *at_, *end_;
};

// Whether `value` is what a state has under that name.
bool has(PyObject* state, PyObject* name, PyObject* value) {
  if (PyDict_Check(state)) return PyDict_GetItemWithError(state, name) == value;
  PyObject* found = PyObject_GetItem(state, name);
  Py_XDECREF(found);
  return found == value;
}

// Whether a parameter's state is that of `known` tensors, which are next among the described.
bool is_state(const Exchange& exchange, PyObject* state, PyObject* names, PyObject* known,
              Py_ssize_t first, Described& described) {
  const Py_ssize_t count = PyTuple_Size(names);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* tensor = PyList_GetItem(known, first + i);
    const Facts* facts = described.next();
    DLTensor x;
    if (facts == nullptr || tensor == nullptr || !has(state, PyTuple_GetItem(names, i), tensor) ||
        exchange.tell(tensor, &x) != 0 || !facts->are_of(x)) {
      return false;
    }
  }
  return true;
}

enum class Gradient { none, odd, fits };

// Takes in the gradient of a parameter: the object and where it lies.
Gradient take_gradient(const Exchange& exchange, PyObject* param, const Facts& like,
                       PyObject* grads, Py_ssize_t place, int64_t* address) {
  PyObject* grad = exchange.grad.of(param);
  if (grad == nullptr || grad == Py_None) {
    Py_XDECREF(grad);
    return Gradient::none;
  }
  DLTensor x;
  PyObject* negated = nullptr;
  if (exchange.tell(grad, &x) == 0) {
    *address = reinterpret_cast<int64_t>(x.data);
    if (like.fit(x)) negated = PyObject_CallFunctionObjArgs(exchange.is_neg, grad, nullptr);
  }
  PyErr_Clear();  // of what has no address, a sparse one for example
  Py_XDECREF(negated);
  // At last: is_neg lets other threads run, and what is let go here may run code.
  if (PyList_SetItem(grads, place, grad) != 0) return Gradient::none;
  return negated == Py_False ? Gradient::fits : Gradient::odd;
}

// Asks for a parameter and its state, `width` tensors that are next among the described.
void ask_for(PyObject* state, Py_ssize_t width, Described& described) {
  __builtin_prefetch(state);
  for (Py_ssize_t i = 0; i < width; ++i) {
    const Facts* facts = described.next();
    if (facts == nullptr) return;
    __builtin_prefetch(facts->object);
    for (int byte = -64; byte <= 128; byte += 64) __builtin_prefetch(facts->inside + byte);
  }
}

}  // namespace

PyObject* describe(PyObject*, PyObject* tensors) {
  const Exchange* exchange = find_exchange();
  if (exchange == nullptr) return nullptr;
  if (!PyList_Check(tensors)) return PyErr_Format(PyExc_TypeError, "describe: expected a list");
  std::vector<char> made;
  for (Py_ssize_t i = 0; i < PyList_Size(tensors); ++i) {
    DLTensor x;
    PyObject* tensor = PyList_GetItem(tensors, i);
    if (exchange->tell(tensor, &x) != 0) return nullptr;
    const auto* inside = reinterpret_cast<const char*>(x.shape);
    const Facts facts{x.data, tensor, inside, x.device, x.dtype, x.ndim};
    const auto append = [&](const void* data, size_t bytes) {
      const auto* chars = static_cast<const char*>(data);
      made.insert(made.end(), chars, chars + bytes);
    };
    append(&facts, sizeof(facts));
    append(x.shape, x.ndim * sizeof(int64_t));
    append(x.strides, x.ndim * sizeof(int64_t));
  }
  return PyBytes_FromStringAndSize(made.data(), static_cast<Py_ssize_t>(made.size()));
}

PyObject* look(PyObject*, PyObject* arguments) {
  const Exchange* exchange = find_exchange();
  PyObject *known, *facts, *states, *names, *grads;
  Py_buffer row;
  if (exchange == nullptr ||
      !PyArg_ParseTuple(arguments, "O!O!O!O!O!w*:look", &PyList_Type, &known, &PyBytes_Type, &facts,
                        &PyList_Type, &states, &PyTuple_Type, &names, &PyList_Type, &grads, &row)) {
    return nullptr;
  }
  const Py_ssize_t count = PyList_Size(states), width = 2 + PyTuple_Size(names);
  const Py_ssize_t gradients = PyList_Size(grads);  // none where there are only averages
  if (PyList_Size(known) != count * width || (gradients != 0 && gradients != count) ||
      row.len != static_cast<Py_ssize_t>(gradients * sizeof(int64_t))) {
    PyBuffer_Release(&row);
    return PyErr_Format(PyExc_ValueError, "look: lists must be of one length");
  }
  constexpr Py_ssize_t kAhead = 8;  // parameters
  Described described(facts), ahead(facts);
  PyObject* odd = PyList_New(0);
  bool same = odd != nullptr;
  for (Py_ssize_t i = -kAhead; i < count && same; ++i) {
    if (i + kAhead < count) {
      ask_for(PyList_GetItem(states, i + kAhead), width, ahead);
    }
    if (i < 0) continue;
    // Letting go of a gradient may run code, which may have made a list shorter.
    PyObject* param = PyList_GetItem(known, width * i);
    PyObject* state = PyList_GetItem(states, i);
    const Facts* of_param = described.next();
    const Facts* of_dense = described.next();
    DLTensor x;
    same = of_dense && param && state && exchange->tell(param, &x) == 0 && of_param->are_of(x) &&
           is_state(*exchange, state, names, known, width * i + 2, described);
    if (!same || gradients == 0) continue;
    const Gradient found =
        take_gradient(*exchange, param, *of_dense, grads, i, static_cast<int64_t*>(row.buf) + i);
    PyObject* place = found == Gradient::odd ? PyLong_FromSsize_t(i) : nullptr;
    same = found == Gradient::fits ||
           (found == Gradient::odd && place != nullptr && PyList_Append(odd, place) == 0);
    Py_XDECREF(place);
  }
  PyBuffer_Release(&row);
  PyErr_Clear();  // a new plan looks closer, and says what is wrong
  if (same) return odd;
  Py_XDECREF(odd);
  return Py_NewRef(Py_None);
}

PyObject* holds(PyObject*, PyObject* arguments) {
  PyObject *container, *expected;
  if (!PyArg_ParseTuple(arguments, "OO!:holds", &container, &PyList_Type, &expected)) {
    return nullptr;
  }
  const Py_ssize_t count = PyList_Size(expected);
  if (PyList_Check(container)) {
    bool same = PyList_Size(container) == count;
    for (Py_ssize_t i = 0; same && i < count; ++i) {
      same = PyList_GetItem(container, i) == PyList_GetItem(expected, i);
    }
    return PyBool_FromLong(same);
  }
  bool same = PyDict_Check(container) && PyDict_Size(container) == count;
  PyObject* value;
  for (Py_ssize_t at = 0, i = 0; same && PyDict_Next(container, &at, nullptr, &value); ++i) {
    same = value == PyList_GetItem(expected, i);
  }
  return PyBool_FromLong(same);
}

}  // namespace reg_kernels
