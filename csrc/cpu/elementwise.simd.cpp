// The loops of the random elementwise family, compiled once for each op (elementwise/<op>.h, which
// comes first) and each instruction set (isa.h).
//
// Reads x and the residual, where there is one, writes y: 2 or 3 * sizeof(T) bytes an element, y
// streamed past the caches where it is larger than they are. A layer scale stays in the caches. A
// tile of draws is made into the first-level cache, then a plain loop applies it.
#include "elementwise_task.h"

#include "normals.h"
#include "product_lines.h"
#include "random.h"
#include "scale_tiles.h"
#include "stream.h"

RK_NAMESPACE_BEGIN
namespace {

using Drawn = drawn_t<Op>;

// Draws are made into the words of a tile, and normal numbers of them a little behind: what the one
// waits for is time for the other.
struct NormalsBehind {
  RK_HD void operator()(char* words, int64_t bytes) const {
    for (int64_t i = 0; i < bytes; i += kWordsAtOnce * 4) make_normals(words + i);
  }
};

// A tile's draws as the op takes them.
template <typename Op>
struct DrawsFor : DrawsOf<drawn_t<Op>> {
  RK_HD const drawn_t<Op>* fill(const RngStream& stream, int64_t first, int64_t count) {
    if constexpr (kDrawsNormals<Op>) {
      return DrawsOf<drawn_t<Op>>::fill(stream, first, count, NormalsBehind{});
    } else {
      return DrawsOf<drawn_t<Op>>::fill(stream, first, count);
    }
  }
};

template <typename T>
struct Elements {
  const T* x;
  T* y;
  const T* residual;
  bool stream;
  RngStream rng;
  factor_t<Op, T> factor;
  ScaleTiles<compute_t<T>, kScalesChannels<Op>> channels;
  LineScale<T, kMultiplies<Op>> lines;
  // half-word < threshold, as <= in 16 bits. With nothing to keep the scale is 0 and this idle.
  uint16_t last_kept;
  bool any_kept;

  explicit Elements(const ElementwiseTask& task)
      : x(static_cast<const T*>(task.x)),
        y(static_cast<T*>(task.y)),
        residual(static_cast<const T*>(task.residual)),
        stream(task.stream),
        rng(Op::kTag, task.seed, task.offset),
        factor(FactorOf<Op, T>::from(task.scale, task.options)),
        channels(task.layer_scale, factor),
        lines(factor),
        last_kept(static_cast<uint16_t>(task.threshold ? task.threshold - 1 : 0)),
        any_kept(task.threshold != 0) {}

  ~Elements() {
    if (stream) stream_fence();
  }

  // Elements [first, first + count), each with its own draw.
  void apply(int64_t first, int64_t count, const Drawn* drawn) {
    if constexpr (kSkipsDropped<Op>) {
      if (!any_kept) return apply_one(first, count, 0);
    }
    const Tile<Op, T> tile{x + first, drawn, last_kept, factor, &lines};
    if constexpr (Op::kAdds) {
      if (residual != nullptr) return write(first, count, TileBeside{tile, residual + first});
    }
    write(first, count, tile);
  }

  // The same with one draw for all of them.
  void apply_one(int64_t first, int64_t count, Drawn drawn) {
    const auto draw = draw_of<Op>(drawn, last_kept, any_kept);
    if constexpr (Op::kAdds) {
      if (residual != nullptr) return apply_one_to(first, count, draw, residual + first);
    }
    apply_one_to(first, count, draw);
  }

 private:
  template <typename F>
  RK_HD void write(int64_t first, int64_t count, const F& f) const {
    write_each(y + first, count, stream, f);
  }

  template <typename Draw, typename... Residual>
  RK_HD void apply_one_to(int64_t first, int64_t count, Draw draw, const Residual*... residual) {
    const T* from = x + first;
    factor_t<Op, T> m = factor;
    if constexpr (kSkipsDropped<Op>) {
      if (!draw) {
        return write(first, count, [=]([[maybe_unused]] int64_t i) RK_INLINE {
          return left_of_dropped<T>(residual[i]...);
        });
      }
    }
    if constexpr (kScalesChannels<Op>) {
      if (channels.any()) return scale_channels(first, count, residual...);
    }
    if constexpr (kKeepsOrDrops<Op>) {  // decided here, the loop has no branch to foresee
      if (!draw) m = 0;
      draw = true;
    }
    write(first, count, [=]([[maybe_unused]] int64_t i) RK_INLINE {
      return element_of<Op>(from[i], draw, m, residual[i]...);
    });
  }

