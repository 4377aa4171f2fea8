// Runs csrc/cuda/augment.cuh on the CPU. Results are compared bit for bit with those of an
// interpreter that executes one instruction after the other on whole images.
#include "cuda/augment.cuh"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "driver.h"

namespace {

using driver::below;
using driver::bfloat16;
using driver::Buffer;
using driver::float16;
using driver::uniform;
using namespace reg_kernels;
using Op = AugmentOp;
using Instruction = std::vector<float>;
using Program = std::vector<Instruction>;

struct Image {
  int channels, height, width;
  std::vector<float> values;

  Image(int channels, int height, int width)
      : channels(channels), height(height), width(width), values(channels * height * width) {}
  float& at(int c, int y, int x) { return values[(int64_t{c} * height + y) * width + x]; }
  // By padded indices, of which -1 is fill.
  float at(int c, int y, int x, float fill) { return y < 0 || x < 0 ? fill : at(c, y, x); }
};

// Whole images, an instruction at a time.
class Interpreter {
 public:
  Interpreter(Image image, ImageRange range)
      : image_(std::move(image)), saved_(image_), sum_(image_), range_(range) {}

  Image run(const Program& program) {
    for (Instruction a : program) {
      a.resize(kInstruction);
      step(static_cast<Op>(static_cast<int>(a[0])), a.data());
    }
    return image_;
  }

 private:
  template <typename F>
  void each(const F& f) {
    for (int c = 0; c < image_.channels; ++c) {
      for (int y = 0; y < image_.height; ++y) {
        for (int x = 0; x < image_.width; ++x) image_.at(c, y, x) = f(image_.at(c, y, x), c, y, x);
      }
    }
  }
  template <typename F>
  void each_pixel(const F& f) {
    for (int y = 0; y < image_.height; ++y) {
      for (int x = 0; x < image_.width; ++x) {
        f(image_.at(0, y, x), image_.at(1, y, x), image_.at(2, y, x));
      }
    }
  }
  int64_t element(int c, int y, int x) const {
    return (int64_t{c} * image_.height + y) * image_.width + x;
  }

  void box(const float* a) {
    const auto box = BoxArguments::of(a);
    const auto rows =
        BoxAxis::of(box.height, box.out_height, box.flip_rows, box.filter, box.antialias);
    const auto columns =
        BoxAxis::of(box.width, box.out_width, box.flip_columns, box.filter, box.antialias);
    Image result(image_.channels, box.out_height, box.out_width);
    for (int c = 0; c < image_.channels; ++c) {
      for (int y = 0; y < box.out_height; ++y) {
        for (int x = 0; x < box.out_width; ++x) {
          float across = 0;
          columns.for_taps(x, [&](int i, int k, float weight) {
            const int column = padded_index(box.left + k, image_.width, box.pad);
            float down = 0;
            rows.for_taps(y, [&](int j, int l, float weight) {
              const int row = padded_index(box.top + l, image_.height, box.pad);
              const float part = weight * image_.at(c, row, column, box.fill[c]);
              down = j ? down + part : part;
            });
            if (column < 0) down = box.fill[c];
            across = i ? across + weight * down : weight * down;
          });
          result.at(c, y, x) = range_.resampled(across);
        }
      }
    }
    image_ = result;
  }

