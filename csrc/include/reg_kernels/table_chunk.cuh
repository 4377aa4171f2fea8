// What a block does of a tensor table: one chunk of kChunk elements, or fewer at a tensor's end.
#pragma once

#include "tensor_table.h"
#include "vec.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

struct TableChunk {
  const TensorTable& table;
  int64_t tensor;
  int64_t first;  // of the chunk's elements, in its tensor
  int count;

  __device__ TableChunk(const TensorTable& table, int64_t chunk)
      : table(table), tensor(table.tensor_of_chunk(chunk)) {
    first = (chunk - table.at(TableRow::first_chunk, tensor)) * kChunk;
    const int64_t rest = table.at(TableRow::numel, tensor) - first;
    count = static_cast<int>(rest < kChunk ? rest : kChunk);
  }

  // Of the chunk's first element; null where the tensor has no such array.
  template <typename T>
  __device__ T* address(TableRow row) const {
    T* const data = table.address<T>(row, tensor);
    return data ? data + first : nullptr;
  }

  template <typename T>
  __device__ Span<T> span(TableRow row) const {
    return {address<T>(row), 0, count};
  }
};

}  // namespace cuda
RK_NAMESPACE_END
