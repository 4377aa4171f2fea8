// Augmentation on raw pointers, for CUDA and for its emulation on the CPU: an interpreter of
// programs of one instruction after the other, a program a sample.
//
// Bytes a sample, each counted once: the part of its pixels that its program needs is read, in the
// pixels' type, and the result is written, in its own; 3 B and 2 B a value from bytes to float16.
// Programs are some hundred bytes a sample. Each instruction that reads more of an image than one
// pixel, but for the first, writes an image of float32 into the scratch memory and reads it again:
// 8 B a value, of which augment/plan.h sees to it that they stay in the second-level cache. The
// neighbours of resampling, blurring and sharpening are read from the caches.
//
// What limits: for a crop with resizing the instructions of its sums, else memory. Nothing waits on
// the host: the programs are there. They go to the device as arguments of kernels, which a captured
// graph keeps, unlike memory that it would be copied from.
//
// Layout: a block writes a tile of 32 x 32 pixels of a sample, a thread 4 pixels side by side with
// all of their channels, which it keeps in registers. The program's next instruction is the same
// for a whole block.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "augment/box.cuh"
#include "augment/pixels.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

static_assert(kAugmentThreads == kGrays && kPlaces <= kAugmentThreads);

struct AugmentArguments {
  const void* pixels;
  void* result;
  const uint32_t* plan;
  float* scratch;
  uint32_t* statistics;
  AugmentLaunch launch;
  float bound;
  int channels;
  bool channels_last, to_channels_last;
  bool whole;  // the result can be written in vectors
  PixelType to;
};

// Before the taps, the weights and the lines of BOX, of which a launch has what it needs.
template <int kChannels>
struct AugmentShared {
  AugmentSegment segment;
  AugmentKnown<kChannels> known;
  TapTable table;
};

template <int kChannels>
constexpr size_t augment_shared_bytes(int taps) {
  const size_t lines = taps ? kAugmentTile * kBoxRow<kChannels> : 0;
  return offsetof(AugmentShared<kChannels>, table) + offsetof(TapTable, weights) +
         sizeof(float) * (kPlaces * static_cast<size_t>(taps) + lines);
}

static_assert(augment_shared_bytes<3>(kAugmentTableTaps) <= 48 * 1024 &&
              augment_shared_bytes<4>(kAugmentTableTaps) <= 48 * 1024);

// Writes a thread's pixels, of which those are there whose bit is set.
template <typename Out, int kChannels>
__device__ __forceinline__ void put_pixels(Out* to, const AugmentArguments& a, int64_t plane, int y,
                                           int x, int width, unsigned there,
                                           const AugmentValues<kChannels>& values) {
  const auto stored = [&](int c, int p) -> Out {
    if constexpr (std::is_same_v<Out, uint8_t>) {
      return static_cast<uint8_t>(stored_byte(values[c][p]));
    } else {
      return store<Out>(values[c][p]);
    }
  };
  const int64_t pixel = static_cast<int64_t>(y) * width + x;
  if (a.whole && (kChannels < 4 || a.channels == kChannels)) {
    if (!there) return;
    RK_UNROLL
    for (int k = 0; k < kChannels; ++k) {
      Vector<Out, kAugmentPixels> vector;
      RK_UNROLL
      for (int j = 0; j < kAugmentPixels; ++j) {
        const int flat = k * kAugmentPixels + j;
        vector.v[j] =
            a.to_channels_last ? stored(flat % kChannels, flat / kChannels) : stored(k, j);
      }
      store_whole(
          to + (a.to_channels_last ? pixel * kChannels + k * kAugmentPixels : k * plane + pixel),
          vector);
    }
    return;
  }
  RK_UNROLL
  for (int c = 0; c < kChannels; ++c) {
    RK_UNROLL
    for (int p = 0; p < kAugmentPixels; ++p) {
      if ((there >> p & 1u) && (kChannels < 4 || c < a.channels)) {
        to[a.to_channels_last ? (pixel + p) * a.channels + c : c * plane + pixel + p] =
            stored(c, p);
      }
    }
  }
}

