// Runs csrc/cuda/elementwise.cuh on the CPU, for the op whose header comes first, and the loops of
// csrc/cpu/elementwise.simd.cpp, and compares every output, bit for bit, with a scalar reference
// that shares with them one element's arithmetic and the generator, and nothing of how elements,
// groups, channels and threads correspond.
#include "cpu/elementwise.simd.cpp"
#include "cuda/elementwise.cuh"

#include <algorithm>
#include <vector>

#include "driver.h"

namespace {

using driver::Buffer;
using reg_kernels::ChannelLayout;
using reg_kernels::compute_t;
using reg_kernels::DrawnFor;
using reg_kernels::DropoutRate;
using reg_kernels::factor_t;
using reg_kernels::has_form;
using reg_kernels::Op;
using reg_kernels::cuda::RateArgument;
using reg_kernels::cuda::RngState;

// A shard of a batch can begin anywhere; the last one's groups need the counter's second word.
const int64_t kOffsets[] = {0, 1, 5, 8, 13, (int64_t{1} << 33) + 3, (int64_t{1} << 40) + 6};
const uint32_t kThresholds[] = {0, 1, 32768, 65535, 65536};
// 2048, 4096, 8192 and 16384 elements fill a block in fp64, fp32, 16 bits and bytes.
const int64_t kSizes[] = {0, 1, 3, 7, 8, 9, 127, 1024, 2049, 8191, 8192, 20001};

// No half is zero: each is a key or counter word of its own.
constexpr uint64_t kSeed = 0x9e3779b97f4a7c15ull, kRngOffset = 0x0000000500000007ull;

// The op's number: of one that keeps or drops, the probability that has this threshold.
double number_of(uint32_t threshold) {
  if (Op::kNumber.most == 1.0) return 1.0 - threshold / 65536.0;
  return threshold / 1024.0;
}

// The op's options; of one that keeps or drops, whether what is kept is scaled.
struct OptionValues {
  double at[reg_kernels::kMostOptions];
};
OptionValues options_of(bool scaled) { return {{scaled ? 1.0 : 0.0, -1.5, 0.375}}; }

// What an element is told: the op's number and options or, of one that keeps or drops, the scale.
template <typename T>
factor_t<Op, T> factor_of(uint32_t threshold, bool scaled) {
  if constexpr (reg_kernels::kKeepsOrDrops<Op>) {
    if (!scaled) return 1;
    return static_cast<compute_t<T>>(threshold ? 65536.0 / threshold : 0.0);
  } else {
    return reg_kernels::FactorOf<Op, T>::from(number_of(threshold), options_of(scaled).at);
  }
}

// The contract of philox.h, one element at a time.
class Draws {
 public:
  uint32_t at(int64_t element) {
    constexpr int64_t kAGroup = sizeof(reg_kernels::drawn_t<Op>) == 4 ? 4 : 8;
    const uint64_t group = static_cast<uint64_t>(element / kAGroup);
    if (!drawn_ || group != group_) {
      const uint64_t key = kSeed ^ static_cast<uint64_t>(Op::kTag);
      words_ = reg_kernels::philox4x32(key, group, kRngOffset);
      group_ = group;
      drawn_ = true;
    }
    if constexpr (reg_kernels::kDrawsNormals<Op>) {
      const uint32_t* const w = words_.w + element % 4 / 2 * 2;
      const auto pair = reg_kernels::normal_pair<reg_kernels::OneLane>(w[0], w[1]);
      return reg_kernels::bit_cast<uint32_t>(element % 2 ? pair.second : pair.first);
    }
    if (kAGroup == 4) return words_.w[element % 4];
    const uint32_t word = words_.w[element % 8 / 2];
    return element % 2 ? word >> 16 : word & 0xffffu;
  }

 private:
  bool drawn_ = false;
  uint64_t group_ = 0;
  reg_kernels::PhiloxWords words_{};
};

// One element as the op's header has it; `residual` is one or nothing.
template <typename T, typename... Residual>
T element(T x, uint32_t drawn, uint32_t threshold, const factor_t<Op, T>& factor,
          Residual... residual) {
  if constexpr (reg_kernels::kDrawsNormals<Op>) {
    return Op::element(x, {reg_kernels::bit_cast<float>(drawn)}, factor, residual...);
  } else if constexpr (!reg_kernels::kKeepsOrDrops<Op>) {
    return Op::element(x, static_cast<Op::Draw>(drawn), factor, residual...);
  } else if constexpr (Op::kReadsDropped) {
    return Op::element(x, drawn < threshold ? factor : 0, residual...);
  } else {
    if (drawn < threshold) return Op::element(x, factor, residual...);
    T left{};
    ((left = residual), ...);
    return left;
  }
}

// The same beside a residual, where there is one.
template <typename T>
T element_at(T x, const T* residual, uint32_t drawn, uint32_t threshold,
             const factor_t<Op, T>& factor) {
  if constexpr (Op::kAdds) {
    if (residual) return element(x, drawn, threshold, factor, *residual);
  }
  return element(x, drawn, threshold, factor);
}

// How a launch is made, apart from its sizes.
struct Variant {
  int64_t x_shift, y_shift;  // elements past a 16-byte boundary
  bool on_device;            // the number and rng_state behind pointers
  bool in_place;
  bool adds = false;  // where the op does
  bool scaled = true;
  int64_t channels = 0;  // of a layer scale, which has as many elements between them as follows
  int64_t inner = 1;

