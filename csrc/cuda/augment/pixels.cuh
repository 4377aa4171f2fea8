// The instructions that change each pixel by itself, on a thread's pixels in registers.
#pragma once

#include "statistics.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

// The normal numbers of four elements from `element` on, each of word e % 4 of group e / 4. They
// are of two groups where a row of the image does not begin with a group.
__device__ __forceinline__ void four_normals(const RngStream& stream, int64_t element,
                                             float (&z)[kAugmentPixels]) {
  const auto group = static_cast<uint64_t>(element) / 4;
  const int from = static_cast<int>(element & 3);
  float next[3] = {};
  RK_NO_UNROLL
  for (int i = from ? 1 : 0; i >= 0; --i) {
    const PhiloxWords words = stream(group + static_cast<uint64_t>(i));
    const auto low = normal_pair<OneLane>(words.w[0], words.w[3]);
    const auto high = normal_pair<OneLane>(words.w[2], words.w[1]);
    z[0] = low.first, z[1] = low.second, z[2] = high.first, z[3] = high.second;
    if (i == 1) next[0] = z[0], next[1] = z[1], next[2] = z[2];
  }
  if (from & 2) z[0] = z[2], z[1] = z[3], z[2] = next[0], z[3] = next[1], next[0] = next[2];
  if (from & 1) z[0] = z[1], z[1] = z[2], z[2] = z[3], z[3] = next[0];
}

// Likewise their half-words, e % 8 of group e / 8, as numbers.
__device__ __forceinline__ void four_half_words(const RngStream& stream, int64_t element,
                                                float (&bits)[kAugmentPixels]) {
  const auto group = static_cast<uint64_t>(element) / 8;
  const int from = static_cast<int>(element & 7);
  RK_NO_UNROLL
  for (int i = 0; i < (from > 4 ? 2 : 1); ++i) {
    const PhiloxWords words = stream(group + static_cast<uint64_t>(i));
    RK_UNROLL
    for (int p = 0; p < kAugmentPixels; ++p) {
      const int at = from + p - 8 * i;
      const uint32_t low = at & 2 ? words.w[1] : words.w[0];
      const uint32_t high = at & 2 ? words.w[3] : words.w[2];
      const uint32_t word = at & 4 ? high : low;
      if (at >= 0 && at < 8) bits[p] = static_cast<float>(at & 1 ? word >> 16 : word & 0xffffu);
    }
  }
}

// What an instruction may look at beside its pixels.
template <int kChannels>
struct AugmentSurroundings {
  ImageRange range;
  int channels;
  int y, x;          // of the first pixel
  unsigned there;    // a bit for each pixel that the image has
  unsigned outside;  // a bit for each pixel of each move
  float* scratch;
  const AugmentSegment& segment;
  const AugmentKnown<kChannels>& known;

  __device__ int64_t element(int c) const {
    return (static_cast<int64_t>(c) * segment.height + y) * segment.width + x;
  }

  // Calls f(address, c) for the pixels' vector in each channel of an image in the scratch memory.
  template <typename F>
  __device__ __forceinline__ void each_vector(int64_t image, const F& f) const {
    if (!there) return;
    const int64_t width = scratch_row(segment.width), plane = segment.height * width;
    float* const at = scratch + image + y * width + x;
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if (kChannels < 4 || c < channels) f(at + c * plane, c);
    }
  }
};