  // The same of elements that are kept, each with its channel's factor. Tiles begin where y's lines
  // do.
  template <typename... Residual>
  RK_HD void scale_channels(int64_t first, int64_t count, const Residual*... residual) {
    auto cursor = channels.cursor(first);
    for (int64_t done = 0; done < count;) {
      const int64_t at = first + done, left = count - done;
      const T* const from = x + at;
      if (channels.same()) {
        const compute_t<T> m = channels.times(*cursor.values());
        const int64_t run = min(cursor.run(), left);
        write(at, run, [=, shift = done](int64_t i) RK_INLINE {
          return element_of<Op>(from[i], true, m, residual[shift + i]...);
        });
        cursor.advance(run);
        done += run;
      } else {
        const int64_t tile = min(channels.kCount - at % channels.kCount, left);
        const compute_t<T>* const m = channels.tile(at, tile);
        write(at, tile, [=, shift = done](int64_t i) RK_INLINE {
          return element_of<Op>(from[i], true, m[i], residual[shift + i]...);
        });
        done += tile;
      }
    }
  }
};

template <typename T>
void elements(const ElementwiseTask& task, int64_t begin, int64_t end) {
  Elements<T> of(task);
  DrawsFor<Op> draws;
  for (int64_t first = begin; first < end; first += kDrawTile) {
    const int64_t count = min(kDrawTile, end - first);
    of.apply(first, count, draws.fill(of.rng, task.mask_offset + first, count));
  }
}

// Elements [begin, end) of planes of L, with one draw each: a long plane is shared by threads.
template <typename T>
void planes(const ElementwiseTask& task, int64_t begin, int64_t end) {
  Elements<T> of(task);
  DrawsFor<Op> draws;
  const int64_t length = task.length, first = begin / length, last = ceil_div(end, length);
  const Drawn* drawn = nullptr;
  for (int64_t plane = first; plane < last; ++plane) {
    const int64_t i = (plane - first) % kDrawTile;
    if (i == 0) {
      drawn = draws.fill(of.rng, task.mask_offset + plane, min(kDrawTile, last - plane));
    }
    const int64_t from = max(begin, plane * length);
    of.apply_one(from, min(end, (plane + 1) * length) - from, drawn[i]);
  }
}

// Positions [begin, end): the C draws of a sample, once for each of its L positions.
template <typename T>
void positions(const ElementwiseTask& task, int64_t begin, int64_t end) {
  Elements<T> of(task);
  DrawsFor<Op> draws;
  const int64_t channels = task.channels;
  if (channels > kDrawTile) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sample = task.mask_offset + row / task.length * channels;
      for (int64_t c = 0; c < channels; c += kDrawTile) {
        const int64_t count = min(kDrawTile, channels - c);
        of.apply(row * channels + c, count, draws.fill(of.rng, sample + c, count));
      }
    }
    return;
  }
  // The draws of a sample, repeated until a tile can start in any channel.
  Drawn repeated[2 * kDrawTile];
  for (int64_t row = begin; row < end;) {
    const int64_t sample = row / task.length;
    const int64_t next = min(end, (sample + 1) * task.length);
    const Drawn* drawn = draws.fill(of.rng, task.mask_offset + sample * channels, channels);
    const int64_t needed = channels + min(kDrawTile, (next - row) * channels);
    for (int64_t i = 0; i < needed; i += channels) {
      const int64_t count = min(channels, needed - i);
      memcpy(repeated + i, drawn, count * sizeof(Drawn));
    }
    const int64_t last = next * channels;
    for (int64_t first = row * channels; first < last; first += kDrawTile) {
      of.apply(first, min(kDrawTile, last - first), repeated + first % channels);
    }
    row = next;
  }
}

}  // namespace

template <>
void elements_range<kOpTag>(const ElementwiseTask& task, int64_t begin, int64_t end) {
  if constexpr (has_form<Op>(DrawnFor::element)) {
    if constexpr (kTakesBytes<Op>) {
      if (task.bytes) return elements<uint8_t>(task, begin, end);
    }
    for_dtype(task.dtype, [&]<typename T>(T) { elements<T>(task, begin, end); });
  }
}

template <>
void channels_range<kOpTag>(const ElementwiseTask& task, int64_t begin, int64_t end) {
  for_dtype(task.dtype, [&]<typename T>(T) {
    if constexpr (has_form<Op>(DrawnFor::channel)) {
      if (task.channels_last) return positions<T>(task, begin, end);
    }
    if constexpr (has_form<Op>(DrawnFor::channel) || has_form<Op>(DrawnFor::sample)) {
      planes<T>(task, begin, end);
    }
  });
}

RK_NAMESPACE_END
