// What the launchers share of LibTorch's stable ABI, and what an op's arguments have to be before a
// kernel touches them: dtypes, sizes, layouts, devices, numbers in range, memory that is there. The
// public functions have validated their callers' arguments, but an op is also reached by saved
// programs, by hooks and by compiled code. CPU and CUDA check by the functions of this folder;
// reg_kernels/ops/_checks.py is their twin for the implementations in Python.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "huge_pages.h"
#include "reg_kernels/dropout_math.h"
#include "reg_kernels/dtypes.h"

namespace reg_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What is said of a call that is refused: one line, op, argument, what it must be, what it is.

template <typename... Parts>
std::string words(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return "float64";
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string described(const Tensor& x) {
  const auto list = [](const auto& numbers) {
    std::string text = "(";
    for (const int64_t number : numbers) text += words(text.size() > 1 ? ", " : "", number);
    return text + ")";
  };
  return words(dtype_name(x.scalar_type()), " of shape ", list(x.sizes()), " and strides ",
               list(x.strides()));
}

inline std::string described(const OptionalTensor& x) { return x ? described(*x) : "None"; }

template <typename T>
std::string described(const T& value) {
  return words(value);
}

[[noreturn]] inline void refuse(const char* op, const std::string& name, const std::string& must,
                                const std::string& got) {
  throw std::runtime_error(words(op, ": ", name, " must be ", must, ", got ", got));
}

// The words are put together only where they are said.
#define RK_REQUIRE(condition, op, name, must, got)                          \
  do {                                                                      \
    if (!(condition)) [[unlikely]] {                                        \
      ::reg_kernels::refuse(op, name, must, ::reg_kernels::described(got)); \
    }                                                                       \
  } while (false)

// A product of sizes, which need not fit where one of the other sizes is 0.
inline int64_t checked_product(int64_t a, int64_t b, const char* op) {
  int64_t product = 0;
  RK_REQUIRE(!__builtin_mul_overflow(a, b, &product), op, "the sizes",
             "such that their product is an int64", words(a, " times ", b));
  return product;
}

inline DType dtype_of(const Tensor& tensor, const char* op, const char* name = "input") {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::float64;
    case ScalarType::Float: return DType::float32;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: refuse(op, name, "one of float64, float32, float16, bfloat16", described(tensor));
  }
}

// Calls f with a value of x's element type.
template <typename F>
void for_dtype(const Tensor& x, const char* op, F&& f) {
  for_dtype(dtype_of(x, op), f);
}

// The type that elements of another are computed in.
inline ScalarType compute_type_of(DType dtype) {
  return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

// Whether all elements lie in the storage: one that was freed, as FSDP frees them, leaves a
// tensor's sizes as they were.
inline bool has_memory(const Tensor& x) {
  if (x.numel() == 0) return true;
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  int64_t last = x.storage_offset();
  for (size_t d = 0; d < sizes.size(); ++d) {
    int64_t span = 0;
    if (__builtin_mul_overflow(sizes[d] - 1, strides[d], &span)) return false;
    if (__builtin_add_overflow(last, span, &last)) return false;
  }
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  return last < bytes / static_cast<int64_t>(x.element_size());
}

// An op's call: its name, and the device that its tensors have to be on.
class Call {
 public:
  const char* op;

  Call(const char* op_, const Tensor& x)
      : op(op_), device_type_(type_of(x)), device_index_(x.get_device_index()) {}

  bool is_here(const Tensor& x) const {
    return type_of(x) == device_type_ && x.get_device_index() == device_index_;
  }

  // Where element 0 of a tensor lies that a kernel may read by its sizes and strides.
  const void* data(const Tensor& x, const char* name) const {
    check_memory(x, name);
    return aligned(x.const_data_ptr(), x, name);
  }

  // Likewise of one that it writes, whose elements the caller has found to lie apart.
  void* written(const Tensor& x, const char* name) const {
    check_memory(x, name);
    return const_cast<void*>(aligned(x.mutable_data_ptr(), x, name));
  }

  // One number of a type, or null where there is no tensor.
  template <typename T>
  const T* number(const OptionalTensor& x, ScalarType type, const char* name) const {
    if (!x) return nullptr;
    RK_REQUIRE(x->scalar_type() == type && x->numel() == 1, op, name,
               words("a tensor of one element, of ", dtype_name(type)), *x);
    return static_cast<const T*>(data(*x, name));
  }

  // `count` numbers of a type that lie side by side.
  const void* vector(const Tensor& x, ScalarType type, int64_t count, const char* name) const {
    check_vector(x, type, count, name);
    return data(x, name);
  }
  void* written_vector(const Tensor& x, ScalarType type, int64_t count, const char* name) const {
    check_vector(x, type, count, name);
    return written(x, name);
  }

 private:
  static int32_t type_of(const Tensor& x) {
    int32_t type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
    return type;
  }

  void check_vector(const Tensor& x, ScalarType type, int64_t count, const char* name) const {
    RK_REQUIRE(x.scalar_type() == type && x.is_contiguous() && x.numel() == count, op, name,
               words("contiguous ", dtype_name(type), " of ", count, " elements"), x);
  }

  void check_memory(const Tensor& x, const char* name) const {
    RK_REQUIRE(is_here(x), op, name, "on the tensors' device", "one on another device");
    RK_REQUIRE(has_memory(x), op, name, "a tensor whose memory was not freed", x);
  }

  const void* aligned(const void* at, const Tensor& x, const char* name) const {
    const auto address = reinterpret_cast<uintptr_t>(at);
    RK_REQUIRE(address % x.element_size() == 0, op, name,
               "at a multiple of its elements' size (a clone is)", words("address ", address));
    return at;
  }

  int32_t device_type_, device_index_;
};

// Whether two tensors have a byte in common; both are dense.
inline bool overlap(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr());
  };
  const auto end = [&](const Tensor& x) { return begin(x) + x.numel() * x.element_size(); };
  return begin(a) < end(b) && begin(b) < end(a);
}

