#pragma once

// Brings a tensor into rows of channels, each group's padded with zeros to whole 16 bytes: what conv_transpose.cu
// reads.

#include "launch.h"

namespace gpt4fast {

struct ChannelRows {
  const void* source;
  void* rows;                               // (batch, row, group, padded), contiguous
  int64_t batch, groups, channels, padded;  // channels of a group
  int64_t sizes[4];                         // of a row's indices
  int64_t batch_stride, group_stride, channel_stride, strides[4];
};

inline constexpr int kLayoutTile = 32, kLayoutThreads = 256;

// A tile of 32 rows x 32 channels of one group, read along the rows and written along the channels.
template <typename T>
__global__ void __launch_bounds__(kLayoutThreads) channel_rows_kernel(const ChannelRows p) {
  struct Shared {
    T tile[kLayoutTile][kLayoutTile + 1];
  };
  Shared& shared = shared_memory<Shared>();
  const int64_t count = p.sizes[0] * p.sizes[1] * p.sizes[2] * p.sizes[3];
  const int64_t row_tiles = (count + kLayoutTile - 1) / kLayoutTile;
  const int64_t channel_tiles = (p.padded + kLayoutTile - 1) / kLayoutTile;
  int64_t block = blockIdx.x;
  const int64_t first_row = block % row_tiles * kLayoutTile;
  block /= row_tiles;
  const int64_t first_channel = block % channel_tiles * kLayoutTile;
  block /= channel_tiles;
  const int64_t group = block % p.groups, batch = block / p.groups;
  const int lane = threadIdx.x % kLayoutTile, line = threadIdx.x / kLayoutTile;
  constexpr int kLines = kLayoutThreads / kLayoutTile;

  const auto* source = static_cast<const T*>(p.source) + batch * p.batch_stride + group * p.group_stride;
  int64_t index = first_row + lane;
  const bool is_row = index < count;
  int64_t offset = 0;
  for (int axis = 3; axis >= 0; --axis) {
    offset += index % p.sizes[axis] * p.strides[axis];
    index /= p.sizes[axis];
  }
  for (int i = line; i < kLayoutTile; i += kLines) {
    const int64_t channel = first_channel + i;
    shared.tile[i][lane] = is_row && channel < p.channels ? source[offset + channel * p.channel_stride] : T(0);
  }
  __syncthreads();
  for (int i = line; i < kLayoutTile; i += kLines) {
    const int64_t row = first_row + i, channel = first_channel + lane;
    if (row < count && channel < p.padded) {
      static_cast<T*>(p.rows)[((batch * count + row) * p.groups + group) * p.padded + channel] = shared.tile[lane][i];
    }
  }
}

// Of elements of 2 or 4 bytes.
inline void launch_channel_rows(const Device& device, int64_t element_size, const ChannelRows& p) {
  const int64_t count = p.sizes[0] * p.sizes[1] * p.sizes[2] * p.sizes[3];
  const int64_t blocks = ceil_div(count, kLayoutTile) * ceil_div(p.padded, kLayoutTile) * p.groups * p.batch;
  const size_t shared_bytes = element_size * kLayoutTile * (kLayoutTile + 1);
  if (blocks > 0) {
    const auto kernel = element_size == 2 ? channel_rows_kernel<uint16_t> : channel_rows_kernel<uint32_t>;
    device.launch(kernel, blocks, kLayoutThreads, shared_bytes, p);
  }
}

}  // namespace gpt4fast
