// augment's arguments as both launchers, CPU and CUDA, read them: what ops/augment.py declares,
// checked for what memory safety rests on, as raw pointers. Images and programs are on the CPU, so
// that every value is looked at before anything runs.
#pragma once

#include "checks.h"
#include "reg_kernels/augment_math.h"

namespace reg_kernels {

inline PixelType pixel_type(const char* op, ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Byte: return PixelType::bytes;
    case ScalarType::Float: return PixelType::float32;
    case ScalarType::Half: return PixelType::float16;
    case ScalarType::BFloat16: return PixelType::bfloat16;
    default: refuse(op, name, "one of uint8, float32, float16, bfloat16", dtype_name(type));
  }
}

// What an instruction's argument may be.
struct AugmentArgument {
  const char* name;
  double least, most;
  bool whole;
};

constexpr double kAnyFloat = 3.4028234663852886e38;
constexpr AugmentArgument any_float(const char* name) {
  return {name, -kAnyFloat, kAnyFloat, false};
}
constexpr AugmentArgument side(const char* name) { return {name, 1, kLargestSide, true}; }
constexpr AugmentArgument place(const char* name) {
  return {name, -kLargestSide, kLargestSide, true};
}
constexpr AugmentArgument extent(const char* name) { return {name, 0, kLargestSide, true}; }
constexpr AugmentArgument choice(const char* name, int most) {
  return {name, 0, double(most), true};
}
constexpr AugmentArgument key_part(const char* name) { return {name, 0, 65535, true}; }

struct AugmentInstruction {
  const char* name;
  std::vector<AugmentArgument> arguments;
};

