// Mixup's loops, compiled once for each instruction set (isa.h).
//
// Reads x and writes y once: sizeof(from) + sizeof(to) bytes an element, since a sample's tile is
// still in the cache when it is read again as another one's partner. A tile is blended into y
// itself where y takes the blend as it is computed; else chunk by chunk into a buffer in the
// first-level cache, then scaled, shifted, cast and written, past the caches where y is large.
#include "mixup.h"

#include "narrow.h"

RK_NAMESPACE_BEGIN

#if defined(__AVX2__)
RK_HD __m256 load_floats(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
#endif

namespace {

// Items that a tile is asked for before it is read: an item reads its own and the next one's, so
// that what lies two ahead is the first new one. Further ahead was a little faster (2026-11-24,
// EPYC: 2 to 4 items of 4 to 32 KiB within a tenth, 4 of 16 KiB first). Only where y is streamed:
// what the caches hold came slower for being asked for.
constexpr int64_t kItemsAhead = 4;

// A sample's way into the buffer: elements are counted in x's storage order within the sample.
template <typename T>
struct Source {
  const T* own;
  const T* partner;
  MixupBox box;
  double lam;
};

// Calls f(first, count, inside) for the parts of elements [begin, begin + count) of a sample that
// lie inside of the box, and for those outside.
template <typename F>
void for_parts(const MixupTask& task, const MixupBox& box, int64_t begin, int64_t count,
               const F& f) {
  if (box.is_empty()) return f(begin, count, false);
  const int64_t step = task.layout.channels_last ? task.layout.channels : 1;
  const int64_t row_length = task.blend.width * step;
  const int64_t end = begin + count;
  int64_t outside = begin;  // where what is not yet called for begins
  for (int64_t row = begin / row_length; row * row_length < end; ++row) {
    if (!box.has_row(row % task.blend.height)) continue;
    const int64_t first = max(row * row_length + box.x1 * step, begin);
    const int64_t last = min(row * row_length + box.x2 * step, end);
    if (first >= last) continue;
    if (outside < first) f(outside, first - outside, false);
    f(first, last - first, true);
    outside = last;
  }
  if (outside < end) f(outside, end - outside, false);
}

// Element i of a blend, for write_each.
template <typename T, typename C>
struct Blended {
  const T *own, *partner;
  MixupWeights<C> weights;

  RK_HD C operator()(int64_t i) const {
    return weights.blend(static_cast<C>(load(own[i])), static_cast<C>(load(partner[i])));
  }
};

#if defined(__AVX2__)

// Widened straight from memory: g++ 12 takes a conversion of bytes or halves to pieces.
template <typename T>
  requires(sizeof(T) < sizeof(float))
RK_HD void write_eight(const Blended<T, float>& b, int64_t i, float* y) {
  const __m256 own = _mm256_mul_ps(_mm256_set1_ps(b.weights.own), load_floats(b.own + i));
  const __m256 partner =
      _mm256_mul_ps(_mm256_set1_ps(b.weights.partner), load_floats(b.partner + i));
  _mm256_storeu_ps(y, _mm256_add_ps(own, partner));
}

#endif

// Elements [begin, begin + count) of a mixed sample into `values`.
template <typename T, typename C>
void blend(const MixupTask& task, const Source<T>& source, int64_t begin, int64_t count,
           C* values) {
  const auto weights = MixupWeights<C>::of(source.lam);
  for_parts(task, source.box, begin, count, [&](int64_t first, int64_t n, bool inside) {
    const T* own = source.own + first;
    const T* partner = source.partner + first;
    C* to = values + (first - begin);
    if (inside || weights.replaces()) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = load(partner[i]);
    } else if (weights.keeps()) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = load(own[i]);
    } else {
      write_each(to, n, false, Blended<T, C>{own, partner, weights});
    }
  });
}

// What a sample's own gradient gives it: its own share.
template <typename T, typename C>
void keep_share(const MixupTask& task, const Source<T>& source, int64_t begin, int64_t count,
                C* values) {
  const C own = MixupWeights<C>::of(source.lam).own;
  for_parts(task, source.box, begin, count, [&](int64_t first, int64_t n, bool inside) {
    const T* grad = source.own + first;
    C* to = values + (first - begin);
    if (inside || own == 0) {
      for (int64_t i = 0; i < n; ++i) to[i] = 0;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = own * static_cast<C>(load(grad[i]));
    }
  });
}

// What the gradient of a sample gives its partner.
template <typename T, typename C>
void add_share(const MixupTask& task, const Source<T>& source, int64_t begin, int64_t count,
               C* values) {
  const C rest = MixupWeights<C>::of(source.lam).partner;
  for_parts(task, source.box, begin, count, [&](int64_t first, int64_t n, bool inside) {
    const T* grad = source.own + first;
    C* to = values + (first - begin);
    const C share = inside ? C(1) : rest;
    if (share == 0) return;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] += share * static_cast<C>(load(grad[i]));
  });
}

