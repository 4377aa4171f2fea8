// How a batch's programs are executed on a GPU: which launch does what of which sample. Plain C++,
// decided on the host from images and programs alone.
//
// A program is cut into segments. One reads an image, the sample's own or one in the scratch
// memory, moves and changes each pixel in registers, and writes an image, into the scratch memory
// or the result; it ends where an instruction reads more of an image than the pixel that it writes.
// Segments at the same place of their programs are one launch.
//
// "Moves" are instructions that give each pixel the value of one other: a crop, a flip, a nearest
// filter. They do not end a segment: a pixel's place is led back through them before anything is
// read, and what lies outside gets its fill at the instruction's own place in the program. That is
// exact, as long as nothing before them depends on a pixel's place.
//
// Scratch memory is shared by groups of samples that come one after the other, so that it stays in
// the second-level cache and is small however large the batch.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "reg_kernels/augment_math.h"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kAugmentTile = 32;       // rows and columns of what a block writes
constexpr int kAugmentMostMoves = 8;   // of a segment: a bit for each of four pixels in 32
constexpr int kAugmentTableTaps = 56;  // weights of more taps an axis are computed where needed
constexpr int64_t kAugmentScratch = int64_t{8} << 20;  // floats of a group: 32 MiB
constexpr int kLoadVector = 4;                         // pixels of a thread, floats of a vector

// What a segment begins with: reading each pixel, or an instruction that reads several.
enum class AugmentHead : int32_t { load, box, warp, blur, sharpness };
// What it counts of the image that it writes, for the first instruction of the next one.
enum class AugmentCount : int32_t { nothing, grays, extrema, histogram };

// Instructions of the plan's own: a move's fill, arguments its number and a value for each channel;
// and what resampling does in the end to values outside of the range.
constexpr int kAugmentFill = kAugmentOps, kAugmentResampled = kAugmentOps + 1;
constexpr int kMoveSource = 16;  // where a move has the height and width of what it reads

struct AugmentSegment {
  int64_t source;  // where it reads: an element of the pixels, in the first segment, or scratch
  int64_t target;  // where it writes: an element of the result, or of the scratch memory
  int64_t saved, total;  // of SAVE, JOIN and MIX, in the scratch memory
  int32_t source_height, source_width;
  int32_t height, width;  // of what it writes
  int64_t code, end;      // words of the plan: moves from the last to the first, the head, the rest
  int32_t moves;
  AugmentHead head;
  int32_t known;    // words of the statistics that its first instruction needs
  int32_t counted;  // and that the next one's does
  AugmentCount counts;
  int32_t to_result;
};
static_assert(sizeof(AugmentSegment) == 88 && alignof(AugmentSegment) == 8);

struct AugmentLaunch {
  int64_t first, segments;  // of the plan's
  uint32_t tiles;           // blocks a segment, those that find nothing to do included
  int32_t taps;             // the most of an axis that are tabled; 0: no BOX with several, no BLUR
  bool from_pixels;
  int32_t cleared;  // words of the statistics to be zero before, of a group's first launch
};

struct AugmentPlan {
  int64_t segments;
  std::vector<uint32_t> words;  // the segments, then all code
  std::vector<AugmentLaunch> launches;
  int64_t scratch;     // floats
  int64_t statistics;  // words
};

// Rows of images in the scratch memory begin at whole vectors.
RK_HD int64_t scratch_row(int32_t width) {
  return ceil_div(width, kLoadVector) * static_cast<int64_t>(kLoadVector);
}

class AugmentPlanner {
 public:
  explicit AugmentPlanner(const AugmentBatch& batch, int64_t most_scratch = kAugmentScratch)
      : batch_(batch), range_(range_of(batch)), most_scratch_(most_scratch) {}

