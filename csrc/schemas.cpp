// libreg_kernels.so: what a program without Python loads. It declares the ops, which in a process
// with Python reg_kernels/ops/ declares, and brings the CPU kernels along; the CUDA kernels are in
// libreg_kernels_cuda.so.
#include <torch/csrc/stable/library.h>

#include <exception>

namespace {

// Written by tests/test_schemas.py from what Python declares.
constexpr const char* kSchemas[] = {
#include "schemas.inc"
};

}  // namespace

// A fragment, since another copy of this library may be there.
STABLE_TORCH_LIBRARY_FRAGMENT(reg_kernels, m) {
  for (const char* schema : kSchemas) {
    try {
      m.def(schema);
    } catch (const std::exception&) {
      // Python, or another copy, has declared it. Of one that torch takes for none, whoever calls
      // it is told that there is no such op.
    }
  }
}