  void warp(const float* a) {
    const auto warp = WarpArguments::of(a);
    Image result(image_.channels, warp.out_height, warp.out_width);
    for (int c = 0; c < image_.channels; ++c) {
      const float fill = warp.fill(c);
      const auto inside = [&](float y, float x) {
        return y >= 0 && x >= 0 && y < static_cast<float>(image_.height) &&
               x < static_cast<float>(image_.width);
      };
      const auto value = [&](float y, float x, float otherwise) {
        return inside(y, x) ? image_.at(c, static_cast<int>(y), static_cast<int>(x)) : otherwise;
      };
      for (int y = 0; y < warp.out_height; ++y) {
        for (int x = 0; x < warp.out_width; ++x) {
          const auto at = WarpPlaces::of(warp, image_.height, image_.width, range_.exact)(
              static_cast<float>(x), static_cast<float>(y));
          float& to = result.at(c, y, x);
          to = fill;
          const float top = floorf(at.y), left = floorf(at.x);
          const float wy = at.y - top, wx = at.x - left;
          if (!(std::fabs(at.x) < kNear && std::fabs(at.y) < kNear)) {
          } else if (warp.filter == WarpFilter::nearest) {
            to = value(rintf(at.y), rintf(at.x), fill);
          } else if (warp.filter != WarpFilter::bicubic) {
            const bool faded = warp.filter == WarpFilter::faded;
            float p[4], in[4];
            for (int k = 0; k < 4; ++k) {
              const float row = top + static_cast<float>(k / 2);
              const float column = left + static_cast<float>(k % 2);
              p[k] = value(row, column, faded ? 0.0f : fill);
              in[k] = inside(row, column) ? 1.0f : 0.0f;
            }
            to = faded ? between_four_faded(p, in, wx, wy, fill) : between_four(p, wx, wy);
          } else {
            const auto across = CubicWeights<float>::of(wx), down = CubicWeights<float>::of(wy);
            for (int i = 0; i < 4; ++i) {
              float row = 0;
              for (int j = 0; j < 4; ++j) {
                const float part = across.w[j] * value(top + static_cast<float>(i - 1),
                                                       left + static_cast<float>(j - 1), fill);
                row = j ? row + part : part;
              }
              to = i ? to + down.w[i] * row : down.w[i] * row;
            }
          }
          to = range_.resampled(to);
        }
      }
    }
    image_ = result;
  }

  void blur(const float* a) {
    const auto blur = BlurArguments::of(a);
    for (const bool down : {true, false}) {
      if (!(down ? blur.rows : blur.columns)) continue;
      Image before = image_;
      each([&](float, int c, int y, int x) {
        float sum = 0;
        for (int k = -blur.radius; k <= blur.radius; ++k) {
          const int row = padded_index(down ? y + k : y, image_.height, AugmentPad::reflect);
          const int column = padded_index(down ? x : x + k, image_.width, AugmentPad::reflect);
          const float part = blur.weights[std::abs(k)] * before.at(c, row, column);
          sum = k == -blur.radius ? part : sum + part;
        }
        return sum;
      });
    }
    each([&](float v, int, int, int) { return range_.resampled(v); });
  }

  void sharpness(float rest) {
    Image before = image_;
    each([&](float v, int c, int y, int x) {
      if (y == 0 || x == 0 || y == image_.height - 1 || x == image_.width - 1) return v;
      float sum = 0;
      for (int k = 0; k < 9; ++k) {
        const float part =
            (k == 4 ? kSmoothCentre : kSmoothSide) * before.at(c, y - 1 + k / 3, x - 1 + k % 3);
        sum = k ? sum + part : part;
      }
      return sharpened(v, sum, rest, range_);
    });
  }

  void contrast(float factor, float rest) {
    int64_t sum = 0;
    if (image_.channels == 1) {
      for (const float v : image_.values) sum += static_cast<int64_t>(counted_gray(v, range_));
    } else {
      each_pixel([&](float r, float g, float b) {
        sum += static_cast<int64_t>(counted_gray(gray_of(r, g, b, range_), range_));
      });
    }
    const float mean = gray_mean(sum, int64_t{image_.height} * image_.width, range_);
    each([&](float v, int, int, int) { return blended(v, mean, factor, rest, range_); });
  }

  void by_extrema() {
    for (int c = 0; c < image_.channels; ++c) {
      float lo = std::numeric_limits<float>::infinity(), hi = -lo;
      each([&](float v, int channel, int, int) {
        if (channel != c) return v;
        lo = v < lo ? v : lo;
        hi = v > hi ? v : hi;
        return v;
      });
      const auto stretch = Autocontrast::of(lo, hi, range_);
      each([&](float v, int channel, int, int) { return channel == c ? stretch(v, range_) : v; });
    }
  }