  AugmentPlan plan() {
    for (int64_t n = 0; n < batch_.samples; ++n) add_sample(n);
    end_group();
    plan_.segments = static_cast<int64_t>(segments_.size());
    // Code is numbered from the segments' end until it is known how many there are.
    const auto words = segments_.size() * sizeof(AugmentSegment) / sizeof(uint32_t);
    for (AugmentSegment& segment : segments_) {
      segment.code += static_cast<int64_t>(words);
      segment.end += static_cast<int64_t>(words);
    }
    plan_.words.resize(words + code_.size());
    if (words) std::memcpy(plan_.words.data(), segments_.data(), 4 * words);
    std::copy(code_.begin(), code_.end(), plan_.words.begin() + static_cast<int64_t>(words));
    return std::move(plan_);
  }

 private:
  // Of one sample: its images in the scratch memory, by what they are for, in floats.
  enum Buffer { kFirst, kSecond, kSaved, kTotal, kBuffers };

  struct Planned {
    AugmentSegment segment;
    int source, target;  // buffers, or -1: the pixels, the result
    int taps;
  };

  void add_sample(int64_t n) {
    sample_.clear();
    std::fill_n(needs_, kBuffers, int64_t{0});
    unbounded_ = false;
    const int64_t* const image = batch_.images + 3 * n;
    height_ = static_cast<int32_t>(image[1]);
    width_ = static_cast<int32_t>(image[2]);
    begin(-1);
    now_.segment.source = image[0];
    for (int64_t i = 0; i < batch_.instructions; ++i) add_instruction(batch_.instruction(n, i));
    now_.segment.target = n * batch_.channels * batch_.height * batch_.width;
    now_.segment.to_result = 1;
    end(-1);

    int64_t offsets[kBuffers], all = 0;
    for (int b = 0; b < kBuffers; ++b) {
      offsets[b] = all;
      all += needs_[b];
    }
    if (scratch_ > 0 && scratch_ + statistics_ + all > most_scratch_) end_group();
    const int32_t counted = statistics_;
    for (Planned& p : sample_) {
      AugmentSegment& s = p.segment;
      if (p.source >= 0) s.source = scratch_ + offsets[p.source];
      if (p.target >= 0) s.target = scratch_ + offsets[p.target];
      s.saved = scratch_ + offsets[kSaved];
      s.total = scratch_ + offsets[kTotal];
      s.known += counted;
      s.counted += counted;
    }
    scratch_ += all;
    statistics_ += sample_statistics_;
    sample_statistics_ = 0;
    if (levels_.size() < sample_.size()) levels_.resize(sample_.size());
    for (size_t k = 0; k < sample_.size(); ++k) levels_[k].push_back(sample_[k]);
    plan_.scratch = std::max(plan_.scratch, scratch_);
    plan_.statistics = std::max<int64_t>(plan_.statistics, statistics_);
  }

  void add_instruction(const float* a) {
    const auto op = static_cast<AugmentOp>(static_cast<int>(a[0]));
    switch (op) {
      case AugmentOp::none: return;
      case AugmentOp::box: return add_box(a);
      case AugmentOp::warp: return add_warp(a);
      case AugmentOp::blur:
        begin_with(AugmentHead::blur, a, 3 + static_cast<int>(a[2]) + 1, false);
        now_.taps = 2 * static_cast<int>(a[2]) + 1;
        return;
      case AugmentOp::sharpness:
        if (height_ <= 2 || width_ <= 2) return;
        return begin_with(AugmentHead::sharpness, a, 3, false);
      case AugmentOp::contrast: next(AugmentCount::grays, 2); break;
      case AugmentOp::autocontrast: next(AugmentCount::extrema, 2 * batch_.channels); break;
      case AugmentOp::equalize: next(AugmentCount::histogram, kGrays * batch_.channels); break;
      case AugmentOp::save:
        needs_[kSaved] = std::max(needs_[kSaved], image_floats());
        needs_[kTotal] = std::max(needs_[kTotal], image_floats());
        break;
      default: break;
    }
    if (op == AugmentOp::noise || op == AugmentOp::erase || op == AugmentOp::salt_and_pepper ||
        op == AugmentOp::save || op == AugmentOp::join || op == AugmentOp::mix) {
      at_place_ = true;
    }
    unbounded_ |= op == AugmentOp::normalize || op == AugmentOp::noise || op == AugmentOp::erase;
    put(body_, static_cast<int>(op), a, words_of(op));
  }

