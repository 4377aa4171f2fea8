// Calls the leaf of csrc/cpu/optimizer_step.simd.cpp.
#include "cpu/optimizer_step.h"

#include "isas.h"

namespace isas {

// `values` without those that are next to nothing beside the others: a product that lies in the
// middle of two floats, and a tiny addend, are what multiply_add rounds in another way where there
// is no instruction for it.
template <typename T>
Buffer<T> coarse(Buffer<T> values) {
  for (int64_t i = 0; i < values.size(); ++i) {
    T& value = values.data()[i];
    if (load(value) * load(value) < 0x1p-40f) value = T{};
  }
  return values;
}

// What the leaf may be handed, of parameters of type T and moments of type M.
template <typename T, typename M>
void call(OptimizerTask task, bool amsgrad, bool average, const char* of_moments) {
  constexpr int64_t kCount = 1101;
  auto param = coarse(numbers<T>(kCount));
  const auto grad = coarse(any_values<T>(kCount));
  auto first = coarse(numbers<M>(kCount, 0.5)), second = numbers<M>(kCount, 0.5);
  auto most = numbers<M>(kCount, 0.5);
  auto ema = numbers<compute_t<T>>(kCount);
  auto compensation = numbers<T>(kCount, 0.01);
  for (int64_t i = 0; i < kCount; ++i) {  // squares
    const auto positive = [](M& v) { v = store<M>(load(v) < 0 ? -load(v) : load(v)); };
    positive(second.data()[i]);
    positive(most.data()[i]);
  }
  task.dtype = kDType<T>;
  task.moments_dtype = kDType<M>;
  task.param = param.data();
  task.grad = grad.data();
  const bool momentum = task.algorithm == Algorithm::adam || task.constants.momentum != 0;
  if (momentum) task.first_moment = first.data();
  if (task.algorithm == Algorithm::adam) task.second_moment = second.data();
  if (amsgrad) task.max_second_moment = most.data();
  if (average) task.ema = ema.data();
  if (task.rounding == Rounding::kahan) task.compensation = compensation.data();
  task.places = {77, 0, 0};
  task.seed = 0x9e3779b97f4a7c15ull;
  task.offset = 0x0000000500000007ull;
  share_out(0, kCount, 64,
            [&](int64_t begin, int64_t end) { RK_LEAF(optimizer_step_range)(task, begin, end); });
  Digest digest;
  digest.add(param);
  digest.add(first);
  digest.add(second);
  digest.add(most);
  digest.add(ema);
  digest.add(compensation);
  digest.report("optimizer_step_range, %s, moments %s, algorithm %d, rounding %d%s%s%s%s%s",
                kName<T>, of_moments, static_cast<int>(task.algorithm),
                static_cast<int>(task.rounding), task.coupled ? ", l2" : "",
                momentum ? "" : ", no momentum", amsgrad ? ", amsgrad" : "",
                average ? ", average" : "", task.constants.threshold > 0 ? ", l1" : "");
}

void call_leaves() {
  OptimizerTask task{};
  OptimizerConstants& k = task.constants;
  k = {-0.5, 0.0625, 0.999, 0.0, 0.875, 0.125, 0.99, 0.01, 0.3, 1e-8, 0.0625, 0.0625, false, true};
  for_types([&]<typename T>(T) {
    using C = compute_t<T>;
    for (const Rounding rounding : {Rounding::nearest, Rounding::stochastic, Rounding::kahan}) {
      if (sizeof(T) > 2 && rounding != Rounding::nearest) continue;
      task.rounding = rounding;
      for (const bool coupled : {false, true}) {
        task.coupled = coupled;
        k.threshold = coupled ? 0.3 : 0.0;
        task.algorithm = Algorithm::adam;
        call<T, T>(task, false, false, "its own");
        call<T, C>(task, true, coupled, "wide");
        k.momentum_rest = 0.625;  // written from the gradient
        call<T, T>(task, true, coupled, "its own");
        k.momentum_rest = 0.125;
        task.algorithm = Algorithm::sgd;
        call<T, T>(task, false, coupled, "its own");
        k.first = true;
        call<T, C>(task, false, false, "wide");
        k.first = false;
        k.momentum = 0.0;
        call<T, T>(task, false, false, "its own");
        k.momentum = 0.875;
      }
    }
    task.rounding = Rounding::nearest;
    task.algorithm = Algorithm::average;
    call<T, C>(task, false, true, "wide");
  });
}

}  // namespace isas