  void equalize() {
    for (int c = 0; c < image_.channels; ++c) {
      std::vector<int32_t> histogram(kGrays);
      const auto level = [&](float v) { return static_cast<int>(gray_level(v, range_)); };
      each([&](float v, int channel, int, int) {
        if (channel == c) ++histogram[level(v)];
        return v;
      });
      std::vector<int32_t> table(kGrays);
      if (!equalize_table(histogram.data(), table.data())) continue;
      each([&](float v, int channel, int, int) {
        return channel == c ? of_gray_level(table[level(v)], range_) : v;
      });
    }
  }

  void step(Op op, const float* a) {
    const auto keyed = [&](const float* key, const auto& f) {
      const RngStream stream = augment_stream(key);
      each([&](float v, int c, int y, int x) { return f(v, stream, c, y, x); });
    };
    switch (op) {
      case Op::none: return;
      case Op::box: return box(a);
      case Op::warp: return warp(a);
      case Op::brightness:
        return each([&](float v, int, int, int) { return range_.clamp_truncated(a[1] * v); });
      case Op::contrast: return contrast(a[1], a[2]);
      case Op::saturation:
        return each_pixel([&](float& r, float& g, float& b) {
          const float gray = gray_of(r, g, b, range_);
          for (float* v : {&r, &g, &b}) *v = blended(*v, gray, a[1], a[2], range_);
        });
      case Op::hue:
        return each_pixel([&](float& r, float& g, float& b) { turn_hue(r, g, b, a[1], range_); });
      case Op::grayscale:
        return each_pixel(
            [&](float& r, float& g, float& b) { r = g = b = gray_of(r, g, b, range_); });
      case Op::invert: return each([&](float v, int, int, int) { return range_.bound - v; });
      case Op::solarize:
        return each([&](float v, int, int, int) { return solarized(v, a[1], range_); });
      case Op::solarize_add:
        return each([&](float v, int, int, int) { return solarize_added(v, a[1], a[2], range_); });
      case Op::posterize: {
        const auto keep = Posterize::of(static_cast<int>(a[1]), range_);
        return each([&](float v, int, int, int) { return keep(v); });
      }
      case Op::autocontrast: return by_extrema();
      case Op::equalize: return equalize();
      case Op::sharpness:
        if (image_.height > 2 && image_.width > 2) sharpness(a[2]);
        return;
      case Op::blur: return blur(a);
      case Op::noise: {
        const auto noise = NoiseArguments::of(a);
        return keyed(noise.key(a), [&](float v, const RngStream& stream, int c, int y, int x) {
          return noise(v, augment_normal(stream, element(c, y, x)), range_);
        });
      }
      case Op::permute:
        return each_pixel([&](float& r, float& g, float& b) {
          const float v[] = {r, g, b};
          r = v[static_cast<int>(a[1])];
          g = v[static_cast<int>(a[2])];
          b = v[static_cast<int>(a[3])];
        });
      case Op::erase: {
        const auto erase = EraseArguments::of(a);
        return keyed(erase.key, [&](float v, const RngStream& stream, int c, int y, int x) {
          const bool here = y >= erase.top && y < erase.top + erase.height && x >= erase.left &&
                            x < erase.left + erase.width;
          if (!here) return v;
          return erase.normal ? augment_normal(stream, element(c, y, x)) : erase.values[c];
        });
      }
      case Op::normalize:
        return each([&](float v, int c, int, int) { return v * a[1 + c] + a[5 + c]; });
      case Op::salt_and_pepper: {
        const auto impulses = SaltAndPepperArguments::of(a);
        return keyed(impulses.key(a), [&](float v, const RngStream& stream, int c, int y, int x) {
          const int64_t e = element(c, y, x);
          const auto words = stream(static_cast<uint64_t>(e) / 8);
          return impulses(v, static_cast<float>(half_word(words, static_cast<int>(e % 8))), range_);
        });
      }
      case Op::save:
        saved_ = sum_ = image_;
        for (float& v : sum_.values) v *= a[1];
        return;
      case Op::join:
        for (size_t i = 0; i < image_.values.size(); ++i) {
          sum_.values[i] += a[1] * image_.values[i];
        }
        image_ = saved_;
        return;
      case Op::mix:
        image_ = sum_;
        return each([&](float v, int, int, int) { return range_.clamp_truncated(v); });
    }
  }

