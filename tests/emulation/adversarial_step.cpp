// Runs csrc/cuda/adversarial_step.cuh on the CPU. L-infinity is compared bit for bit with one
// element's formula written out, L1 and L2 with a projection in double that sorts.
#include "cuda/adversarial_step.cuh"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "driver.h"

namespace {

using driver::Buffer;
using driver::uniform;
using reg_kernels::BallNorm;
using reg_kernels::ChannelLayout;
using reg_kernels::compute_t;
using reg_kernels::load;
using reg_kernels::store;

struct Shape {
  int64_t N, C, L;
  bool channels_last;

  int64_t numel() const { return C * L; }
  int64_t channel(int64_t i) const { return channels_last ? i % C : i / L; }
};

struct Variant {
  bool each, normalised;
  int64_t shift;  // elements of adv past a 16-byte boundary
  int64_t most_blocks;
};

// The arguments of a launch, and what it leaves.
template <typename T>
struct Batch {
  using C = compute_t<T>;

  Shape shape;
  BallNorm norm;
  Variant variant;
  Buffer<T> before, adv, grad, clean;
  std::vector<double> steps, radii;
  std::vector<C> channels;

  Batch(const Shape& shape, BallNorm norm, const Variant& variant)
      : shape(shape),
        norm(norm),
        variant(variant),
        before(shape.N * shape.numel(), 0),
        adv(before.size(), variant.shift),
        grad(before.size(), 0),
        clean(before.size(), 0) {
    for (int64_t i = 0; i < before.size(); ++i) {
      const double origin = uniform(), away = (uniform() - 0.5) * 0.2;
      clean.data()[i] = store<T>(static_cast<C>(origin));
      before.data()[i] = store<T>(static_cast<C>(origin + away));
      const double slope = driver::below(7) ? uniform() - 0.5 : 0.0;
      grad.data()[i] = store<T>(static_cast<C>(slope));
    }
    if (before.size() > 3) {
      const C strange = std::numeric_limits<C>::quiet_NaN();
      grad.data()[1] = before.data()[2] = store<T>(strange);
    }
    std::copy_n(before.data(), before.size(), adv.data());
    const double unit = norm == BallNorm::linf ? 1.0
                        : norm == BallNorm::l1 ? static_cast<double>(shape.numel())
                                               : std::sqrt(static_cast<double>(shape.numel()));
    for (int64_t n = 0; n < std::max<int64_t>(variant.each ? shape.N : 1, 1); ++n) {
      steps.push_back(unit * (n % 2 ? -0.03 : 0.02));
      radii.push_back(unit * 0.04 * static_cast<double>(n % 3));
    }
    if (!variant.each) radii[0] = unit * 0.05;
    for (const double row : {0.5, 2.0, -0.25, 0.75}) {
      for (int64_t c = 0; c < shape.C; ++c) {
        const double by = 1 << c % 3;
        channels.push_back(static_cast<C>(row == 0.5 ? row * by : row == 2.0 ? row / by : row));
      }
    }
  }

  void launch() {
    reg_kernels::cuda::AdversarialStep<T> a{};
    a.adv = adv.data();
    a.grad = grad.data();
    a.clean = clean.data();
    a.samples = shape.N;
    a.layout = ChannelLayout{shape.C, shape.L, shape.channels_last};
    a.step_sizes = {variant.each ? steps.data() : nullptr, false, steps[0]};
    a.eps = {variant.each ? radii.data() : nullptr, false, radii[0]};
    a.lower = C(0);
    a.upper = C(1);
    a.channels = variant.normalised ? channels.data() : nullptr;
    reg_kernels::cuda::launch_adversarial_step(a, norm, nullptr, variant.most_blocks);
  }

  C number(int row, int64_t i) const {
    const C plain[] = {C(1), C(1), C(0), C(1)};
    return variant.normalised ? channels[row * shape.C + shape.channel(i)] : plain[row];
  }

