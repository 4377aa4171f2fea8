// Runs csrc/cuda/distillation.cuh on the CPU and compares losses, stats and gradients with what a
// plain loop over the definition, in long double, makes of the same logits.
#include "cuda/distillation.cuh"

#include <algorithm>
#include <cmath>
#include <vector>

#include "loss.h"

namespace {

using driver::below;
using driver::bfloat16;
using driver::Buffer;
using driver::float16;
using driver::is_near;
using driver::kIgnored;
using driver::kInfinity;
using driver::kNaN;
using driver::Memory;
using driver::Real;
using driver::uniform;
using reg_kernels::compute_t;
using reg_kernels::DType;
using reg_kernels::LabelOptions;
using reg_kernels::load;
using reg_kernels::Reduction;
using reg_kernels::cuda::DistillationArguments;

enum class Lams { none, number, one, each };  // none: one label
enum class Excluded { none, by_student, by_teacher, by_both, all_by_student, all_by_teacher };
enum class Ignored { none, some, all };

struct Case {
  int64_t N, C, S;
  bool classes_last = false;  // where S is not 1
  double temperature = 2.0, alpha = 0.5;
  Reduction reduction = Reduction::mean;
  Lams lams = Lams::none;
  bool weighted = false;
  double smoothing = 0;
  bool labelled = true;
  bool traced = false;  // smoothing, temperature and alpha lie in memory
  Ignored ignored = Ignored::none;
  double range = 5;  // of the logits
  Excluded excluded = Excluded::none;
  int64_t x_shift = 0, teacher_shift = 0, gradient_shift = 0;  // elements past a boundary
  int64_t most_blocks = 4;
  int shared_bytes = 227 * 1024;

  int64_t positions() const { return N * S; }
  int64_t numel() const { return N * C * S; }
  int64_t at(int64_t position, int64_t c) const { return driver::place(*this, position, c); }

  std::string text() const {
    const char* reductions[] = {"none", "mean", "sum"};
    const auto number = [](const char* name, auto value) {
      return std::string(" ") + name + " " + std::to_string(value);
    };
    return "(" + std::to_string(N) + ", " + std::to_string(C) + ", " + std::to_string(S) + ")" +
           (classes_last ? " last" : "") + number("T", temperature) + number("alpha", alpha) + " " +
           reductions[static_cast<int>(reduction)] + number("lams", static_cast<int>(lams)) +
           (weighted ? " weighted" : "") + (labelled ? "" : " unlabelled") +
           (traced ? " traced" : "") + number("smoothing", smoothing) +
           number("ignored", static_cast<int>(ignored)) + number("range", range) +
           number("excluded", static_cast<int>(excluded)) + number("x+", x_shift) +
           number("teacher+", teacher_shift) + number("gradient+", gradient_shift) +
           number("blocks", most_blocks) + number("shared", shared_bytes);
  }
};

template <typename S, typename T>
struct Problem {
  using C = compute_t<S>;

  const Case& of;
  Buffer<S> x;
  Buffer<T> teacher;
  std::unique_ptr<int64_t[]> labels, partner_labels;
  std::unique_ptr<float[]> lam;
  std::unique_ptr<C[]> weight;
  double softness[2];

  explicit Problem(const Case& of)
      : of(of),
        x(of.numel(), of.x_shift),
        teacher(of.numel(), of.teacher_shift),
        labels(of.labelled ? draw_labels() : nullptr),
        softness{of.temperature, of.alpha} {
    const bool by_student = of.excluded == Excluded::by_student,
               both = of.excluded == Excluded::by_both;
    const bool by_teacher = of.excluded == Excluded::by_teacher;
    for (int64_t p = 0; p < of.positions(); ++p) {
      const bool first = p == of.positions() / 2;
      for (int64_t c = 0; c < of.C; ++c) {
        const bool some = below(3) == 0;
        const bool no_x =
            (some && (by_student || both)) || (first && of.excluded == Excluded::all_by_student);
        const bool no_teacher =
            (some && (by_teacher || both)) || (first && of.excluded == Excluded::all_by_teacher);
        x.data()[of.at(p, c)] = draw<S>(no_x);
        teacher.data()[of.at(p, c)] = draw<T>(no_teacher);
      }
    }
    if (of.lams != Lams::none) partner_labels = draw_labels();
    if (of.lams == Lams::one || of.lams == Lams::each) {
      const int64_t count = of.lams == Lams::each ? of.N : 1;
      lam.reset(new float[count]);
      for (int64_t n = 0; n < count; ++n) lam[n] = static_cast<float>(uniform());
    }
    if (of.weighted) {
      weight.reset(new C[of.C]);
      for (int64_t c = 0; c < of.C; ++c) weight[c] = static_cast<C>(0.25 + uniform());
    }
  }

