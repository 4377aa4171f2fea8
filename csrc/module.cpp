// reg_kernels._C: loading it registers the CPU kernels; what it holds is build facts and the hooks
// that tests and measurements need. Nothing here is called in a training step.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "reg_kernels/philox.h"

namespace py = pybind11;
using reg_kernels::Isa;

namespace {

constexpr std::pair<Isa, const char*> kIsaNames[] = {
    {Isa::baseline, "baseline"}, {Isa::avx2, "avx2"}, {Isa::avx512, "avx512"}};

std::string isa_name() {
  for (const auto& [isa, name] : kIsaNames) {
    if (isa == reg_kernels::current_isa()) return name;
  }
  throw std::logic_error("isa: unnamed instruction set");
}

void set_isa(const std::string& wanted) {
  for (const auto& [isa, name] : kIsaNames) {
    if (wanted == name) return reg_kernels::set_isa(isa);
  }
  throw std::invalid_argument("set_isa: expected baseline, avx2 or avx512, got " + wanted);
}

std::array<uint32_t, 4> philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  const auto words = reg_kernels::philox4x32(key, counter_low, counter_high);
  return {words.w[0], words.w[1], words.w[2], words.w[3]};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts and test hooks of reg_kernels' native code.";
  m.attr("compiler") = RK_COMPILER;
  m.attr("torch_version_built_with") = RK_TORCH_VERSION;
  m.def("isa", &isa_name, "The instruction set that the CPU kernels run.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Run the CPU kernels of `name`: baseline, avx2 or avx512, if this machine has it.");
  m.def("philox4x32", &philox, py::arg("key"), py::arg("counter_low"), py::arg("counter_high"),
        "One Philox4x32-10 block, as csrc/include/reg_kernels/philox.h draws it.");
}
