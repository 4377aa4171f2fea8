// A tensor table in host memory, laid out as reg_kernels/_tensor_table.py does, for the programs
// that run kernels over whole lists.
#pragma once

#include <memory>
#include <vector>

#include "driver.h"
#include "reg_kernels/tensor_table.h"

namespace driver {

using reg_kernels::kChunk;
using reg_kernels::kRows;
using reg_kernels::TableRow;
using reg_kernels::TensorTable;

class Table {
 public:
  explicit Table(const std::vector<int64_t>& sizes)
      : count_(static_cast<int64_t>(sizes.size())), data_(kRows * sizes.size()) {
    for (int64_t i = 0; i < count_; ++i) {
      set(TableRow::numel, i, sizes[i]);
      set(TableRow::first_chunk, i, chunks());
      for (int64_t rest = sizes[i]; rest > 0; rest -= kChunk) data_.push_back(i);
    }
    // To the byte, so that ASan sees a block that reads of a chunk too many.
    exact_ = std::make_unique<int64_t[]>(data_.size());
    scratch = std::make_unique<double[]>(1 + chunks());
  }

  void set(TableRow row, int64_t tensor, int64_t value) {
    data_[static_cast<int>(row) * count_ + tensor] = value;
  }

  template <typename T>
  void set(TableRow row, int64_t tensor, T* address) {
    set(row, tensor, static_cast<int64_t>(reinterpret_cast<uintptr_t>(address)));
  }

  int64_t chunks() const { return static_cast<int64_t>(data_.size()) - kRows * count_; }

  TensorTable view() {
    std::copy(data_.begin(), data_.end(), exact_.get());
    return {exact_.get(), count_};
  }

  // Whether the counter of blocks is back at zero.
  bool ticket_is_zero() const {
    uint64_t bits;
    std::memcpy(&bits, scratch.get(), sizeof(bits));
    return bits == 0;
  }

  std::unique_ptr<double[]> scratch;  // [1 + chunks]

 private:
  int64_t count_;
  std::vector<int64_t> data_;
  std::unique_ptr<int64_t[]> exact_;
};

}  // namespace driver
