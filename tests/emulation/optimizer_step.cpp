// Runs csrc/cuda/optimizer_step.cuh on the CPU and compares every array with two loops over plain
// vectors. The first shares one element's arithmetic with the kernel, and nothing of how elements,
// groups, draws and threads correspond: bit for bit. The second shares nothing at all and computes
// in double from the papers' formulas: within roundings.
#include "cuda/optimizer_step.cuh"

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <limits>

#include "table.h"

namespace {

using driver::Buffer;
using driver::Table;
using driver::TableRow;
using reg_kernels::Algorithm;
using reg_kernels::compute_t;
using reg_kernels::Decay;
using reg_kernels::OptimizerGroup;
using reg_kernels::OptimizerRule;
using reg_kernels::Rounding;
using reg_kernels::cuda::OptimizerStep;
using reg_kernels::cuda::RngState;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
// No half is zero: each is a key or counter word of its own.
constexpr uint64_t kSeed = 0x9e3779b97f4a7c15ull, kRngOffset = 0x0000000500000007ull;

uint64_t draws = 0x853c49e6748fea9bull;

double uniform() {  // in (-1, 1)
  draws = draws * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<double>(static_cast<int64_t>(draws) >> 11) * 0x1p-52;
}

struct Options {
  const char* name;
  Algorithm algorithm = Algorithm::adam;
  bool second = false;  // amsgrad, or momentum
  bool nesterov = false, maximize = false;
  Decay decay = Decay::decoupled;
  double l1 = 0;
  bool ema = false;
  Rounding rounding = Rounding::nearest;
  bool scaled = false, clipped = false;
  bool on_device = false;  // learning rates and rng_state behind pointers
  bool counted = true;     // the tensors have steps
  bool found_inf = false;
};

enum class Placement { aligned, misaligned, one_misaligned };

struct List {
  std::vector<int64_t> sizes;
  Placement placement = Placement::aligned;
  int64_t groups = 3;
  int64_t shards = 0;  // above 0: draws are those of parts of tensors

  // How many elements past a 16-byte boundary an array of a tensor starts.
  int64_t shift(size_t array, size_t tensor) const {
    switch (placement) {
      case Placement::misaligned: return 1 + static_cast<int64_t>(array + tensor) % 3;
      case Placement::one_misaligned: return array == tensor % 7 ? 1 : 0;
      default: return 0;
    }
  }
};

// One row of the table.
template <typename T>
using Tensors = std::deque<Buffer<T>>;

template <typename T>
Tensors<T> tensors_of(const List& list, size_t array, bool present = true) {
  Tensors<T> result;
  for (size_t i = 0; present && i < list.sizes.size(); ++i) {
    result.emplace_back(list.sizes[i], list.shift(array, i));
  }
  return result;
}

template <typename T, typename S>
struct State {
  Tensors<T> param, grad, compensation;
  Tensors<S> first, second, most;
  Tensors<compute_t<T>> ema;
  std::vector<std::unique_ptr<float>> steps;

  State(const Options& o, const List& list)
      : param(tensors_of<T>(list, 0)),
        grad(tensors_of<T>(list, 1)),
        compensation(tensors_of<T>(list, 2, o.rounding == Rounding::kahan)),
        first(tensors_of<S>(list, 3, o.algorithm == Algorithm::adam || o.second)),
        second(tensors_of<S>(list, 4, o.algorithm == Algorithm::adam)),
        most(tensors_of<S>(list, 5, o.algorithm == Algorithm::adam && o.second)),
        ema(tensors_of<compute_t<T>>(list, 6, o.ema)) {
    for (size_t i = 0; i < list.sizes.size(); ++i) {
      for (int64_t j = 0; j < list.sizes[i]; ++j) {
        const double p = uniform(), m = 0.1 * uniform();
        set(param[i].data()[j], p);
        set(grad[i].data()[j], uniform());
        if (!compensation.empty()) set(compensation[i].data()[j], 0x1p-10 * uniform());
        if (!first.empty()) set(first[i].data()[j], m);
        if (!second.empty()) set(second[i].data()[j], m * m + 0.1 * std::fabs(uniform()));
        if (!most.empty()) set(most[i].data()[j], m * m + 0.1 * std::fabs(uniform()));
        if (!ema.empty()) set(ema[i].data()[j], p + 0.1 * uniform());
      }
      if (o.counted) steps.push_back(std::make_unique<float>(std::array{0.f, 1.f, 40.f}[i % 3]));
    }
  }