  Image image_, saved_, sum_;
  ImageRange range_;
};

template <typename T>
constexpr PixelType kPixelType = PixelType::float32;
template <>
constexpr PixelType kPixelType<uint8_t> = PixelType::bytes;
template <>
constexpr PixelType kPixelType<float16> = PixelType::float16;
template <>
constexpr PixelType kPixelType<bfloat16> = PixelType::bfloat16;

template <typename T>
float widened(T value) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    return static_cast<float>(value);
  } else {
    return load(value);
  }
}
template <typename T>
T narrowed(float value) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    return static_cast<uint8_t>(stored_byte(value));
  } else {
    return store<T>(value);
  }
}

struct Size {
  int height, width;
};

struct Batch {
  std::string name;
  int channels;
  Size result;
  bool exact = false;
  std::vector<Size> sizes = {};  // of the images, in turn
  std::vector<Program> programs = {};
  bool nans = false;  // whether some of the pixels are NaN
  int64_t most_scratch = cuda::kAugmentScratch;
};

template <typename In, typename Out>
void test(const Batch& b, bool from_last, bool to_last) {
  const auto samples = static_cast<int64_t>(b.programs.size());
  std::vector<int64_t> images;
  int64_t elements = 0;
  size_t steps = 0;
  for (int64_t n = 0; n < samples; ++n) {
    const auto [h, w] = b.sizes[n % b.sizes.size()];
    for (const int64_t number : {elements, int64_t{h}, int64_t{w}}) images.push_back(number);
    elements += int64_t{b.channels} * h * w;
    steps = std::max(steps, b.programs[n].size());
  }
  std::vector<float> program(samples * steps * kInstruction);
  for (int64_t n = 0; n < samples; ++n) {
    for (size_t i = 0; i < b.programs[n].size(); ++i) {
      const auto& a = b.programs[n][i];
      std::copy(a.begin(), a.end(), program.begin() + (n * steps + i) * kInstruction);
    }
  }
  const int64_t plane = int64_t{b.result.height} * b.result.width;
  Buffer<In> pixels(elements, 0);
  for (int64_t i = 0; i < elements; ++i) {
    const double u = 1.2 * uniform() - 0.1;
    pixels.data()[i] =
        narrowed<In>(static_cast<float>(std::clamp(u, 0.0, 1.0) * (sizeof(In) == 1 ? 255 : 1)));
  }
  if (b.nans) {
    for (int64_t i = 0; i < elements; i += 97) {
      pixels.data()[i] = narrowed<In>(std::numeric_limits<float>::quiet_NaN());
    }
  }
  Buffer<Out> result(samples * b.channels * plane, 0);
  AugmentBatch batch{};
  batch.pixels = pixels.data();
  batch.from = kPixelType<In>;
  batch.channels_last = from_last;
  batch.images = images.data();
  batch.program = program.data();
  batch.samples = samples;
  batch.instructions = static_cast<int64_t>(steps);
  batch.channels = b.channels;
  batch.result = result.data();
  batch.to = kPixelType<Out>;
  batch.to_channels_last = to_last;
  batch.height = b.result.height;
  batch.width = b.result.width;
  batch.exact = b.exact;
  std::unique_ptr<unsigned char[]> memory;
  const auto allocate = [&](int64_t bytes) -> void* {
    memory.reset(new unsigned char[static_cast<size_t>(bytes)]);
    std::memset(memory.get(), cuda_on_cpu::kUnwritten, static_cast<size_t>(bytes));
    return memory.get();
  };
  cuda::launch_augment(batch, allocate, nullptr, b.most_scratch);

  std::vector<Out> expected(samples * b.channels * plane);
  const ImageRange range{sizeof(In) == 1 ? 255.0f : 1.0f, b.exact};
  for (int64_t n = 0; n < samples; ++n) {
    const auto [h, w] = b.sizes[n % b.sizes.size()];
    Image image(b.channels, h, w);
    const In* const from = pixels.data() + images[3 * n];
    for (int c = 0; c < b.channels; ++c) {
      for (int64_t i = 0; i < int64_t{h} * w; ++i) {
        image.values[c * int64_t{h} * w + i] =
            widened(from_last ? from[i * b.channels + c] : from[c * int64_t{h} * w + i]);
      }
    }
    const Image last = Interpreter(std::move(image), range).run(b.programs[n]);
    for (int c = 0; c < b.channels; ++c) {
      for (int64_t i = 0; i < plane; ++i) {
        expected[n * b.channels * plane + (to_last ? i * b.channels + c : c * plane + i)] =
            narrowed<Out>(last.values[c * plane + i]);
      }
    }
  }
  driver::expect_same_bits(result, expected.data(), [&] {
    return "augment " + b.name + ", " + std::to_string(b.channels) + " channels, " +
           std::to_string(sizeof(In)) + " to " + std::to_string(sizeof(Out)) + " bytes" +
           (b.exact ? ", exact" : "") + (from_last ? ", from channels last" : "") +
           (to_last ? ", to channels last" : "");
  });
}