// By opcode; _augment_program.py has the same names.
inline const AugmentInstruction& augment_instruction(int opcode) {
  using A = AugmentArgument;
  const auto key = [](std::vector<A> arguments) {
    for (const char* part : {"key0", "key1", "key2", "key3"}) arguments.push_back(key_part(part));
    return arguments;
  };
  const auto numbers = [](std::vector<A> arguments, std::initializer_list<const char*> names) {
    for (const char* name : names) arguments.push_back(any_float(name));
    return arguments;
  };
  static const AugmentInstruction instructions[kAugmentOps] = {
      {"NONE", {}},
      {"BOX",
       numbers({place("top"), place("left"), side("height"), side("width"), side("out_height"),
                side("out_width"), choice("flips", 3), choice("filter", 7), choice("pad", 4)},
               {"fill0", "fill1", "fill2", "fill3"})},
      {"WARP",
       numbers({any_float("m0"), any_float("m1"), any_float("m2"), any_float("m3"), any_float("m4"),
                any_float("m5"), any_float("m6"), any_float("m7"), any_float("m8"),
                side("out_height"), side("out_width"), choice("filter", 3)},
               {"fill0", "fill1", "fill2"})},
      {"BRIGHTNESS", {any_float("factor")}},
      {"CONTRAST", {any_float("factor"), any_float("rest")}},
      {"SATURATION", {any_float("factor"), any_float("rest")}},
      {"HUE", {{"shift", -0.5, 0.5, false}}},
      {"GRAYSCALE", {}},
      {"INVERT", {}},
      {"SOLARIZE", {any_float("threshold")}},
      {"SOLARIZE_ADD", {any_float("threshold"), any_float("addend")}},
      {"POSTERIZE", {choice("bits", 8)}},
      {"AUTOCONTRAST", {}},
      {"EQUALIZE", {}},
      {"SHARPNESS", {any_float("factor"), any_float("rest")}},
      {"BLUR",
       numbers({choice("axes", 2), choice("radius", kMostBlurRadius)},
               {"w0", "w1", "w2", "w3", "w4", "w5", "w6", "w7", "w8", "w9", "w10", "w11", "w12"})},
      {"NOISE", key({any_float("mean"), any_float("std"), choice("clip", 1)})},
      {"PERMUTE", {choice("p0", 2), choice("p1", 2), choice("p2", 2)}},
      {"ERASE",
       key({extent("top"), extent("left"), extent("height"), extent("width"), choice("mode", 1),
            any_float("v0"), any_float("v1"), any_float("v2"), any_float("v3")})},
      {"NORMALIZE", numbers({}, {"a0", "a1", "a2", "a3", "b0", "b1", "b2", "b3"})},
      {"SALT_AND_PEPPER", key({{"p", 0, 1, false}, {"salt", 0, 1, false}})},
      {"SAVE", {any_float("weight")}},
      {"JOIN", {any_float("weight")}},
      {"MIX", {}},
  };
  return instructions[opcode];
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
    for (int64_t i = 0; i < batch_.instructions; ++i) step(i, batch_.instruction(sample_, i));
    if (height_ != batch_.height || width_ != batch_.width) {
      refuse(op_, "program",
             words("one that ends with images of ", batch_.height, " x ", batch_.width),
             words(height_, " x ", width_, " of sample ", sample_));
    }
  }

 private:
  // "program[2, 3] (BOX): top"
  void fail(const AugmentInstruction& instruction, int64_t i, const char* name,
            const std::string& must, const std::string& got) const {
    refuse(op_, words("program[", sample_, ", ", i, "] (", instruction.name, "): ", name), must,
           got);
  }

  void step(int64_t i, const float* a) {
    if (!(a[0] >= 0 && a[0] < kAugmentOps && a[0] == static_cast<float>(static_cast<int>(a[0])))) {
      refuse(op_, words("program[", sample_, ", ", i, ", 0]"), "an opcode", words(a[0]));
    }
    const auto opcode = static_cast<AugmentOp>(static_cast<int>(a[0]));
    const AugmentInstruction& instruction = augment_instruction(static_cast<int>(opcode));
    for (size_t k = 0; k < instruction.arguments.size(); ++k) {
      const AugmentArgument& argument = instruction.arguments[k];
      const double value = a[k + 1];
      const bool whole =
          !argument.whole ||
          static_cast<double>(static_cast<int64_t>(value > -1e9 && value < 1e9 ? value : 0.5)) ==
              value;
      if (value >= argument.least && value <= argument.most && whole) continue;
      const char* kind = argument.whole ? "a whole number in " : "in ";
      fail(instruction, i, argument.name,
           argument.most == kAnyFloat ? std::string("finite")
                                      : words(kind, "[", argument.least, ", ", argument.most, "]"),
           words(a[k + 1]));
    }
    const auto check = [&](bool ok, const char* name, const std::string& must,
                           const std::string& got) {
      if (!ok) [[unlikely]]
        fail(instruction, i, name, must, got);
    };
    const std::string channels = words(batch_.channels, " channels");
    switch (opcode) {
      case AugmentOp::box: {
        const BoxArguments box = BoxArguments::of(a);
        const int filter = static_cast<int>(a[8]);
        check(filter != 4 && filter != 5, "filter", "0 to 3, 6 or 7", words(filter));
        const bool inside = box.top >= 0 && box.left >= 0 && box.top + box.height <= height_ &&
                            box.left + box.width <= width_;
        check(inside || box.pad != AugmentPad::none, "pad",
              "given where the region is not inside of the image", "0");
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
      case AugmentOp::contrast:
        check(batch_.channels == 1 || batch_.channels == 3, "channels", "1 or 3", channels);
        break;
      case AugmentOp::saturation:
      case AugmentOp::hue:
      case AugmentOp::grayscale:
      case AugmentOp::permute: check(batch_.channels == 3, "channels", "3", channels); break;
      case AugmentOp::blur: {
        const BlurArguments blur = BlurArguments::of(a);
        check((!blur.rows || blur.radius < height_) && (!blur.columns || blur.radius < width_),
              "radius", words("smaller than the image, ", height_, " x ", width_),
              words(blur.radius));
        break;
      }
      case AugmentOp::erase: {
        const EraseArguments erase = EraseArguments::of(a);
        check(erase.top + erase.height <= height_ && erase.left + erase.width <= width_, "height",
              words("such that the region lies inside of the image, ", height_, " x ", width_),
              words(erase.height));
        break;
      }
      case AugmentOp::save:
        saved_ = true;
        saved_height_ = height_;
        saved_width_ = width_;
        break;
      case AugmentOp::join:
      case AugmentOp::mix:
        check(saved_ && saved_height_ == height_ && saved_width_ == width_, "image",
              "as large as what SAVE has saved", words(height_, " x ", width_));
        break;
      default: break;
    }
  }

  const char* op_;
  const AugmentBatch& batch_;
  int64_t sample_, height_, width_;
  bool saved_ = false;
  int64_t saved_height_ = 0, saved_width_ = 0;
};

