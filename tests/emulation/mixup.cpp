// Runs csrc/cuda/mixup.cuh on the CPU and compares every output, bit for bit but for what a NaN
// holds, with a loop over samples, channels and positions that shares with it the arithmetic of
// weights alone.
#include "cuda/mixup.cuh"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "driver.h"

namespace {

using driver::below;
using driver::bfloat16;
using driver::Buffer;
using driver::float16;
using driver::uniform;
using reg_kernels::ChannelLayout;
using reg_kernels::compute_t;
using reg_kernels::DType;
using reg_kernels::MixupBlend;
using reg_kernels::MixupBox;
using reg_kernels::cuda::mixup_compute_t;

template <typename T>
const char* name_of() {
  return std::is_same_v<T, uint8_t> ? "uint8" : driver::kName<T>;
}

struct Shape {
  int64_t N, C, D, H, W;

  int64_t length() const { return D * H * W; }
  int64_t sample() const { return C * length(); }
  std::string text() const {
    std::string text;
    for (const int64_t size : {N, C, D, H, W})
      text += (text.empty() ? "(" : ", ") + std::to_string(size);
    return text + ")";
  }
};

// Where element (n, c, l) lies.
int64_t offset(const Shape& s, bool channels_last, int64_t n, int64_t c, int64_t l) {
  return n * s.sample() + (channels_last ? l * s.C + c : c * s.length() + l);
}

enum class Order { reversed, permuted, one_cycle, kept, repeated };
enum class Lams { number, one, each };

// The arguments of a blend. What is on the heap is there to the byte.
struct Blend {
  Shape shape;
  Order order;
  Lams lams;
  int boxes;  // 0, 1 or a box for each sample
  std::vector<double> lam;
  std::vector<int64_t> index;
  std::vector<MixupBox> box;
  std::unique_ptr<float[]> lam_data;
  std::unique_ptr<int64_t[]> index_data, box_data, receivers, starts;

  Blend(const Shape& shape, Order order, Lams lams, int boxes)
      : shape(shape), order(order), lams(lams), boxes(boxes), index(shape.N) {
    const double some[] = {0.0, 1.0, 0.25, 0.7, 1e-9};
    const int64_t count = lams == Lams::each ? shape.N : 1;
    lam_data.reset(new float[count]);
    for (int64_t n = 0; n < count; ++n) {
      lam_data[n] = static_cast<float>(some[below(5)]);
      lam.push_back(lam_data[n]);
    }
    std::iota(index.begin(), index.end(), 0);
    if (order == Order::reversed) std::reverse(index.begin(), index.end());
    if (order == Order::repeated) {
      for (int64_t& partner : index) partner = below(shape.N);
    }
    // A shuffle that keeps no element in its place makes one cycle of them all.
    if (order == Order::permuted || order == Order::one_cycle) {
      const int64_t most = order == Order::permuted ? 1 : 0;
      for (int64_t n = shape.N - 1; n > 0; --n) std::swap(index[n], index[below(n + most)]);
    }
    index_data.reset(new int64_t[shape.N]);
    std::copy(index.begin(), index.end(), index_data.get());
    box_data.reset(new int64_t[4 * boxes]);
    for (int i = 0; i < boxes; ++i) {
      int64_t x[2] = {below(shape.W + 1), below(shape.W + 1)};
      int64_t y[2] = {below(shape.H + 1), below(shape.H + 1)};
      if (below(5) == 0) x[0] = x[1];  // none
      if (below(5) == 0) x[0] = y[0] = 0, x[1] = shape.W, y[1] = shape.H;
      const MixupBox made{std::min(x[0], x[1]), std::min(y[0], y[1]), std::max(x[0], x[1]),
                          std::max(y[0], y[1])};
      std::memcpy(box_data.get() + 4 * i, &made, sizeof(made));
      box.push_back(made);
    }
    receivers.reset(new int64_t[shape.N]);
    starts.reset(new int64_t[shape.N + 1]);
    int64_t found = 0;
    for (int64_t n = 0; n < shape.N; ++n) {
      starts[n] = found;
      for (int64_t m = 0; m < shape.N; ++m) {
        if (index[m] == n) receivers[found++] = m;
      }
    }
    starts[shape.N] = found;
  }