float number(Op op) { return static_cast<float>(op); }
float integer(int64_t i) { return static_cast<float>(i); }

Instruction box(int top, int left, Size region, Size out, int flips, int filter, int pad) {
  return {number(Op::box),
          integer(top),
          integer(left),
          integer(region.height),
          integer(region.width),
          integer(out.height),
          integer(out.width),
          integer(flips),
          integer(filter),
          integer(pad),
          0.25f,
          0.5f,
          0.75f,
          1.0f};
}

Instruction warp(Size out, int filter, std::vector<float> m) {
  Instruction a{number(Op::warp)};
  a.insert(a.end(), m.begin(), m.end());
  for (const float x :
       {integer(out.height), integer(out.width), integer(filter), 0.25f, 0.5f, 0.75f}) {
    a.push_back(x);
  }
  return a;
}

const std::vector<float> kTurned = {0.9f, -0.3f, 5.0f, 0.25f, 0.95f, -3.0f, 0, 0, 1};
const std::vector<float> kSheared = {1.1f, 0.2f, -2.5f, -0.1f, 0.8f, 4.0f, 0, 0, 1};
const std::vector<float> kTilted = {0.9f, 0.1f, 1.0f, 0.05f, 1.1f, -1.0f, 0.004f, -0.003f, 1};

Instruction noise(float clip) { return {number(Op::noise), 0.01f, 0.2f, clip, 1, 65535, 3, 77}; }

Instruction salt_and_pepper() { return {number(Op::salt_and_pepper), 0.3f, 0.4f, 5, 6, 7, 8}; }

Instruction erase(Size at, Size size, bool normal) {
  return {number(Op::erase),
          integer(at.height),
          integer(at.width),
          integer(size.height),
          integer(size.width),
          integer(normal),
          0.1f,
          0.2f,
          0.3f,
          0.4f,
          9,
          10,
          11,
          12};
}

Instruction blur(int axes, int radius) {
  Instruction a{number(Op::blur), integer(axes), integer(radius)};
  for (int k = 0; k <= radius; ++k) a.push_back(1.0f / static_cast<float>(2 * radius + 1 + k));
  return a;
}

const Instruction kNormalize = {
    number(Op::normalize), 0.02f, 0.5f, 3.0f, 1.5f, -1.0f, 0.1f, 0.3f, -0.2f};

