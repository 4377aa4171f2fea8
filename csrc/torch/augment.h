// augment's arguments as both launchers, CPU and CUDA, read them: what ops/augment.py declares,
// checked for what memory safety rests on, as raw pointers. Images and programs are on the CPU, so
// that every value is looked at before anything runs.
#pragma once

#include <initializer_list>
#include <limits>
#include <vector>

#include "checks.h"
#include "reg_kernels/augment_math.h"

namespace reg_kernels {

// `got` is what is said of it where it is refused.
template <typename T>
PixelType pixel_type(const char* op, ScalarType type, const char* name, const T& got) {
  switch (type) {
    case ScalarType::Byte: return PixelType::bytes;
    case ScalarType::Float: return PixelType::float32;
    case ScalarType::Half: return PixelType::float16;
    case ScalarType::BFloat16: return PixelType::bfloat16;
    case ScalarType::Double:
      refuse(op, name, "of no float64, which is the reference's alone", described(got));
    default:
      refuse(op, name, "one of float64, float32, float16, bfloat16 or uint8", described(got));
  }
}

// By opcode. _augment_program.py has the same names and ranges.
constexpr const char* kAugmentNames[kAugmentOps] = {
    "NONE",         "BOX",          "WARP",
    "BRIGHTNESS",   "CONTRAST",     "SATURATION",
    "HUE",          "GRAYSCALE",    "INVERT",
    "SOLARIZE",     "SOLARIZE_ADD", "POSTERIZE",
    "AUTOCONTRAST", "EQUALIZE",     "SHARPNESS",
    "BLUR",         "NOISE",        "PERMUTE",
    "ERASE",        "NORMALIZE",    "SALT_AND_PEPPER",
    "SAVE",         "JOIN",         "MIX"};

// What an argument may be, beside finite: of `count` arguments from `first` on.
struct AugmentRange {
  AugmentOp op;
  int first;
  std::initializer_list<const char*> names;
  double lowest, highest;
  bool whole;
};

inline const std::vector<AugmentRange>& augment_ranges(AugmentOp op) {
  static const auto by_op = [] {
    using enum AugmentOp;
    constexpr double kSide = kLargestSide, kAny = std::numeric_limits<double>::infinity();
    static const AugmentRange ranges[] = {
        {box, 1, {"top", "left"}, -kSide, kSide, true},
        {box, 3, {"height", "width", "out_height", "out_width"}, 1, kSide, true},
        {box, 7, {"flips"}, 0, 3, true},
        {box, 8, {"filter"}, 0, 7, true},
        {box, 9, {"pad"}, 0, 4, true},
        {warp, 10, {"out_height", "out_width"}, 1, kSide, true},
        {warp, 12, {"filter"}, 0, 3, true},
        {hue, 1, {"shift"}, -0.5, 0.5, false},
        {posterize, 1, {"bits"}, 0, 8, true},
        {blur, 1, {"axes"}, 0, 2, true},
        {blur, 2, {"radius"}, 0, kMostBlurRadius, true},
        {noise, 2, {"std"}, 0, kAny, false},
        {noise, 3, {"clip"}, 0, 1, true},
        {noise, 4, {"key0", "key1", "key2", "key3"}, 0, 65535, true},
        {permute, 1, {"p0", "p1", "p2"}, 0, 2, true},
        {erase, 1, {"top", "left", "height", "width"}, 0, kSide, true},
        {erase, 5, {"mode"}, 0, 1, true},
        {erase, 10, {"key0", "key1", "key2", "key3"}, 0, 65535, true},
        {salt_and_pepper, 1, {"p", "salt"}, 0, 1, false},
        {salt_and_pepper, 3, {"key0", "key1", "key2", "key3"}, 0, 65535, true},
    };
    std::vector<std::vector<AugmentRange>> lists(kAugmentOps);
    for (const AugmentRange& range : ranges) lists[static_cast<int>(range.op)].push_back(range);
    return lists;
  }();
  return by_op[static_cast<int>(op)];
}

// A sample's program, walked through by the image's size.
class AugmentProgramCheck {
 public:
  AugmentProgramCheck(const char* op, const AugmentBatch& batch, int64_t sample)
      : op_(op),
        batch_(batch),
        sample_(sample),
        height_(batch.images[3 * sample + 1]),
        width_(batch.images[3 * sample + 2]) {}