  // As the launchers are handed it.
  MixupBlend view(bool backward) const {
    MixupBlend view{};
    view.samples = shape.N;
    view.height = shape.H;
    view.width = shape.W;
    view.one_lam_for_all = lams != Lams::each;
    view.one_lam = lams == Lams::number ? lam[0] : 2.0;  // where it must not count, a wrong one
    if (lams != Lams::number) view.lam = {lam_data.get(), DType::float32};
    view.index = backward || order == Order::reversed ? nullptr : index_data.get();
    view.boxes = boxes ? box_data.get() : nullptr;
    view.one_box = boxes == 1;
    return view;
  }

  double lam_of(int64_t n) const { return lam[lams == Lams::each ? n : 0]; }

  // The weight of sample n itself at position l.
  double weight(int64_t n, int64_t l) const {
    if (boxes) {
      const MixupBox& b = box[boxes == 1 ? 0 : n];
      const int64_t row = l / shape.W % shape.H, column = l % shape.W;
      if (row >= b.y1 && row < b.y2 && column >= b.x1 && column < b.x2) return 0.0;
    }
    return lam_of(n);
  }

  std::string text() const {
    const char* orders[] = {"reversed", "permuted", "one cycle", "kept", "repeated"};
    const char* kinds[] = {"lam a number", "one lam", "lam for each"};
    return shape.text() + " " + orders[static_cast<int>(order)] + ", " +
           kinds[static_cast<int>(lams)] + " from " + std::to_string(lam[0]) + ", boxes " +
           std::to_string(boxes);
  }
};

template <typename C>
struct Constants {
  std::unique_ptr<C[]> scale, shift;

  Constants(int64_t channels, bool with_scale, bool with_shift) {
    if (with_scale) scale.reset(new C[channels]);
    if (with_shift) shift.reset(new C[channels]);
    for (int64_t c = 0; c < channels; ++c) {
      if (scale) scale[c] = static_cast<C>(0.5 + uniform());
      if (shift) shift[c] = static_cast<C>(uniform() - 0.5);
    }
  }

  C apply(C value, int64_t c) const {
    if (scale) value *= scale[c];
    if (shift) value += shift[c];
    return value;
  }
};

// How a launch is made, apart from its blend.
struct Variant {
  bool from_last, to_last;
  int64_t x_shift, y_shift;  // elements past a 16-byte boundary
  bool scale, shift;
  int64_t most_blocks;

  std::string text() const {
    return std::string(from_last ? " from last" : "") + (to_last ? " to last" : "") + " x+" +
           std::to_string(x_shift) + " y+" + std::to_string(y_shift) + (scale ? " scale" : "") +
           (shift ? " shift" : "") + " blocks " + std::to_string(most_blocks);
  }
};

// Numbers, and now and then what must not reach those that do not take it.
template <typename T>
Buffer<T> batch(int64_t count, int64_t shift) {
  Buffer<T> x(count, shift);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, uint8_t>) {
      x.data()[i] = static_cast<uint8_t>(below(256));
    } else {
      const double special[] = {std::numeric_limits<double>::quiet_NaN(),
                                std::numeric_limits<double>::infinity(), -0.0};
      const double value = below(24) ? 6 * uniform() - 3 : special[below(3)];
      x.data()[i] = reg_kernels::store<T>(static_cast<compute_t<T>>(value));
    }
  }
  return x;
}

template <typename T, typename C>
C number(T value) {
  return static_cast<C>(reg_kernels::load(value));
}

template <typename T, typename Describe>
void expect_same(const Buffer<T>& actual, const std::vector<T>& expected,
                 const Describe& describe) {
  for (int64_t i = 0; i < actual.size(); ++i) {
    const auto a = reg_kernels::load(actual.data()[i]), b = reg_kernels::load(expected[i]);
    const bool same = std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b));
    driver::expect(same, [&] {
      return describe() + " at " + std::to_string(i) + ": " + std::to_string(a) + ", expected " +
             std::to_string(b);
    });
  }
  driver::expect(actual.untouched(), [&] { return describe() + ": wrote in front of its output"; });
}

