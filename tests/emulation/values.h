// What programs that call kernels fill their inputs with: the same in each run, on every machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "reg_kernels/dtypes.h"

namespace driver {

using reg_kernels::bfloat16;
using reg_kernels::float16;

template <typename T>
constexpr const char* kName = "";
template <>
inline constexpr const char* kName<double> = "float64";
template <>
inline constexpr const char* kName<float> = "float32";
template <>
inline constexpr const char* kName<float16> = "float16";
template <>
inline constexpr const char* kName<bfloat16> = "bfloat16";
template <>
inline constexpr const char* kName<uint8_t> = "bytes";

inline uint64_t draws = 0x9e3779b97f4a7c15ull;

inline int64_t below(int64_t n) {  // in [0, n)
  draws = draws * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<int64_t>((draws >> 33) % static_cast<uint64_t>(n));
}

inline double uniform() { return static_cast<double>(below(1 << 24)) / (1 << 24); }  // in [0, 1)

// `count` elements, `shift` of them past a 16-byte boundary. On the heap and to the byte: ASan sees
// an access past the end, and before the beginning where shift is 0. Otherwise `untouched` tells.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t count, int64_t shift) : count_(count), shift_(shift), bytes_(new Byte[bytes()]) {
    std::memset(bytes_.get(), kMark, bytes());
  }

  T* data() { return reinterpret_cast<T*>(bytes_.get()) + shift_; }
  const T* data() const { return reinterpret_cast<const T*>(bytes_.get()) + shift_; }
  int64_t size() const { return count_; }

  // Whether the bytes in front of the data are as they were.
  bool untouched() const {
    for (size_t i = 0; i < shift_ * sizeof(T); ++i) {
      if (bytes_[i] != kMark) return false;
    }
    return true;
  }

  // Every bit pattern there is: NaNs, infinities, subnormals and zeros of both signs among them.
  void fill_with_bits(uint64_t seed) {
    for (int64_t i = 0; i < count_; ++i) {
      const uint64_t draw = mix(seed * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(i));
      // One in four is all exponent or no exponent, which random bits rarely are in wide types. In
      // a byte some bits stand for one.
      constexpr int kExponentBits = sizeof(T) == 8               ? 11
                                    : sizeof(T) == 1             ? 4
                                    : std::is_same_v<T, float16> ? 5
                                                                 : 8;
      constexpr int kBits = 8 * sizeof(T);
      constexpr uint64_t kExponent = ((uint64_t{1} << kExponentBits) - 1)
                                     << (kBits - 1 - kExponentBits);
      constexpr uint64_t kSign = uint64_t{1} << (kBits - 1);
      uint64_t bits = mix(draw);
      switch (draw % 16) {
        case 0: bits = (bits & kSign) | kExponent; break;  // infinity
        case 1: bits = bits | kExponent; break;            // NaN
        case 2: bits = bits & kSign; break;                // zero
        case 3: bits = bits & ~kExponent; break;           // subnormal
      }
      std::memcpy(data() + i, &bits, sizeof(T));
    }
  }

 private:
  using Byte = unsigned char;
  static constexpr Byte kMark = 0xa5;

  static uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

  size_t bytes() const { return static_cast<size_t>(count_ + shift_) * sizeof(T); }

  int64_t count_, shift_;
  std::unique_ptr<Byte[]> bytes_;
};

}  // namespace driver
