// Calls the leaf of csrc/cpu/augment.simd.cpp.
#include "cpu/augment.h"

#include <vector>

#include "isas.h"

namespace isas {

// Of sides that fill no whole vectors.
constexpr int kHeight = 37, kWidth = 53;

using Instruction = std::vector<float>;

struct Program {
  std::string name;
  std::vector<Instruction> instructions;
  int height = kHeight, width = kWidth;
  int channels = 0;  // that it is for, or 0: any
};

Instruction made(AugmentOp op, std::vector<float> arguments = {}) {
  Instruction instruction{static_cast<float>(op)};
  instruction.insert(instruction.end(), arguments.begin(), arguments.end());
  instruction.resize(kInstruction);
  return instruction;
}

std::vector<Program> programs(float bound) {
  using enum AugmentOp;
  std::vector<Program> all{{"nothing", {}}};
  const auto fill = [=](int k) { return bound * static_cast<float>(k) / 8; };
  // Filters, flips and pads in turn; regions that shrink little or much, grow, or stay.
  const int sizes[][6] = {{2, 3, 30, 40, 29, 37},
                          {0, 0, 37, 53, 3, 5},
                          {1, 1, 9, 11, 40, 61},
                          {-4, -5, 37, 53, 37, 53},
                          {-20, 30, 60, 70, 31, 33}};
  int turn = 0;
  for (const int* size : sizes) {
    for (const int filter : {0, 1, 2, 3, 6, 7}) {
      const bool outside = size[0] < 0 || size[1] < 0;
      const int pad = outside ? 1 + turn % 4 : 0, flips = turn % 4;
      std::vector<float> arguments(size, size + 6);
      for (const int value : {flips, filter, pad}) arguments.push_back(static_cast<float>(value));
      for (int c = 0; c < 4; ++c) arguments.push_back(fill(c));
      all.push_back({"box " + std::to_string(turn++), {made(box, arguments)}, size[4], size[5]});
    }
  }
  for (const int filter : {0, 1, 2, 3}) {
    for (const float perspective : {0.0f, 0.01f}) {
      const Instruction moved =
          made(warp, {0.9f, 0.3f, -4.0f, -0.25f, 1.1f, 3.5f, perspective, perspective / 2, 1.0f,
                      41.0f, 39.0f, static_cast<float>(filter), fill(1), fill(5), fill(3)});
      all.push_back({"warp " + std::to_string(filter), {moved}, 41, 39});
      all.push_back({"warp of floats " + std::to_string(filter), {made(invert), moved}, 41, 39});
    }
  }
  for (const float axes : {0.0f, 1.0f, 2.0f}) {
    all.push_back({"blur", {made(blur, {axes, 3.0f, 0.3f, 0.2f, 0.1f, 0.05f})}});
  }
  const float keys[] = {1.0f, 65535.0f, 77.0f, 40000.0f};
  const auto keyed = [&](AugmentOp op, std::vector<float> arguments) {
    arguments.insert(arguments.end(), keys, keys + 4);
    return made(op, arguments);
  };
  const Instruction pixels[] = {
      made(brightness, {1.4f}),
      made(invert),
      made(solarize, {fill(4)}),
      made(solarize_add, {fill(4), fill(1)}),
      made(posterize, {3.0f}),
      made(autocontrast),
      made(equalize),
      made(sharpness, {1.7f, -0.7f}),
      keyed(noise, {fill(1) / 16, fill(1), 1.0f}),
      keyed(erase, {3.0f, 5.0f, 20.0f, 33.0f, 1.0f, 0.0f, 0.0f, 0.0f, 0.0f}),
      keyed(erase, {0.0f, 0.0f, 9.0f, 53.0f, 0.0f, fill(1), fill(2), fill(3), fill(4)}),
      keyed(salt_and_pepper, {0.2f, 0.3f}),
      made(normalize, {1.5f, 0.5f, 2.0f, 1.0f, 0.1f, -0.2f, 0.3f, 0.0f}),
  };
  for (const Instruction& one : pixels) {
    all.push_back({"instruction " + std::to_string(static_cast<int>(one[0])), {one}});
  }
  all.push_back({"a mix",
                 {made(save, {0.25f}), made(invert), made(join, {0.5f}), made(equalize),
                  made(join, {0.25f}), made(mix), made(brightness, {0.8f})}});
  const Instruction colours[] = {
      made(contrast, {0.6f, 0.4f}), made(saturation, {1.6f, -0.6f}),   made(hue, {0.3f}),
      made(hue, {-0.4f}),           made(permute, {2.0f, 2.0f, 0.0f}), made(grayscale),
  };
  for (const Instruction& one : colours) {
    all.push_back(
        {"colour " + std::to_string(static_cast<int>(one[0])), {one}, kHeight, kWidth, 3});
  }
  return all;
}

template <typename T>
constexpr PixelType kPixelType = PixelType::float32;
template <>
inline constexpr PixelType kPixelType<uint8_t> = PixelType::bytes;
template <>
inline constexpr PixelType kPixelType<float16> = PixelType::float16;
template <>
inline constexpr PixelType kPixelType<bfloat16> = PixelType::bfloat16;

template <typename From, typename To>
void call(const Program& program, int channels, bool channels_last, bool turns, bool exact) {
  constexpr int64_t kSamples = 2;
  const int64_t numel = int64_t{channels} * kHeight * kWidth;
  Buffer<From> pixels(kSamples * numel, 0);
  for (int64_t i = 0; i < pixels.size(); ++i) {
    if constexpr (std::is_same_v<From, uint8_t>) {
      pixels.data()[i] = static_cast<uint8_t>(below(256));
    } else {
      const float value = below(64) == 0 ? std::nanf("") : static_cast<float>(driver::uniform());
      pixels.data()[i] = store<From>(value);
    }
  }
  Buffer<To> result(kSamples * channels * program.height * program.width, 0);
  const int64_t images[] = {0, kHeight, kWidth, numel, kHeight, kWidth};
  std::vector<float> rows;
  for (int64_t n = 0; n < kSamples; ++n) {
    for (const Instruction& one : program.instructions) {
      rows.insert(rows.end(), one.begin(), one.end());
    }
  }
  AugmentTask task{};
  AugmentBatch& batch = task.batch;
  batch.pixels = pixels.data();
  batch.elements = pixels.size();
  batch.from = kPixelType<From>;
  batch.channels_last = channels_last;
  batch.images = images;
  batch.program = rows.data();
  batch.samples = kSamples;
  batch.instructions = static_cast<int64_t>(program.instructions.size());
  batch.channels = channels;
  batch.result = result.data();
  batch.to = kPixelType<To>;
  batch.to_channels_last = channels_last != turns;
  batch.height = program.height;
  batch.width = program.width;
  batch.exact = exact;
  task.stream = turns;
  share_out(0, kSamples, 1,
            [&](int64_t begin, int64_t end) { RK_LEAF(augment_range)(task, begin, end); });
  Digest digest;
  digest.add(result);
  digest.report("%s, %s to %s, %d channels%s%s%s", program.name.c_str(), kName<From>, kName<To>,
                channels, channels_last ? ", channels last" : "", turns ? ", turned" : "",
                exact ? ", exact" : "");
}

template <typename From, typename To>
void call(bool exact) {
  int turn = 0;
  for (Program program : programs(std::is_same_v<From, uint8_t> ? 255.0f : 1.0f)) {
    const int channels = program.channels ? program.channels : 1 + (turn + 3) % 4;
    program.name += ", program " + std::to_string(turn++);
    call<From, To>(program, channels, turn % 2 == 0, turn % 3 == 0, exact);
    if (channels != 3) call<From, To>(program, 3, turn % 2 == 1, turn % 3 == 1, exact);
  }
}

void call_leaves() {
  call<uint8_t, float>(false);
  call<uint8_t, uint8_t>(true);
  call<uint8_t, float16>(true);
  call<float, bfloat16>(false);
  call<float16, float>(false);
  call<bfloat16, uint8_t>(false);
}

}  // namespace isas