  std::string text() const {
    return "x+" + std::to_string(x_shift) + " y+" + std::to_string(y_shift) +
           (on_device ? " on device" : "") + (in_place ? " in place" : "") +
           (adds ? " with a residual" : "") + (scaled ? "" : " option 0 off") +
           (channels ? " scale " + std::to_string(channels) + " by " + std::to_string(inner) : "");
  }
};

// The factors of a variant's layer scale, of which no product with a scale is NaN.
template <typename T>
Buffer<compute_t<T>> scales_of(const Variant& variant) {
  Buffer<compute_t<T>> scales(variant.channels, 1);
  for (int64_t c = 0; c < variant.channels; ++c) {
    scales.data()[c] = static_cast<compute_t<T>>((c % 7 - 3) / 3.0);
  }
  return scales;
}

// Of two NaNs a processor's sum is either one, so no residual is one.
template <typename T>
Buffer<T> residual_of(int64_t numel, int64_t shift) {
  Buffer<T> residual(numel, shift);
  residual.fill_with_bits(numel + 1);
  for (int64_t i = 0; i < numel; ++i) {
    T& value = residual.data()[i];
    if (reg_kernels::load(value) != reg_kernels::load(value)) value = reg_kernels::store<T>(1);
  }
  return residual;
}

// What the loops for the CPU are handed.
template <typename T>
reg_kernels::ElementwiseTask task_of(const T* x, T* y, const T* residual, int64_t numel,
                                     const ChannelLayout& layout, int64_t offset,
                                     uint32_t threshold, const Variant& variant,
                                     const reg_kernels::LayerScale& layer_scale = {}) {
  const DropoutRate rate = reg_kernels::rate_of<Op>(number_of(threshold));
  constexpr auto kDType = std::is_same_v<T, double>            ? reg_kernels::DType::float64
                          : std::is_same_v<T, float>           ? reg_kernels::DType::float32
                          : std::is_same_v<T, driver::float16> ? reg_kernels::DType::float16
                                                               : reg_kernels::DType::bfloat16;
  const bool stream = variant.y_shift % 2;  // either way
  const OptionValues options = options_of(variant.scaled);
  return {x,
          y,
          residual,
          numel,
          kDType,
          std::is_same_v<T, uint8_t>,
          offset,
          rate.threshold,
          rate.scale,
          {options.at[0], options.at[1], options.at[2]},
          kSeed,
          kRngOffset,
          stream,
          layout.channels,
          layout.length,
          layout.channels_last,
          layer_scale};
}

// Calls launch(x, y, rate, rng) as the variant says, and checks what it left in y and in x.
template <typename T, typename Launch, typename Describe>
void run(const Buffer<T>& x, const std::vector<T>& expected, uint32_t threshold,
         const Variant& variant, const Launch& launch, const Describe& describe) {
  const auto number = std::make_unique<double>(number_of(threshold));
  const auto state = std::make_unique<int64_t[]>(2);
  state[0] = static_cast<int64_t>(kSeed);
  state[1] = static_cast<int64_t>(kRngOffset);
  // Where one form of an argument is in use, the other one holds what would be wrong.
  const RateArgument rate = variant.on_device ? RateArgument(number.get())
                                              : RateArgument(reg_kernels::rate_of<Op>(*number));
  const RngState rng =
      variant.on_device ? RngState{state.get(), 1, 2} : RngState{nullptr, kSeed, kRngOffset};
  Buffer<T> y(x.size(), variant.y_shift);
  if (variant.in_place) {
    std::copy_n(x.data(), x.size(), y.data());
    launch(y.data(), y.data(), rate, rng);
  } else {
    const std::vector<T> before(x.data(), x.data() + x.size());
    launch(x.data(), y.data(), rate, rng);
    driver::expect(
        std::equal(before.begin(), before.end(), x.data(),
                   [](const T& a, const T& b) { return !std::memcmp(&a, &b, sizeof(T)); }),
        [&] { return describe() + ": wrote into its input"; });
  }
  driver::expect_same_bits(y, expected.data(), describe);
}

template <typename T>
void test_elements(int64_t numel, int64_t offset, uint32_t threshold,
                   const std::vector<Variant>& variants) {
  Buffer<T> values(numel, 0);
  values.fill_with_bits(numel);
  for (const Variant& variant : variants) {
    const auto factor = factor_of<T>(threshold, variant.scaled);
    const Buffer<T> residual = residual_of<T>(numel, variant.y_shift);
    const T* const added = variant.adds ? residual.data() : nullptr;
    Draws draws;
    std::vector<T> expected;
    for (int64_t i = 0; i < numel; ++i) {
      expected.push_back(element_at(values.data()[i], added ? added + i : nullptr,
                                    draws.at(offset + i), threshold, factor));
    }
    Buffer<T> x(numel, variant.x_shift);
    std::copy_n(values.data(), numel, x.data());
    const auto describe = [&](const char* what) {
      return std::string(what) + " " + driver::kName<T> + " numel " + std::to_string(numel) +
             " element_offset " + std::to_string(offset) + " threshold " +
             std::to_string(threshold) + " " + variant.text();
    };
    run(
        x, expected, threshold, variant,
        [&](const T* in, T* out, const RateArgument& rate, const RngState& rng) {
          reg_kernels::cuda::launch_elements<Op, T>(in, out, {added, options_of(variant.scaled).at},
                                                    numel, offset, rate, rng, nullptr);
        },
        [&] { return describe("elements"); });
    if (variant.on_device) continue;
    run(
        x, expected, threshold, variant,
        [&](const T* in, T* out, const RateArgument&, const RngState&) {
          reg_kernels::elements_range<reg_kernels::kOpTag>(
              task_of(in, out, added, numel, {1, 1, false}, offset, threshold, variant), 0, numel);
        },
        [&] { return describe("loops over elements"); });
  }
}

template <typename T>
void test_channels(int64_t N, int64_t C, int64_t L, bool channels_last, int64_t offset,
                   uint32_t threshold, const Variant& variant) {
  const auto factor = factor_of<T>(threshold, variant.scaled);
  const int64_t numel = N * C * L;
  Draws draws;
  Buffer<T> x(numel, variant.x_shift);
  x.fill_with_bits(numel);
  const Buffer<T> residual = residual_of<T>(numel, variant.y_shift);
  const T* const added = variant.adds ? residual.data() : nullptr;
  const Buffer<compute_t<T>> scales = scales_of<T>(variant);
  const reg_kernels::LayerScale layer_scale{variant.channels ? scales.data() : nullptr,
                                            variant.channels, variant.inner};
  const auto factor_at = [&](int64_t i) {
    if constexpr (reg_kernels::kScalesChannels<Op>) {
      if (variant.channels) return scales.data()[i / variant.inner % variant.channels] * factor;
    }
    return factor;
  };
  std::vector<T> expected(numel);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t c = 0; c < C; ++c) {
      const uint32_t drawn = draws.at(offset + n * C + c);
      for (int64_t l = 0; l < L; ++l) {
        const int64_t i = channels_last ? (n * L + l) * C + c : (n * C + c) * L + l;
        expected[i] =
            element_at(x.data()[i], added ? added + i : nullptr, drawn, threshold, factor_at(i));
      }
    }
  }
  const ChannelLayout layout{C, L, channels_last};
  // Of what is dropped nothing is read, not even an address.
  const bool unread = reg_kernels::kSkipsDropped<Op> && threshold == 0;
  const auto describe = [&](const char* what) {
    return std::string(what) + " " + driver::kName<T> + " (" + std::to_string(N) + ", " +
           std::to_string(C) + ", " + std::to_string(L) + ")" +
           (channels_last ? " channels last" : "") + " mask_offset " + std::to_string(offset) +
           " threshold " + std::to_string(threshold) + " " + variant.text();
  };
  run(
      x, expected, threshold, variant,
      [&](const T* in, T* out, const RateArgument& rate, const RngState& rng) {
        const OptionValues options = options_of(variant.scaled);
        const auto beside = [&] {
          using Beside = reg_kernels::cuda::Beside<Op, T>;
          if constexpr (reg_kernels::kScalesChannels<Op>) {
            return Beside(added, options.at, layer_scale);
          } else {
            return Beside(added, options.at);
          }
        }();
        reg_kernels::cuda::launch_channels<Op, T>(unread ? nullptr : in, out, beside, numel, layout,
                                                  offset, rate, rng, nullptr);
      },
      [&] { return describe("channels"); });
  if (variant.on_device) return;
  run(
      x, expected, threshold, variant,
      [&](const T* in, T* out, const RateArgument&, const RngState&) {
        reg_kernels::channels_range<reg_kernels::kOpTag>(
            task_of(unread ? nullptr : in, out, added, numel, layout, offset, threshold, variant,
                    layer_scale),
            0, channels_last ? N * L : numel);
      },
      [&] { return describe("loops over channels"); });
}

