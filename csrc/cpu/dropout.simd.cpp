// Dropout's loops, compiled once for each instruction set (isa.h).
//
// Reads x, writes y: 2 * sizeof(T) bytes an element, streamed past the caches where y is larger
// than they are. A tile of mask draws is made into the first-level cache, then a plain loop applies
// it.
#include "dropout.h"

#include "dropout_lines.h"
#include "random.h"
#include "stream.h"

RK_NAMESPACE_BEGIN
namespace {

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
struct Dropout {
  const T* x;
  T* y;
  bool stream;
  RngStream rng;
  compute_t<T> scale;
  LineScale<T> lines;
  // half-word < threshold, as <= in 16 bits. With nothing to keep the scale is 0 and this idle.
  uint16_t last_kept;

  explicit Dropout(const DropoutTask& task)
      : x(static_cast<const T*>(task.x)),
        y(static_cast<T*>(task.y)),
        stream(task.stream),
        rng(RngTag::dropout, task.seed, task.offset),
        scale(static_cast<compute_t<T>>(task.scale)),
        lines(scale),
        last_kept(static_cast<uint16_t>(task.threshold ? task.threshold - 1 : 0)) {}

  ~Dropout() {
    if (stream) stream_fence();
  }

  // Elements [first, first + count), each with its own half-word.
  void apply(int64_t first, int64_t count, const uint16_t* half_words) const {
    write_each(y + first, count, stream,
               DroppedTile<T>{x + first, half_words, last_kept, scale, &lines});
  }

  // The same with one half-word for all of them.
  void apply_one(int64_t first, int64_t count, uint16_t half_word) const {
    const T* from = x + first;
    const compute_t<T> m = half_word <= last_kept ? scale : 0;
    write_each(y + first, count, stream, [=](int64_t i) __attribute__((always_inline)) {
      return store_product<T>(load(from[i]) * m);
    });
  }
};

template <typename T>
void elements(const DropoutTask& task, int64_t begin, int64_t end) {
  Dropout<T> dropout(task);
  Draws draws;
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t count = min(kTile, end - first);
    dropout.apply(first, count, draws.fill(dropout.rng, task.mask_offset + first, count));
  }
}

// Rows are planes: one draw for L elements.
template <typename T>
void channels_first_rows(const DropoutTask& task, int64_t begin, int64_t end) {
  Dropout<T> dropout(task);
  Draws draws;
  const uint16_t* half_words = nullptr;
  for (int64_t plane = begin; plane < end; ++plane) {
    const int64_t drawn = (plane - begin) % kTile;
    if (drawn == 0) {
      half_words = draws.fill(dropout.rng, task.mask_offset + plane, min(kTile, end - plane));
    }
    dropout.apply_one(plane * task.length, task.length, half_words[drawn]);
  }
}

// Rows are positions: the C draws of a sample, once for each of its L positions.
template <typename T>
void channels_last_rows(const DropoutTask& task, int64_t begin, int64_t end) {
  Dropout<T> dropout(task);
  Draws draws;
  const int64_t channels = task.channels;
  if (channels > kTile) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = task.mask_offset + row / task.length * channels;
      for (int64_t c = 0; c < channels; c += kTile) {
        const int64_t count = min(kTile, channels - c);
        dropout.apply(row * channels + c, count, draws.fill(dropout.rng, sample + c, count));
      }
    }
    return;
  }
  // The draws of a sample, repeated until a tile can start in any channel.
  uint16_t repeated[2 * kTile];
  for (int64_t row = begin; row < end;) {
    const int64_t sample = row / task.length;
    const int64_t next = min(end, (sample + 1) * task.length);
    const uint16_t* half_words =
        draws.fill(dropout.rng, task.mask_offset + sample * channels, channels);
    const int64_t needed = channels + min(kTile, (next - row) * channels);
    for (int64_t i = 0; i < needed; i += channels) {
      const int64_t count = min(channels, needed - i);
      memcpy(repeated + i, half_words, count * sizeof(uint16_t));
    }
    const int64_t last = next * channels;
    for (int64_t first = row * channels; first < last; first += kTile) {
      dropout.apply(first, min(kTile, last - first), repeated + first % channels);
    }
    row = next;
  }
}

template <typename T>
void rows(const DropoutTask& task, int64_t begin, int64_t end) {
  (task.channels_last ? channels_last_rows<T> : channels_first_rows<T>)(task, begin, end);
}

}  // namespace

#define RK_FOR_DTYPE(function, task, begin, end)                       \
  switch ((task).dtype) {                                              \
    case DType::float64: return function<double>(task, begin, end);    \
    case DType::float32: return function<float>(task, begin, end);     \
    case DType::float16: return function<float16>(task, begin, end);   \
    case DType::bfloat16: return function<bfloat16>(task, begin, end); \
  }

void dropout_range(const DropoutTask& task, int64_t begin, int64_t end) {
  RK_FOR_DTYPE(elements, task, begin, end);
}

void feature_dropout_range(const DropoutTask& task, int64_t begin, int64_t end) {
  RK_FOR_DTYPE(rows, task, begin, end);
}

RK_NAMESPACE_END