// Executes one instruction.
template <int kChannels>
__device__ __forceinline__ void execute(int op, const float* a,
                                        const AugmentSurroundings<kChannels>& at,
                                        AugmentValues<kChannels>& values) {
  const ImageRange& range = at.range;
  const auto each = [&](const auto& f) {
    RK_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      RK_UNROLL
      for (int p = 0; p < kAugmentPixels; ++p) values[c][p] = f(values[c][p], c, p);
    }
  };
  // The same a channel at a time, of what is so long that its code is to be there once. Each comes
  // to the front, since registers have no index.
  const auto each_channel = [&](const auto& f) {
    RK_NO_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      f(values[0], c);
      RK_UNROLL
      for (int p = 0; p < kAugmentPixels; ++p) {
        const float front = values[0][p];
        RK_UNROLL
        for (int k = 0; k + 1 < kChannels; ++k) values[k][p] = values[k + 1][p];
        values[kChannels - 1][p] = front;
      }
    }
  };
  switch (op) {
    case static_cast<int>(AugmentOp::brightness): {
      const float f = a[1];
      return each([&](float v, int, int) { return range.clamp_truncated(f * v); });
    }
    case static_cast<int>(AugmentOp::contrast): {
      const float f = a[1], rest = a[2], mean = at.known.mean;
      return each([&](float v, int, int) { return blended(v, mean, f, rest, range); });
    }
    case static_cast<int>(AugmentOp::invert):
      return each([&](float v, int, int) { return range.bound - v; });
    case static_cast<int>(AugmentOp::solarize): {
      const float threshold = a[1];
      return each([&](float v, int, int) { return solarized(v, threshold, range); });
    }
    case static_cast<int>(AugmentOp::solarize_add): {
      const float threshold = a[1], addend = a[2];
      return each([&](float v, int, int) { return solarize_added(v, threshold, addend, range); });
    }
    case static_cast<int>(AugmentOp::posterize): {
      const auto keep = Posterize::of(static_cast<int>(a[1]), range);
      return each([&](float v, int, int) { return keep(v); });
    }
    case static_cast<int>(AugmentOp::normalize):
      return each([&](float v, int c, int) { return plus(v * a[1 + c], a[5 + c]); });
    case static_cast<int>(AugmentOp::autocontrast):
      return each([&](float v, int c, int) { return at.known.stretch[c](v, range); });
    case static_cast<int>(AugmentOp::equalize):
      return each([&](float v, int c, int) {
        const int level = static_cast<int>(gray_level(v, range));
        return at.known.changes[c] ? at.known.table[c * kGrays + level] : v;
      });
    case static_cast<int>(AugmentOp::noise): {
      const auto noise = NoiseArguments::of(a);
      const RngStream stream = augment_stream(NoiseArguments::key(a));
      return each_channel([&](float (&v)[kAugmentPixels], int c) {
        float z[kAugmentPixels];
        four_normals(stream, at.element(c), z);
        RK_UNROLL
        for (int p = 0; p < kAugmentPixels; ++p) v[p] = noise(v[p], z[p], range);
      });
    }
    case static_cast<int>(AugmentOp::salt_and_pepper): {
      const auto impulses = SaltAndPepperArguments::of(a);
      const RngStream stream = augment_stream(SaltAndPepperArguments::key(a));
      return each_channel([&](float (&v)[kAugmentPixels], int c) {
        float bits[kAugmentPixels] = {};
        four_half_words(stream, at.element(c), bits);
        RK_UNROLL
        for (int p = 0; p < kAugmentPixels; ++p) v[p] = impulses(v[p], bits[p], range);
      });
    }
    case static_cast<int>(AugmentOp::erase): {
      const auto erase = EraseArguments::of(a);
      const int from = erase.left - at.x, to = from + erase.width;
      if (at.y < erase.top || at.y >= erase.top + erase.height || from >= kAugmentPixels ||
          to <= 0) {
        return;
      }
      const RngStream stream = augment_stream(erase.key);
      return each_channel([&](float (&v)[kAugmentPixels], int c) {
        float z[kAugmentPixels];
        RK_UNROLL
        for (int p = 0; p < kAugmentPixels; ++p) z[p] = erase.values[c];
        if (erase.normal) four_normals(stream, at.element(c), z);
        RK_UNROLL
        for (int p = 0; p < kAugmentPixels; ++p) {
          if (p >= from && p < to) v[p] = z[p];
        }
      });
    }
    case static_cast<int>(AugmentOp::save):
    case static_cast<int>(AugmentOp::join): {
      const bool saves = op == static_cast<int>(AugmentOp::save);
      const int64_t saved = at.segment.saved - at.segment.total;
      const float weight = a[1];
      return at.each_vector(at.segment.total, [&](float* total, int c) {
        Vector<float, kAugmentPixels> x, sum;
        if (!saves) {
          x = load_whole<kAugmentPixels>(total + saved);
          sum = load_whole<kAugmentPixels>(total);
        }
        RK_UNROLL
        for (int p = 0; p < kAugmentPixels; ++p) {
          const float part = values[c][p] * weight;
          sum.v[p] = saves ? part : plus(sum.v[p], part);
          x.v[p] = saves ? values[c][p] : x.v[p];
          values[c][p] = x.v[p];
        }
        store_whole(total, sum);
        if (saves) store_whole(total + saved, x);
      });
    }
    case static_cast<int>(AugmentOp::mix):
      return at.each_vector(at.segment.total, [&](float* total, int c) {
        const auto sum = load_whole<kAugmentPixels>(total);
        RK_UNROLL
        for (int p = 0; p < kAugmentPixels; ++p) values[c][p] = range.clamp_truncated(sum.v[p]);
      });
    case kAugmentFill: {
      const unsigned outside = at.outside >> kAugmentPixels * static_cast<int>(a[1]);
      return each([&](float v, int c, int p) { return outside >> p & 1u ? a[2 + c] : v; });
    }
    case kAugmentResampled: return each([&](float v, int, int) { return range.resampled(v); });
    default: break;
  }
  if constexpr (kChannels == 3) {
    const auto each_pixel = [&](const auto& f) {
      RK_UNROLL
      for (int p = 0; p < kAugmentPixels; ++p) f(values[0][p], values[1][p], values[2][p]);
    };
    switch (op) {
      case static_cast<int>(AugmentOp::saturation): {
        const float f = a[1], rest = a[2];
        return each_pixel([&](float& r, float& g, float& b) {
          const float gray = gray_of(r, g, b, range);
          r = blended(r, gray, f, rest, range);
          g = blended(g, gray, f, rest, range);
          b = blended(b, gray, f, rest, range);
        });
      }
      case static_cast<int>(AugmentOp::grayscale):
        return each_pixel(
            [&](float& r, float& g, float& b) { r = g = b = gray_of(r, g, b, range); });
      case static_cast<int>(AugmentOp::permute): {
        const int p0 = static_cast<int>(a[1]), p1 = static_cast<int>(a[2]);
        const int p2 = static_cast<int>(a[3]);
        return each_pixel([&](float& r, float& g, float& b) {
          const auto channel = [r = r, g = g, b = b](int p) { return p == 0 ? r : p == 1 ? g : b; };
          r = channel(p0);
          g = channel(p1);
          b = channel(p2);
        });
      }
      case static_cast<int>(AugmentOp::hue): {
        const float turn = a[1];
        // By far the longest one: a pixel at a time, so that its code is there once.
        RK_NO_UNROLL
        for (int p = 0; p < kAugmentPixels; ++p) {
          float pixel[3] = {values[0][0], values[1][0], values[2][0]};
          turn_hue(pixel[0], pixel[1], pixel[2], turn, range);
          push_pixel(values, pixel);
        }
        return;
      }
      default: return;
    }
  }
}

}  // namespace cuda
RK_NAMESPACE_END