// The output of each element, by element(n, c, l).
template <typename Out, typename C, typename Element>
std::vector<Out> outputs(const Shape& s, bool channels_last, const Element& element) {
  std::vector<Out> result(s.N * s.sample());
  for (int64_t n = 0; n < s.N; ++n) {
    for (int64_t c = 0; c < s.C; ++c) {
      for (int64_t l = 0; l < s.length(); ++l) {
        const C value = element(n, c, l);
        result[offset(s, channels_last, n, c, l)] =
            reg_kernels::store<Out>(static_cast<compute_t<Out>>(value));
      }
    }
  }
  return result;
}

template <typename In, typename Out, typename C>
std::vector<Out> blended(const Blend& blend, const Constants<C>& constants, const In* x,
                         bool from_last, bool to_last) {
  return outputs<Out, C>(blend.shape, to_last, [&](int64_t n, int64_t c, int64_t l) {
    const double w = blend.weight(n, l);
    const C own = number<In, C>(x[offset(blend.shape, from_last, n, c, l)]);
    const C partner = number<In, C>(x[offset(blend.shape, from_last, blend.index[n], c, l)]);
    const C a = static_cast<C>(w), b = static_cast<C>(1 - w);
    return constants.apply(b == 0 ? own : a == 0 ? partner : a * own + b * partner, c);
  });
}

template <typename In, typename Out>
void test_forward(const Blend& blend, const Variant& v) {
  using C = mixup_compute_t<In, Out>;
  const Shape& s = blend.shape;
  const int64_t count = s.N * s.sample();
  const Constants<C> constants(s.C, v.scale, v.shift);
  const Buffer<In> x = batch<In>(count, v.x_shift);
  Buffer<Out> y(count, v.y_shift);
  reg_kernels::cuda::launch_mixup(
      x.data(), y.data(), blend.view(false), ChannelLayout{s.C, s.length(), v.from_last}, v.to_last,
      constants.scale.get(), constants.shift.get(), nullptr, v.most_blocks);
  const auto expected = blended<In, Out, C>(blend, constants, x.data(), v.from_last, v.to_last);
  expect_same(y, expected, [&] {
    return std::string("mixup ") + name_of<In>() + " to " + name_of<Out>() + " " + blend.text() +
           v.text();
  });
}

template <typename T>
void test_in_place(const Blend& blend, const Variant& v) {
  using C = compute_t<T>;
  const Shape& s = blend.shape;
  const Constants<C> constants(s.C, v.scale, v.shift);
  Buffer<T> x = batch<T>(s.N * s.sample(), v.x_shift);
  const auto expected = blended<T, T, C>(blend, constants, x.data(), v.from_last, v.from_last);
  reg_kernels::cuda::launch_mixup_in_place(
      x.data(), blend.view(false), ChannelLayout{s.C, s.length(), v.from_last},
      constants.scale.get(), constants.shift.get(), nullptr, v.most_blocks);
  expect_same(x, expected, [&] {
    return std::string("mixup_ ") + name_of<T>() + " " + blend.text() + v.text();
  });
}

template <typename In, typename Out>
void test_backward(const Blend& blend, const Variant& v) {
  using C = mixup_compute_t<In, Out>;
  const Shape& s = blend.shape;
  const int64_t count = s.N * s.sample();
  const Constants<C> constants(s.C, v.scale, false);
  const Buffer<In> g = batch<In>(count, v.x_shift);
  Buffer<Out> y(count, v.y_shift);
  const bool reversed = blend.order == Order::reversed;
  reg_kernels::cuda::launch_mixup_backward(
      g.data(), y.data(), blend.view(true), reversed ? nullptr : blend.receivers.get(),
      reversed ? nullptr : blend.starts.get(), ChannelLayout{s.C, s.length(), v.from_last},
      v.to_last, constants.scale.get(), nullptr, v.most_blocks);
  const auto expected = outputs<Out, C>(s, v.to_last, [&](int64_t n, int64_t c, int64_t l) {
    C sum = C(-0.0);
    for (int64_t i = blend.starts[n]; i < blend.starts[n + 1]; ++i) {
      const int64_t m = blend.receivers[i];
      const C weight = static_cast<C>(1 - blend.weight(m, l));
      if (weight != 0) sum += weight * number<In, C>(g.data()[offset(s, v.from_last, m, c, l)]);
    }
    const C weight = static_cast<C>(blend.weight(n, l));
    if (weight != 0) sum += weight * number<In, C>(g.data()[offset(s, v.from_last, n, c, l)]);
    return constants.apply(sum, c);
  });
  expect_same(y, expected, [&] {
    return std::string("mixup_backward ") + name_of<In>() + " to " + name_of<Out>() + " " +
           blend.text() + v.text();
  });
}