template <typename T>
void test_dtype_of_elements() {
  for (const int64_t offset : kOffsets) {
    // So far past a boundary, data can move in vectors even though its first group is cut.
    const int64_t fit = offset % 8 % reg_kernels::cuda::kVector<T>;
    for (const int64_t numel : kSizes) {
      test_elements<T>(numel, offset, 32768,
                       {{fit, fit, false, false, Op::kAdds},
                        {1, 2, true, false},
                        {fit, fit + 1, false, true, Op::kAdds}});
    }
  }
  for (const uint32_t threshold : kThresholds) {
    test_elements<T>(8200, 0, threshold, {{0, 0, true, false}, {0, 0, false, true}});
    test_elements<T>(
        129, 5, threshold,
        {{1, 0, true, false, Op::kAdds, Op::Options::kCount == 0}, {0, 1, false, true}});
  }
}

template <typename T>
void test_dtype_of_channels(const std::vector<int64_t>& channels, bool channels_last) {
  int turn = 0;
  for (const int64_t C : channels) {
    for (const int64_t L : {1, 3, 8, 63}) {
      for (const int64_t N : {0, 1, 5}) {
        for (const int64_t offset : kOffsets) {
          const bool on_device = turn & 1, in_place = turn & 2;
          const bool adds = Op::kAdds && turn & 1, scaled = Op::Options::kCount == 0 || turn % 3;
          ++turn;
          const uint32_t threshold = kThresholds[turn % 5];
          test_channels<T>(N, C, L, channels_last, offset, threshold,
                           {turn % 3, turn % 4, on_device, in_place, adds, scaled});
          test_channels<T>(N, C, L, channels_last, offset, 32768,
                           {0, 0, !on_device, !in_place, adds, scaled});
        }
      }
    }
  }
  // Several blocks, and channels longer and more numerous than one covers.
  for (const Variant& variant :
       {Variant{0, 0, false, false}, Variant{1, 3, true, false, Op::kAdds}}) {
    test_channels<T>(3, channels.back(), 257, channels_last, 13, 32768, variant);
    if (channels.size() > 1) test_channels<T>(2, 3001, 1, channels_last, 5, 32768, variant);
    test_channels<T>(2, 1, 3001, channels_last, 8, 32768, variant);
  }
}