// That what an op writes is none of what it reads by: its kernels trust that to stay.
inline void check_apart(const char* op, const Tensor& written, const OptionalTensor& other,
                        const char* name) {
  RK_REQUIRE(!other || !overlap(written, *other), op, name, "apart in memory from what is written",
             "a part of it");
}

// Whether the elements fill one stretch of memory, each place once, in whatever order of
// dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  std::vector<int64_t> order;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (sizes[d] > 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const int64_t d : order) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// `input` itself where it is dense, otherwise a contiguous copy: storage order is then defined.
inline Tensor dense(const Call& call, const Tensor& input) {
  if (is_dense(input)) return input;
  call.data(input, "input");  // what is copied has to be there
  return torch::stable::contiguous(input);
}

// The number that torch's C interface knows a dtype by.
inline int32_t dtype_number(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}
inline int32_t dtype_number(const Tensor& x) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// An uninitialised tensor on x's device, `dtype` by its number: all that an op allocates is one of
// these. Straight from the allocator: the stable ABI's empty_like looks its operator up by name at
// each call, which a small one would feel.
template <typename Sizes, typename Strides>
Tensor empty_strided(const Tensor& x, const Sizes& sizes, const Strides& strides, int32_t dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type,
                                                  x.get_device_index(), &handle));
  Tensor result(handle);
  const auto bytes = static_cast<size_t>(result.numel()) * result.element_size();
  if (bytes >= kLeastHinted && device_type == aoti_torch_device_type_cpu()) {
    hint_huge_pages(result.const_data_ptr(), bytes);
  }
  return result;
}

// One of x's shape, strides and dtype.
inline Tensor empty_like_dense(const Tensor& x) {
  return empty_strided(x, x.sizes(), x.strides(), dtype_number(x));
}

// One of shape [count].
inline Tensor empty_vector(const Tensor& x, int64_t count, int32_t dtype) {
  return empty_strided(x, std::array{count}, std::array{int64_t{1}}, dtype);
}

// One of shape [rows, columns], of float64.
inline Tensor empty_matrix(const Tensor& x, int64_t rows, int64_t columns) {
  return empty_strided(x, std::array{rows, columns}, std::array{columns, int64_t{1}},
                       aoti_torch_dtype_float64());
}

// The strides of a dense tensor of these sizes, or with dimension 1 innermost.
inline std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, bool channels_last,
                                          const char* op) {
  std::vector<int64_t> strides(sizes.size());
  int64_t expected = 1;
  const auto place = [&](size_t d) {
    strides[d] = expected;
    expected = checked_product(expected, std::max<int64_t>(sizes[d], 1), op);
  };
  if (channels_last) place(1);
  for (size_t d = sizes.size(); d-- > 0;) {
    if (!channels_last || d != 1) place(d);
  }
  return strides;
}

inline void check_dense(const Tensor& tensor, const char* op, const char* name) {
  RK_REQUIRE(is_dense(tensor), op, name, "dense, since it is written into", tensor);
}

inline void check_number(double value, const Number& number, const char* op) {
  RK_REQUIRE(value >= number.least && value <= number.most, op, number.name,
             words("in [", number.least, ", ", number.most, "]"), value);
}

// The offset that shards a mask: added to an index, it has to stay an int64.
inline void check_element_offset(int64_t element_offset, const char* op) {
  RK_REQUIRE(element_offset >= 0 && element_offset < int64_t{1} << 62, op, "element_offset",
             "in [0, 2^62)", element_offset);
}

// The data of an rng_state, on the CPU or on the call's device.
inline const int64_t* rng_state_data(const Call& call, const Tensor& rng_state) {
  RK_REQUIRE(rng_state.is_cpu() || call.is_here(rng_state), call.op, "rng_state",
             "on the CPU or on the tensors' device", "one on another device");
  const Call there(call.op, rng_state);
  return static_cast<const int64_t*>(there.vector(rng_state, ScalarType::Long, 2, "rng_state"));
}

// The data of a probability that a compiled program passes as a tensor, likewise.
inline const double* traced_p_data(const Call& call, const Tensor& traced_p) {
  RK_REQUIRE(traced_p.is_cpu() || call.is_here(traced_p), call.op, "traced_p",
             "on the CPU or on the tensors' device", "one on another device");
  return Call(call.op, traced_p).number<double>(traced_p, ScalarType::Double, "traced_p");
}

// Puts one share for all samples, or one for each, into the options of a blend or of a pair of
// labels.
template <typename Options>
void set_shares(const Call& call, const Tensor& lam, int64_t samples, Options& options) {
  RK_REQUIRE(lam.is_contiguous() && (lam.numel() == 1 || lam.numel() == samples), call.op, "lam",
             words("contiguous, of 1 element or of ", samples), lam);
  const DType dtype = dtype_of(lam, call.op, "lam");
  options.lam = {const_cast<void*>(call.data(lam, "lam")), dtype};
  options.one_lam_for_all = lam.numel() == 1;
}

}  // namespace reg_kernels