  template <typename X>
  static void set(X& x, double value) {
    x = reg_kernels::store<X>(static_cast<compute_t<X>>(value));
  }

  // How many updates a tensor has seen when the next one is done.
  float next_step(size_t tensor) const { return steps.empty() ? 1.0f : *steps[tensor] + 1.0f; }
};

template <typename T>
using Values = std::vector<std::vector<T>>;

template <typename T>
Values<T> values_of(const Tensors<T>& tensors) {
  Values<T> result;
  for (const auto& x : tensors) result.emplace_back(x.data(), x.data() + x.size());
  return result;
}

// What a state holds, and what it has to become.
template <typename T, typename S>
struct Expected {
  Values<T> param, grad, compensation;
  Values<S> first, second, most;
  Values<compute_t<T>> ema;
  std::vector<float> steps;

  explicit Expected(const State<T, S>& s)
      : param(values_of(s.param)),
        grad(values_of(s.grad)),
        compensation(values_of(s.compensation)),
        first(values_of(s.first)),
        second(values_of(s.second)),
        most(values_of(s.most)),
        ema(values_of(s.ema)) {
    for (const auto& step : s.steps) steps.push_back(*step);
  }
};

OptimizerGroup group_of(const Options& o, int64_t index) {
  OptimizerGroup group{};
  group.lr = 0x1p-7 * static_cast<double>(1 + index);  // a float too
  group.decay_lr = 0.02;
  group.weight_decay = index % 3 == 1 ? 0.0 : 0.3;
  group.l1 = index % 3 == 2 ? 0.0 : o.l1;
  const bool adam = o.algorithm == Algorithm::adam;
  group.beta1 = index % 3 == 0 ? 0.9 : 0.4;  // either of the first moment's two forms
  group.beta2 = adam ? 0.98 : 0.25;
  group.eps = 1e-6;
  group.ema_decay = 0.9;
  group.decay = o.decay;
  group.maximize = o.maximize && index % 2 == 0;
  group.nesterov = o.nesterov;
  return group;
}

constexpr float kScale = 8.0f;
constexpr double kSquares[] = {30.0, 0.5, 210.0};
constexpr double kMaxNorm = 1.25;

double gradient_factor(const Options& o) {
  double factor = o.scaled ? 0.125 : 1.0;
  if (o.clipped) factor *= kMaxNorm / (std::sqrt(240.5) * factor + 1e-6);
  return factor;
}

// Half-word of a mask element, by the contract of philox.h.
uint32_t drawn(int64_t element) {
  const auto words = reg_kernels::philox4x32(kSeed ^ 0x726f756e64696e67ull,
                                             static_cast<uint64_t>(element) / 8, kRngOffset);
  const uint32_t word = words.w[element % 8 / 2];
  return element % 2 ? word >> 16 : word & 0xffffu;
}

template <typename C>
void update(const Options& o, bool coupled, const OptimizerRule<C>& rule, C& p, C g, C& m, C& v,
            C& v_max) {
  if (o.algorithm == Algorithm::adam) {
    if (coupled && o.second) reg_kernels::adam_element<true, true>(rule, p, g, m, v, v_max);
    if (coupled && !o.second) reg_kernels::adam_element<true, false>(rule, p, g, m, v, v_max);
    if (!coupled && o.second) reg_kernels::adam_element<false, true>(rule, p, g, m, v, v_max);
    if (!coupled && !o.second) reg_kernels::adam_element<false, false>(rule, p, g, m, v, v_max);
  } else {
    if (coupled && o.second) reg_kernels::sgd_element<true, true>(rule, p, g, m);
    if (coupled && !o.second) reg_kernels::sgd_element<true, false>(rule, p, g, m);
    if (!coupled && o.second) reg_kernels::sgd_element<false, true>(rule, p, g, m);
    if (!coupled && !o.second) reg_kernels::sgd_element<false, false>(rule, p, g, m);
  }
}

// One step, in the kernel's own arithmetic.
template <typename T, typename S>
void step_by_elements(const Options& o, const List& list, const Values<int64_t>& places,
                      Expected<T, S>& e) {
  using C = compute_t<T>;
  for (size_t i = 0; i < list.sizes.size(); ++i) {
    const OptimizerGroup group = group_of(o, static_cast<int64_t>(i) % list.groups);
    const double step = e.steps.empty() ? 1.0 : e.steps[i] + 1.0;
    const auto constants =
        reg_kernels::optimizer_constants(o.algorithm, group, step, gradient_factor(o));
    const OptimizerRule<C> rule(constants, o.algorithm);
    const bool coupled = o.decay == Decay::l2 && group.weight_decay != 0;
    for (int64_t j = 0; j < list.sizes[i]; ++j) {
      C p = reg_kernels::load(e.param[i][j]), m{}, v{}, v_max{};
      if (o.algorithm == Algorithm::average) {
        e.ema[i][j] = reg_kernels::ema_element(rule, e.ema[i][j], p);
        continue;
      }
      if (!e.compensation.empty()) p += reg_kernels::load(e.compensation[i][j]);
      if (!e.first.empty()) m = static_cast<C>(reg_kernels::load(e.first[i][j]));
      if (!e.second.empty()) v = static_cast<C>(reg_kernels::load(e.second[i][j]));
      if (!e.most.empty()) v_max = static_cast<C>(reg_kernels::load(e.most[i][j]));
      update(o, coupled, rule, p, static_cast<C>(reg_kernels::load(e.grad[i][j])), m, v, v_max);
      if (!e.first.empty()) e.first[i][j] = reg_kernels::store<S>(m);
      if (!e.second.empty()) e.second[i][j] = reg_kernels::store<S>(v);
      if (!e.most.empty()) e.most[i][j] = reg_kernels::store<S>(v_max);
      if (group.l1 > 0) p = reg_kernels::soft_threshold(p, rule.threshold);
      if (!e.ema.empty()) e.ema[i][j] = reg_kernels::ema_element(rule, e.ema[i][j], p);
      e.param[i][j] = reg_kernels::store<T>(p);
      if constexpr (std::is_same_v<T, driver::bfloat16>) {
        if (o.rounding == Rounding::stochastic) {
          e.param[i][j] = reg_kernels::store_stochastic(p, drawn(places[i][j]));
        }
      }
      if (!e.compensation.empty()) {
        e.compensation[i][j] = reg_kernels::store<T>(p - reg_kernels::load(e.param[i][j]));
      }
    }
    if (!e.steps.empty()) e.steps[i] += 1.0f;
  }
}

template <typename T>
constexpr double kEps = std::is_same_v<T, double>            ? 0x1p-52
                        : std::is_same_v<T, float>           ? 0x1p-23
                        : std::is_same_v<T, driver::float16> ? 0x1p-10
                                                             : 0x1p-7;

// The largest of what values are off by, in units of what is allowed.
struct Worst {
  double ratio = 0;

