// Runs csrc/cuda/subset.cuh on the CPU, bit for bit against what one element is by definition.
#include "cuda/subset.cuh"

#include <vector>

#include "driver.h"

namespace {

using driver::Buffer;
using reg_kernels::add_scaled;
using reg_kernels::compute_t;
using reg_kernels::scaled;
using reg_kernels::SubsetRows;

struct Shape {
  int64_t samples, kept, numel;
  int64_t shift;  // elements of each tensor past a 16-byte boundary
  int64_t most_blocks;
};

// The samples in an order that is none of theirs, to the byte: those that are kept come first.
struct Rows {
  Buffer<int64_t> kept, dropped;

  explicit Rows(const Shape& shape) : kept(shape.kept, 0), dropped(shape.samples - shape.kept, 0) {
    for (int64_t i = 0; i < shape.samples; ++i) {
      const int64_t row = shape.samples - 1 - (i + 1) % shape.samples;
      (i < shape.kept ? kept.data()[i] : dropped.data()[i - shape.kept]) = row;
    }
  }

  SubsetRows view() const {
    return {kept.data(), dropped.data(), kept.size(), kept.size() + dropped.size()};
  }
};

template <typename T>
Buffer<T> values(const Shape& shape, int64_t samples, uint64_t seed) {
  Buffer<T> x(samples * shape.numel, shape.shift);
  x.fill_with_bits(seed);
  return x;
}

template <typename T>
void test(const Shape& shape, bool gathers, bool adds, double factor) {
  const auto scale = static_cast<compute_t<T>>(factor);
  const Rows rows(shape);
  const SubsetRows view = rows.view();
  const auto x = values<T>(shape, gathers ? shape.samples : shape.kept, 1);
  const auto residual = values<T>(shape, adds ? shape.samples : 0, 2);
  Buffer<T> y((gathers ? shape.kept : shape.samples) * shape.numel, shape.shift);
  std::vector<T> expected(y.size());
  for (int64_t i = 0; i < (gathers ? shape.kept : shape.samples); ++i) {
    for (int64_t j = 0; j < shape.numel; ++j) {
      const int64_t of_batch = view.at(i) * shape.numel + j, of_subset = i * shape.numel + j;
      if (gathers) {
        expected[of_subset] = scaled(x.data()[of_batch], scale);
      } else if (i >= shape.kept) {
        expected[of_batch] = adds ? residual.data()[of_batch] : T{};
      } else if (adds) {
        expected[of_batch] = add_scaled(residual.data()[of_batch], x.data()[of_subset], scale);
      } else {
        expected[of_batch] = scaled(x.data()[of_subset], scale);
      }
    }
  }
  const reg_kernels::cuda::Subset<T> a{
      x.data(), adds ? residual.data() : nullptr, y.data(), view, shape.numel, scale, gathers};
  reg_kernels::cuda::launch_subset(a, nullptr, shape.most_blocks);
  driver::expect_same_bits(y, expected.data(), [&] {
    return std::string("subset ") + driver::kName<T> + (gathers ? " gathers " : " adds ") +
           std::to_string(shape.kept) + " of " + std::to_string(shape.samples) + ", " +
           std::to_string(shape.numel) + (adds ? " to a residual +" : " +") +
           std::to_string(shape.shift);
  });
}

template <typename T>
void test_dtype() {
  const Shape shapes[] = {{5, 2, 24, 0, 99}, {4, 3, 9000, 0, 3}, {3, 1, 37, 0, 2}, {4, 2, 16, 1, 1},
                          {1, 1, 8, 0, 9},   {2, 0, 8, 0, 9},    {0, 0, 8, 0, 9},  {3, 2, 0, 0, 9}};
  for (const Shape& shape : shapes) {
    for (const double factor : {1.0, 1.7}) {
      test<T>(shape, true, false, factor);
      test<T>(shape, false, false, factor);
      test<T>(shape, false, true, factor);
    }
  }
}

void test_assertion() {
  for (const int64_t row : {int64_t{-1}, int64_t{3}}) {
    const Shape shape{3, 1, 8, 0, 9};
    Rows rows(shape);
    rows.kept.data()[0] = row;
    const auto x = values<float>(shape, 3, 1);
    Buffer<float> y(8, 0);
    const reg_kernels::cuda::Subset<float> a{x.data(), nullptr, y.data(), rows.view(),
                                             8,        1.0f,    true};
    driver::expect_assertion([&] { reg_kernels::cuda::launch_subset(a, nullptr); },
                             "row >= 0 && row < a.rows.samples",
                             [&] { return "subset with row " + std::to_string(row); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  test_dtype<double>();
  test_dtype<float>();
  test_dtype<driver::float16>();
  test_dtype<driver::bfloat16>();
  test_assertion();
  return driver::finish();
}
