// The interpreter of augment's programs, compiled once for each instruction set (isa.h).
//
// A sample's program is cut into segments: an instruction that moves pixels or mixes those that lie
// side by side, and the ones behind it that go pixel by pixel. A row of a segment stays in the
// first-level cache from what it is made of until it is stored, in the result or, where another
// segment follows, in an image of floats that stays in the second-level cache. So of most programs
// the pixels are read once and the result is written once: 1 B an element of the image from bytes,
// and 4 B an element of the result in float32, 2 B in 16 bits.
#include "augment.h"

#include "augment_box.h"
#include "augment_colour.h"
#include "augment_filters.h"
#include "augment_rows.h"
#include "augment_warp.h"

RK_NAMESPACE_BEGIN
namespace {

AugmentOp op_of(const float* instruction) {
  return static_cast<AugmentOp>(static_cast<int>(instruction[0]));
}

bool needs_statistics(AugmentOp op) {
  return op == AugmentOp::contrast || op == AugmentOp::autocontrast || op == AugmentOp::equalize;
}
// Whether a row of the result is made of others than the same row of the image.
bool moves_pixels(AugmentOp op) {
  return op == AugmentOp::box || op == AugmentOp::warp || op == AugmentOp::blur ||
         op == AugmentOp::sharpness;
}
// Whether an instruction needs no more of the image than the pixel that it changes.
bool goes_by_pixels(AugmentOp op) {
  return !needs_statistics(op) && !moves_pixels(op) && op != AugmentOp::save &&
         op != AugmentOp::join && op != AugmentOp::mix;
}

// Bytes of an image that are asked for before a warp reads them in an order that no hardware
// foresees: half of a small second-level cache.
constexpr int64_t kMostPrefetched = int64_t{1} << 18;

class Interpreter {
 public:
  explicit Interpreter(const AugmentTask& task)
      : task_(task), batch_(task.batch), range_(range_of(batch_)) {}

  ~Interpreter() {
    if (task_.stream) stream_fence();
  }

  void run(int64_t sample) {
    sample_ = sample;
    const int64_t* const image = batch_.images + 3 * sample;
    const int64_t size = batch_.from == PixelType::bytes     ? 1
                         : batch_.from == PixelType::float32 ? 4
                                                             : 2;
    pixels_ = {static_cast<const char*>(batch_.pixels) + image[0] * size,
               batch_.elements - image[0],
               batch_.from,
               batch_.channels_last,
               batch_.channels,
               static_cast<int>(image[1]),
               static_cast<int>(image[2])};
    current_ = saved_ = total_ = nullptr;
    height_ = pixels_.height;
    width_ = pixels_.width;
    counted_ = done_ = false;
    for (int64_t i = 0; !done_;) i = run_segment(skip_none(i));
  }

 private:
  const float* instruction(int64_t i) const { return batch_.instruction(sample_, i); }
  AugmentOp op_at(int64_t i) const {
    return i < batch_.instructions ? op_of(instruction(i)) : AugmentOp::none;
  }
  int64_t skip_none(int64_t i) const {
    while (i < batch_.instructions && op_at(i) == AugmentOp::none) ++i;
    return i;
  }

  // The segment that begins with instruction i, or what is left where there is none; returns where
  // the next one begins.
  int64_t run_segment(int64_t i) {
    const AugmentOp op = op_at(i);
    if (op == AugmentOp::save) return save(instruction(i)[1]), i + 1;
    if (op == AugmentOp::join) return join(instruction(i)[1]), i + 1;
    if (op == AugmentOp::mix) current_ = total_;
    if (needs_statistics(op)) {
      if (!counted_) count(op);
      pixel_.take(op, batch_.channels, statistics_);
    }
    const bool moves = moves_pixels(op);
    int64_t end = skip_none(min(i + 1, batch_.instructions));
    while (end < batch_.instructions && goes_by_pixels(op_at(end))) end = skip_none(end + 1);
    write(moves ? instruction(i) : nullptr, moves ? i + 1 : i, end);
    return end;
  }

  // An image that is none of those in use.
  Planes& other_planes() {
    for (Planes& planes : planes_) {
      if (&planes != current_ && &planes != saved_ && &planes != total_) return planes;
    }
    return planes_[0];  // there are enough
  }

  // Makes planes of what are pixels still.
  const Planes& in_planes() {
    if (!current_) {
      open_source(0, width_, 1);
      write_rows(0, 0, &other_planes(), [&](int y, const RowSet& rows) { source_.read(y, rows); });
    }
    return *current_;
  }

  void save(float weight) {
    saved_ = &in_planes();
    total_ = nullptr;
    Planes& total = other_planes();
    total.resize(batch_.channels, height_, width_);
    add(total, [=](Vector, Vector v) RK_INLINE { return v * weight; });
    total_ = &total;
  }

  void join(float weight) {
    add(*total_, [=](Vector total, Vector v) RK_INLINE { return total + v * weight; });
    current_ = saved_;
  }

  // total = f(total, image) for each element.
  template <typename F>
  void add(Planes& total, const F& f) {
    for (int c = 0; c < batch_.channels; ++c) {
      for (int y = 0; y < height_; ++y) {
        float* const to = total.row(c, y);
        const float* const from = current_->row(c, y);
        for (int64_t x = 0; x < width_; x += kVector) {
          put(to + x, f(vector_at(to + x), vector_at(from + x)));
        }
      }
    }
  }