  void add(double actual, double expected, double allowed) {
    const double off = std::fabs(actual - expected);
    ratio = off <= allowed ? std::max(ratio, off / allowed) : std::max(2.0, off / allowed);
  }
};

// `after` is one step from `before`, as the papers have it.
template <typename T, typename S, typename Describe>
void expect_formulas(const Options& o, const List& list, const Expected<T, S>& before,
                     const Expected<T, S>& after, const Describe& describe) {
  const auto of = [](auto x) { return static_cast<double>(reg_kernels::load(x)); };
  // A value computed in C and stored in the type of `like`.
  const auto allowed = [](double expected, double eps) {
    return eps * std::fabs(expected) + 64 * kEps<compute_t<T>> * (1 + std::fabs(expected)) +
           (eps == kEps<driver::float16> ? 0x1p-24 : 0.0);
  };
  Worst param, exact, first, second, most, ema;
  int64_t zeros = 0, wrong_zeros = 0;
  for (size_t i = 0; i < list.sizes.size(); ++i) {
    const OptimizerGroup k = group_of(o, static_cast<int64_t>(i) % list.groups);
    const double t = before.steps.empty() ? 1 : before.steps[i] + 1;
    const double rate = o.decay == Decay::decoupled_lr ? k.lr / k.decay_lr : k.lr;
    for (int64_t j = 0; j < list.sizes[i]; ++j) {
      double p = of(before.param[i][j]);
      if (o.algorithm == Algorithm::average) {
        const double e = 0.9 * of(before.ema[i][j]) + 0.1 * p;
        ema.add(of(after.ema[i][j]), e, allowed(e, 0));
        continue;
      }
      if (!before.compensation.empty()) p += of(before.compensation[i][j]);
      double g = of(before.grad[i][j]) * gradient_factor(o) * (k.maximize ? -1 : 1);
      if (o.decay == Decay::l2) g += k.weight_decay * p;
      if (o.decay != Decay::l2) p -= rate * k.weight_decay * p;
      if (o.algorithm == Algorithm::adam) {
        const double m = k.beta1 * of(before.first[i][j]) + (1 - k.beta1) * g;
        double v = k.beta2 * of(before.second[i][j]) + (1 - k.beta2) * g * g;
        first.add(of(after.first[i][j]), m, allowed(m, kEps<S>));
        second.add(of(after.second[i][j]), v, allowed(v, kEps<S>));
        if (o.second) {
          v = std::max(v, of(before.most[i][j]));
          most.add(of(after.most[i][j]), v, allowed(v, kEps<S>));
        }
        const double m_hat = m / (1 - std::pow(k.beta1, t));
        const double v_hat = v / (1 - std::pow(k.beta2, t));
        p -= k.lr * m_hat / (std::sqrt(v_hat) + k.eps);
      } else {
        if (o.second) {
          const double m = t == 1 ? g : k.beta1 * of(before.first[i][j]) + (1 - k.beta2) * g;
          first.add(of(after.first[i][j]), m, allowed(m, kEps<S>));
          g = o.nesterov ? g + k.beta1 * m : m;
        }
        p -= k.lr * g;
      }
      if (k.l1 > 0) {
        const double threshold = rate * k.l1, margin = 64 * kEps<compute_t<T>>;
        if (std::fabs(p) < threshold - margin) {
          ++zeros;
          wrong_zeros += of(after.param[i][j]) != 0;
        }
        p = std::fabs(p) <= threshold ? 0 : p - std::copysign(threshold, p);
      }
      if (o.ema) {
        const double e = 0.9 * of(before.ema[i][j]) + 0.1 * p;
        ema.add(of(after.ema[i][j]), e, allowed(e, 0));
      }
      param.add(of(after.param[i][j]), p, allowed(p, kEps<T>));
      if (!before.compensation.empty()) {
        exact.add(of(after.param[i][j]) + of(after.compensation[i][j]), p,
                  allowed(p, kEps<T> * kEps<T>));
      }
    }
  }
  const auto expect = [&](const char* array, const Worst& worst) {
    driver::expect(worst.ratio <= 1, [&] {
      return describe() + ": " + array + " is off by " + std::to_string(worst.ratio) +
             " times what is allowed";
    });
  };
  expect("param", param);
  expect("param + compensation", exact);
  expect("first moment", first);
  expect("second moment", second);
  expect("maximum", most);
  expect("ema", ema);
  driver::expect(wrong_zeros == 0, [&] {
    return describe() + ": " + std::to_string(wrong_zeros) + " of " + std::to_string(zeros) +
           " parameters within the threshold are not zero";
  });
}

template <typename T, typename Describe>
void expect_all(const Tensors<T>& actual, const Values<T>& expected, const char* array,
                const Describe& describe) {
  for (size_t i = 0; i < actual.size(); ++i) {
    driver::expect_same_bits(actual[i], expected[i].data(), [&] {
      return describe() + ", " + array + " of tensor " + std::to_string(i);
    });
  }
}

template <typename T>
void fill_row(Table& table, TableRow row, Tensors<T>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    table.set(row, static_cast<int64_t>(i), tensors[i].data());
  }
}