// Of samples of 3 times as many elements as the channels have together: side by side, in runs that
// a vector has several of, in longer ones than a tile, one for all; fewer than a tile, and more.
template <typename T>
void test_layer_scales() {
  int turn = 0;
  const int64_t sizes[][2] = {{1, 1}, {2, 1},  {5, 1},    {64, 1},  {701, 1},  {5, 2},
                              {7, 3}, {3, 49}, {2100, 1}, {7, 301}, {2, 2100}, {1, 94}};
  for (const auto& [channels, inner] : sizes) {
    for (const uint32_t threshold : {0u, 32768u, 65536u}) {
      ++turn;
      const bool on_device = turn & 1, in_place = turn & 2, adds = turn % 3;
      test_channels<T>(
          4, 1, 3 * channels * inner, false, turn, threshold,
          {turn % 4, turn % 5, on_device, in_place, adds, turn % 4 != 0, channels, inner});
      test_channels<T>(1, 1, 3 * channels * inner, false, 5, threshold,
                       {0, 0, false, false, !adds, true, channels, inner});
    }
  }
}

template <typename T>
void test_dtype() {
  if constexpr (has_form<Op>(DrawnFor::element)) test_dtype_of_elements<T>();
  if constexpr (has_form<Op>(DrawnFor::channel)) {
    test_dtype_of_channels<T>({1, 3, 8, 13}, false);
    test_dtype_of_channels<T>({1, 3, 8, 13}, true);
  }
  if constexpr (has_form<Op>(DrawnFor::sample)) test_dtype_of_channels<T>({1}, false);
  if constexpr (reg_kernels::kScalesChannels<Op>) test_layer_scales<T>();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  test_dtype<double>();
  test_dtype<float>();
  test_dtype<driver::float16>();
  test_dtype<driver::bfloat16>();
  if constexpr (reg_kernels::kTakesBytes<Op>) test_dtype_of_elements<uint8_t>();
  return driver::finish();
}
