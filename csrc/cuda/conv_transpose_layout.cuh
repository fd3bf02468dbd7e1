#pragma once

// Brings a tensor into rows of channels, each group's padded with zeros to whole 16 bytes: what conv_transpose.cu
// reads.

#include <algorithm>

#include "launch.h"

namespace gpt4fast {

struct ChannelRows {
  const void* source;
  void* rows;                               // (batch, *sizes, group, padded), contiguous
  int64_t element_size;                     // 2 or 4 bytes
  int64_t batch, groups, channels, padded;  // channels of a group
  int64_t batch_stride, group_stride, channel_stride;
  struct Axis {
    int64_t size, stride, rows;  // rows from one index to the next: launch_channel_rows sets it
  } axes[4];
};

inline constexpr int kLayoutRows = 32, kLayoutChannels = 64, kLayoutThreads = 256;

template <typename T>
struct ChannelRowsShared {
  T tile[kLayoutChannels][kLayoutRows + 1];
  int64_t row[kLayoutRows];  // where it belongs, or -1
};

// A tile of rows x channels of one group, read along the rows and written along the channels.
template <typename T>
__device__ __forceinline__ void copy_channel_rows(const ChannelRows& p) {
  auto& shared = shared_memory<ChannelRowsShared<T>>();
  uint32_t block = blockIdx.x;
  const auto take = [&](int64_t count) {  // the block's index along a dimension, by a division of 32 bits
    const uint32_t index = block % static_cast<uint32_t>(count);
    block /= static_cast<uint32_t>(count);
    return index;
  };
  const int64_t count = p.axes[0].size * p.axes[1].size * p.axes[2].size * p.axes[3].size;
  const uint32_t first_row = take((count + kLayoutRows - 1) / kLayoutRows) * kLayoutRows;
  const int64_t first_channel = int64_t{take((p.padded + kLayoutChannels - 1) / kLayoutChannels)} * kLayoutChannels;
  const int64_t group = take(p.groups), batch = block;
  const int lane = threadIdx.x % kLayoutRows, line = threadIdx.x / kLayoutRows;
  constexpr int kLines = kLayoutThreads / kLayoutRows;

  uint32_t index = first_row + lane;
  const bool is_row = index < count;
  int64_t offset = first_channel * p.channel_stride, row = 0;
#pragma unroll
  for (int axis = 3; axis >= 0; --axis) {
    const auto size = static_cast<uint32_t>(p.axes[axis].size);
    offset += index % size * p.axes[axis].stride;
    row += index % size * p.axes[axis].rows;
    index /= size;
  }
  if (line == 0) {
    shared.row[lane] = is_row ? row : -1;
  }
  const auto* source = static_cast<const T*>(p.source) + batch * p.batch_stride + group * p.group_stride + offset;
  const auto channels = static_cast<int>(min(p.padded - first_channel, int64_t{kLayoutChannels}));
#pragma unroll
  for (int i = 0; i < kLayoutChannels; i += kLines) {
    const int channel = i + line;
    if (channel < channels) {
      const bool exists = is_row && first_channel + channel < p.channels;
      shared.tile[channel][lane] = exists ? source[channel * p.channel_stride] : T(0);
    }
  }
  __syncthreads();
  T* rows = static_cast<T*>(p.rows) + batch * count * p.groups * p.padded + group * p.padded + first_channel;
  for (int i = line; i < kLayoutRows && shared.row[i] >= 0; i += kLines) {
    for (int channel = lane; channel < channels; channel += kLayoutRows) {
      rows[shared.row[i] * p.groups * p.padded + channel] = shared.tile[channel][i];
    }
  }
}

template <int kThreads>  // a template, so that each source that includes this file may have it
__global__ void __launch_bounds__(kThreads) channel_rows_kernel(const ChannelRows p) {
  p.element_size == 2 ? copy_channel_rows<uint16_t>(p) : copy_channel_rows<uint32_t>(p);
}

// Rows are gone through in the order of the source, so that a warp reads what lies together.
inline void launch_channel_rows(const Device& device, ChannelRows p) {
  int64_t count = 1;
  for (int axis = 3; axis >= 0; --axis) {
    p.axes[axis].rows = count;
    count *= p.axes[axis].size;
  }
  std::sort(p.axes, p.axes + 4, [](const auto& a, const auto& b) { return a.stride > b.stride; });
  STD_TORCH_CHECK(count <= INT32_MAX, "expected fewer than 2^31 pixels of an image on a GPU, but they are ", count);
  const int64_t blocks = ceil_div(count, kLayoutRows) * ceil_div(p.padded, kLayoutChannels) * p.groups * p.batch;
  if (blocks > 0) {
    device.launch(channel_rows_kernel<kLayoutThreads>, blocks, kLayoutThreads,
                  p.element_size == 2 ? sizeof(ChannelRowsShared<uint16_t>) : sizeof(ChannelRowsShared<uint32_t>), p);
  }
}

}  // namespace gpt4fast