  // Rows of the image as it is, from column `first` on, of which as many as `reach` are in use.
  void open_source(int64_t first, int64_t count, int reach) {
    if (current_) {
      source_.of_planes(*current_, batch_.channels, first);
    } else {
      source_.of_pixels(pixels_, first, count, reach);
    }
  }

  void count(AugmentOp op) {
    statistics_.start(op, batch_.channels, range_);
    open_source(0, width_, 1);
    for (int y = 0; y < height_; ++y) statistics_.add(source_.at(y), width_);
  }

  // Instruction `mover`, where there is one, then instructions [begin, end), to where what follows
  // them will want it.
  void write(const float* mover, int64_t begin, int64_t end) {
    // Bytes are read as they lie; what else is read in no order is made planes first.
    const AugmentOp op = mover ? op_of(mover) : AugmentOp::none;
    const bool bytes = !current_ && ByteReader::takes(pixels_);
    if (op == AugmentOp::warp && !bytes) in_planes();
    Planes* const planes = end == batch_.instructions ? nullptr : &other_planes();
    const auto write_rows = [&](const auto& make_row) {
      this->write_rows(begin, end, planes, make_row);
    };
    const int channels = batch_.channels, height = height_, width = width_;
    switch (op) {
      case AugmentOp::box: {
        const BoxArguments box = BoxArguments::of(mover);
        const bool absent = current_ || batch_.from != PixelType::bytes;
        box_.set(box, channels, height, width, absent, range_);
        open_source(box_.first(), box_.count(), box_.reach());
        height_ = box.out_height;
        width_ = box.out_width;
        return write_rows([&](int y, const RowSet& rows) { box_.row(source_, y, rows); });
      }
      case AugmentOp::warp: {
        const WarpArguments warp = WarpArguments::of(mover);
        warp_.set(warp, channels, height, width, range_);
        height_ = warp.out_height;
        width_ = warp.out_width;
        if (bytes) {
          const ByteReader reader(pixels_);
          const int64_t elements = int64_t{channels} * height * width;
          if (elements <= kMostPrefetched)
            prefetch(static_cast<const char*>(pixels_.data), elements);
          return write_rows([&](int y, const RowSet& rows) { warp_.row(reader, y, rows); });
        }
        const PlaneReader reader(*current_, channels);
        return write_rows([&](int y, const RowSet& rows) { warp_.row(reader, y, rows); });
      }
      case AugmentOp::blur: {
        blur_.set(BlurArguments::of(mover), channels, height, width, range_);
        open_source(0, width, blur_.reach());
        return write_rows([&](int y, const RowSet& rows) { blur_.row(source_, y, rows); });
      }
      case AugmentOp::sharpness: {
        sharpness_.set(mover[2], channels, height, width, range_);
        open_source(0, width, sharpness_.reach());
        return write_rows([&](int y, const RowSet& rows) { sharpness_.row(source_, y, rows); });
      }
      default:
        open_source(0, width, 1);
        return write_rows([&](int y, const RowSet& rows) { source_.read(y, rows); });
    }
  }

  // The rows of a segment, one after the other, each as make_row(y, rows) has it at first, to
  // `planes` or, where that is null, to the result.
  template <typename MakeRow>
  void write_rows(int64_t begin, int64_t end, Planes* planes, const MakeRow& make_row) {
    if (planes) planes->resize(batch_.channels, height_, width_);
    pixel_.set(batch_.channels, height_, width_, range_);
    counted_ = planes && needs_statistics(op_at(end));
    if (counted_) statistics_.start(op_at(end), batch_.channels, range_);
    for (int y = 0; y < height_; ++y) {
      make_row(y, pixel_.rows);
      for (int64_t i = begin; i < end; ++i) pixel_.run(instruction(i), y);
      if (counted_) statistics_.add(constant(pixel_.rows), width_);
      if (planes) {
        for (int c = 0; c < batch_.channels; ++c) {
          memcpy(planes->row(c, y), pixel_.rows.channel[c], width_ * sizeof(float));
        }
      } else {
        write_result(task_, sample_, y, pixel_.rows, staging_);
      }
    }
    current_ = planes;
    done_ = !planes;
  }

  const AugmentTask& task_;
  const AugmentBatch& batch_;
  const ImageRange range_;
  int64_t sample_ = 0;
  bool done_ = false;

  // The image as it is between two segments: planes, or the pixels as they came.
  PixelImage pixels_{};
  const Planes* current_ = nullptr;
  int height_ = 0, width_ = 0;
  // What SAVE and JOIN keep.
  const Planes* saved_ = nullptr;
  Planes* total_ = nullptr;
  Planes planes_[4];

  bool counted_ = false;  // whether `statistics_` are what the next instruction asks of the image
  ImageStatistics statistics_;
  RowSource source_;
  Box box_;
  Warp warp_;
  Blur blur_;
  Sharpness sharpness_;
  PixelInstructions pixel_;
  RowRoom staging_;
};

}  // namespace

void augment_range(const AugmentTask& task, int64_t begin, int64_t end) {
  Interpreter interpreter(task);
  for (int64_t sample = begin; sample < end; ++sample) interpreter.run(sample);
}

RK_NAMESPACE_END