// Blocks that a multiprocessor is to hold, so that they hide each other's loads. With one more the
// kernels spill.
template <int kChannels, bool kExact>
constexpr int kAugmentBlocks = kChannels == 4 || (kChannels == 3 && kExact) ? 2 : 3;

// Segments of the first launches read pixels of type In, the others float32 in the scratch memory.
template <typename In, int kChannels, bool kExact>
__global__ void __launch_bounds__(kAugmentThreads, kAugmentBlocks<kChannels, kExact>)
    augment_kernel(const __grid_constant__ AugmentArguments a) {
  const ImageRange range{a.bound, kExact};
  using Shared = AugmentShared<kChannels>;
  RK_SHARED(Shared, shared);
  const int thread = threadIdx.x;
  const int64_t index = a.launch.first + blockIdx.x / a.launch.tiles;
  const int tile = static_cast<int>(blockIdx.x % a.launch.tiles);
  constexpr int kWords = sizeof(AugmentSegment) / sizeof(uint32_t);
  if (thread < kWords) {
    reinterpret_cast<uint32_t*>(&shared->segment)[thread] = a.plan[index * kWords + thread];
  }
  __syncthreads();
  const AugmentSegment& s = shared->segment;
  const int tiles_a_row = static_cast<int>(ceil_div(s.width, kAugmentTile));
  const int top = tile / tiles_a_row * kAugmentTile, left = tile % tiles_a_row * kAugmentTile;
  if (top >= s.height) return;
  const int row = thread / (kAugmentTile / kAugmentPixels);
  const int column = thread % (kAugmentTile / kAugmentPixels) * kAugmentPixels;
  const int y = top + row, x = left + column;
  unsigned there = 0;
  RK_UNROLL
  for (int p = 0; p < kAugmentPixels; ++p) there |= (y < s.height && x + p < s.width) << p;

  const uint32_t* const moves = a.plan + s.code;
  const uint32_t* const end = a.plan + s.end;
  const uint32_t* code = moves;
  const auto skip = [&] { code += *code >> 8; };
  for (int i = 0; i < s.moves; ++i) skip();
  const auto* const head = reinterpret_cast<const float*>(code);
  if (s.head != AugmentHead::load) skip();

  AugmentImage<In> image{};
  image.height = s.source_height;
  image.width = s.source_width;
  if (a.launch.from_pixels) {
    image.data = static_cast<const In*>(a.pixels) + s.source;
    image.plane = a.channels_last ? 1 : static_cast<int64_t>(s.source_height) * s.source_width;
    image.column = a.channels_last ? a.channels : 1;
    image.row = s.source_width * image.column;
  } else if constexpr (std::is_same_v<In, float>) {
    image.data = a.scratch + s.source;
    image.column = 1;
    image.row = static_cast<int>(scratch_row(s.source_width));
    image.plane = static_cast<int64_t>(s.source_height) * image.row;
  }

  AugmentSurroundings<kChannels> at{range, a.channels, y, x, there, 0, a.scratch, s, shared->known};
  AugmentValues<kChannels> values{};
  auto& staged = shared->known.staged;
  const int last_y = static_cast<int>(min(y, s.height - 1));
  if (s.head == AugmentHead::box || s.head == AugmentHead::blur) {
    TapTable& table = shared->table;
    const int taps = a.launch.taps;
    fill_table(table, taps, head, s.head == AugmentHead::blur, s.source_height, s.source_width,
               s.height, s.width, top, left);
    __syncthreads();
    box_pixels(image, head, range, a.channels, row, column, table, table.weights + kPlaces * taps,
               staged, values);
  } else if (s.head == AugmentHead::load && s.moves == 0 && !a.launch.from_pixels) {
    at.each_vector(s.source, [&](const float* from, int c) {
      const auto vector = load_whole<kAugmentPixels>(from);
      RK_UNROLL
      for (int p = 0; p < kAugmentPixels; ++p) values[c][p] = vector.v[p];
    });
  } else if (s.head == AugmentHead::load && s.moves == 0) {
    RK_UNROLL
    for (int p = 0; p < kAugmentPixels; ++p) {
      float pixel[kChannels];
      image.read(last_y, static_cast<int>(min(x + p, s.width - 1)), a.channels, pixel);
      RK_UNROLL
      for (int c = 0; c < kChannels; ++c) values[c][p] = pixel[c];
    }
  } else {
    RK_NO_UNROLL
    for (int p = 0; p < kAugmentPixels; ++p) {
      AugmentPlace place{last_y, static_cast<int>(min(x + p, s.width - 1))};
      const uint32_t* move = moves;
      for (int i = s.moves - 1; i >= 0; --i) {
        const bool is_box = (*move & 0xff) == static_cast<int>(AugmentOp::box);
        if (!lead_back(reinterpret_cast<const float*>(move), is_box, range.exact, place)) {
          at.outside |= 1u << (kAugmentPixels * i + p);
        }
        move += *move >> 8;
      }
      float pixel[kChannels];
      if (s.head == AugmentHead::warp) {
        warp_pixel(image, head, range, a.channels, place, pixel);
      } else if (std::is_same_v<In, float> && s.head == AugmentHead::sharpness) {
        sharpness_pixel(image, head, range, a.channels, place, pixel);
      } else {
        image.read(place.y, place.x, a.channels, pixel);
      }
      staged.put(p, pixel);
    }
    staged.get_all(values);
  }
  if (code < end) {
    learn(static_cast<AugmentOp>(*code & 0xff), a.statistics + s.known,
          static_cast<int64_t>(s.source_height) * s.source_width, a.channels, range, shared->known);
  }
  __syncthreads();  // what was learnt is there

  RK_NO_UNROLL
  for (; code < end; skip()) {
    execute(static_cast<int>(*code & 0xff), reinterpret_cast<const float*>(code), at, values);
  }

  if (s.counts != AugmentCount::nothing) {
    count_pixels(s.counts, a.statistics + s.counted, a.channels, values, there, range,
                 shared->known);
  }
  if (!s.to_result) {
    at.each_vector(s.target, [&](float* to, int c) {
      Vector<float, kAugmentPixels> vector;
      RK_UNROLL
      for (int p = 0; p < kAugmentPixels; ++p) vector.v[p] = values[c][p];
      store_whole(to, vector);
    });
    return;
  }
  const auto put = [&](auto* to) {
    put_pixels(to + s.target, a, static_cast<int64_t>(s.height) * s.width, y, x, s.width, there,
               values);
  };
  switch (a.to) {
    case PixelType::bytes: return put(static_cast<uint8_t*>(a.result));
    case PixelType::float32: return put(static_cast<float*>(a.result));
    case PixelType::float16: return put(static_cast<float16*>(a.result));
    case PixelType::bfloat16: return put(static_cast<bfloat16*>(a.result));
  }
}