template <typename T, typename S>
void test(const Options& o, const List& list, int launches = 1) {
  const auto count = static_cast<int64_t>(list.sizes.size());
  State<T, S> state(o, list);
  Table table(list.sizes);
  fill_row(table, TableRow::param, state.param);
  fill_row(table, TableRow::grad, state.grad);
  fill_row(table, TableRow::compensation, state.compensation);
  fill_row(table, TableRow::first_moment, state.first);
  fill_row(table, TableRow::second_moment, state.second);
  fill_row(table, TableRow::max_second_moment, state.most);
  fill_row(table, TableRow::ema, state.ema);
  // The draw of each element: of whole tensors, of parts that begin anywhere, and of columns.
  Values<int64_t> places;
  int64_t offset = int64_t{1} << 35;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t kind = list.shards ? (i + list.shards) % 3 : 0;
    const int64_t begin = offset + (kind ? 5 : 0), run = kind == 2 ? 13 : 0, stride = 40;
    std::vector<int64_t> of_tensor;
    for (int64_t j = 0; j < list.sizes[i]; ++j) {
      of_tensor.push_back(begin + (run ? j / run * stride + j % run : j));
    }
    table.set(TableRow::element_offset, i, begin);
    table.set(TableRow::run, i, run);
    table.set(TableRow::run_stride, i, run ? stride : 0);
    offset += (list.sizes[i] + 7) / 8 * 32;
    places.push_back(of_tensor);
    table.set(TableRow::group, i, i % list.groups);
    if (o.counted) table.set(TableRow::step, i, state.steps[i].get());
  }

  OptimizerStep step{};
  step.table = table.view();
  step.chunks = table.chunks();
  step.ticket = reinterpret_cast<unsigned*>(table.scratch.get());
  step.max_norm = kMaxNorm;
  step.rounding = o.rounding;
  const auto scale = std::make_unique<float>(kScale);
  const auto found = std::make_unique<float>(o.found_inf ? 1.0f : 0.0f);
  const auto squares = std::make_unique<double[]>(3);
  std::copy_n(kSquares, 3, squares.get());
  if (o.scaled) step.grad_scale = scale.get();
  if (o.clipped) {
    step.squares = squares.get();
    step.squares_count = 3;
  }
  if (o.found_inf || o.scaled) step.found_inf = found.get();
  // Where one form of an argument is in use, the other one holds what would be wrong.
  const auto rng = std::make_unique<int64_t[]>(2);
  rng[0] = static_cast<int64_t>(kSeed);
  rng[1] = static_cast<int64_t>(kRngOffset);
  step.rng = o.on_device ? RngState{rng.get(), 1, 2} : RngState{nullptr, kSeed, kRngOffset};
  std::vector<std::unique_ptr<float>> rates;
  for (int64_t i = 0; i < list.groups; ++i) {
    step.groups[i] = group_of(o, i);
    if (!o.on_device) continue;
    rates.push_back(std::make_unique<float>(static_cast<float>(step.groups[i].lr)));
    step.groups[i].lr = kNaN;
    step.groups[i].lr_on_device = rates.back().get();
  }

  for (int launch = 0; launch < launches; ++launch) {
    const auto describe = [&] {
      return std::string(o.name) + " " + driver::kName<T> + ", " + driver::kName<S> + ", " +
             std::to_string(count) + " tensors, placement " +
             std::to_string(static_cast<int>(list.placement)) + ", launch " +
             std::to_string(launch);
    };
    const Expected<T, S> before(state);
    Expected<T, S> expected = before;
    if (!o.found_inf) step_by_elements(o, list, places, expected);
    reg_kernels::cuda::launch_optimizer_step<T, S>(o.algorithm, step, nullptr);
    if (!o.found_inf) expect_formulas(o, list, before, Expected<T, S>(state), describe);
    expect_all(state.param, expected.param, "param", describe);
    expect_all(state.compensation, expected.compensation, "compensation", describe);
    expect_all(state.first, expected.first, "first moment", describe);
    expect_all(state.second, expected.second, "second moment", describe);
    expect_all(state.most, expected.most, "maximum", describe);
    expect_all(state.ema, expected.ema, "ema", describe);
    expect_all(state.grad, expected.grad, "grad", describe);
    for (size_t i = 0; i < expected.steps.size(); ++i) {
      driver::expect(*state.steps[i] == expected.steps[i], [&] {
        return describe() + ": step " + std::to_string(i) + " is " +
               std::to_string(*state.steps[i]) + ", expected " + std::to_string(expected.steps[i]);
      });
    }
    driver::expect(table.ticket_is_zero(), [&] { return describe() + ": the ticket is not zero"; });
  }
}