// A batch whose samples each have one of the programs.
template <typename In, typename Out>
void test(const std::string& name, int channels, Size size, std::vector<Program> programs,
          bool exact = false, Size image = {0, 0}) {
  Batch b{name, channels, size};
  b.exact = exact;
  b.sizes = {image.height ? image : size};
  b.programs = std::move(programs);
  test<In, Out>(b, channels % 2 == 1, size.width % 3 == 1);
}

void test_boxes() {
  for (const bool exact : {false, true}) {
    std::vector<Program> programs;
    for (int pad = 1; pad <= 4; ++pad) {
      programs.push_back({box(-5, -7, {35, 41}, {35, 41}, pad % 4, 0, pad)});
      programs.push_back({box(-50, -40, {90, 80}, {35, 41}, pad % 4, pad % 4 == 1 ? 6 : pad, pad)});
    }
    for (const int filter : {0, 1, 2, 3, 6, 7}) {
      programs.push_back({box(2, 1, {13, 20}, {35, 41}, filter % 4, filter, 0)});
      programs.push_back({box(0, 1, {20, 7}, {35, 41}, filter % 3, filter, 0)});
    }
    test<uint8_t, float>("box", 3, {35, 41}, programs, exact, {21, 24});
    test<uint8_t, uint8_t>("box", 1, {35, 41}, programs, exact, {21, 24});
  }
  // More columns than there is room for at once, and more taps than are tabled.
  std::vector<Program> programs;
  for (const int filter : {0, 2, 3, 6, 7}) {
    for (const Size out : {Size{5, 36}, Size{2, 3}}) {
      programs.push_back(
          {box(3, 1, {60, 150}, out, 1, filter, 0), box(0, 0, out, {5, 36}, 0, 0, 0)});
    }
    programs.push_back(
        {box(1, 1, {140, 140}, {1, 1}, 1, filter, 2), box(0, 0, {1, 1}, {5, 36}, 0, 2, 0)});
  }
  for (const int channels : {2, 3, 4}) {
    test<float, float>("wide box", channels, {5, 36}, programs, false, {64, 152});
  }
}

void test_warps() {
  for (const bool exact : {false, true}) {
    std::vector<Program> programs;
    for (const auto& m : {kTurned, kSheared, kTilted}) {
      for (int filter = 0; filter < 4; ++filter) programs.push_back({warp({33, 36}, filter, m)});
    }
    // From so far away that no index holds it.
    programs.push_back({warp({33, 36}, 2, {1e12f, 0, -1e14f, 0, 1, 0, 0, 0, 1})});
    programs.push_back({warp({33, 36}, 0, {1e12f, 0, -1e14f, 0, 1, 0, 0, 0, 1})});
    test<uint8_t, float>("warp", 3, {33, 36}, programs, exact, {29, 40});
    if (!exact) test<float16, bfloat16>("warp", 1, {33, 36}, programs, exact, {29, 40});
  }
  // Moves: chains of them, colour between them, more than a segment holds, after noise.
  const Instruction invert{number(Op::invert)}, solarize{number(Op::solarize), 0.4f};
  const auto nearest = [](const std::vector<float>& m) { return warp({33, 37}, 0, m); };
  const Instruction crop = box(-3, 4, {33, 37}, {33, 37}, 1, 0, 3);
  Program many;
  for (int i = 0; i < 11; ++i) {
    many.push_back(nearest(i % 2 ? kTurned : kSheared));
    many.push_back({number(Op::brightness), 0.9f});
  }
  const std::vector<Program> programs = {
      {nearest(kTurned), nearest(kSheared), nearest(kTilted)},
      {crop, invert, nearest(kTurned), solarize, nearest(kSheared), {number(Op::hue), 0.3f}},
      {warp({33, 37}, 2, kTilted), nearest(kTurned), invert, crop},
      {box(1, 2, {20, 22}, {33, 37}, 0, 6, 0), nearest(kTurned)},
      {crop, noise(1), nearest(kTurned), kNormalize, crop},
      {box(0, 0, {30, 40}, {33, 37}, 0, 1, 0),
       nearest(kTurned),
       {number(Op::contrast), 0.6f, 0.4f},
       nearest(kSheared),
       {number(Op::equalize)},
       crop},
      many};
  test<float, float>("moves", 3, {33, 37}, programs, false, {30, 40});
  test<uint8_t, float16>("moves", 3, {33, 37}, programs, false, {30, 40});
  test<uint8_t, uint8_t>("moves", 3, {33, 37}, programs, true, {30, 40});
}

