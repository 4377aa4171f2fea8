// Runs csrc/cuda/cross_entropy.cuh on the CPU and compares loss, statistics and gradients with
// their definitions, class by class in long double. Shares with it nothing but the arguments.
#include "cuda/cross_entropy.cuh"

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
using reg_kernels::ChannelValues;
using reg_kernels::compute_t;
using reg_kernels::DType;
using reg_kernels::Reduction;

enum class Kind { labels, pair, shares, probabilities, wide_probabilities };
enum class Logits { usual, huge, excluded, all_excluded, infinite };
constexpr const char* kKinds[] = {"labels", "pair", "shares", "probabilities",
                                  "wide probabilities"};
constexpr const char* kLogits[] = {"usual", "huge", "excluded", "all excluded", "infinite"};

struct Case {
  int64_t N, C, S;
  Kind kind = Kind::labels;
  Reduction reduction = Reduction::mean;
  double smoothing = 0;
  bool weighted = false;
  bool classes_last = false;  // where S is not 1
  Logits logits = Logits::usual;
  int ignores = 3;  // every so many labels, or all of 1, or none of 0
  int64_t shift = 0;
  int64_t most_blocks = reg_kernels::cuda::kMostLossBlocks;
  int shared_bytes = cuda_on_cpu::Device{}.shared_bytes_a_block;
  bool traced = false;  // the smoothing lies in memory

  int64_t positions() const { return N * S; }
  bool has_probabilities() const { return kind >= Kind::probabilities; }
  bool has_partner() const { return kind == Kind::pair || kind == Kind::shares; }
  std::string text() const {
    return "(" + std::to_string(N) + ", " + std::to_string(C) + ", " + std::to_string(S) + ")" +
           (classes_last ? " channels last, " : ", ") + kKinds[static_cast<int>(kind)] + ", " +
           kLogits[static_cast<int>(logits)] + " logits, reduction " +
           std::to_string(static_cast<int>(reduction)) + ", smoothing " +
           std::to_string(smoothing) + (weighted ? ", weighted" : "") + ", every " +
           std::to_string(ignores) + "th ignored, shift " + std::to_string(shift) + ", " +
           std::to_string(shared_bytes) + " bytes";
  }
};

// Inputs of a case, and what comes out by definition.
template <typename T>
struct Problem {
  using C = compute_t<T>;

  Case of;
  Buffer<T> x, probabilities;
  Buffer<C> wide_probabilities, weight;
  Buffer<int64_t> labels, partner_labels;
  std::vector<float> lam;

  explicit Problem(const Case& of)
      : of(of),
        x(of.N * of.C * of.S, of.shift),
        probabilities(of.kind == Kind::probabilities ? x.size() : 0, of.shift),
        wide_probabilities(of.kind == Kind::wide_probabilities ? x.size() : 0, of.shift),
        weight(of.weighted ? of.C : 0, 0),
        labels(of.positions(), 0),
        partner_labels(of.positions(), 0),
        lam(of.N) {
    for (int64_t p = 0; p < of.positions(); ++p) {
      const int64_t excluded = below(of.C);
      for (int64_t c = 0; c < of.C; ++c) {
        double value = 6 * uniform() - 3;
        if (of.logits == Logits::huge) value = below(3) ? -1e4 + uniform() : 1e4 - 8 * uniform();
        if (of.logits == Logits::excluded && c % 3 == excluded % 3) value = -kInfinity;
        if (of.logits == Logits::all_excluded && p % 2 == 0) value = -kInfinity;
        if (of.logits == Logits::infinite && c == excluded) value = kInfinity;
        x.data()[at(p, c)] = reg_kernels::store<T>(static_cast<C>(value));
        const double t = static_cast<double>(below(16)) / 16;
        if (probabilities.size()) {
          probabilities.data()[at(p, c)] = reg_kernels::store<T>(static_cast<C>(t));
        }
        if (wide_probabilities.size()) wide_probabilities.data()[at(p, c)] = static_cast<C>(t);
      }
      labels.data()[p] = is_ignored(p) ? kIgnored : below(of.C);
      partner_labels.data()[p] = is_ignored(p + 1) ? kIgnored : below(of.C);
    }
    for (int64_t c = 0; c < weight.size(); ++c) weight.data()[c] = static_cast<C>(0.25 + below(8));
    for (float& each : lam) each = below(4) ? static_cast<float>(uniform()) : 1.0f;
  }

