// Runs csrc/cuda/elementwise.cuh on the CPU, for the op whose header comes first, and compares
// every output, bit for bit, with a scalar reference that shares with it one element's arithmetic
// and the generator, and nothing of how elements, groups, channels and threads correspond.
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
using reg_kernels::has_form;
using reg_kernels::Op;
using reg_kernels::cuda::RateArgument;
using reg_kernels::cuda::RngState;

// A shard of a batch can begin anywhere; the last one's groups need the counter's second word.
const int64_t kOffsets[] = {0, 1, 5, 8, 13, (int64_t{1} << 33) + 3, (int64_t{1} << 40) + 6};
const uint32_t kThresholds[] = {0, 1, 32768, 65535, 65536};
// 2048, 4096 and 8192 elements fill a block in fp64, fp32 and 16 bits.
const int64_t kSizes[] = {0, 1, 3, 7, 8, 9, 127, 1024, 2049, 8191, 8192, 20001};

// No half is zero: each is a key or counter word of its own.
constexpr uint64_t kSeed = 0x9e3779b97f4a7c15ull, kRngOffset = 0x0000000500000007ull;

template <typename T>
compute_t<T> scale_of(uint32_t threshold) {
  return static_cast<compute_t<T>>(threshold ? 65536.0 / threshold : 0.0);
}

// The contract of philox.h, one element at a time.
class Mask {
 public:
  explicit Mask(uint32_t threshold) : threshold_(threshold) {}

  bool keeps(int64_t element) {
    const uint64_t group = static_cast<uint64_t>(element) / 8;
    if (!drawn_ || group != group_) {
      const uint64_t key = kSeed ^ static_cast<uint64_t>(Op::kTag);
      words_ = reg_kernels::philox4x32(key, group, kRngOffset);
      group_ = group;
      drawn_ = true;
    }
    const uint32_t word = words_.w[element % 8 / 2];
    return (element % 2 ? word >> 16 : word & 0xffffu) < threshold_;
  }

 private:
  uint32_t threshold_;
  bool drawn_ = false;
  uint64_t group_ = 0;
  reg_kernels::PhiloxWords words_{};
};

// One element as the op's header has it, beside a residual or without one.
template <typename T>
T element(T x, const T* residual, bool keep, compute_t<T> scale) {
  if constexpr (Op::kReadsDropped) {
    return Op::element(x, keep ? scale : 0);
  } else {
    if (!keep) return residual ? *residual : T{};
    return residual ? Op::element(x, *residual, scale) : Op::element(x, scale);
  }
}

// How a launch is made, apart from its sizes.
struct Variant {
  int64_t x_shift, y_shift;  // elements past a 16-byte boundary
  bool on_device;            // p and rng_state behind pointers
  bool in_place;
  bool adds = false;  // where the op does
  bool scaled = true;

  std::string text() const {
    return "x+" + std::to_string(x_shift) + " y+" + std::to_string(y_shift) +
           (on_device ? " on device" : "") + (in_place ? " in place" : "") +
           (adds ? " with a residual" : "") + (scaled ? "" : " not scaled");
  }
};

// Calls launch(x, y, rate, rng) as the variant says, and checks what it left in y and in x.
template <typename T, typename Launch, typename Describe>
void run(const Buffer<T>& x, const std::vector<T>& expected, uint32_t threshold,
         const Variant& variant, const Launch& launch, const Describe& describe) {
  const auto p = std::make_unique<double>(1.0 - threshold / 65536.0);
  const auto state = std::make_unique<int64_t[]>(2);
  state[0] = static_cast<int64_t>(kSeed);
  state[1] = static_cast<int64_t>(kRngOffset);
  // Where one form of an argument is in use, the other one holds what would be wrong.
  const RateArgument rate =
      variant.on_device ? RateArgument(p.get()) : RateArgument(DropoutRate::from_probability(*p));
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
  const auto scale = scale_of<T>(threshold);
  Mask mask(threshold);
  std::vector<T> expected;
  Buffer<T> values(numel, 0);
  values.fill_with_bits(numel);
  for (int64_t i = 0; i < numel; ++i) {
    expected.push_back(element<T>(values.data()[i], nullptr, mask.keeps(offset + i), scale));
  }
  for (const Variant& variant : variants) {
    Buffer<T> x(numel, variant.x_shift);
    std::copy_n(values.data(), numel, x.data());
    run(
        x, expected, threshold, variant,
        [&](const T* in, T* out, const RateArgument& rate, const RngState& rng) {
          reg_kernels::cuda::launch_elements<Op, T>(in, out, {nullptr, true}, numel, offset, rate,
                                                    rng, nullptr);
        },
        [&] {
          return std::string("elements ") + driver::kName<T> + " numel " + std::to_string(numel) +
                 " element_offset " + std::to_string(offset) + " threshold " +
                 std::to_string(threshold) + " " + variant.text();
        });
  }
}