  void run() {
    for (step_ = 0; step_ < batch_.instructions; ++step_) {
      const float* const a = batch_.instruction(sample_, step_);
      check_values(a);
      follow(static_cast<AugmentOp>(static_cast<int>(a[0])), a);
    }
    if (height_ == batch_.height && width_ == batch_.width) return;
    refuse(op_, "program",
           words("such that images of (", batch_.height, ", ", batch_.width, ") result"),
           words("(", height_, ", ", width_, ") for sample ", sample_));
  }

 private:
  [[noreturn]] void fail(const std::string& must, const std::string& got) const {
    refuse(op_, "program", must, words(got, " in instruction ", step_, " of sample ", sample_));
  }

  static bool is_whole(float x) { return x == __builtin_floorf(x); }

  void check_values(const float* a) const {
    const bool known = a[0] >= 0 && a[0] < kAugmentOps && is_whole(a[0]);
    const std::string name = known ? kAugmentNames[static_cast<int>(a[0])] : words(a[0]);
    bool finite = true;
    for (int k = 0; k < kInstruction; ++k) finite = finite && a[k] - a[k] == 0;
    if (!finite) fail("of finite numbers", name);
    if (!known) fail(words("of opcodes from 0 to ", kAugmentOps - 1), name);
    const auto op = static_cast<AugmentOp>(static_cast<int>(a[0]));
    check_channels(op);
    for (const AugmentRange& range : augment_ranges(op)) {
      const float* value = a + range.first;
      for (const char* argument : range.names) {
        const bool is_filter = op == AugmentOp::box && range.first == 8;
        const bool fits = *value >= range.lowest && *value <= range.highest &&
                          (!range.whole || is_whole(*value)) &&
                          !(is_filter && (*value == 4 || *value == 5));
        if (!fits) {
          fail(words(name, " with ", argument, " ", range.whole ? "whole and " : "", "in [",
                     range.lowest, ", ", range.highest, "]", is_filter ? ", not 4 or 5" : ""),
               words(argument, " ", *value));
        }
        ++value;
      }
    }
  }

  void check_channels(AugmentOp op) const {
    using enum AugmentOp;
    const bool colour = op == saturation || op == hue || op == grayscale || op == permute;
    const bool fits = batch_.channels == 3 || (op == contrast ? batch_.channels == 1 : !colour);
    if (fits || !(colour || op == contrast)) return;
    const char* const name = kAugmentNames[static_cast<int>(op)];
    fail(words(name, " only for ", colour ? "3" : "1 or 3", " channels, not ", batch_.channels),
         name);
  }

  // The sizes that an instruction leaves.
  void follow(AugmentOp op, const float* a) {
    const std::string name = kAugmentNames[static_cast<int>(op)];
    const int64_t height = height_, width = width_;
    const auto holds = [&](int64_t top, int64_t left, int64_t h, int64_t w) {
      return top >= 0 && left >= 0 && top + h <= height && left + w <= width;
    };
    switch (op) {
      case AugmentOp::box: {
        const BoxArguments box = BoxArguments::of(a);
        if (box.pad == AugmentPad::none && !holds(box.top, box.left, box.height, box.width)) {
          fail("BOX of a region inside of the image, or a pad", name);
        }
        height_ = box.out_height;
        width_ = box.out_width;
        break;
      }
      case AugmentOp::warp: {
        const WarpArguments warp = WarpArguments::of(a);
        height_ = warp.out_height;
        width_ = warp.out_width;
        break;
      }
      case AugmentOp::blur: {
        const BlurArguments blur = BlurArguments::of(a);
        const bool fits =
            (!blur.rows || blur.radius < height) && (!blur.columns || blur.radius < width);
        if (!fits) fail("BLUR with a radius below the image's sides", name);
        break;
      }
      case AugmentOp::erase: {
        const EraseArguments erase = EraseArguments::of(a);
        if (!holds(erase.top, erase.left, erase.height, erase.width)) {
          fail("ERASE of a region inside of the image", name);
        }
        break;
      }
      case AugmentOp::save: saved_ = true; break;
      case AugmentOp::join:
      case AugmentOp::mix:
        if (!saved_) fail("JOIN and MIX between a SAVE and its MIX alone", name);
        saved_ = op == AugmentOp::join;
        break;
      default: break;
    }
    if (saved_ && (height_ != height || width_ != width)) {
      fail("a size that stays between a SAVE and its MIX", name);
    }
  }

