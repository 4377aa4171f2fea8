// An optimizer step's arguments as both launchers, CPU and CUDA, read them: what
// ops/optimizer_step.py declares, checked for what memory safety rests on.
#pragma once

#include "reg_kernels/optimizer_step_math.h"
#include "tensor_table.h"

namespace reg_kernels {

// The groups' hyperparameters: kGroupNumbers doubles and one word of flags each, and where rates
// are on a device a tensor each.
constexpr int64_t kGroupNumbers = 8;

inline std::vector<OptimizerGroup> optimizer_groups(const std::vector<double>& numbers,
                                                    const std::vector<int64_t>& flags,
                                                    const std::vector<Tensor>& rates) {
  const auto groups = static_cast<int64_t>(flags.size());
  STD_TORCH_CHECK(static_cast<int64_t>(numbers.size()) == kGroupNumbers * groups &&
                      (rates.empty() || static_cast<int64_t>(rates.size()) == groups),
                  "optimizer_step: expected ", kGroupNumbers, " numbers a group");
  std::vector<OptimizerGroup> result;
  for (int64_t i = 0; i < groups; ++i) {
    const double* n = numbers.data() + kGroupNumbers * i;
    OptimizerGroup group{};
    group.lr = n[0];
    group.decay_lr = n[1];
    group.weight_decay = n[2];
    group.l1 = n[3];
    group.beta1 = n[4];
    group.beta2 = n[5];
    group.eps = n[6];
    group.ema_decay = n[7];
    group.decay = static_cast<Decay>(flags[i] & 3);
    group.maximize = (flags[i] & 4) != 0;
    group.nesterov = (flags[i] & 8) != 0;
    if (!rates.empty()) {
      STD_TORCH_CHECK(rates[i].scalar_type() == ScalarType::Float && rates[i].numel() == 1,
                      "optimizer_step: a learning rate on a device must be one float32");
      group.lr_on_device = static_cast<const float*>(rates[i].const_data_ptr());
    }
    result.push_back(group);
  }
  return result;
}

// One number that a tensor holds, or null.
template <typename T>
const T* scalar_of(const std::optional<Tensor>& tensor, ScalarType type, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->numel() == 1, "optimizer_step: ", name,
                  " must be a tensor of one element");
  return static_cast<const T*>(tensor->const_data_ptr());
}

}  // namespace reg_kernels