const std::vector<Program> kOfColours = {{{number(Op::saturation), 1.4f, -0.4f}},
                                         {{number(Op::hue), 0.4f}},
                                         {{number(Op::hue), -0.5f}},
                                         {{number(Op::grayscale)}},
                                         {{number(Op::permute), 2, 0, 0}}};
const std::vector<Program> kOfAny = {
    {},
    {{number(Op::none)}, {number(Op::brightness), 1.3f}},
    {{number(Op::invert)}},
    {{number(Op::solarize), 0.4f}, {number(Op::solarize_add), 0.3f, 0.2f}},
    {{number(Op::posterize), 3}},
    {{number(Op::posterize), 0}},
    {{number(Op::autocontrast)}},
    {{number(Op::equalize)}, {number(Op::equalize)}, {number(Op::autocontrast)}},
    {{number(Op::sharpness), 1.7f, -0.7f}, {number(Op::sharpness), 0.2f, 0.8f}},
    {blur(0, 2)},
    {blur(1, 12), blur(2, 0)},
    {blur(2, 7)},
    {noise(0)},
    {noise(1), salt_and_pepper()},
    {erase({3, 2}, {20, 9}, false), erase({1, 11}, {20, 21}, true)},
    {kNormalize, box(0, 1, {33, 35}, {33, 35}, 3, 0, 1), noise(0)},
    {{number(Op::save), 0.4f},
     {number(Op::brightness), 0.7f},
     {number(Op::join), 0.3f},
     warp({33, 35}, 2, kTurned),
     {number(Op::equalize)},
     {number(Op::join), 0.5f},
     {number(Op::autocontrast)},
     {number(Op::join), 0.2f},
     {number(Op::mix)}}};

template <typename In, typename Out>
void test_instructions() {
  for (const int channels : {1, 2, 3, 4}) {
    for (const bool exact : {false, true}) {
      if (exact && sizeof(In) > 1) continue;
      auto programs = kOfAny;
      if (channels % 2) programs.push_back({{number(Op::contrast), 1.5f, -0.5f}});
      if (channels == 3) programs.insert(programs.end(), kOfColours.begin(), kOfColours.end());
      test<In, Out>("instructions", channels, {33, 35}, programs, exact);
      if (sizeof(In) == 1) continue;
      Batch b{"instructions on NaN", channels, {33, 35}};
      b.sizes = {b.result};
      b.programs = programs;
      b.nans = true;
      test<In, Out>(b, false, false);
    }
  }
}

void test_layouts() {
  const std::vector<Program> programs = {{kNormalize}, {blur(0, 1), kNormalize}};
  for (const int channels : {1, 2, 3, 4}) {
    for (const Size size : {Size{3, 36}, Size{33, 5}, Size{1, 1}}) {
      for (const bool from_last : {false, true}) {
        for (const bool to_last : {false, true}) {
          Batch b{"layout", channels, size};
          b.sizes = {size};
          b.programs = {programs[0], size.height == 1 ? programs[0] : programs[1]};
          test<uint8_t, float>(b, from_last, to_last);
          test<uint8_t, uint8_t>(b, from_last, to_last);
          test<bfloat16, float16>(b, from_last, to_last);
          test<float, bfloat16>(b, from_last, to_last);
        }
      }
    }
  }
}