  bool is_ignored(int64_t p) const { return of.ignores && p % of.ignores == of.ignores - 1; }

  int64_t at(int64_t p, int64_t c) const { return driver::place(of, p, c); }
  Real logit(int64_t p, int64_t c) const { return reg_kernels::load(x.data()[at(p, c)]); }
  Real w(int64_t c) const { return of.weighted ? Real(weight.data()[c]) : Real(1); }
  Real probability(int64_t p, int64_t c) const {
    return of.kind == Kind::probabilities ? Real(reg_kernels::load(probabilities.data()[at(p, c)]))
                                          : Real(wide_probabilities.data()[at(p, c)]);
  }
  Real total(const Buffer<int64_t>& of_labels) const {
    if (of.reduction != Reduction::mean) return 1;
    Real sum = 0;
    for (int64_t p = 0; p < of.positions(); ++p) {
      const int64_t label = of_labels.data()[p];
      if (label != kIgnored) sum += w(label);
    }
    return sum;
  }

  reg_kernels::cuda::CrossEntropy<T> arguments() const {
    reg_kernels::cuda::CrossEntropy<T> a{};
    a.x = x.data();
    driver::set_case(a, of);
    if (!of.has_probabilities()) a.labels.labels = labels.data();
    if (of.has_partner()) a.labels.partner_labels = partner_labels.data();
    a.labels.one_lam_for_all = of.kind != Kind::shares;
    if (of.kind == Kind::shares) {
      a.labels.lam = {const_cast<float*>(lam.data()), DType::float32};
    }
    if (of.kind == Kind::probabilities) a.probabilities = probabilities.data();
    if (of.kind == Kind::wide_probabilities) a.probabilities_c = wide_probabilities.data();
    if (of.weighted) a.weight = weight.data();
    return a;
  }
};

struct Expected {
  std::vector<Real> losses, max, sum, mass;  // of positions
  std::vector<Real> gradient;                // in the input's order
  Real loss = 0;
};

template <typename T>
Expected expected_of(const Problem<T>& problem) {
  const Case& of = problem.of;
  Expected result;
  result.gradient.resize(problem.x.size());
  const Real smooth = Real(of.smoothing) / of.C, keep = 1 - Real(of.smoothing);
  const Real totals[2] = {problem.total(problem.labels), problem.total(problem.partner_labels)};
  for (int64_t p = 0; p < of.positions(); ++p) {
    Real max = reg_kernels::kLowest<compute_t<T>>, sum = 0;
    for (int64_t c = 0; c < of.C; ++c) max = std::max(max, problem.logit(p, c));
    for (int64_t c = 0; c < of.C; ++c) sum += std::exp(problem.logit(p, c) - max);
    const auto loss_of = [&](int64_t c) { return std::log(sum) - (problem.logit(p, c) - max); };
    std::vector<Real> q(of.C);
    bool counts = false;
    Real loss = 0;
    if (of.has_probabilities()) {
      counts = true;
      const Real share = of.reduction == Reduction::mean ? Real(1) / of.positions() : Real(1);
      for (int64_t c = 0; c < of.C; ++c) {
        q[c] = share * problem.w(c) * (keep * problem.probability(p, c) + smooth);
        loss += q[c] * loss_of(c);
      }
    } else {
      for (int side = 0; side < (of.has_partner() ? 2 : 1); ++side) {
        const int64_t label = (side ? problem.partner_labels : problem.labels).data()[p];
        if (label == kIgnored) continue;
        counts = true;
        const Real lam = of.kind == Kind::shares ? Real(problem.lam[p / of.S])
                         : of.has_partner()      ? Real(driver::kLam)
                                                 : Real(1);
        const Real share = (side ? 1 - lam : lam) / totals[side];
        q[label] += share * keep * problem.w(label);
        loss += share * keep * problem.w(label) * loss_of(label);
        for (int64_t c = 0; of.smoothing > 0 && c < of.C; ++c) {
          q[c] += share * smooth * problem.w(c);
          loss += share * smooth * problem.w(c) * loss_of(c);
        }
      }
    }
    Real mass = 0;
    for (const Real each : q) mass += each;
    for (int64_t c = 0; counts && c < of.C; ++c) {
      result.gradient[problem.at(p, c)] = mass * std::exp(problem.logit(p, c) - max) / sum - q[c];
    }
    result.losses.push_back(loss);
    result.mass.push_back(mass);
    result.max.push_back(max);
    result.sum.push_back(sum);
    result.loss += loss;
  }
  const bool of_nothing = totals[0] == 0 || (of.has_partner() && totals[1] == 0);
  if (!of.has_probabilities() && of_nothing) result.loss = kNaN;
  return result;
}