constexpr Algorithm kSgd = Algorithm::sgd;

const Options kAll[] = {
    {.name = "adamw"},
    {.name = "amsgrad, l2, ema", .second = true, .decay = Decay::l2, .ema = true},
    {.name = "adam, l1, scaled and clipped, maximize",
     .maximize = true,
     .decay = Decay::decoupled_lr,
     .l1 = 0.5,
     .scaled = true,
     .clipped = true},
    {.name = "sgd", .algorithm = kSgd, .l1 = 4.0},
    {.name = "momentum, ema", .algorithm = kSgd, .second = true, .ema = true, .clipped = true},
    {.name = "nesterov, l2",
     .algorithm = kSgd,
     .second = true,
     .nesterov = true,
     .decay = Decay::l2,
     .scaled = true},
    {.name = "average", .algorithm = Algorithm::average, .ema = true, .counted = false},
};

const Options kNarrow[] = {
    {.name = "adamw, kahan, amsgrad, ema, l1",
     .second = true,
     .l1 = 0.5,
     .ema = true,
     .rounding = Rounding::kahan},
    {.name = "sgd, kahan", .algorithm = kSgd, .second = true, .rounding = Rounding::kahan},
    {.name = "adamw, stochastic, ema", .ema = true, .rounding = Rounding::stochastic},
    {.name = "sgd, stochastic, l1", .algorithm = kSgd, .l1 = 0.5, .rounding = Rounding::stochastic},
};