// All of a call but its result.
inline AugmentBatch augment_batch(const Call& call, const Tensor& pixels, const Tensor& images,
                                  const Tensor& program, int64_t channels, bool channels_last,
                                  int64_t height, int64_t width, ScalarType dtype,
                                  bool result_channels_last, bool exact) {
  AugmentBatch batch{};
  batch.from = pixel_type(call.op, pixels.scalar_type(), "pixels");
  batch.to = pixel_type(call.op, dtype, "dtype");
  RK_REQUIRE(pixels.dim() == 1 && pixels.is_contiguous(), call.op, "pixels",
             "contiguous, of 1 dimension", pixels);
  batch.pixels = call.data(pixels, "pixels");
  RK_REQUIRE(channels >= 1 && channels <= kMostChannels, call.op, "channels",
             words("in [1, ", kMostChannels, "]"), channels);
  RK_REQUIRE(height >= 1 && height <= kLargestSide, call.op, "height",
             words("in [1, ", kLargestSide, "]"), height);
  RK_REQUIRE(width >= 1 && width <= kLargestSide, call.op, "width",
             words("in [1, ", kLargestSide, "]"), width);
  RK_REQUIRE(!exact || batch.from == PixelType::bytes, call.op, "exact",
             "false but of uint8 pixels", exact);
  RK_REQUIRE(images.is_cpu() && images.scalar_type() == ScalarType::Long && images.dim() == 2 &&
                 images.size(1) == 3 && images.is_contiguous(),
             call.op, "images", "contiguous int64 of shape (N, 3), on the CPU", images);
  batch.samples = images.size(0);
  RK_REQUIRE(
      program.is_cpu() && program.scalar_type() == ScalarType::Float && program.dim() == 3 &&
          program.size(0) == batch.samples && program.size(2) == kInstruction &&
          program.is_contiguous(),
      call.op, "program",
      words("contiguous float32 of shape (", batch.samples, ", S, ", kInstruction, "), on the CPU"),
      program);
  batch.instructions = program.size(1);
  batch.images = static_cast<const int64_t*>(Call(call.op, images).data(images, "images"));
  batch.program = static_cast<const float*>(Call(call.op, program).data(program, "program"));
  batch.channels = static_cast<int>(channels);
  batch.channels_last = channels_last;
  batch.to_channels_last = result_channels_last;
  batch.height = static_cast<int>(height);
  batch.width = static_cast<int>(width);
  batch.exact = exact;
  batch.elements = pixels.numel();
  for (int64_t n = 0; n < batch.samples; ++n) {
    const int64_t *image = batch.images + 3 * n, offset = image[0], h = image[1], w = image[2];
    const bool fits = h >= 1 && h <= kLargestSide && w >= 1 && w <= kLargestSide && offset >= 0 &&
                      offset <= batch.elements && channels * h * w <= batch.elements - offset;
    RK_REQUIRE(fits, call.op, words("images[", n, "]"),
               words("(offset, height, width) of an image of ", channels, " channels inside of ",
                     batch.elements, " elements, of sides in [1, ", kLargestSide, "]"),
               words("(", offset, ", ", h, ", ", w, ")"));
    AugmentProgramCheck(call.op, batch, n).run();
  }
  return batch;
}

// An uninitialised result for it, on the pixels' device.
inline Tensor augment_result(const Call& call, const Tensor& pixels, const AugmentBatch& batch,
                             ScalarType dtype) {
  const std::vector<int64_t> sizes{batch.samples, batch.channels, batch.height, batch.width};
  const std::vector<int64_t> strides = dense_strides(sizes, batch.to_channels_last, call.op);
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(pixels.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      4, sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      pixels.get_device_index(), &handle));
  return Tensor(handle);
}

}  // namespace reg_kernels