  // How many of an instruction's numbers are used.
  static int words_of(AugmentOp op) {
    switch (op) {
      case AugmentOp::brightness:
      case AugmentOp::hue:
      case AugmentOp::solarize:
      case AugmentOp::posterize:
      case AugmentOp::save:
      case AugmentOp::join: return 2;
      case AugmentOp::contrast:
      case AugmentOp::saturation:
      case AugmentOp::solarize_add: return 3;
      case AugmentOp::permute: return 4;
      case AugmentOp::noise: return 8;
      case AugmentOp::salt_and_pepper: return 7;
      case AugmentOp::normalize: return 9;
      case AugmentOp::erase: return 14;
      default: return 1;
    }
  }

  void add_box(const float* a) {
    const auto box = BoxArguments::of(a);
    const auto rows =
        BoxAxis::of(box.height, box.out_height, box.flip_rows, box.filter, box.antialias);
    const auto columns =
        BoxAxis::of(box.width, box.out_width, box.flip_columns, box.filter, box.antialias);
    if (rows.takes_one() && columns.takes_one()) {
      add_move(a, box.pad == AugmentPad::constant, [&](int c) { return box.fill[c]; });
    } else {
      begin_with(AugmentHead::box, a, 14, true);
      now_.taps = std::max(rows.most_taps(), columns.most_taps());
    }
    height_ = box.out_height;
    width_ = box.out_width;
  }

  void add_warp(const float* a) {
    const auto warp = WarpArguments::of(a);
    if (warp.filter == WarpFilter::nearest) {
      add_move(a, true, [&](int c) { return warp.fill(c); });
    } else {
      begin_with(AugmentHead::warp, a, 16, true);
    }
    height_ = warp.out_height;
    width_ = warp.out_width;
  }

  template <typename Fill>
  void add_move(const float* a, bool may_be_outside, const Fill& fill_of) {
    const AugmentHead head = now_.segment.head;
    const bool at_any_place = head == AugmentHead::load || head == AugmentHead::warp;
    if (!at_any_place || at_place_ || now_.segment.moves == kAugmentMostMoves) next();
    float move[kMoveSource + 2];
    std::copy_n(a, kInstruction, move);
    move[kMoveSource] = static_cast<float>(height_);
    move[kMoveSource + 1] = static_cast<float>(width_);
    std::vector<uint32_t> code;
    put(code, static_cast<int>(a[0]), move, kMoveSource + 2);
    moves_.insert(moves_.begin(), code.begin(), code.end());
    if (may_be_outside) {
      float fill[2 + kMostChannels] = {0, static_cast<float>(now_.segment.moves)};
      for (int c = 0; c < kMostChannels; ++c) fill[2 + c] = range_.resampled(fill_of(c));
      put(body_, kAugmentFill, fill, 2 + kMostChannels);
    }
    if (unbounded_ && range_.bound != 1.0f) put(body_, kAugmentResampled, a, 1);
    ++now_.segment.moves;
  }

  // Makes an instruction the head of a segment, which the one that there is becomes if it has done
  // nothing yet and may read where it does.
  void begin_with(AugmentHead head, const float* a, int words, bool of_pixels) {
    const bool nothing =
        now_.segment.head == AugmentHead::load && now_.segment.moves == 0 && body_.empty();
    if (!nothing || (now_.source < 0 && !of_pixels)) next();
    now_.segment.head = head;
    put(head_, static_cast<int>(a[0]), a, words);
  }

  int64_t image_floats() const { return batch_.channels * height_ * scratch_row(width_); }

  void begin(int source) {
    now_ = {};
    now_.source = source;
    now_.segment.source_height = height_;
    now_.segment.source_width = width_;
    at_place_ = false;
  }

