// A tensor table's arguments as both launchers, CPU and CUDA, read them, checked for what memory
// safety rests on.
#pragma once

#include "checks.h"
#include "reg_kernels/penalty_math.h"
#include "reg_kernels/tensor_table.h"

namespace reg_kernels {

// What tells a table that reg_kernels/_tensor_table.py has built, in this process, from any other
// int64 tensor: the addresses in it cannot be checked, those of a table on a device not even read.
inline int64_t table_seal(uint64_t address, uint64_t numbers, uint64_t count) {
  uint64_t seal = 0x9e3779b97f4a7c15;
  for (const uint64_t word : {address, numbers, count}) {
    seal = (seal ^ word) * 0xbf58476d1ce4e5b9;
    seal ^= seal >> 29;
  }
  return static_cast<int64_t>(seal >> 1);
}

inline TensorTable tensor_table(const Call& call, const Tensor& data, int64_t count, int64_t seal) {
  const int64_t numbers = data.numel();
  RK_REQUIRE(data.scalar_type() == ScalarType::Long && data.is_contiguous() && data.dim() == 1 &&
                 count >= 0 && count <= numbers / kRows,
             call.op, "table", words("int64 of ", kRows, " rows of ", count), data);
  const auto* rows = static_cast<const int64_t*>(call.data(data, "table"));
  RK_REQUIRE(seal == table_seal(reinterpret_cast<uintptr_t>(rows), static_cast<uint64_t>(numbers),
                                static_cast<uint64_t>(count)),
             call.op, "table", "a TensorTable of this process, with its seal", seal);
  return {rows, count};
}

// That a table on the CPU has an address in a row for each tensor that has elements.
inline void check_row(const TensorTable& table, TableRow row, const char* op) {
  for (int64_t i = 0; i < table.count; ++i) {
    RK_REQUIRE(table.at(row, i) != 0 || table.at(TableRow::numel, i) == 0, op, "the table",
               "of tensors whose memory was not freed", words("an address of 0 for tensor ", i));
  }
}

// The chunks of its tensors: what its length leaves behind the rows.
inline int64_t table_chunks(const Tensor& data, int64_t count) {
  return data.numel() - kRows * count;
}

inline DType dtype_from(int64_t number, const char* op) {
  RK_REQUIRE(number >= 0 && number <= static_cast<int64_t>(DType::bfloat16), op, "dtype",
             "in [0, 3]", number);
  return static_cast<DType>(number);
}

inline Penalty penalty_from(int64_t power, const char* op) {
  RK_REQUIRE(power == 1 || power == 2, op, "power", "1 or 2", power);
  return static_cast<Penalty>(power);
}

// The counter of blocks and room for `chunks` partial sums behind it, apart from the table.
inline double* scratch_of(const Call& call, const Tensor& data, const Tensor& scratch,
                          int64_t chunks) {
  RK_REQUIRE(scratch.scalar_type() == ScalarType::Double && scratch.is_contiguous() &&
                 scratch.numel() - 1 >= chunks,
             call.op, "scratch", words("contiguous float64 for ", chunks, " chunks and a counter"),
             scratch);
  auto* numbers = static_cast<double*>(call.written(scratch, "scratch"));
  check_apart(call.op, scratch, data, "table");
  return numbers;
}

// Where one of several float64 numbers lies.
inline double* slot_of(const Call& call, const Tensor& numbers, int64_t slot, const char* name) {
  RK_REQUIRE(numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous() && slot >= 0 &&
                 slot < numbers.numel(),
             call.op, name, words("contiguous float64 with room for number ", slot), numbers);
  return static_cast<double*>(call.written(numbers, name)) + slot;
}

}  // namespace reg_kernels
