// Rows of an image as augment's loops have them, a float for each pixel and channel, one channel
// after the other: read from pixels of any type and layout, kept between segments, and written to
// the result.
#pragma once

#include "augment.h"
#include "augment_lanes.h"
#include "narrow.h"

RK_NAMESPACE_BEGIN

RK_HD float load(uint8_t byte) { return static_cast<float>(byte); }

// What vectors may read or write behind a row.
constexpr int64_t kSlack = 4 * kVector;

// A row of each channel.
struct RowSet {
  float* channel[kMostChannels];
};
struct ConstRowSet {
  const float* channel[kMostChannels];
};
RK_HD ConstRowSet constant(const RowSet& rows) {
  ConstRowSet same{};
  for (int c = 0; c < kMostChannels; ++c) same.channel[c] = rows.channel[c];
  return same;
}

// Memory for a row of each channel.
class RowRoom {
 public:
  RowSet at_least(int64_t width) {
    const int64_t stride = whole_vectors(width) + kSlack;
    float* const data = room_.at_least(kMostChannels * stride);
    RowSet rows;
    for (int c = 0; c < kMostChannels; ++c) rows.channel[c] = data + c * stride;
    return rows;
  }

 private:
  Room<float> room_;
};

// An image between two segments: planes of floats.
class Planes {
 public:
  int height = 0, width = 0;
  int64_t stride = 0;  // of rows

  void resize(int channels, int new_height, int new_width) {
    height = new_height;
    width = new_width;
    stride = whole_vectors(width);
    data_ = room_.at_least(channels * height * stride + kSlack);
  }
  float* row(int c, int y) const { return data_ + (static_cast<int64_t>(c) * height + y) * stride; }

 private:
  Room<float> room_;
  float* data_ = nullptr;
};

// An image as the caller has it.
struct PixelImage {
  const void* data;
  int64_t elements;  // that may be read from there on, some of them other images'
  PixelType type;
  bool channels_last;
  int channels, height, width;

  bool interleaved() const { return channels_last && channels > 1; }
};

namespace {

// `count` elements as floats.
template <typename T>
RK_STAGE void widen_row(const T* from, int64_t count, float* to) {
  if constexpr (sizeof(T) == 1) {
    int64_t i = 0;
    for (; i + kVector <= count; i += kVector) put(to + i, bytes_at(from + i));
    for (; i < count; ++i) to[i] = load(from[i]);
  } else if constexpr (sizeof(T) == sizeof(float)) {
    memcpy(to, from, count * sizeof(float));
  } else {
    widen(from, count, to, NothingAhead{});
  }
}

// Positions of `channels` values each to rows, and back.
template <int kChannels>
RK_STAGE void part_channels(const float* from, int64_t count, const RowSet& to) {
  float* channel[kChannels];
  for (int c = 0; c < kChannels; ++c) channel[c] = to.channel[c];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < kChannels; ++c) channel[c][i] = from[i * kChannels + c];
  }
}
template <int kChannels>
RK_STAGE void join_channels(const RowSet& from, int64_t count, float* to) {
  const float* channel[kChannels];
  for (int c = 0; c < kChannels; ++c) channel[c] = from.channel[c];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < kChannels; ++c) to[i * kChannels + c] = channel[c][i];
  }
}
template <typename F>
RK_HD void for_channels(int channels, const F& f) {
  if (channels == 2) return f.template operator()<2>();
  if (channels == 3) return f.template operator()<3>();
  f.template operator()<4>();
}

// The first positions of three bytes each, as many as can be read a vector at a time, to rows;
// returns how many. `readable` bytes lie at `from`.
RK_HD int64_t part_bytes(const uint8_t* from, [[maybe_unused]] int64_t readable, int64_t count,
                         const RowSet& to) {
  int64_t i = 0;
#if defined(__AVX2__)
  // Four positions a lane of 16 bytes; each channel's bytes then become words.
#if defined(__AVX512F__)
  const __m512i spread = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
#else
  const __m256i spread = _mm256_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5);