  double lam_of(int64_t position) const {
    if (of.lams == Lams::none) return 1.0;
    return lam ? lam[of.lams == Lams::each ? position / of.S : 0] : driver::kLam;
  }

  DistillationArguments<S, T> arguments() const {
    DistillationArguments<S, T> a{};
    a.x = x.data();
    a.teacher = teacher.data();
    driver::set_case(a, of);
    // Where the two lie in memory, what is said here does not count.
    a.temperature = of.traced ? 7.0 : of.temperature;
    a.alpha = of.traced ? 2.0 : of.alpha;
    a.traced = of.traced ? softness : nullptr;
    a.weight = weight.get();
    a.labels.labels = labels.get();
    a.labels.partner_labels = partner_labels.get();
    a.labels.lam = {lam.get(), DType::float32};
    a.labels.one_lam_for_all = of.lams != Lams::each;
    return a;
  }

 private:
  std::unique_ptr<int64_t[]> draw_labels() const {
    std::unique_ptr<int64_t[]> result(new int64_t[of.positions()]);
    for (int64_t p = 0; p < of.positions(); ++p) {
      const bool ignored =
          of.ignored == Ignored::all || (of.ignored == Ignored::some && below(3) == 0);
      result[p] = ignored ? kIgnored : below(of.C);
    }
    return result;
  }

  template <typename E>
  E draw(bool excluded) const {
    const double value =
        excluded ? -std::numeric_limits<double>::infinity() : of.range * (2 * uniform() - 1);
    return reg_kernels::store<E>(static_cast<compute_t<E>>(value));
  }
};

// By definition, in long double.
template <typename S, typename T>
struct Expected {
  std::vector<Real> losses, sizes;  // and how large what they are made of is
  std::vector<Real> stats;
  std::vector<Real> slopes, slope_sizes;  // d loss / d x, before any grad_output
  Real loss = 0, size = 0;

  explicit Expected(const Problem<S, T>& problem)
      : losses(problem.of.positions()),
        sizes(losses.size()),
        stats(5 * losses.size()),
        slopes(problem.of.numel()),
        slope_sizes(losses.size()) {
    const Case& of = problem.of;
    const auto weight_of = [&](int64_t c) {
      return problem.weight ? Real(problem.weight[c]) : Real(1);
    };
    const bool is_mean = of.reduction == Reduction::mean;
    Real totals[2] = {is_mean ? Real(0) : Real(1), is_mean ? Real(0) : Real(1)}, weights = 0;
    for (int64_t c = 0; c < of.C; ++c) weights += weight_of(c);
    const int64_t* const labels[2] = {problem.labels.get(), problem.partner_labels.get()};
    for (int k = 0; k < 2; ++k) {
      for (int64_t p = 0; is_mean && labels[k] && p < of.positions(); ++p) {
        if (labels[k][p] != kIgnored) totals[k] += weight_of(labels[k][p]);
      }
    }
    for (int64_t p = 0; p < of.positions(); ++p) {
      std::vector<Real> x(of.C), t(of.C);
      for (int64_t c = 0; c < of.C; ++c) {
        x[c] = static_cast<double>(load(problem.x.data()[of.at(p, c)]));
        t[c] = static_cast<double>(load(problem.teacher.data()[of.at(p, c)]));
      }
      const Softmax one(x, 1), q(x, of.temperature), teacher(t, of.temperature);
      const Real of_stats[5] = {one.max, one.sum, q.sum, teacher.max, teacher.sum};
      for (int k = 0; k < 5; ++k) stats[k * of.positions() + p] = of_stats[k];

      Real divergence = 0, size = 0;
      for (int64_t c = 0; c < of.C; ++c) {
        const Real probability = teacher.probability(c),
                   entropy = probability == 0 ? 0 : probability * teacher.logarithm(c);
        divergence += entropy - probability * q.logarithm(c);
        size += std::fabs(entropy) + std::fabs(probability * q.logarithm(c));
      }
      const Real share = is_mean ? 1 / static_cast<Real>(of.positions()) : Real(1);
      const Real of_divergence = of.alpha * of.temperature * of.temperature * share;
      const Real of_labels = 1 - static_cast<Real>(of.alpha);
      losses[p] = of_divergence * divergence;
      sizes[p] = of_divergence * size;
      for (int64_t c = 0; c < of.C; ++c) {
        slopes[of.at(p, c)] =
            of.alpha * of.temperature * share * (q.probability(c) - teacher.probability(c));
      }
      slope_sizes[p] = of.alpha * of.temperature * share;
      const Real lam = problem.lam_of(p), lams[2] = {lam, 1 - lam};
      Real cross_entropy = 0;
      for (int k = 0; k < 2 && labels[k]; ++k) {
        const int64_t label = labels[k][p];
        if (label == kIgnored) {
          cross_entropy += 0 / totals[k];
          continue;
        }
        const Real factor = lams[k] / totals[k], smooth = of.smoothing / static_cast<Real>(of.C);
        const Real own = (1 - static_cast<Real>(of.smoothing)) * weight_of(label);
        Real loss = -own * one.logarithm(label);
        Real large = std::fabs(loss);
        for (int64_t c = 0; of.smoothing > 0 && c < of.C; ++c) {
          loss -= smooth * weight_of(c) * one.logarithm(c);
          large += std::fabs(smooth * weight_of(c) * one.logarithm(c));
        }
        cross_entropy += factor * loss;
        sizes[p] += of_labels * factor * large;
        const Real mass = own + (of.smoothing > 0 ? smooth * weights : Real(0));
        slope_sizes[p] += of_labels * factor * mass;
        for (int64_t c = 0; c < of.C; ++c) {
          const Real target = (c == label ? own : Real(0)) + smooth * weight_of(c);
          slopes[of.at(p, c)] += of_labels * factor * (one.probability(c) * mass - target);
        }
      }
      losses[p] += of_labels * cross_entropy;
      loss += losses[p];
      this->size += sizes[p];
    }
  }

