// What csrc/cpu/mixup.cpp hands to the loops of csrc/cpu/mixup.simd.cpp.
#pragma once

#include <cstdint>

#include "isa.h"
#include "reg_kernels/channel_layout.h"
#include "reg_kernels/mixup_math.h"

namespace reg_kernels {

// The element type of a batch: a floating-point type's number in DType, or bytes.
constexpr int kBytes = 4;

// A batch (N, C, L), cut into tiles: as many elements of a sample that lie side by side, or, where
// the output has another layout, as many positions of all channels.
struct MixupTask {
  const void* x;  // the batch, or the gradient of the mixed one
  void* y;        // likewise the result; may be x
  int from;       // x's element type
  DType to;       // y's
  bool in_double;
  MixupBlend blend;
  ChannelLayout layout;   // x's
  bool to_channels_last;  // y's
  int64_t numel;          // of a sample
  int64_t tile, tiles;    // in elements, or in positions where the layout changes
  bool stream;            // whether y is large enough for streaming stores

  // One number an element, repeated often enough for a chunk to start at any, or for each channel
  // where `constant`: of the type that is computed in; null where there are none.
  const void *scale, *shift;
  bool constant;

  // The order that samples are worked on in: each one's partner comes next where that is possible,
  // so that what was read as a partner is in the cache when its own turn comes.
  const int64_t* order;

  // Backward: the samples whose partner is n are receivers[starts[n]] to receivers[starts[n + 1]],
  // without: the last sample but n.
  const int64_t *receivers, *starts;
};

constexpr int64_t kMixupChunk = 512;  // elements that are staged at a time

// Items [begin, end): item i is tile i / N of the sample order[i % N].
RK_DECLARE_LEAF(void, mixup_range, (const MixupTask& task, int64_t begin, int64_t end))
RK_DECLARE_LEAF(void, mixup_backward_range, (const MixupTask& task, int64_t begin, int64_t end))
// Over x itself: tiles [begin, end) of a cycle of `length` samples, the partner of each the next
// one in `cycle`. `saved` has room for a tile of the first.
RK_DECLARE_LEAF(void, mixup_cycle,
                (const MixupTask& task, const int64_t* cycle, int64_t length, void* saved,
                 int64_t begin, int64_t end))

}  // namespace reg_kernels
