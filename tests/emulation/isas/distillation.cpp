// Calls the leaves of csrc/cpu/distillation.simd.cpp.
#include "cpu/distillation.h"

#include "losses.h"

namespace isas {

template <typename T, typename Teacher>
void call(Loss<T>& loss, double temperature) {
  const auto teacher = numbers<Teacher>(loss.x.size());
  const DistillationTask task{loss.task, teacher.data(), kDType<Teacher>, temperature, 0.7};
  loss.name += std::string(", teacher ") + kName<Teacher> + ", T " + std::to_string(temperature);
  loss.call(
      "distillation",
      [&](int64_t begin, int64_t end) { RK_LEAF(distillation_units)(task, begin, end); },
      [&](int64_t begin, int64_t end) { RK_LEAF(distillation_backward_units)(task, begin, end); });
}

void call_leaves() {
  for_types([&]<typename T>(T) {
    for_losses([&](int64_t samples, int64_t classes, int64_t length, bool classes_last,
                   Target target, bool weighted, bool stream) {
      if (target == Target::probabilities) return;
      Loss<T> loss(samples, classes, length, classes_last, 0, target, weighted, stream, 5);
      call<T, T>(loss, weighted ? 1.0 : 3.0);
      if (sizeof(T) == 2 && target == Target::labels) call<T, compute_t<T>>(loss, 3.0);
    });
  });
}

}  // namespace isas
