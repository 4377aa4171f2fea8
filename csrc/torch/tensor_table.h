// A tensor table's arguments as both launchers, CPU and CUDA, read them, checked for what memory
// safety rests on.
#pragma once

#include "checks.h"
#include "reg_kernels/penalty_math.h"
#include "reg_kernels/tensor_table.h"

namespace reg_kernels {

// A table that reg_kernels/_tensor_table.py has built in this process comes with a seal, which
// tells it from any other int64 tensor, and says what of it a launcher cannot read, or not on a
// device: from the lowest bit on the dtypes of the parameters and of the moments, 2 bits each, the
// number of groups, 6 bits, and the rows that it was given, 15 bits.
constexpr int kSealBits = 25;

inline int64_t table_seal(uint64_t address, uint64_t numbers, uint64_t count, uint64_t kind) {
  const uint64_t mixed = address * 0x9e3779b97f4a7c15 + numbers * 0xbf58476d1ce4e5b9 +
                         count * 0x94d049bb133111eb + kind * 0xd6e8feb86659fd93;
  return static_cast<int64_t>(mixed >> (kSealBits + 1) << kSealBits | kind);
}

struct SealedTable {
  TensorTable table;
  int64_t dtype, moments, groups, rows;

  bool has(TableRow row) const { return (rows >> static_cast<int>(row) & 1) != 0; }
};

inline SealedTable sealed_table(const Call& call, const Tensor& data, int64_t count, int64_t seal) {
  const int64_t numbers = data.numel();
  RK_REQUIRE(data.scalar_type() == ScalarType::Long && data.is_contiguous() && data.dim() == 1 &&
                 count >= 0 && count <= numbers / kRows,
             call.op, "table", words("int64 of ", kRows, " rows of ", count), data);
  const auto* rows = static_cast<const int64_t*>(call.data(data, "table"));
  const int64_t kind = seal & ((1 << kSealBits) - 1);
  RK_REQUIRE(seal == table_seal(reinterpret_cast<uintptr_t>(rows), static_cast<uint64_t>(numbers),
                                static_cast<uint64_t>(count), static_cast<uint64_t>(kind)),
             call.op, "table", "a TensorTable of this process, with its seal", seal);
  return {{rows, count}, kind & 3, kind >> 2 & 3, kind >> 4 & 63, kind >> 10};
}

// That a table has a row and, on the CPU, an address in it for each tensor that has elements.
inline void check_row(const Call& call, const Tensor& data, const SealedTable& of, TableRow row) {
  RK_REQUIRE(of.has(row), call.op, "table", words("one with row ", static_cast<int>(row)),
             "one without");
  const TensorTable& table = of.table;
  for (int64_t i = 0; data.is_cpu() && i < table.count; ++i) {
    RK_REQUIRE(table.at(row, i) != 0 || table.at(TableRow::numel, i) == 0, call.op, "table",
               "of tensors whose memory was not freed", words("an address of 0 for tensor ", i));
  }
}

// The chunks of its tensors: what its length leaves behind the rows.
inline int64_t table_chunks(const Tensor& data, int64_t count) {
  return data.numel() - kRows * count;
}

inline DType dtype_from(int64_t number, int64_t of_table, const char* op) {
  RK_REQUIRE(number == of_table, op, "dtype", words("the table's, ", of_table), number);
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