// A program whose instructions are drawn.
Program drawn(int channels, Size size, Size result, int length) {
  Program program;
  const auto some_size = [] {
    return Size{static_cast<int>(3 + below(40)), static_cast<int>(3 + below(60))};
  };
  const auto resize = [&](Size to) {
    static constexpr int kFilters[] = {0, 1, 2, 3, 6, 7};
    const Size region = some_size();
    const bool copies = below(3) == 0;
    program.push_back(box(static_cast<int>(below(20) - 10), static_cast<int>(below(20) - 10),
                          copies ? to : region, to, static_cast<int>(below(4)), kFilters[below(6)],
                          static_cast<int>(1 + below(4))));
    size = to;
  };
  bool saved = false;
  for (int i = 0; i < length; ++i) {
    const auto& programs = channels == 3 && below(3) == 0 ? kOfColours : kOfAny;
    const auto& chosen = programs[below(static_cast<int64_t>(programs.size()))];
    const int64_t kind = below(8);
    if (kind < 2 && !saved) {
      resize(some_size());
    } else if (kind < 4) {
      const Size to = saved ? size : some_size();
      program.push_back(
          warp(to, kind == 2 ? 0 : static_cast<int>(1 + below(3)), below(2) ? kTurned : kTilted));
      size = to;
    } else if (channels % 2 && kind == 4) {
      program.push_back({number(Op::contrast), static_cast<float>(2 * uniform()), 0.3f});
    } else if (kind == 5) {
      program.push_back({number(saved ? Op::join : Op::save), 0.4f});
      saved = true;
    } else if (!chosen.empty() && chosen[0][0] < number(Op::blur)) {
      program.insert(program.end(), chosen.begin(), chosen.end());
    } else {
      program.push_back(noise(1));
    }
  }
  if (saved) program.push_back({number(Op::mix)});
  resize(result);
  return program;
}

// Many samples of different sizes and programs, in groups that share little scratch memory.
void test_drawn() {
  for (const int channels : {1, 3, 4}) {
    Batch b{"drawn", channels, {24, 40}};
    b.sizes = {{20, 30}, {40, 33}, {5, 70}, {100, 100}};
    for (int n = 0; n < 24; ++n) {
      const Size size = b.sizes[n % b.sizes.size()];
      b.programs.push_back(drawn(channels, size, b.result, static_cast<int>(below(7))));
    }
    test<float, float>(b, false, false);
    b.most_scratch = 20000;
    test<uint8_t, uint8_t>(b, true, true);
    b.exact = true;
    test<uint8_t, float>(b, true, false);
  }
}

void test_plan() {
  Batch b{"no samples", 3, {4, 4}};
  b.sizes = {{4, 4}};
  AugmentBatch batch{};
  batch.channels = 3;
  cuda::launch_augment(batch, [](int64_t) -> void* { std::abort(); }, nullptr);
  // Crop, colours, a flip and a turn that take pixels as they are, normalisation: one launch, and
  // nothing in the scratch memory.
  const Program program = {box(1, 1, {8, 8}, {8, 8}, 1, 0, 0),
                           {number(Op::brightness), 0.5f},
                           warp({8, 8}, 0, kTurned),
                           kNormalize};
  std::vector<float> words(3 * program.size() * kInstruction);
  for (size_t i = 0; i < 3 * program.size(); ++i) {
    const auto& a = program[i % program.size()];
    std::copy(a.begin(), a.end(), words.begin() + i * kInstruction);
  }
  const int64_t images[] = {0, 9, 9, 0, 9, 9, 0, 9, 9};
  batch.images = images;
  batch.program = words.data();
  batch.samples = 3;
  batch.instructions = static_cast<int64_t>(program.size());
  batch.height = batch.width = 8;
  const auto plan = cuda::AugmentPlanner(batch).plan();
  driver::expect(plan.launches.size() == 1 && plan.segments == 3 && plan.scratch == 0,
                 [] { return "plan: not one launch of three segments"; });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !driver::set_order(argv[1])) return 2;
  test_boxes();
  test_warps();
  test_instructions<uint8_t, float>();
  test_instructions<float, float16>();
  test_layouts();
  test_drawn();
  test_plan();
  return driver::finish();
}