template <typename T>
constexpr double kRounding = std::is_same_v<T, double>    ? 0x1p-53
                             : std::is_same_v<T, float>   ? 0x1p-24
                             : std::is_same_v<T, float16> ? 0x1p-11
                                                          : 0x1p-8;

template <typename T>
struct Run {
  using C = compute_t<T>;

  const Problem<T>& problem;
  const Expected expected = expected_of(problem);
  std::string name = std::string(driver::kName<T>) + " " + problem.of.text();

  explicit Run(const Problem<T>& problem) : problem(problem) {}

  void near(const char* what, int64_t i, Real actual, Real wanted, Real error) const {
    driver::expect(is_near(actual, wanted, error), [&] {
      return "cross_entropy " + name + ": " + what + " " + std::to_string(i) + " is " +
             std::to_string(actual) + ", expected " + std::to_string(wanted);
    });
  }

  // A gradient times `factor(position)`.
  template <typename Factor>
  void check_gradient(const char* what, const Buffer<T>& gradient, const Factor& factor) const {
    const Case& of = problem.of;
    constexpr Real kError = 16 * kRounding<C>;
    for (int64_t p = 0; p < of.positions(); ++p) {
      for (int64_t c = 0; c < of.C; ++c) {
        const Real wanted = expected.gradient[problem.at(p, c)] * factor(p);
        // A float16 has no more than the steps of a subnormal; infinite is what is beyond it.
        const Real step = std::is_same_v<T, float16> ? 0x1p-25 : 0;
        near(what, problem.at(p, c), reg_kernels::load(gradient.data()[problem.at(p, c)]), wanted,
             kRounding<T> * std::fabs(wanted) + kError * expected.mass[p] * std::fabs(factor(p)) +
                 step);
      }
    }
    driver::expect(gradient.untouched(), [&] { return name + ": wrote in front of " + what; });
  }

  void forward(bool keeps_gradient) const {
    const Case& of = problem.of;
    const bool none = of.reduction == Reduction::none;
    constexpr Real kError = 16 * kRounding<C>;
    std::vector<std::vector<C>> results;
    for (int launch = 0; launch < 2; ++launch) {
      Buffer<C> loss(none ? of.positions() : 1, 0), stats(2 * of.positions(), 0);
      Buffer<T> gradient(keeps_gradient ? problem.x.size() : 0, of.shift);
      auto a = problem.arguments();
      (none ? a.losses : a.sum.loss) = loss.data();
      a.stats = stats.data();
      if (keeps_gradient) a.gradient = gradient.data();
      Memory memory;
      reg_kernels::cuda::launch_cross_entropy(a, memory, nullptr, of.most_blocks);
      results.emplace_back(loss.data(), loss.data() + loss.size());
      if (launch) continue;
      Real scale = 0;
      for (const Real each : expected.losses) scale += std::fabs(each);
      if (none) {
        for (int64_t p = 0; p < of.positions(); ++p) {
          const Real wanted = expected.losses[p];
          near("loss", p, loss.data()[p], wanted, kError * (std::fabs(wanted) + 1));
        }
      } else {
        near("loss", 0, loss.data()[0], expected.loss, kError * scale);
      }
      for (int64_t p = 0; p < of.positions(); ++p) {
        near("max", p, stats.data()[p], expected.max[p], 0);
        near("sum", p, stats.data()[of.positions() + p], expected.sum[p], kError * expected.sum[p]);
      }
      if (keeps_gradient) check_gradient("gradient", gradient, [](int64_t) { return Real(1); });
    }
    const size_t bytes = results[0].size() * sizeof(C);
    driver::expect(std::memcmp(results[0].data(), results[1].data(), bytes) == 0,
                   [&] { return name + ": two launches differ"; });
  }