// `values` of the elements from `first` on, of one channel, to y, which may be where they are.
template <typename T, typename C>
void write(const MixupTask& task, C* values, int64_t first, int64_t channel, int64_t count, T* y,
           bool stream) {
  const C* scale = static_cast<const C*>(task.scale);
  const C* shift = static_cast<const C*>(task.shift);
  if constexpr (sizeof(T) < sizeof(C) && sizeof(C) == sizeof(float)) {
    if (scale) write(task, values, first, channel, count, values, false);
    narrow(values, count, y, stream, NothingAhead{});
  } else if (scale == nullptr) {
    write_each(y, count, stream, [=](int64_t i) RK_INLINE { return store<T>(values[i]); });
  } else if (task.constant) {
    const C k = scale[channel], d = shift ? shift[channel] : C(0);
    write_each(y, count, stream, [=](int64_t i) RK_INLINE { return store<T>(values[i] * k + d); });
  } else {
    scale += first;
    if (shift == nullptr) {
      write_each(y, count, stream,
                 [=](int64_t i) RK_INLINE { return store<T>(values[i] * scale[i]); });
      return;
    }
    shift += first;
    write_each(y, count, stream,
               [=](int64_t i) RK_INLINE { return store<T>(values[i] * scale[i] + shift[i]); });
  }
}

// Elements from `first` on of a sample whose first element is at y.
template <typename T, typename C>
void write_sample(const MixupTask& task, C* values, int64_t first, int64_t count, T* y) {
  if (task.scale == nullptr) return write(task, values, 0, 0, count, y + first, task.stream);
  if (!task.constant) {
    const int64_t period = task.to_channels_last ? task.layout.channels : task.numel;
    return write(task, values, first % period, 0, count, y + first, task.stream);
  }
  while (count > 0) {  // channel by channel
    const int64_t channel = first / task.layout.length;
    const int64_t n = min(count, (channel + 1) * task.layout.length - first);
    write(task, values, 0, channel, n, y + first, task.stream);
    values += n;
    first += n;
    count -= n;
  }
}

// The tiles of a batch of T, computed in C.
template <typename T, typename C, bool kBackward>
struct Tiles {
  using Write = void (*)(const MixupTask&, C*, int64_t, int64_t, int64_t);

  const MixupTask& task;
  const Write write;
  const int64_t to_size;
  // Whether y takes values as they are computed: they are staged where they belong.
  const bool direct;
  // Where the layout changes, a tile of all channels: as x has them, and as y does.
  C* const staged;
  C* const turned;

  explicit Tiles(const MixupTask& task)
      : task(task),
        write(writer(task.to)),
        to_size(task.to == DType::float64   ? 8
                : task.to == DType::float32 ? 4
                                            : 2),
        direct(task.scale == nullptr && !task.stream && to_size == sizeof(C)),
        staged(turns() ? new C[2 * task.tile * task.layout.channels] : nullptr),
        turned(turns() ? staged + task.tile * task.layout.channels : nullptr) {}

  ~Tiles() {
    if (task.stream) stream_fence();
    delete[] staged;
  }

  template <typename To>
  static void write_as(const MixupTask& task, C* values, int64_t first, int64_t count, int64_t n) {
    write_sample(task, values, first, count, static_cast<To*>(task.y) + n * task.numel);
  }

  static Write writer(DType to) {
    if constexpr (sizeof(C) == sizeof(double)) {
      if (to == DType::float64) return write_as<double>;
    }
    return to == DType::float32   ? write_as<float>
           : to == DType::float16 ? write_as<float16>
                                  : write_as<bfloat16>;
  }

  bool turns() const { return task.to_channels_last != task.layout.channels_last; }

  const T* sample(int64_t n) const { return static_cast<const T*>(task.x) + n * task.numel; }

  int64_t partner_of(int64_t n) const {
    if (!kBackward) return task.blend.partner_of(n);
    return task.receivers ? task.receivers[min(task.starts[n], task.blend.samples - 1)]
                          : task.blend.samples - 1 - n;
  }

  Source<T> source(int64_t n, const T* partner) const {
    return {sample(n), partner, task.blend.box_of(n), task.blend.lam_of(n)};
  }

  void stage(int64_t n, const Source<T>& source, int64_t begin, int64_t count, C* values) const {
    if constexpr (!kBackward) {
      blend(task, source, begin, count, values);
    } else {
      keep_share(task, source, begin, count, values);
      const int64_t mirrored = task.blend.samples - 1 - n;
      const int64_t first = task.starts ? task.starts[n] : mirrored;
      const int64_t last = task.starts ? task.starts[n + 1] : mirrored + 1;
      for (int64_t i = first; i < last; ++i) {
        const int64_t m = task.receivers ? task.receivers[i] : i;
        add_share(task, this->source(m, nullptr), begin, count, values);
      }
    }
  }