  std::string text() const {
    return std::string("adversarial_step ") + driver::kName<T> + " norm " +
           std::to_string(static_cast<int>(norm)) + " (" + std::to_string(shape.N) + ", " +
           std::to_string(shape.C) + ", " + std::to_string(shape.L) + ")" +
           (shape.channels_last ? " last" : "") + (variant.each ? " each" : "") +
           (variant.normalised ? " normalised" : "") + " +" + std::to_string(variant.shift);
  }
};

// What adv becomes, in double, before it is rounded.
template <typename T>
std::vector<double> expected(const Batch<T>& b) {
  using C = compute_t<T>;
  std::vector<double> result;
  for (int64_t n = 0; n < b.shape.N; ++n) {
    const double step = b.steps[b.variant.each ? n : 0], eps = b.radii[b.variant.each ? n : 0];
    const int64_t at = n * b.shape.numel();
    std::vector<double> way, magnitudes;
    double norm = 0;
    const auto add = [&](double x) { norm += b.norm == BallNorm::l2 ? x * x : std::fabs(x); };
    const auto root = [&] { return b.norm == BallNorm::l2 ? std::sqrt(norm) : norm; };
    const auto slope = [&](int64_t i) {
      const double g = static_cast<double>(load(b.grad.data()[at + i]));
      return std::isnan(g) ? 0.0 : g * static_cast<double>(b.number(1, i));
    };
    for (int64_t i = 0; i < b.shape.numel(); ++i) add(slope(i));
    const double length = norm > 0 ? step / root() : 0;
    norm = 0;
    for (int64_t i = 0; i < b.shape.numel(); ++i) {
      const double x = static_cast<double>(load(b.before.data()[at + i]));
      const double origin = static_cast<double>(load(b.clean.data()[at + i]));
      way.push_back((x - origin) * static_cast<double>(b.number(0, i)) + length * slope(i));
      if (!std::isnan(way.back())) add(way.back()), magnitudes.push_back(std::fabs(way.back()));
    }
    double threshold = 0, factor = 1;
    if (root() > eps && b.norm == BallNorm::l2) factor = eps / root();
    if (root() > eps && b.norm == BallNorm::l1) {
      std::sort(magnitudes.begin(), magnitudes.end(), std::greater<double>());
      double sum = 0;
      for (size_t k = 0; k < magnitudes.size(); ++k) {
        sum += magnitudes[k];
        threshold = std::max(threshold, (sum - eps) / static_cast<double>(k + 1));
      }
    }
    for (int64_t i = 0; i < b.shape.numel(); ++i) {
      const C x = load(b.before.data()[at + i]), origin = load(b.clean.data()[at + i]);
      const double lower = b.number(2, i), upper = b.number(3, i);
      double y;
      if (b.norm == BallNorm::linf) {
        const C s = static_cast<C>(step) * b.number(1, i), e = static_cast<C>(eps) * b.number(1, i);
        C moved = x + (slope(i) > 0 ? s : slope(i) < 0 ? -s : C(0));
        if (moved < origin - e) moved = origin - e;
        if (moved > origin + e) moved = origin + e;
        y = static_cast<double>(moved);
      } else {
        const double size = std::fabs(way[i]) - threshold;
        const double kept = size > 0 || std::isnan(size) ? std::copysign(size, way[i]) : 0;
        y = static_cast<double>(origin) + factor * kept * static_cast<double>(b.number(1, i));
      }
      result.push_back(std::isnan(y) ? y : std::min(std::max(y, lower), upper));
    }
  }
  return result;
}

template <typename T>
void test(const Shape& shape, BallNorm norm, const Variant& variant) {
  using C = compute_t<T>;
  Batch<T> b(shape, norm, variant);
  const std::vector<double> truth = expected(b);
  b.launch();
  const double ulp = sizeof(T) == 8 ? 1e-14 : sizeof(T) == 4 ? 1e-6 : 0;
  for (int64_t i = 0; i < b.adv.size(); ++i) {
    const double y = static_cast<double>(load(b.adv.data()[i])), e = truth[i];
    const auto clean = static_cast<double>(load(b.clean.data()[i]));
    const T rounded = store<T>(static_cast<C>(e));
    bool right = std::isnan(e) ? std::isnan(y) : std::fabs(y - e) <= ulp;
    if (norm == BallNorm::linf && sizeof(T) > 2) right = std::isnan(e) ? std::isnan(y) : y == e;
    if constexpr (sizeof(T) == 2) {
      // Rounded to nearest, or to the next number towards clean; in L1 and L2 never away from it.
      const T nearer{reg_kernels::next_towards(rounded.bits, b.clean.data()[i].bits)};
      double off = 1e-6;
      for (const T& at : {rounded, nearer}) {
        off = std::max(off, std::fabs(static_cast<double>(load(at)) - e));
      }
      right = std::isnan(e) ? std::isnan(y) : std::fabs(y - e) <= off;
      if (norm != BallNorm::linf && !std::isnan(e)) {
        right = right && std::fabs(y - clean) <= std::fabs(e - clean) + 1e-6;
      }
    }
    driver::expect(right, [&] {
      return b.text() + " at " + std::to_string(i) + ": " + std::to_string(y) + ", expected " +
             std::to_string(e) + ", clean " + std::to_string(clean);
    });
  }
  driver::expect(b.adv.untouched(), [&] { return b.text() + ": wrote in front of adv"; });
  // Two runs give the same bits.
  Batch<T> again = Batch<T>(shape, norm, variant);
  std::copy_n(b.before.data(), b.before.size(), again.adv.data());
  std::copy_n(b.grad.data(), b.grad.size(), again.grad.data());
  std::copy_n(b.clean.data(), b.clean.size(), again.clean.data());
  again.launch();
  driver::expect_same_bits(again.adv, b.adv.data(), [&] { return b.text() + " again"; });
}

// What rounding leaves of the ball in L-infinity: |y - clean| <= eps, exactly.
template <typename T>
void test_the_ball() {
  for (const double eps : {8.0 / 255, 1e-3, 0.0}) {
    Batch<T> b({2, 1, 999, false}, BallNorm::linf, {false, false, 0, 2});
    b.radii[0] = eps;
    b.steps[0] = 0.1;
    b.launch();
    for (int64_t i = 3; i < b.adv.size(); ++i) {
      const float away = load(b.adv.data()[i]) - load(b.clean.data()[i]);
      driver::expect(std::fabs(away) <= static_cast<float>(eps),
                     [&] { return b.text() + ": left the ball by rounding"; });
    }
  }
}

template <typename T>
void test_dtype() {
  const Shape shapes[] = {{3, 3, 16, false},   {3, 3, 16, true}, {2, 5, 7, false},
                          {2, 1, 4500, false}, {1, 1, 1, false}, {0, 3, 4, false},
                          {2, 3, 0, false}};
  for (const BallNorm norm : {BallNorm::linf, BallNorm::l1, BallNorm::l2}) {
    for (const Shape& shape : shapes) {
      for (const Variant& variant : {Variant{false, false, 0, 9}, Variant{true, true, 0, 1},
                                     Variant{true, false, 1, 2}, Variant{false, true, 0, 3}}) {
        test<T>(shape, norm, variant);
      }
    }
  }
  if constexpr (sizeof(T) == 2) test_the_ball<T>();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  test_dtype<double>();
  test_dtype<float>();
  test_dtype<driver::float16>();
  test_dtype<driver::bfloat16>();
  return driver::finish();
}
