// Runs csrc/cuda/penalty.cuh on the CPU. Sums are compared with a plain loop's, in long double;
// gradients bit for bit with what one element's are by definition.
#include "cuda/penalty.cuh"

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>

#include "table.h"

namespace {

using driver::Buffer;
using driver::Table;
using driver::TableRow;
using reg_kernels::compute_t;
using reg_kernels::Penalty;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

uint64_t draws = 0x9e3779b97f4a7c15ull;

double uniform() {  // in (-1, 1)
  draws = draws * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<double>(static_cast<int64_t>(draws) >> 11) * 0x1p-52;
}

struct List {
  std::vector<int64_t> sizes;
  std::vector<int64_t> shifts;  // elements past a 16-byte boundary, in turn

  std::string text() const {
    return std::to_string(sizes.size()) + " tensors, the first of " +
           (sizes.empty() ? "none" : std::to_string(sizes[0])) + ", shifts from " +
           std::to_string(shifts[0]);
  }
};

template <typename T>
std::deque<Buffer<T>> buffers(const List& list, size_t offset = 0) {
  std::deque<Buffer<T>> result;
  for (size_t i = 0; i < list.sizes.size(); ++i) {
    result.emplace_back(list.sizes[i], list.shifts[(i + offset) % list.shifts.size()]);
  }
  return result;
}

template <typename T>
void fill(std::deque<Buffer<T>>& tensors) {
  for (auto& x : tensors) {
    for (int64_t i = 0; i < x.size(); ++i) {
      x.data()[i] = reg_kernels::store<T>(static_cast<compute_t<T>>(3 * uniform()));
    }
  }
}

template <typename T>
double sum_of(Penalty penalty, std::deque<Buffer<T>>& tensors, const List& list) {
  Table table(list.sizes);
  for (size_t i = 0; i < tensors.size(); ++i) table.set(TableRow::grad, i, tensors[i].data());
  // What an earlier launch has left among the partial sums must not matter.
  std::fill_n(table.scratch.get() + 1, table.chunks(), kNaN);
  std::vector<double> results;
  for (int replay = 0; replay < 2; ++replay) {
    const auto sum = std::make_unique<double>(kNaN);
    reg_kernels::cuda::launch_penalty<T>(penalty, table.view(), table.chunks(), sum.get(),
                                         table.scratch.get(), nullptr);
    results.push_back(*sum);
  }
  const auto describe = [&] {
    return std::string("penalty ") + driver::kName<T> + " " + list.text();
  };
  driver::expect(std::memcmp(&results[0], &results[1], sizeof(double)) == 0,
                 [&] { return describe() + ": two launches differ"; });
  driver::expect(table.ticket_is_zero(), [&] { return describe() + ": the ticket is not zero"; });
  return results[0];
}

template <typename T>
void test_sum(Penalty penalty, const List& list) {
  auto tensors = buffers<T>(list);
  fill(tensors);
  long double expected = 0;
  for (const auto& x : tensors) {
    for (int64_t i = 0; i < x.size(); ++i) {
      const long double value = static_cast<double>(reg_kernels::load(x.data()[i]));
      expected += penalty == Penalty::l2 ? value * value : std::fabs(value);
    }
  }
  const double actual = sum_of(penalty, tensors, list);
  driver::expect(
      std::fabs(static_cast<double>(actual - expected)) <= 1e-14 * static_cast<double>(expected),
      [&] {
        return std::string("penalty ") + driver::kName<T> + " " + list.text() + ": " +
               std::to_string(actual) + ", expected " +
               std::to_string(static_cast<double>(expected));
      });
  // The same order for any alignment.
  List elsewhere = list;
  for (int64_t& shift : elsewhere.shifts) shift = shift ? 0 : 1;
  auto moved = buffers<T>(elsewhere);
  for (size_t i = 0; i < tensors.size(); ++i) {
    std::copy_n(tensors[i].data(), tensors[i].size(), moved[i].data());
  }
  driver::expect(sum_of(penalty, moved, elsewhere) == actual, [&] {
    return std::string("penalty ") + driver::kName<T> + " " + list.text() +
           ": the sum depends on the alignment";
  });
}

template <typename T>
void test_gradient(Penalty penalty, const List& list) {
  using C = compute_t<T>;
  auto xs = buffers<T>(list), ys = buffers<T>(list, 1);
  Table table(list.sizes);
  for (size_t i = 0; i < xs.size(); ++i) {
    xs[i].fill_with_bits(i);
    table.set(TableRow::grad, i, xs[i].data());
    table.set(TableRow::param, i, ys[i].data());
  }
  const auto grad_output = std::make_unique<double>(-0.7);
  reg_kernels::cuda::launch_penalty_backward<T>(penalty, table.view(), table.chunks(),
                                                grad_output.get(), nullptr);
  const C g = static_cast<C>(*grad_output);
  for (size_t i = 0; i < xs.size(); ++i) {
    std::vector<T> expected;
    for (int64_t j = 0; j < xs[i].size(); ++j) {
      const C x = reg_kernels::load(xs[i].data()[j]);
      const C sign = x > 0 ? g : (x < 0 ? -g : C(0) * g);
      expected.push_back(reg_kernels::store<T>(penalty == Penalty::l2 ? C(2) * x * g : sign));
    }
    driver::expect_same_bits(ys[i], expected.data(), [&] {
      return std::string("penalty_backward ") + driver::kName<T> + " " + list.text() + " tensor " +
             std::to_string(i);
    });
  }
}

template <typename T>
void test_special() {
  for (const Penalty penalty : {Penalty::l1, Penalty::l2}) {
    for (const double value : {kNaN, kInfinity, -kInfinity}) {
      const List list{{5, 8193}, {0}};
      auto tensors = buffers<T>(list);
      fill(tensors);
      tensors[1].data()[8192] = reg_kernels::store<T>(static_cast<compute_t<T>>(value));
      const double sum = sum_of(penalty, tensors, list);
      driver::expect(std::isnan(value) ? std::isnan(sum) : sum == kInfinity, [&] {
        return "penalty: " + std::to_string(value) + " gave " + std::to_string(sum);
      });
    }
  }
}

template <typename T>
void test_dtype() {
  const std::vector<int64_t> edges = {0, 1, 7, 8191, 0, 8192, 8193, 20001, 0};
  const List lists[] = {{{}, {0}},    {{0, 0}, {0}},      {{1}, {0}},
                        {edges, {0}}, {edges, {1, 0, 3}}, {std::vector<int64_t>(70, 3), {0, 1, 2}}};
  for (const Penalty penalty : {Penalty::l1, Penalty::l2}) {
    for (const List& list : lists) {
      test_sum<T>(penalty, list);
      test_gradient<T>(penalty, list);
    }
  }
  test_special<T>();
}

// More partial sums than the last block's threads take at a time.
void test_many_chunks() {
  const List list{std::vector<int64_t>(8 * 256 + 100, 1), {0}};
  test_sum<float>(Penalty::l1, list);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  test_dtype<double>();
  test_dtype<float>();
  test_dtype<driver::float16>();
  test_dtype<driver::bfloat16>();
  test_many_chunks();
  return driver::finish();
}