  // Tile `tile` of sample n; `ahead` is the sample whose tile will be read next.
  void run(int64_t n, const Source<T>& source, int64_t tile, const T* ahead) const {
    if (turns()) return turn(n, source, tile * task.tile);
    const int64_t begin = tile * task.tile, end = min(begin + task.tile, task.numel);
    if (direct) {
      return stage(n, source, begin, end - begin, static_cast<C*>(task.y) + n * task.numel + begin);
    }
    alignas(kLine) C values[kMixupChunk];
    // Chunks end where a line of y does: what is streamed are whole lines.
    const auto address = reinterpret_cast<uintptr_t>(task.y) + (n * task.numel + begin) * to_size;
    int64_t count = kMixupChunk - static_cast<int64_t>(address % kLine) / to_size;
    for (int64_t first = begin; first < end; first += count, count = kMixupChunk) {
      count = min(count, end - first);
      if (task.stream) prefetch(ahead + first, count);
      stage(n, source, first, count, values);
      write(task, values, first, count, n);
    }
  }

  // The same for positions from `begin` on of all channels, where the layout changes.
  void turn(int64_t n, const Source<T>& source, int64_t begin) const {
    const int64_t channels = task.layout.channels, length = task.layout.length;
    const int64_t count = min(task.tile, length - begin);
    if (task.to_channels_last) {
      for (int64_t c = 0; c < channels; ++c) {
        stage(n, source, c * length + begin, count, staged + c * count);
      }
    } else {
      stage(n, source, begin * channels, count * channels, staged);
    }
    if (channels == 3) {  // by name, which makes shuffles of it
      turn_positions<3>(count, 3);
    } else {
      turn_positions<0>(count, channels);
    }
    if (task.to_channels_last) return write(task, turned, begin * channels, count * channels, n);
    for (int64_t c = 0; c < channels; ++c) {
      write(task, turned + c * count, c * length + begin, count, n);
    }
  }

  // A tile's C planes of `count` values to `count` positions of C, or back; C is kChannels where
  // that is known.
  template <int64_t kChannels>
  void turn_positions(int64_t count, int64_t channels) const {
    const int64_t n = kChannels ? kChannels : channels;
    const C* from = staged;
    C* to = turned;
    if (task.to_channels_last) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < n; ++c) to[i * n + c] = from[c * count + i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < n; ++c) to[c * count + i] = from[i * n + c];
      }
    }
  }
};

// Calls f with Tiles<...>, for the types of the task.
template <bool kBackward, typename F>
void with_tiles(const MixupTask& task, const F& f) {
  const auto in = [&]<typename T>(T) {
    if constexpr (sizeof(T) == sizeof(double)) {
      f(Tiles<T, double, kBackward>(task));
    } else if (task.in_double) {
      f(Tiles<T, double, kBackward>(task));
    } else {
      f(Tiles<T, float, kBackward>(task));
    }
  };
  if (task.from <= static_cast<int>(DType::bfloat16)) {
    for_dtype(static_cast<DType>(task.from), in);
  } else {
    if constexpr (!kBackward) in(uint8_t{});
  }
}

template <bool kBackward>
void run_items(const MixupTask& task, int64_t begin, int64_t end) {
  with_tiles<kBackward>(task, [&](const auto& tiles) {
    const int64_t samples = task.blend.samples;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = task.order[item % samples];
      const auto* partner = tiles.sample(tiles.partner_of(n));
      // Asked for some items early, by the order in which they are read first.
      const int64_t later = item + kItemsAhead;
      const auto* ahead = tiles.sample(task.order[later % samples]);
      const int64_t tiles_ahead = later / samples - item / samples;
      tiles.run(n, tiles.source(n, partner), item / samples, ahead + tiles_ahead * task.tile);
    }
  });
}

}  // namespace

void mixup_range(const MixupTask& task, int64_t begin, int64_t end) {
  run_items<false>(task, begin, end);
}

void mixup_backward_range(const MixupTask& task, int64_t begin, int64_t end) {
  run_items<true>(task, begin, end);
}

void mixup_cycle(const MixupTask& task, const int64_t* cycle, int64_t length, void* saved,
                 int64_t begin, int64_t end) {
  with_tiles<false>(task, [&]<typename T, typename C>(const Tiles<T, C, false>& tiles) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * task.tile;
      const int64_t count = min(task.tile, task.numel - first);
      memcpy(saved, tiles.sample(cycle[0]) + first, count * sizeof(T));
      for (int64_t i = 0; i < length; ++i) {
        const bool last = i + 1 == length;
        // As if the whole sample had been saved: no more than the tile is read.
        const T* partner = last ? static_cast<const T*>(saved) - first : tiles.sample(cycle[i + 1]);
        tiles.run(cycle[i], tiles.source(cycle[i], partner), tile,
                  tiles.sample(cycle[min(i + 2, length - 1)]));
      }
    }
  });
}

RK_NAMESPACE_END
