// Subsets of samples on the CPU key: torch's thread pool over the loops of subset.simd.cpp.
#include "subset.h"

#include "../torch/subset.h"
#include "cache.h"

namespace reg_kernels {
namespace {

constexpr int64_t kGrain = 32768;  // elements a thread takes at the least
constexpr int64_t kUnit = 256;     // threads part the work at multiples of it

// The place of each sample among those that are kept, or -1.
std::vector<int64_t> places(const SubsetRows& rows, const char* op) {
  constexpr int64_t kUnknown = -2;
  std::vector<int64_t> result(rows.samples, kUnknown);
  for (int64_t i = 0; i < rows.samples; ++i) {
    const int64_t row = rows.at(i);
    RK_REQUIRE(row >= 0 && row < rows.samples && result[row] == kUnknown, op, "kept and dropped",
               "such that they have each sample once", row);
    result[row] = i < rows.count ? i : -1;
  }
  return result;
}

void run(const SubsetCall& a, const Tensor& input, const int64_t* sources, double scale,
         const char* op) {
  const int64_t numel = a.result.numel();
  if (numel == 0) return;
  const bool stream =
      numel * static_cast<int64_t>(a.result.element_size()) > last_level_cache_bytes();
  const SubsetTask task{a.x, a.residual, a.y, dtype_of(input, op), a.numel, sources, scale, stream};
  const auto leaf = RK_LEAF(subset_range);
  torch::stable::parallel_for(
      0, ceil_div(numel, kUnit), kGrain / kUnit,
      [&](int64_t begin, int64_t end) { leaf(task, begin * kUnit, std::min(end * kUnit, numel)); });
}

Tensor subset(const Tensor& input, const Tensor& kept, const Tensor& dropped, double scale) {
  const Call call("subset", input);
  dtype_of(input, call.op);
  SubsetCall a = SubsetCall::gathering(call, input, kept, dropped);
  places(a.rows, call.op);  // which checks them
  run(a, input, a.rows.kept, scale, call.op);
  return a.result;
}

Tensor subset_add(const Tensor& input, const OptionalTensor& residual, const Tensor& kept,
                  const Tensor& dropped, double scale) {
  const Call call("subset_add", input);
  dtype_of(input, call.op);
  SubsetCall a = SubsetCall::adding(call, input, residual, kept, dropped);
  const std::vector<int64_t> sources = places(a.rows, call.op);
  run(a, input, sources.data(), scale, call.op);
  return a.result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(reg_kernels, CPU, m) {
  m.impl("subset", TORCH_BOX(&subset));
  m.impl("subset_add", TORCH_BOX(&subset_add));
}

}  // namespace reg_kernels
