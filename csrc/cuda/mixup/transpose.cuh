// Mixup where the channels lie together in the input and apart in the output, or the other way
// round.
//
// A block takes some channels of some positions of a sample. It blends them in the input's order,
// leaves them in shared memory, and writes them in the output's.
#pragma once

#include "flat.cuh"

RK_NAMESPACE_BEGIN
namespace cuda {

constexpr int kMixupTransposeBlocks = 2;  // a multiprocessor: what the registers are held to
// So few channels are one tile's: with the channels last it is one stretch of memory.
constexpr int kMixupFewChannels = 16;
constexpr int kMixupTile = 4096;  // elements, at most
constexpr int kMixupSide = 64;    // channels, and positions, of a tile where there are more

struct MixupTiles {
  bool whole_in, whole_out;  // that side's vectors are of 16 bytes, not of one element
  int positions;             // a tile
  int64_t strips;            // of channels
  int64_t tasks;             // tiles of all samples: those of one tile's place lie side by side

  __device__ bool few() const { return strips == 0; }
};

// A tile as it lies in the input, or in the output: rows, whose elements are side by side.
struct MixupTileRows {
  int64_t first;   // the tile's first element, in its sample
  int64_t stride;  // elements from one row to the next
  int rows, length;
};

struct MixupTile {
  int64_t c, l;
  int channels, positions;
  bool few;  // all channels

  __device__ __forceinline__ MixupTileRows rows(const ChannelLayout& layout,
                                                bool channels_last) const {
    if (!channels_last) return {c * layout.length + l, layout.length, channels, positions};
    const int64_t first = l * layout.channels + c;
    if (few) return {first, 0, 1, positions * channels};
    return {first, layout.channels, positions, channels};
  }
};

// Where the output's element (row, column) of a tile lies in shared memory. Threads side by side
// write to rows that are a vector apart: the vectors of such rows change places, so that they lie
// in other banks.
template <int kCount>
__device__ __forceinline__ int in_shared_tile(int row, int column, int stride) {
  return row * stride + (column ^ (row / kCount % 8 * kCount));
}

// A row of the tile in shared memory, in elements; one stretch needs none.
__device__ __forceinline__ int shared_stride(const MixupTiles& tiles, bool to_channels_last) {
  return to_channels_last ? kMixupSide : tiles.positions;
}

// From the input to shared memory, in vectors of kCount.
template <MixupPass kPass, int kCount, typename In, typename Out>
__device__ __forceinline__ void mixup_tile_in(const MixupArguments<In, Out>& a,
                                              const MixupTiles& tiles, const MixupTile& tile,
                                              int64_t n, Out* shared) {
  constexpr int kLoads = kMixupLoads<kCount>;
  const bool from_channels_last = a.layout.channels_last;
  const MixupTileRows rows = tile.rows(a.layout, from_channels_last);
  const int stride = shared_stride(tiles, !from_channels_last);
  const int vectors_a_row = rows.length / kCount;
  const int vectors = rows.rows * vectors_a_row;
  for (int first = static_cast<int>(threadIdx.x); first < vectors;
       first += kLoads * kMixupThreads) {
    int64_t at[kLoads];
    MixupPlace places[kLoads] = {};
    RK_UNROLL
    for (int k = 0; k < kLoads; ++k) {
      at[k] = kNoVector;
      const int vector = first + k * kMixupThreads;
      if (vector >= vectors) continue;
      const int row = vector / vectors_a_row, column = vector % vectors_a_row * kCount;
      at[k] = rows.first + row * rows.stride + column;
      if (!from_channels_last) {
        places[k] = {tile.c + row, tile.l + column};
      } else if (tile.few) {
        places[k] = {column % tile.channels, tile.l + column / tile.channels};
      } else {
        places[k] = {tile.c + column, tile.l + row};
      }
    }
    mixup_vectors<kPass, kCount>(a, n, at, places, [&](int k, const Vector<Out, kCount>& vector) {
      auto c = static_cast<int>(places[k].c - tile.c), l = static_cast<int>(places[k].l - tile.l);
      RK_UNROLL
      for (int j = 0; j < kCount; ++j) {
        if (!from_channels_last) {
          const int to = tile.few ? (l + j) * tile.channels + c
                                  : in_shared_tile<kMixupVector<In, Out>>(l + j, c, stride);
          shared[to] = vector.v[j];
        } else {
          shared[in_shared_tile<kMixupVector<In, Out>>(c, l, stride)] = vector.v[j];
          if (++c == tile.channels) {
            c = 0;
            ++l;
          }
        }
      }
    });
  }
}

// From there to the output.
template <int kCount, typename In, typename Out>
__device__ __forceinline__ void mixup_tile_out(const MixupArguments<In, Out>& a,
                                               const MixupTiles& tiles, const MixupTile& tile,
                                               int64_t n, const Out* shared) {
  const bool to_channels_last = !a.layout.channels_last;
  const MixupTileRows rows = tile.rows(a.layout, to_channels_last);
  const int stride = shared_stride(tiles, to_channels_last);
  const int vectors_a_row = rows.length / kCount;
  for (int vector = static_cast<int>(threadIdx.x); vector < rows.rows * vectors_a_row;
       vector += kMixupThreads) {
    const int row = vector / vectors_a_row, column = vector % vectors_a_row * kCount;
    const Out* const from = shared + in_shared_tile<kMixupVector<In, Out>>(row, column, stride);
    Out* const to = a.y + n * a.numel() + rows.first + row * rows.stride + column;
    if constexpr (kCount == 1) {
      *to = *from;
    } else {
      using B = Bits<kCount * sizeof(Out)>;
      const B bits = *reinterpret_cast<const B*>(from);
      store_whole(to, bit_cast<Vector<Out, kCount>>(bits));
    }
  }
}

template <MixupPass kPass, typename In, typename Out>
__global__ void __launch_bounds__(kMixupThreads, kMixupTransposeBlocks)
    mixup_transpose_kernel(const __grid_constant__ MixupArguments<In, Out> a,
                           const __grid_constant__ MixupTiles tiles) {
  constexpr int kCount = kMixupVector<In, Out>;
  RK_SHARED(Out, shared);
  const int64_t channels = a.layout.channels, length = a.layout.length;
  for (int64_t task = blockIdx.x; task < tiles.tasks; task += gridDim.x) {
    const int64_t place = quotient(task, a.blend.samples);
    const int64_t n = a.sample(task - place * a.blend.samples);
    const int64_t strip = tiles.few() ? 0 : place % tiles.strips;
    const int64_t c = strip * kMixupSide;
    const int64_t l = (tiles.few() ? place : place / tiles.strips) * tiles.positions;
    const int64_t more_channels = channels - c, more_positions = length - l;
    const MixupTile tile{
        c, l,
        static_cast<int>(!tiles.few() && more_channels > kMixupSide ? kMixupSide : more_channels),
        static_cast<int>(more_positions < tiles.positions ? more_positions : tiles.positions),
        tiles.few()};
    if (tiles.whole_in) {
      mixup_tile_in<kPass, kCount>(a, tiles, tile, n, shared);
    } else {
      mixup_tile_in<kPass, 1>(a, tiles, tile, n, shared);
    }
    __syncthreads();
    if (tiles.whole_out) {
      mixup_tile_out<kCount>(a, tiles, tile, n, shared);
    } else {
      mixup_tile_out<1>(a, tiles, tile, n, shared);
    }
    __syncthreads();  // before the next tile is written there
  }
}

}  // namespace cuda
RK_NAMESPACE_END