  void backward() const {
    const Case& of = problem.of;
    const bool none = of.reduction == Reduction::none;
    std::vector<double> grad_output(none ? of.positions() : 1);
    for (double& each : grad_output) each = 2 * uniform() - 1;
    std::vector<C> stats;
    for (const Real each : expected.max) stats.push_back(static_cast<C>(each));
    for (const Real each : expected.sum) stats.push_back(static_cast<C>(each));
    Buffer<T> gradient(problem.x.size(), of.shift);
    auto a = problem.arguments();
    a.stats = stats.data();
    a.gradient = gradient.data();
    a.grad_output = {grad_output.data(), DType::float64};
    a.one_grad_output = !none;
    Memory memory;
    reg_kernels::cuda::launch_cross_entropy_backward(a, memory, nullptr, of.most_blocks);
    check_gradient("backward", gradient,
                   [&](int64_t p) { return Real(grad_output[none ? p : 0]); });
  }
};

template <typename T>
void test(const Case& of) {
  cuda_on_cpu::device.shared_bytes_a_block = of.shared_bytes;
  const Problem<T> problem(of);
  const Run<T> run(problem);
  run.forward(true);
  run.forward(false);
  run.backward();
}

// Every kind of target with every option, for one size.
template <typename T>
void test_options(int64_t N, int64_t C, int64_t S, bool classes_last) {
  int turn = 0;
  for (const Kind kind :
       {Kind::labels, Kind::pair, Kind::shares, Kind::probabilities, Kind::wide_probabilities}) {
    for (const double smoothing : {0.0, 0.1}) {
      for (const bool weighted : {false, true}) {
        const auto reduction = static_cast<Reduction>(turn++ % 3);
        test<T>({N, C, S, kind, reduction, smoothing, weighted, classes_last});
      }
    }
  }
}

// Logits that are not usual, and labels that are all ignored.
template <typename T>
void test_special(int64_t N, int64_t C, int64_t S, bool classes_last) {
  for (const Logits logits :
       {Logits::huge, Logits::excluded, Logits::all_excluded, Logits::infinite}) {
    for (const double smoothing : {0.0, 0.1}) {
      Case of{N, C, S, Kind::labels, Reduction::none, smoothing, false, classes_last, logits};
      test<T>(of);
    }
    test<T>({N, C, S, Kind::probabilities, Reduction::none, 0, false, classes_last, logits});
  }
  for (const Reduction reduction : {Reduction::mean, Reduction::sum}) {
    Case of{N, C, S, Kind::pair, reduction, 0.1, true, classes_last, Logits::infinite, 1};
    test<T>(of);
    of.kind = Kind::labels;
    of.smoothing = 0;
    test<T>(of);
  }
  for (const Kind kind : {Kind::labels, Kind::shares, Kind::probabilities}) {
    Case of{N, C, S, kind, Reduction::mean, 0.1, true, classes_last};
    of.traced = true;
    test<T>(of);
  }
}

template <typename T>
void test_dtype() {
  constexpr bool kLast = true, kApart = false;
  const int64_t vector = reg_kernels::cuda::kVector<T>;
  test_options<T>(5, 2, 1, kLast);
  test_options<T>(7, 33, 1, kLast);
  test_options<T>(2, 5, 9, kApart);
  test_special<T>(4, 33, 1, kLast);
  test_special<T>(2, 19, 3, kApart);
  test<T>({1, 1, 1});
  test<T>({3, 1, 5});
  test<T>({3, 5, 7, Kind::labels, Reduction::mean, 0.1, false, kLast});
  // As many vectors as a warp keeps, and one more: with a row that begins anywhere, too.
  const int64_t most = 32 * vector * reg_kernels::cuda::kShortVectors<T>;
  for (const int64_t C : {most - vector + 1, most, most + 1}) {
    Case of{3, C, 1, Kind::labels, Reduction::sum};
    test<T>(of);
    of.shift = 1;
    test<T>(of);
  }
  test<T>({3, 1000, 1, Kind::shares, Reduction::mean, 0.1, true});
}

