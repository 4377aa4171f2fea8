// An optimizer step's arguments as both launchers, CPU and CUDA, read them: what
// ops/optimizer_step.py declares, checked for what memory safety rests on.
#pragma once

#include "reg_kernels/optimizer_step_math.h"
#include "tensor_table.h"

namespace reg_kernels {

// The groups' hyperparameters: kGroupNumbers doubles and one word of flags each. `rates` are the
// learning rates of those groups that have kRateOnDevice set, in their order.
constexpr int64_t kGroupNumbers = 8;
constexpr int64_t kMaximize = 4, kNesterov = 8, kRateOnDevice = 16;  // above the two bits of Decay

inline std::vector<OptimizerGroup> optimizer_groups(const std::vector<double>& numbers,
                                                    const std::vector<int64_t>& flags,
                                                    const std::vector<Tensor>& rates) {
  const auto groups = static_cast<int64_t>(flags.size());
  STD_TORCH_CHECK(static_cast<int64_t>(numbers.size()) == kGroupNumbers * groups,
                  "optimizer_step: expected ", kGroupNumbers, " numbers a group");
  std::vector<OptimizerGroup> result;
  size_t rate = 0;
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
    group.maximize = (flags[i] & kMaximize) != 0;
    group.nesterov = (flags[i] & kNesterov) != 0;
    if (flags[i] & kRateOnDevice) {
      STD_TORCH_CHECK(rate < rates.size() && rates[rate].scalar_type() == ScalarType::Float &&
                          rates[rate].numel() == 1,
                      "optimizer_step: a learning rate on a device must be one float32");
      group.lr_on_device = static_cast<const float*>(rates[rate++].const_data_ptr());
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