 private:
  struct Softmax {
    const std::vector<Real>& x;
    Real temperature, max, sum;

    Softmax(const std::vector<Real>& x, double temperature)
        : x(x), temperature(temperature), max(*std::max_element(x.begin(), x.end())), sum(0) {
      for (const Real value : x) sum += std::exp((value - max) / this->temperature);
    }
    Real logarithm(int64_t c) const { return (x[c] - max) / temperature - std::log(sum); }
    Real probability(int64_t c) const { return std::exp(logarithm(c)); }
  };
};

// Of the type that is computed in, with some roundings.
template <typename C>
constexpr Real kError = sizeof(C) == 8 ? 4e-14L : 4e-6L;
template <typename S>
constexpr Real kRounding = sizeof(S) == 2 ? 4e-3L : Real(0);  // of a bfloat16

template <typename Describe>
void expect_close(Real actual, Real expected, Real allowed, const Describe& describe) {
  driver::expect(is_near(actual, expected, allowed), [&] {
    return describe() + ": " + std::to_string(actual) + ", expected " + std::to_string(expected) +
           " within " + std::to_string(allowed);
  });
}

template <typename S, typename Describe>
void expect_gradient(const Case& of, const Buffer<S>& gradient, const std::vector<Real>& slopes,
                     const std::vector<Real>& sizes, const std::vector<Real>& factors,
                     const Describe& describe) {
  for (int64_t p = 0; p < of.positions(); ++p) {
    for (int64_t c = 0; c < of.C; ++c) {
      const Real expected = factors[p] * slopes[of.at(p, c)];
      const Real allowed = kError<compute_t<S>> * std::fabs(factors[p]) * sizes[p] +
                           kRounding<S> * std::fabs(expected) + (sizeof(S) == 2 ? 6e-8L : 0);
      expect_close(static_cast<double>(load(gradient.data()[of.at(p, c)])), expected, allowed, [&] {
        return std::string(describe()) + " gradient of " + std::to_string(p) + ", " +
               std::to_string(c);
      });
    }
  }
  driver::expect(gradient.untouched(), [&] { return describe() + ": wrote before its gradient"; });
}

template <typename S, typename T>
void test(const Case& of) {
  using C = compute_t<S>;
  cuda_on_cpu::device.shared_bytes_a_block = of.shared_bytes;
  const Problem<S, T> problem(of);
  const Expected<S, T> expected(problem);
  const auto describe = [&] {
    return std::string("distillation ") + driver::kName<S> + ", teacher " + driver::kName<T> + " " +
           of.text();
  };
  const bool summed = of.reduction != Reduction::none;
  const int64_t positions = of.positions();

  // With the gradient, and once more: the same bits; then without.
  std::vector<Buffer<C>> losses, stats;
  std::vector<Buffer<S>> gradients;
  for (int run = 0; run < 3; ++run) {
    losses.emplace_back(summed ? 1 : positions, 0);
    stats.emplace_back(5 * positions, 0);
    gradients.emplace_back(of.numel(), of.gradient_shift);
    Memory memory;
    auto a = problem.arguments();
    (summed ? a.sum.loss : a.losses) = losses[run].data();
    a.stats = stats[run].data();
    if (run < 2) a.gradient = gradients[run].data();
    reg_kernels::cuda::launch_distillation(a, memory, nullptr, of.most_blocks);
  }
  driver::expect_same_bits(losses[1], losses[0].data(), [&] { return describe() + " again"; });
  driver::expect_same_bits(gradients[1], gradients[0].data(),
                           [&] { return describe() + " again"; });
  driver::expect_same_bits(losses[2], losses[0].data(),
                           [&] { return describe() + " without a gradient"; });
  driver::expect_same_bits(stats[2], stats[0].data(),
                           [&] { return describe() + " without a gradient"; });

  constexpr Real error = kError<C>;
  if (summed) {
    expect_close(losses[0].data()[0], expected.loss, error * (expected.size + 1), describe);
  }
  for (int64_t p = 0; p < positions; ++p) {
    const auto at = [&] { return describe() + " position " + std::to_string(p); };
    if (!summed) {
      expect_close(losses[0].data()[p], expected.losses[p], error * (expected.sizes[p] + 1), at);
    }
    for (int k = 0; k < 5; ++k) {
      const Real actual = stats[0].data()[k * positions + p];
      Real stat = expected.stats[k * positions + p];
      if (k % 3 == 0 && stat == -kInfinity) stat = reg_kernels::kLowest<C>;
      if (std::isnan(stat)) stat = 0;  // the sum of a row of nothing but -inf
      expect_close(actual, stat, k % 3 == 0 ? Real(0) : error * stat, at);
    }
  }
  const std::vector<Real> ones(positions, 1);
  expect_gradient(of, gradients[0], expected.slopes, expected.slope_sizes, ones, describe);

  // The gradient from the stats: with 1 for all as the forward has written it, then with others.
  for (int run = 0; run < 2; ++run) {
    const int64_t count = summed ? 1 : positions;
    Buffer<C> grad_output(count, 0);
    for (int64_t p = 0; p < count; ++p) {
      grad_output.data()[p] = static_cast<C>(run ? 4 * uniform() - 2 : 1);
    }
    std::vector<Real> factors(positions);
    for (int64_t p = 0; p < positions; ++p) factors[p] = grad_output.data()[summed ? 0 : p];
    Buffer<S> gradient(of.numel(), of.gradient_shift);
    Memory memory;
    auto a = problem.arguments();
    a.stats = stats[0].data();
    a.gradient = gradient.data();
    a.grad_output = {grad_output.data(), sizeof(C) == 8 ? DType::float64 : DType::float32};
    a.one_grad_output = summed;
    reg_kernels::cuda::launch_distillation_backward(a, memory, nullptr, of.most_blocks);
    if (run == 0) {
      driver::expect_same_bits(gradient, gradients[0].data(),
                               [&] { return describe() + " from the stats"; });
    }
    expect_gradient(of, gradient, expected.slopes, expected.slope_sizes, factors,
                    [&] { return describe() + " backward"; });
  }
}

// Every option, in each of the ways that rows are worked on: a thread, a warp, a block.
template <typename S, typename T>
void test_options() {
  const Reduction reductions[] = {Reduction::none, Reduction::mean, Reduction::sum};
  for (const Case& shape : {Case{3, 5, 7}, Case{5, 5, 1}, Case{2, 33, 3, true}, Case{3, 1100, 1}}) {
    for (const Reduction reduction : reductions) {
      Case of = shape;
      of.reduction = reduction;
      test<S, T>(of);
      of.weighted = true;
      of.ignored = Ignored::some;
      test<S, T>(of);
      of.smoothing = 0.1;
      of.lams = Lams::each;
      of.temperature = 1.5;
      test<S, T>(of);
      of.weighted = false;
      of.lams = Lams::one;
      of.temperature = 1;
      test<S, T>(of);
      of.ignored = Ignored::all;
      test<S, T>(of);
      of.lams = Lams::number;
      of.ignored = Ignored::none;
      of.alpha = 1;
      of.temperature = 0.5;
      test<S, T>(of);
      of.alpha = 0;
      test<S, T>(of);
      of.alpha = 0.3;
      of.smoothing = 0.2;
      of.weighted = of.traced = true;
      test<S, T>(of);
      of = shape;
      of.reduction = reduction;
      of.labelled = false;
      of.alpha = 1;
      test<S, T>(of);
    }
  }
}

template <typename S, typename T>
void test_shapes() {
  for (const int64_t classes : {1, 2, 16, 17, 31, 33, 1000}) {
    test<S, T>({3, classes, 1});
    test<S, T>({2, classes, 3, true});
    test<S, T>({2, classes, 3});
  }
  // Rows that begin anywhere, all alike and each in its own way.
  for (const int64_t classes : {19, 1031}) {
    Case of{5, classes, 1};
    test<S, T>(of);
    of.x_shift = of.teacher_shift = of.gradient_shift = 1;
    test<S, T>(of);
    of.gradient_shift = 0;
    test<S, T>(of);
    of.teacher_shift = 3;
    test<S, T>(of);
  }
  // Rows that fit, in part, and not at all.
  for (const int shared_bytes : {16 * 1024, 8 * 1024, 4 * 1024}) {
    Case of{3, 1501, 1};
    of.shared_bytes = shared_bytes;
    of.most_blocks = 2;
    test<S, T>(of);
    of.x_shift = 1;
    test<S, T>(of);
  }
}

template <typename S, typename T>
void test_values() {
  for (const Case& shape : {Case{3, 5, 3}, Case{3, 40, 1}, Case{3, 1100, 1}}) {
    for (const double temperature : {1.0, 2.0, 3.0}) {
      Case of = shape;
      of.temperature = temperature;
      of.reduction = Reduction::none;
      for (const Excluded excluded : {Excluded::by_student, Excluded::by_teacher, Excluded::by_both,
                                      Excluded::all_by_student, Excluded::all_by_teacher}) {
        of.excluded = excluded;
        of.ignored = Ignored::some;
        test<S, T>(of);
      }
      of.excluded = Excluded::none;
      of.range = 1e4;
      test<S, T>(of);
      of.smoothing = 0.1;
      test<S, T>(of);
      of.range = 1e35;  // what lies above the lowest number by more than the largest one
      test<S, T>(of);
    }
  }
}

void test_large() {
  test<float, float>({2, 5001, 1});
  test<bfloat16, bfloat16>({2, 5001, 1});
  // More positions than the blocks' threads, for sums of sums, and for the totals' blocks.
  Case of{3, 3, 1501};
  of.weighted = true;
  of.most_blocks = 300;
  of.ignored = Ignored::some;
  test<float, float>(of);
}

void test_assertions() {
  for (const Case& of : {Case{2, 5, 3}, Case{2, 40, 1}, Case{2, 1100, 1}}) {
    Case sum = of;
    sum.reduction = Reduction::sum;
    sum.lams = Lams::number;
    for (const int64_t wrong : {of.C, int64_t{-1}}) {
      for (const bool partner : {false, true}) {
        Problem<float, float> problem(sum);
        (partner ? problem.partner_labels : problem.labels)[0] = wrong;
        Buffer<float> loss(1, 0), stats(5 * of.positions(), 0);
        driver::expect_assertion(
            [&] {
              Memory memory;
              auto a = problem.arguments();
              a.sum.loss = loss.data();
              a.stats = stats.data();
              reg_kernels::cuda::launch_distillation(a, memory, nullptr);
            },
            partner ? "a.labels.is_valid(a.labels.partner_labels[position])"
                    : "a.labels.is_valid(a.labels.labels[position])",
            [&] { return "label " + std::to_string(wrong) + " of " + of.text(); });
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  test_options<float, float>();
  test_shapes<float, float>();
  test_values<float, float>();
  test_shapes<bfloat16, bfloat16>();
  test_shapes<float, bfloat16>();
  test_shapes<float16, float>();
  test_options<double, double>();
  test_values<double, double>();
  test_large();
  test_assertions();
  return driver::finish();
}
