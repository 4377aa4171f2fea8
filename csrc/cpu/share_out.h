// A list of tensors shared out to torch's threads by the work that is in it, not by its length.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../torch/checks.h"
#include "reg_kernels/tensor_table.h"

namespace reg_kernels {

// Calls make()(tensor, begin, end) for every tensor, whole or in parts that start at multiples of
// `unit` elements, itself a multiple of 64; from several threads where there is enough to do, each
// with what it made.
template <typename Make>
void share_out(const TensorTable& table, int64_t unit, Make&& make) {
  // What a thread takes at the least: below it, waking another costs more than it saves.
  constexpr int64_t kGrain = 32768;
  if (table.count == 0) return;
  // As work_units in reg_kernels/_tensor_table.py.
  const auto work = [&](int64_t tensor) {
    return (table.at(TableRow::numel, tensor) + 63) / 64 * 64 + 64;
  };
  const int64_t* first = table.data + static_cast<int>(TableRow::first_work) * table.count;
  const int64_t total = first[table.count - 1] + work(table.count - 1);
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    // Where a position in the whole list falls in a tensor: the same for the thread that ends there
    // and the one that begins.
    const auto within = [&](int64_t position, int64_t tensor, int64_t numel) {
      const int64_t element = position - first[tensor];
      return std::clamp<int64_t>(ceil_div(element, unit) * unit, 0, numel);
    };
    auto f = make();
    int64_t tensor = std::upper_bound(first, first + table.count, begin) - first - 1;
    for (; tensor < table.count && first[tensor] < end; ++tensor) {
      const int64_t numel = table.at(TableRow::numel, tensor);
      const int64_t from = first[tensor] >= begin ? 0 : within(begin, tensor, numel);
      const int64_t to = first[tensor] + work(tensor) <= end ? numel : within(end, tensor, numel);
      if (from < to) f(tensor, from, to);
    }
  });
}

}  // namespace reg_kernels