  const char* op_;
  const AugmentBatch& batch_;
  int64_t sample_, step_ = 0, height_, width_;
  bool saved_ = false;  // and not yet mixed
};

// All of a call but its result.
inline AugmentBatch augment_batch(const Call& call, const Tensor& pixels, const Tensor& images,
                                  const Tensor& program, int64_t channels, bool channels_last,
                                  int64_t height, int64_t width, ScalarType dtype,
                                  bool result_channels_last, bool exact) {
  AugmentBatch batch{};
  batch.from = pixel_type(call.op, pixels.scalar_type(), "pixels", pixels);
  RK_REQUIRE(pixels.dim() == 1 && pixels.is_contiguous(), call.op, "pixels",
             "one contiguous dimension", pixels);
  batch.pixels = call.data(pixels, "pixels");
  batch.elements = pixels.numel();
  const auto on_host = [&](const Tensor& x, ScalarType type, int64_t dims, int64_t last,
                           const char* name, const std::string& shape) {
    RK_REQUIRE(
        x.scalar_type() == type && x.dim() == dims && x.size(dims - 1) == last && x.is_contiguous(),
        call.op, name, words("contiguous ", dtype_name(type), " of shape ", shape), x);
    RK_REQUIRE(x.is_cpu(), call.op, name, "on the CPU", "one on another device");
    return Call(call.op, x).data(x, name);
  };
  batch.images =
      static_cast<const int64_t*>(on_host(images, ScalarType::Long, 2, 3, "images", "(N, 3)"));
  batch.program = static_cast<const float*>(on_host(
      program, ScalarType::Float, 3, kInstruction, "program", words("(N, S, ", kInstruction, ")")));
  batch.samples = images.size(0);
  batch.instructions = program.size(1);
  RK_REQUIRE(program.size(0) == batch.samples, call.op, "program",
             words("of as many samples as images, ", batch.samples), program.size(0));
  RK_REQUIRE(channels >= 1 && channels <= kMostChannels, call.op, "channels",
             words("in [1, ", kMostChannels, "]"), channels);
  RK_REQUIRE(height >= 1 && height <= kLargestSide, call.op, "height",
             words("in [1, ", kLargestSide, "]"), height);
  RK_REQUIRE(width >= 1 && width <= kLargestSide, call.op, "width",
             words("in [1, ", kLargestSide, "]"), width);
  batch.to = pixel_type(call.op, dtype, "dtype", dtype_name(dtype));
  RK_REQUIRE(!exact || batch.from == PixelType::bytes, call.op, "exact",
             "false but for pixels of uint8", dtype_name(pixels.scalar_type()));
  batch.channels = static_cast<int>(channels);
  batch.channels_last = channels_last;
  batch.to_channels_last = result_channels_last;
  batch.height = static_cast<int>(height);
  batch.width = static_cast<int>(width);
  batch.exact = exact;
  for (int64_t n = 0; n < batch.samples; ++n) {
    const int64_t *image = batch.images + 3 * n, offset = image[0], h = image[1], w = image[2];
    const bool fits = h >= 1 && h <= kLargestSide && w >= 1 && w <= kLargestSide && offset >= 0 &&
                      offset <= batch.elements && channels * h * w <= batch.elements - offset;
    RK_REQUIRE(fits, call.op, "images",
               words("(offset, height, width) with sides in [1, ", kLargestSide,
                     "] of images that lie in the ", batch.elements, " pixels"),
               words("[", offset, ", ", h, ", ", w, "] for sample ", n));
  }
  for (int64_t n = 0; n < batch.samples; ++n) AugmentProgramCheck(call.op, batch, n).run();
  return batch;
}

// An uninitialised result for it, on the pixels' device.
inline Tensor augment_result(const Call& call, const Tensor& pixels, const AugmentBatch& batch,
                             ScalarType dtype) {
  const std::vector<int64_t> sizes{batch.samples, batch.channels, batch.height, batch.width};
  const std::vector<int64_t> strides = dense_strides(sizes, batch.to_channels_last, call.op);
  return empty_strided(pixels, sizes, strides, dtype_number(dtype));
}

}  // namespace reg_kernels