// Rows that a block takes, aligned or not, kept whole or in part.
template <typename T>
void test_long_rows() {
  for (const int64_t C : {5000, 4097}) {
    test<T>({2, C, 1, Kind::labels, Reduction::mean});
    Case of{3, C, 1, Kind::shares, Reduction::none, 0.1, true};
    of.shift = 1;
    of.shared_bytes = 8192;
    test<T>(of);
    // A block takes several rows.
    of.most_blocks = 2;
    test<T>(of);
    of.kind = Kind::wide_probabilities;
    test<T>(of);
  }
  for (const Logits logits : {Logits::huge, Logits::excluded, Logits::all_excluded}) {
    Case of{2, 4097, 1, Kind::labels, Reduction::none, 0.1};
    of.logits = logits;
    test<T>(of);
  }
}

// More labels than one block sums up, more positions than blocks, and planes kept in part.
template <typename T>
void test_many() {
  for (const bool weighted : {false, true}) {
    Case of{5000, 2, 1, Kind::pair, Reduction::mean, weighted ? 0.1 : 0.0, weighted};
    test<T>(of);
    of.most_blocks = 3;
    test<T>(of);
    Case planes{3, 37, 131, Kind::pair, Reduction::mean, weighted ? 0.1 : 0.0, weighted};
    test<T>(planes);
    planes.most_blocks = 2;
    planes.shared_bytes = 16384;
    test<T>(planes);
    planes = {2, 200, 3, Kind::labels, Reduction::sum, weighted ? 0.1 : 0.0, weighted};
    test<T>(planes);
  }
}

void test_assertions() {
  for (const int64_t label : {int64_t{-1}, int64_t{5}}) {
    for (const Reduction reduction : {Reduction::none, Reduction::mean}) {
      Problem<float> problem({3, 5, 1, Kind::pair, reduction});
      problem.partner_labels.data()[2] = label;
      const bool none = reduction == Reduction::none;
      driver::expect_assertion(
          [&] {
            Buffer<float> loss(3, 0);
            auto a = problem.arguments();
            (none ? a.losses : a.sum.loss) = loss.data();
            Memory memory;
            reg_kernels::cuda::launch_cross_entropy(a, memory, nullptr);
          },
          none ? "a.labels.is_valid(a.labels.partner_labels[position])" : "options.is_valid(label)",
          [] { return "cross_entropy: a label out of range"; });
    }
  }
}

template <typename T>
void test_rescale() {
  for (const double factor : {1.0, -0.37, 0.0}) {
    for (const int64_t size : {0, 1, 37, 20001}) {
      for (const int64_t shift : {0, 1}) {
        Buffer<T> x(size, shift);
        x.fill_with_bits(static_cast<uint64_t>(size + shift));
        std::vector<T> expected(x.data(), x.data() + size);
        const float by = static_cast<float>(factor);
        for (T& each : expected) {
          if (by != 1) each = reg_kernels::store<T>(reg_kernels::load(each) * compute_t<T>(by));
        }
        float on_device = by;
        reg_kernels::cuda::launch_rescale(x.data(), size, ChannelValues{&on_device, DType::float32},
                                          nullptr);
        driver::expect_same_bits(x, expected.data(), [&] {
          return std::string("rescale_ ") + driver::kName<T> + " " + std::to_string(size) + " by " +
                 std::to_string(factor);
        });
      }
    }
  }
}

template <typename T>
void test_all() {
  test_dtype<T>();
  test_long_rows<T>();
  test_rescale<T>();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  test_all<double>();
  test_all<float>();
  test_all<float16>();
  test_all<bfloat16>();
  test_many<float>();
  test_assertions();
  return driver::finish();
}