#endif
  for (; i + kVector <= count && 3 * i + 4 * kVector <= readable; i += kVector) {
    for (int c = 0; c < 3; ++c) {
      const __m128i bytes = _mm_add_epi8(_mm_setr_epi8(0, -100, -100, -100, 3, -100, -100, -100, 6,
                                                       -100, -100, -100, 9, -100, -100, -100),
                                         _mm_set1_epi8(static_cast<char>(c)));
#if defined(__AVX512F__)
      const __m512i at = _mm512_permutexvar_epi32(spread, _mm512_loadu_si512(from + 3 * i));
      const __m512i words = _mm512_shuffle_epi8(at, _mm512_broadcast_i32x4(bytes));
      put(to.channel[c] + i, _mm512_cvtepi32_ps(words));
#else
      const __m256i at = _mm256_permutevar8x32_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 3 * i)), spread);
      const __m256i words = _mm256_shuffle_epi8(at, _mm256_broadcastsi128_si256(bytes));
      put(to.channel[c] + i, _mm256_cvtepi32_ps(words));
#endif
    }
  }
#elif defined(__aarch64__)
  for (; i + 16 <= count; i += 16) {
    const uint8x16x3_t bytes = vld3q_u8(from + 3 * i);
    for (int c = 0; c < 3; ++c) {
      const uint16x8_t low = vmovl_u8(vget_low_u8(bytes.val[c]));
      const uint16x8_t high = vmovl_high_u8(bytes.val[c]);
      float* const at = to.channel[c] + i;
      put(at, vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))));
      put(at + 4, vcvtq_f32_u32(vmovl_high_u16(low)));
      put(at + 8, vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))));
      put(at + 12, vcvtq_f32_u32(vmovl_high_u16(high)));
    }
  }
#else
  for (; i + kVector <= count && 3 * i + 4 * kVector <= readable; i += kVector) {
    const Integers words = gathered_words(from + 3 * i, 3 * lane_numbers());
    for (int c = 0; c < 3; ++c) put(to.channel[c] + i, as_floats(words >> (8 * c) & 255));
  }
#endif
  return i;
}

// Positions [first, first + count) of row y.
template <typename T>
void read_pixels(const PixelImage& image, int y, int64_t first, int64_t count, const RowSet& to,
                 RowRoom& staging) {
  const T* const data = static_cast<const T*>(image.data);
  const int64_t at = static_cast<int64_t>(y) * image.width + first;
  if (!image.interleaved()) {
    const int64_t plane = static_cast<int64_t>(image.height) * image.width;
    for (int c = 0; c < image.channels; ++c) {
      widen_row(data + c * plane + at, count, to.channel[c]);
    }
    return;
  }
  const T* from = data + at * image.channels;
  RowSet rest = to;
  if constexpr (sizeof(T) == 1) {
    if (image.channels == 3) {
      const int64_t done = part_bytes(from, image.elements - 3 * at, count, to);
      from += 3 * done;
      count -= done;
      for (int c = 0; c < 3; ++c) rest.channel[c] += done;
    }
  }
  if (count == 0) return;
  float* const staged = staging.at_least(count).channel[0];  // of 4 rows, side by side
  widen_row(from, count * image.channels, staged);
  for_channels(image.channels,
               [&]<int kChannels>() { part_channels<kChannels>(staged, count, rest); });
}

// Calls f with a value of the type of an element.
template <typename F>
RK_HD void for_pixel_type(PixelType type, const F& f) {
  switch (type) {
    case PixelType::bytes: return f(uint8_t{});
    case PixelType::float32: return f(float{});
    case PixelType::float16: return f(float16{});
    case PixelType::bfloat16: return f(bfloat16{});
  }
}