template <typename T>
void test_channels(int64_t N, int64_t C, int64_t L, bool channels_last, int64_t offset,
                   uint32_t threshold, const Variant& variant) {
  const auto scale = variant.scaled ? scale_of<T>(threshold) : compute_t<T>(1);
  const int64_t numel = N * C * L;
  Mask mask(threshold);
  Buffer<T> x(numel, variant.x_shift), residual(numel, variant.y_shift);
  x.fill_with_bits(numel);
  residual.fill_with_bits(numel + 1);
  for (int64_t i = 0; i < numel; ++i) {
    // Of two NaNs a processor's sum is either one.
    T& value = residual.data()[i];
    if (reg_kernels::load(value) != reg_kernels::load(value)) value = reg_kernels::store<T>(1);
  }
  const T* const added = variant.adds ? residual.data() : nullptr;
  std::vector<T> expected(numel);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t c = 0; c < C; ++c) {
      const bool keep = mask.keeps(offset + n * C + c);
      for (int64_t l = 0; l < L; ++l) {
        const int64_t i = channels_last ? (n * L + l) * C + c : (n * C + c) * L + l;
        expected[i] = element(x.data()[i], added ? added + i : nullptr, keep, scale);
      }
    }
  }
  const ChannelLayout layout{C, L, channels_last};
  run(
      x, expected, threshold, variant,
      [&](const T* in, T* out, const RateArgument& rate, const RngState& rng) {
        // Of what is dropped nothing is read, not even an address.
        const bool unread = !Op::kReadsDropped && threshold == 0;
        reg_kernels::cuda::launch_channels<Op, T>(unread ? nullptr : in, out,
                                                  {added, variant.scaled}, numel, layout, offset,
                                                  rate, rng, nullptr);
      },
      [&] {
        return std::string("channels ") + driver::kName<T> + " (" + std::to_string(N) + ", " +
               std::to_string(C) + ", " + std::to_string(L) + ")" +
               (channels_last ? " channels last" : "") + " mask_offset " + std::to_string(offset) +
               " threshold " + std::to_string(threshold) + " " + variant.text();
      });
}

template <typename T>
void test_dtype_of_elements() {
  for (const int64_t offset : kOffsets) {
    // So far past a boundary, data can move in vectors even though its first group is cut.
    const int64_t fit = offset % 8 % reg_kernels::cuda::kVector<T>;
    for (const int64_t numel : kSizes) {
      test_elements<T>(
          numel, offset, 32768,
          {{fit, fit, false, false}, {1, 2, true, false}, {fit, fit + 1, false, true}});
    }
  }
  for (const uint32_t threshold : kThresholds) {
    test_elements<T>(8200, 0, threshold, {{0, 0, true, false}, {0, 0, false, true}});
    test_elements<T>(129, 5, threshold, {{1, 0, true, false}, {0, 1, false, true}});
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
          const bool adds = Op::kAdds && turn & 1, scaled = !Op::kAdds || turn % 3;
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

template <typename T>
void test_dtype() {
  if constexpr (has_form<Op>(DrawnFor::element)) test_dtype_of_elements<T>();
  if constexpr (has_form<Op>(DrawnFor::channel)) {
    test_dtype_of_channels<T>({1, 3, 8, 13}, false);
    test_dtype_of_channels<T>({1, 3, 8, 13}, true);
  }
  if constexpr (has_form<Op>(DrawnFor::sample)) test_dtype_of_channels<T>({1}, false);
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