// The plan's way to the device: a part of it is a kernel's argument, of which there are two
// lengths, since a call with few samples would feel the longer one.
template <int kWords>
struct AugmentPart {
  uint32_t words[kWords];
};
constexpr int kFewWords = 960, kManyWords = 7936;

template <int kWords>
__global__ void __launch_bounds__(kAugmentThreads)
    augment_upload_kernel(const __grid_constant__ AugmentPart<kWords> part, uint32_t* to,
                          int count) {
  const int i = static_cast<int>(blockIdx.x * kAugmentThreads + threadIdx.x);
  if (i < count) to[i] = part.words[i];
}

template <int kWords>
void upload(const std::vector<uint32_t>& words, uint32_t* to, cudaStream_t stream) {
  AugmentPart<kWords> part;
  for (size_t begin = 0; begin < words.size(); begin += kWords) {
    const int count = static_cast<int>(std::min<size_t>(kWords, words.size() - begin));
    std::copy_n(words.data() + begin, count, part.words);
    RK_LAUNCH(augment_upload_kernel<kWords>,
              dim3(static_cast<unsigned>(ceil_div(count, kAugmentThreads))), dim3(kAugmentThreads),
              0, stream, part, to + begin, count);
    check_launch("augment");
  }
}

template <typename In, int kChannels, bool kExact>
void launch_augment_kernel(const AugmentArguments& arguments, cudaStream_t stream) {
  const int64_t blocks = arguments.launch.tiles * arguments.launch.segments;
  RK_LAUNCH((augment_kernel<In, kChannels, kExact>), dim3(static_cast<unsigned>(blocks)),
            dim3(kAugmentThreads), augment_shared_bytes<kChannels>(arguments.launch.taps), stream,
            arguments);
  check_launch("augment");
}