// Rows of an image, wherever it is. Those of pixels are made when they are asked for and stay for
// as long as `reach` rows beside them are.
class RowSource {
 public:
  // Positions [first, first + count) of each row.
  void of_pixels(const PixelImage& image, int64_t first, int64_t count, int reach) {
    planes_ = nullptr;
    image_ = image;
    first_ = first;
    count_ = count;
    slots_ = 1;
    while (slots_ < reach) slots_ *= 2;
    row_stride_ = whole_vectors(count) + kSlack;
    rows_ = ring_.at_least(slots_ * image.channels * row_stride_);
    held_ = held_room_.at_least(slots_);
    for (int slot = 0; slot < slots_; ++slot) held_[slot] = -1;
  }
  void of_planes(const Planes& planes, int channels, int64_t first) {
    planes_ = &planes;
    image_.channels = channels;
    first_ = first;
  }

  // A row of the image itself, for one that is to be changed.
  void read(int y, const RowSet& to) {
    if (!planes_) return read_row(y, to);
    for (int c = 0; c < image_.channels; ++c) {
      memcpy(to.channel[c], planes_->row(c, y) + first_, planes_->width * sizeof(float));
    }
  }

  ConstRowSet at(int y) {
    ConstRowSet rows{};
    if (planes_) {
      for (int c = 0; c < image_.channels; ++c) rows.channel[c] = planes_->row(c, y) + first_;
      return rows;
    }
    const int slot = y & (slots_ - 1);
    RowSet in{};
    for (int c = 0; c < image_.channels; ++c) {
      rows.channel[c] = in.channel[c] = rows_ + (slot * image_.channels + c) * row_stride_;
    }
    if (held_[slot] != y) {
      held_[slot] = y;
      read_row(y, in);
    }
    return rows;
  }

 private:
  void read_row(int y, const RowSet& to) {
    for_pixel_type(image_.type,
                   [&]<typename T>(T) { read_pixels<T>(image_, y, first_, count_, to, staging_); });
  }

  const Planes* planes_ = nullptr;
  PixelImage image_{};
  int64_t first_ = 0, count_ = 0, row_stride_ = 0;
  int slots_ = 1;
  Room<float> ring_;
  Room<int> held_room_;
  float* rows_ = nullptr;
  int* held_ = nullptr;  // the row in each slot
  RowRoom staging_;
};

// `count` floats as elements of the result.
template <typename T>
RK_STAGE void narrow_row(const float* from, int64_t count, T* to, bool stream) {
  if constexpr (sizeof(T) == 1) {
    int64_t i = 0;
    for (; i + kVector <= count; i += kVector) {
      put_bytes(to + i, as_integers(stored_byte(vector_at(from + i))));
    }
    for (; i < count; ++i) {
      to[i] = static_cast<uint8_t>(static_cast<int>(stored_byte(from[i])));
    }
  } else if constexpr (sizeof(T) == sizeof(float)) {
    int64_t i = 0;
    if (stream && reinterpret_cast<uintptr_t>(to) % kLine == 0) {  // as `from` is of a vector
      constexpr int64_t kFloats = kLine / sizeof(float);
      for (; i + kFloats <= count; i += kFloats) stream_line(to + i, from + i);
    }
    write_each(to + i, count - i, stream, [=](int64_t j) RK_INLINE { return from[i + j]; });
  } else {
    narrow(from, count, to, stream, NothingAhead{});
  }
}

// Row y of sample n of the result.
RK_HD void write_result(const AugmentTask& task, int64_t n, int y, const RowSet& rows,
                        RowRoom& staging) {
  const AugmentBatch& batch = task.batch;
  const int64_t width = batch.width, height = batch.height, channels = batch.channels;
  for_pixel_type(batch.to, [&]<typename T>(T) {
    T* const to = static_cast<T*>(batch.result);
    if (!batch.to_channels_last || channels == 1) {
      for (int c = 0; c < channels; ++c) {
        narrow_row(rows.channel[c], width, to + ((n * channels + c) * height + y) * width,
                   task.stream);
      }
      return;
    }
    float* const staged = staging.at_least(width).channel[0];
    for_channels(batch.channels,
                 [&]<int kChannels>() { join_channels<kChannels>(rows, width, staged); });
    narrow_row(staged, width * channels, to + (n * height + y) * width * channels, task.stream);
  });
}

}  // namespace

RK_NAMESPACE_END