// Blocks of 256 threads have 2 vectors each, 4096 elements of 16 bits; of a change of layout 4096,
// and 64 channels at a time where there are more than 16.
const Shape kShapes[] = {
    {1, 1, 1, 1, 1},   {0, 3, 1, 4, 4},   {2, 3, 1, 0, 4},   {5, 3, 1, 9, 7},    {4, 8, 1, 8, 8},
    {3, 1, 1, 16, 9},  {3, 2, 2, 5, 6},   {7, 130, 1, 1, 1}, {6, 1, 1, 1, 1},    {3, 70, 1, 5, 13},
    {2, 72, 1, 8, 16}, {3, 3, 1, 40, 40}, {3, 24, 1, 6, 8},  {2, 16, 1, 16, 18}, {33, 3, 1, 2, 2},
};

Blend some_blend(const Shape& shape, int turn, bool in_place) {
  const auto order = static_cast<Order>(turn % (in_place ? 4 : 5));
  const int64_t boxes[] = {0, 1, shape.N};
  return Blend(shape, order, static_cast<Lams>(turn / 5 % 3),
               shape.N ? static_cast<int>(boxes[turn / 2 % 3]) : 0);
}

Variant some_variant(int turn, bool from_last, bool to_last) {
  // Mostly aligned: sizes see to it that many are not whole all the same.
  const bool moved = below(4) == 0;
  const int64_t most = below(4) ? reg_kernels::cuda::kMostBlocks : 2;
  return {from_last,     to_last, moved ? below(3) : 0, moved ? below(3) : 0, turn % 2 == 0,
          turn % 3 == 0, most};
}

template <typename In, typename Out>
void test_types(int turns) {
  int turn = 0;
  for (const Shape& shape : kShapes) {
    for (const bool from_last : {false, true}) {
      for (const bool to_last : {false, true}) {
        for (int i = 0; i < turns; ++i, ++turn) {
          const Blend blend = some_blend(shape, turn + i, false);
          test_forward<In, Out>(blend, some_variant(turn, from_last, to_last));
          if constexpr (!std::is_same_v<In, uint8_t>) {
            test_backward<In, Out>(blend, some_variant(turn + 1, from_last, to_last));
          }
        }
      }
    }
  }
}

// Whole vectors that a channel, or a position of several channels, ends in at any element, with an
// edge of a box there now and then.
template <typename T>
void test_inner_edges() {
  for (const Shape& shape : {Shape{2, 8, 1, 3, 5}, Shape{3, 11, 1, 8, 7}, Shape{2, 5, 1, 8, 9}}) {
    for (int turn = 0; turn < 24; ++turn) {
      const bool from_last = turn % 2, to_last = turn / 2 % 2;
      const Blend blend(shape, Order::permuted, Lams::each, static_cast<int>(shape.N));
      const Variant variant{from_last, to_last, 0, 0, true, true, reg_kernels::cuda::kMostBlocks};
      test_forward<T, T>(blend, variant);
      test_backward<T, T>(blend, variant);
      test_in_place<T>(blend, variant);
    }
  }
}

template <typename T>
void test_own_type() {
  test_inner_edges<T>();
  test_types<T, T>(4);
  // Cycles longer than what is read ahead, and more samples than a group.
  const Shape shapes[] = {{1, 3, 1, 5, 5},  {2, 3, 1, 8, 8},  {0, 3, 1, 5, 5},  {5, 3, 1, 40, 40},
                          {31, 2, 1, 4, 4}, {33, 1, 1, 1, 1}, {70, 3, 1, 3, 3}, {64, 8, 1, 4, 4}};
  int turn = 0;
  for (const Shape& shape : shapes) {
    for (int i = 0; i < 12; ++i, ++turn) {
      const bool last = turn % 2;
      test_in_place<T>(some_blend(shape, turn + turn / 4, true), some_variant(turn, last, last));
    }
  }
}