template <typename In, bool kExact>
void launch_augment_of(const AugmentArguments& arguments, cudaStream_t stream) {
  switch (arguments.channels) {
    case 1: return launch_augment_kernel<In, 1, kExact>(arguments, stream);
    case 3: return launch_augment_kernel<In, 3, kExact>(arguments, stream);
    default: return launch_augment_kernel<In, 4, kExact>(arguments, stream);
  }
}

// Executes a batch's programs. allocate(bytes) gives device memory that stays until the kernels
// have run.
template <typename Allocate>
void launch_augment(const AugmentBatch& batch, const Allocate& allocate, cudaStream_t stream,
                    int64_t most_scratch = kAugmentScratch) {
  if (batch.samples == 0) return;
  const AugmentPlan plan = AugmentPlanner(batch, most_scratch).plan();
  const auto round_up = [](int64_t words) { return ceil_div(words, int64_t{64}) * 64; };
  const int64_t words = round_up(static_cast<int64_t>(plan.words.size()));
  const int64_t statistics = round_up(plan.statistics);
  auto* const memory = static_cast<uint32_t*>(allocate(4 * (words + statistics + plan.scratch)));
  const ImageRange range = range_of(batch);
  AugmentArguments a{};
  a.pixels = batch.pixels;
  a.result = batch.result;
  a.plan = memory;
  a.statistics = memory + words;
  a.scratch = reinterpret_cast<float*>(memory + words + statistics);
  a.bound = range.bound;
  a.channels = batch.channels;
  a.channels_last = batch.channels_last;
  a.to_channels_last = batch.to_channels_last;
  a.to = batch.to;
  a.whole = batch.width % kAugmentPixels == 0 &&
            reinterpret_cast<uintptr_t>(batch.result) % kVectorBytes == 0;
  const auto upload_words = plan.words.size() <= kFewWords ? upload<kFewWords> : upload<kManyWords>;
  upload_words(plan.words, memory, stream);
  for (const AugmentLaunch& launch : plan.launches) {
    if (launch.cleared) {
      const auto bytes = sizeof(uint32_t) * static_cast<size_t>(launch.cleared);
      if (cudaMemsetAsync(a.statistics, 0, bytes, stream) != cudaSuccess) check_launch("augment");
    }
    a.launch = launch;
    const PixelType from = launch.from_pixels ? batch.from : PixelType::float32;
    const auto launch_of = [&]<typename In>(In) {
      return range.exact ? launch_augment_of<In, true>(a, stream)
                         : launch_augment_of<In, false>(a, stream);
    };
    switch (from) {
      case PixelType::bytes: launch_of(uint8_t{}); break;
      case PixelType::float32: launch_of(float{}); break;
      case PixelType::float16: launch_augment_of<float16, false>(a, stream); break;
      case PixelType::bfloat16: launch_augment_of<bfloat16, false>(a, stream); break;
    }
  }
}

}  // namespace cuda
RK_NAMESPACE_END