const std::vector<int64_t> kEdges = {0, 1, 7, 8191, 8192, 8193, 20001, 0};
const std::vector<int64_t> kSmall = {13, 0, 130, 1, 2051, 7, 64, 300};

template <typename T, typename S>
void test_dtypes() {
  int turn = 0;
  const auto run = [&](const Options& o) {
    // Each of the placements with each of the sizes, over the options.
    test<T, S>(o, {kEdges, static_cast<Placement>(turn % 3)});
    test<T, S>(o, {kSmall, static_cast<Placement>((turn + 1) % 3)}, 2);
    test<T, S>(o, {kSmall, static_cast<Placement>((turn + 2) % 3)});
    ++turn;
  };
  for (const Options& o : kAll) run(o);
  if constexpr (sizeof(T) == 2) {
    for (const Options& o : kNarrow) run(o);
  }
  for (Options o : {kAll[1], kAll[4], kAll[6], kNarrow[2]}) {
    o.found_inf = true;
    test<T, S>(o, {kSmall}, 2);
    o.found_inf = false;
    o.on_device = true;
    test<T, S>(o, {kSmall}, 2);
    o.counted = false;
    test<T, S>(o, {kSmall});
  }
}

void test_lists() {
  const std::vector<int64_t> many(70, 3);
  // More tensors than the last block's threads count the steps of at a time.
  const std::vector<int64_t> empty(1100, 0);
  test<float, float>(kAll[0], {{}});
  test<float, float>(kAll[0], {{0}}, 2);
  test<float, float>(kAll[0], {empty}, 2);
  test<float, float>(kAll[0], {many, Placement::aligned, reg_kernels::cuda::kMostGroups}, 2);
  test<driver::bfloat16, float>(kNarrow[2], {many, Placement::misaligned, 5}, 2);
  for (const int64_t shards : {1, 2, 3}) {
    const auto placement = static_cast<Placement>(shards % 3);
    test<driver::bfloat16, float>(kNarrow[2], {kEdges, placement, 3, shards});
    test<driver::bfloat16, driver::bfloat16>(kNarrow[3], {kSmall, Placement::aligned, 3, shards});
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  using driver::bfloat16;
  using driver::float16;
  test_dtypes<double, double>();
  test_dtypes<float, float>();
  test_dtypes<float, bfloat16>();
  test_dtypes<float16, float16>();
  test_dtypes<float16, float>();
  test_dtypes<bfloat16, bfloat16>();
  test_dtypes<bfloat16, float>();
  test_lists();
  return driver::finish();
}
