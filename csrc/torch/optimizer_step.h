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

inline std::vector<OptimizerGroup> optimizer_groups(const Call& call,
                                                    const std::vector<double>& numbers,
                                                    const std::vector<int64_t>& flags,
                                                    const std::vector<Tensor>& rates) {
  const auto groups = static_cast<int64_t>(flags.size());
  RK_REQUIRE(static_cast<int64_t>(numbers.size()) % kGroupNumbers == 0 &&
                 static_cast<int64_t>(numbers.size()) / kGroupNumbers == groups,
             call.op, "numbers", words(kGroupNumbers, " for each of ", groups, " groups"),
             numbers.size());
  std::vector<OptimizerGroup> result;
  size_t rate = 0;
  for (int64_t i = 0; i < groups; ++i) {
    const double* n = numbers.data() + kGroupNumbers * i;
    RK_REQUIRE(flags[i] >= 0 && flags[i] < 2 * kRateOnDevice && (flags[i] & 3) != 3, call.op,
               "flags", "a decay, 0 to 2, and bits up to 16", flags[i]);
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
      RK_REQUIRE(rate < rates.size(), call.op, "rates", "one for each group that has it there",
                 rates.size());
      group.lr_on_device = call.number<float>(rates[rate++], ScalarType::Float, "rates");
    }
    result.push_back(group);
  }
  return result;
}

// The parts of the gradients' norm's square, or null.
inline const double* squares_data(const Call& call, const OptionalTensor& squares) {
  if (!squares) return nullptr;
  return static_cast<const double*>(
      call.vector(*squares, ScalarType::Double, squares->numel(), "squares"));
}

// What all tensors of a step have in common.
struct OptimizerKind {
  Algorithm algorithm;
  Rounding rounding;
  DType dtype, moments;
};

// Of a step of `groups` groups; `draws`: whether there is an rng_state.
inline OptimizerKind optimizer_kind(const Call& call, const Tensor& data, const SealedTable& table,
                                    int64_t groups, int64_t algorithm, int64_t rounding,
                                    const std::vector<int64_t>& dtypes, bool draws) {
  const char* op = call.op;
  RK_REQUIRE(algorithm >= 0 && algorithm <= 2, op, "algorithm", "0, 1 or 2", algorithm);
  RK_REQUIRE(rounding >= 0 && rounding <= 2, op, "rounding", "0, 1 or 2", rounding);
  RK_REQUIRE(dtypes.size() == 2, op, "dtypes", "the parameters' and the moments'", dtypes.size());
  RK_REQUIRE(groups >= table.groups, op, "groups", words("the table's ", table.groups), groups);
  OptimizerKind kind{static_cast<Algorithm>(algorithm), static_cast<Rounding>(rounding),
                     dtype_from(dtypes[0], table.dtype, op),
                     dtype_from(dtypes[1], table.moments, op)};
  const bool own = kind.moments == kind.dtype;
  const bool wider = kind.moments == DType::float32 && kind.dtype != DType::float64;
  const bool narrower = kind.moments == DType::bfloat16 && kind.dtype == DType::float32;
  RK_REQUIRE(own || wider || narrower, op, "dtypes",
             "moments like the parameters, float32 for 16 bits, or bfloat16 for float32",
             words(dtypes[0], " and ", dtypes[1]));
  const bool rounds = kind.dtype == DType::float16 || kind.dtype == DType::bfloat16;
  RK_REQUIRE(kind.rounding != Rounding::stochastic || !rounds || draws, op, "rng_state",
             "given for stochastic rounding", "None");
  if (table.table.count == 0) return kind;
  check_row(call, data, table, TableRow::param);
  if (kind.algorithm == Algorithm::average) {
    check_row(call, data, table, TableRow::ema);
    return kind;
  }
  check_row(call, data, table, TableRow::grad);
  if (kind.algorithm == Algorithm::adam) {
    check_row(call, data, table, TableRow::first_moment);
    check_row(call, data, table, TableRow::second_moment);
  }
  return kind;
}

}  // namespace reg_kernels