  // Ends a segment, of which `count` is to be known, and begins the next one.
  void next(AugmentCount count = AugmentCount::nothing, int32_t words = 0) {
    // In place, where a pixel is read by the thread that writes it.
    const bool in_place = now_.segment.head == AugmentHead::load && now_.segment.moves == 0;
    const int target = now_.source < 0 || in_place ? std::max(now_.source, 0) : 1 - now_.source;
    needs_[target] = std::max(needs_[target], image_floats());
    const int32_t counted = sample_statistics_;
    now_.segment.counts = count;
    now_.segment.counted = counted;
    end(target);
    begin(target);
    now_.segment.known = counted;
    sample_statistics_ += words + words % 2;  // of 8 bytes each
  }

  void end(int target) {
    now_.target = target;
    now_.segment.height = height_;
    now_.segment.width = width_;
    now_.segment.code = static_cast<int64_t>(code_.size());
    for (auto* part : {&moves_, &head_, &body_}) {
      code_.insert(code_.end(), part->begin(), part->end());
      part->clear();
    }
    now_.segment.end = static_cast<int64_t>(code_.size());
    sample_.push_back(now_);
  }

  // The opcode and how many words there are, then the arguments.
  static void put(std::vector<uint32_t>& code, int op, const float* a, int words) {
    code.push_back(static_cast<uint32_t>(op | words << 8));
    for (int i = 1; i < words; ++i) code.push_back(bit_cast<uint32_t>(a[i]));
  }

  static uint32_t tiles_of(const Planned& p) {
    return static_cast<uint32_t>(ceil_div(p.segment.height, kAugmentTile) *
                                 ceil_div(p.segment.width, kAugmentTile));
  }

  // Makes launches of the samples since the last group: one for the segments of each level, or a
  // few where their images differ much in size.
  void end_group() {
    bool clears = statistics_ > 0;
    for (size_t level = 0; level < levels_.size(); ++level) {
      auto& planned = levels_[level];
      const auto size_class = [](const Planned& p) { return std::bit_width(tiles_of(p)); };
      std::stable_sort(planned.begin(), planned.end(), [&](const Planned& a, const Planned& b) {
        return size_class(a) > size_class(b);
      });
      for (size_t i = 0; i < planned.size();) {
        AugmentLaunch launch{};
        launch.first = static_cast<int64_t>(segments_.size());
        launch.from_pixels = level == 0;
        launch.cleared = clears ? statistics_ : 0;
        clears = false;
        const auto size = size_class(planned[i]);
        for (; i < planned.size() && size_class(planned[i]) == size; ++i) {
          const uint32_t tiles = std::max(launch.tiles, tiles_of(planned[i]));
          if (tiles * (launch.segments + 1) > kMostBlocks && launch.segments > 0) break;
          launch.tiles = tiles;
          launch.segments += 1;
          launch.taps = std::max(launch.taps, std::min(planned[i].taps, kAugmentTableTaps));
          segments_.push_back(planned[i].segment);
        }
        plan_.launches.push_back(launch);
      }
    }
    levels_.clear();
    scratch_ = 0;
    statistics_ = 0;
  }

  static constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid

  const AugmentBatch& batch_;
  const ImageRange range_;
  const int64_t most_scratch_;
  AugmentPlan plan_{};
  std::vector<AugmentSegment> segments_;
  std::vector<uint32_t> code_;
  // The group's.
  std::vector<std::vector<Planned>> levels_;
  int64_t scratch_ = 0;
  int32_t statistics_ = 0;
  // The sample's.
  std::vector<Planned> sample_;
  int64_t needs_[kBuffers] = {};
  int32_t sample_statistics_ = 0, height_ = 0, width_ = 0;
  bool unbounded_ = false;
  // The segment's.
  Planned now_{};
  std::vector<uint32_t> moves_, head_, body_;
  bool at_place_ = false;  // something in it depends on a pixel's place
};

}  // namespace cuda
RK_NAMESPACE_END
