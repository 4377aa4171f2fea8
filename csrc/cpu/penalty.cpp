// Penalties, and the norm that clipping needs, on the CPU key: torch's thread pool over the loops
// of penalty.simd.cpp.
#include "penalty.h"

#include "../torch/tensor_table.h"
#include "share_out.h"

namespace reg_kernels {
namespace {

// One partial sum a chunk, added up so that neither threads nor the list's order change a bit.
void penalty_table(const Tensor& data, int64_t count, int64_t seal, int64_t dtype_number,
                   int64_t power, const Tensor& sums, int64_t slot, const Tensor& scratch) {
  const Call call("penalty", data);
  const SealedTable sealed = sealed_table(call, data, count, seal);
  const TensorTable& table = sealed.table;
  const DType dtype = dtype_from(dtype_number, sealed.dtype, call.op);
  const Penalty penalty = penalty_from(power, call.op);
  if (count) check_row(call, data, sealed, TableRow::grad);
  double* const partials = scratch_of(call, data, scratch, table_chunks(data, count)) + 1;
  double* const sum = slot_of(call, sums, slot, "sums");
  const auto leaf = RK_LEAF(penalty_sum);
  share_out(table, kChunk, [&] {
    return [&](int64_t i, int64_t begin, int64_t end) {
      const void* x = table.address(TableRow::grad, i);
      const int64_t first = table.at(TableRow::first_chunk, i);
      for (int64_t at = begin; at < end; at += kChunk) {
        partials[first + at / kChunk] = leaf(x, dtype, penalty, at, std::min(at + kChunk, end));
      }
    };
  });
  ExactSum total;
  for (int64_t i = 0; i < table.chunks(); ++i) total.add(partials[i]);
  *sum = total.value();
}

void penalty_backward_table(const Tensor& data, int64_t count, int64_t seal, int64_t dtype_number,
                            int64_t power, const Tensor& grad_output) {
  const Call call("penalty_backward", data);
  const SealedTable sealed = sealed_table(call, data, count, seal);
  const TensorTable& table = sealed.table;
  const DType dtype = dtype_from(dtype_number, sealed.dtype, call.op);
  const Penalty penalty = penalty_from(power, call.op);
  if (count) check_row(call, data, sealed, TableRow::grad);
  if (count) check_row(call, data, sealed, TableRow::param);
  const double grad = *slot_of(call, grad_output, 0, "grad_output");
  const auto leaf = RK_LEAF(penalty_gradient_range);
  share_out(table, kChunk, [&] {
    return [&](int64_t i, int64_t begin, int64_t end) {
      leaf(table.address(TableRow::grad, i), table.address(TableRow::param, i), dtype, penalty,
           grad, begin, end);
    };
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("penalty_table", TORCH_BOX(&penalty_table));
  m.impl("penalty_backward_table", TORCH_BOX(&penalty_backward_table));
}

}  // namespace reg_kernels
