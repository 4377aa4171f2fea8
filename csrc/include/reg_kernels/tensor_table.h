// A list of tensors as the kernels that take whole lists read it: one int64 buffer, made by
// reg_kernels/_tensor_table.py and kept for as long as the list stays the same.
//
//   kRows rows of one number a tensor, in the order of TableRow; then the tensor that each chunk of
//   kChunk elements belongs to, for a GPU's blocks.
//
// Addresses are those of dense tensors of one layout, element 0 in storage order; 0 where a tensor
// has none. All tensors of a row have one dtype.
#pragma once

#include <cstdint>

#include "portable.h"

RK_NAMESPACE_BEGIN

// As reg_kernels/_tensor_table.py counts them. The gradient comes first: it is what changes.
enum class TableRow {
  grad,  // or, for an op that reads one list alone, that list
  param,
  first_moment,  // exp_avg, momentum_buffer
  second_moment,
  max_second_moment,
  ema,
  compensation,
  step,            // one float32 each
  numel,           // a number from here on, no address
  element_offset,  // of element 0 among all draws
  run,             // elements that lie side by side among the draws, or 0: all; see DrawPlaces
  run_stride,      // from where one run begins to where the next one does
  group,           // which hyperparameters
  first_chunk,     // chunks of the tensors before
  first_work,      // work units of the tensors before: see work_units
};

constexpr int kRows = 15;
constexpr int64_t kChunk = 8192;  // elements: what a block takes, and what one partial sum is of

struct TensorTable {
  const int64_t* data;
  int64_t count;  // tensors

  RK_HD int64_t at(TableRow row, int64_t tensor) const {
    return data[static_cast<int>(row) * count + tensor];
  }

  template <typename T>
  RK_HD T* address(TableRow row, int64_t tensor) const {
    return reinterpret_cast<T*>(at(row, tensor));
  }

  // Of an element type that is known at run time.
  RK_HD void* address(TableRow row, int64_t tensor) const { return address<void>(row, tensor); }

  RK_HD int64_t chunks() const {
    if (count == 0) return 0;
    const int64_t last = count - 1;
    return at(TableRow::first_chunk, last) + chunks_of(at(TableRow::numel, last));
  }

  static RK_HD int64_t chunks_of(int64_t numel) { return ceil_div(numel, kChunk); }

  RK_HD int64_t tensor_of_chunk(int64_t chunk) const { return data[kRows * count + chunk]; }
};

RK_NAMESPACE_END