// ---- What is asserted of values.

// The conditions, as the kernels write them.
constexpr const char* kIndex = "m >= 0 && m < samples";
constexpr const char* kPermutation = "partners == all";
constexpr const char* kLam = "lam >= 0 && lam <= 1";
constexpr const char* kBox = "box.fits(a.blend.height, a.blend.width)";
constexpr const char* kStarts = "0 <= first && first <= last && last <= samples";

template <typename Change>
void test_assertion(const char* forward, const char* in_place, const char* backward,
                    const Change& change) {
  Blend blend({4, 3, 1, 4, 8}, Order::kept, Lams::each, 4);
  change(blend);
  const ChannelLayout layout{3, 32, false};
  Buffer<float> x = batch<float>(4 * 96, 0), y(4 * 96, 0);
  const auto describe = [] { return "an assertion"; };
  for (const bool to_last : {false, true}) {
    if (forward) {
      driver::expect_assertion(
          [&] {
            reg_kernels::cuda::launch_mixup(x.data(), y.data(), blend.view(false), layout, to_last,
                                            nullptr, nullptr, nullptr);
          },
          forward, describe);
    }
    if (backward) {
      driver::expect_assertion(
          [&] {
            reg_kernels::cuda::launch_mixup_backward(x.data(), y.data(), blend.view(true),
                                                     blend.receivers.get(), blend.starts.get(),
                                                     layout, to_last, nullptr, nullptr);
          },
          backward, describe);
    }
  }
  if (in_place) {
    driver::expect_assertion(
        [&] {
          reg_kernels::cuda::launch_mixup_in_place(x.data(), blend.view(false), layout, nullptr,
                                                   nullptr, nullptr);
        },
        in_place, describe);
  }
}

void test_assertions() {
  for (const int64_t wrong : {int64_t{-1}, int64_t{4}, std::numeric_limits<int64_t>::max()}) {
    test_assertion(kIndex, nullptr, kIndex,
                   [&](Blend& blend) { blend.index_data[2] = blend.receivers[1] = wrong; });
  }
  for (const float wrong : {-0.1f, 1.5f, std::numeric_limits<float>::quiet_NaN()}) {
    test_assertion(kLam, kLam, kLam, [&](Blend& blend) { blend.lam_data[3] = wrong; });
  }
  const MixupBox boxes[] = {{-1, 0, 3, 3}, {0, 0, 9, 3}, {0, 0, 8, 5}, {0, -2, 1, 1}, {5, 1, 4, 2}};
  for (const MixupBox& wrong : boxes) {
    test_assertion(kBox, kBox, kBox, [&](Blend& blend) {
      std::memcpy(blend.box_data.get() + 8, &wrong, sizeof(wrong));
    });
  }
  test_assertion(nullptr, nullptr, kStarts, [](Blend& blend) { blend.starts[2] = 5; });
  test_assertion(nullptr, nullptr, kStarts, [](Blend& blend) { blend.starts[1] = -1; });
  // Not a permutation: a cycle with a sample leading into it, one that nobody comes back to. The
  // group's first check says so.
  const int64_t indices[][4] = {
      {0, 0, 2, 3}, {1, 1, 2, 3}, {3, 1, 1, 1}, {1, 2, 3, 1}, {-1, 1, 2, 3}};
  for (const auto& index : indices) {
    test_assertion(nullptr, kPermutation, nullptr,
                   [&](Blend& blend) { std::copy_n(index, 4, blend.index_data.get()); });
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  test_own_type<double>();
  test_own_type<float>();
  test_own_type<float16>();
  test_own_type<bfloat16>();
  test_types<uint8_t, double>(1);
  test_types<uint8_t, float>(2);
  test_types<uint8_t, bfloat16>(2);
  test_types<float, bfloat16>(2);
  test_types<float16, float>(2);
  test_types<bfloat16, float16>(1);
  test_types<double, float16>(1);
  test_types<bfloat16, double>(1);
  test_assertions();
  return driver::finish();
}
