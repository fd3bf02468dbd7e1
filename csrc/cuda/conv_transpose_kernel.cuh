#pragma once

// The kernel of transposed convolution, and of the convolution whose transpose that is: the gradient of its input.
// A block takes a tile of a phase's pixels x a group's channels through all taps and input channels, or a split of
// these; slices of both operands arrive by asynchronous copies while earlier ones are multiplied, and bias, scale,
// shift and activation are applied before the one write, or where splits are added up.

#include "block_sums.cuh"
#include "common/activation.h"
#include "common/dtypes.h"
#include "conv_transpose_config.h"
#include "conv_transpose_phase.cuh"
#include "conv_transpose_products.cuh"
#include "launch.h"

namespace gpt4fast {

template <typename Tile>
struct alignas(16) ConvTransposeShared {
  union {
    char slices[Tile::kStages][Tile::kPixels * Tile::kRowBytes + Tile::kWeightBytes];
    float sums[Tile::kPixels][Tile::kChannels + 4];  // once all slices are multiplied
  };
  float factor[Tile::kChannels], offset[Tile::kChannels];
  int64_t source[Tile::kPixels];  // where a pixel's first tap meets the input, perhaps outside of it
  int64_t target[Tile::kPixels];  // where the pixel lies in the output, or -1 where there is none
  int place[3][Tile::kPixels];    // of the input that the first tap meets
  int64_t part;                   // of the statistics, or of the sums
  Statistics shares[Tile::kThreads];
};

template <typename scalar_t, Products kProducts, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) conv_transpose_kernel(const ConvTransposeLaunch p) {
  constexpr int kPixels = Tile::kPixels, kChannels = Tile::kChannels, kStages = Tile::kStages;
  constexpr int kCount = 16 / sizeof(scalar_t), kParts = Tile::kDepthBytes / 16, kDepth = kParts * kCount;
  constexpr int kRows = Tile::kThreads / kParts;  // that are copied at once
  auto& shared = shared_memory<ConvTransposeShared<Tile>>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  uint32_t block = blockIdx.x;
  const auto take = [&](int64_t count) {  // the block's index along a dimension
    const uint32_t index = block % static_cast<uint32_t>(count);
    block /= static_cast<uint32_t>(count);
    return index;
  };
  const uint32_t pixel_tile = take(p.pixel_tiles);
  const int first_pixel = static_cast<int>(pixel_tile) * kPixels;
  const int outputs = static_cast<int>(p.out_channels) / static_cast<int>(p.groups);
  const auto first_channel = static_cast<int>(take(p.channel_tiles)) * kChannels;
  const int64_t group = take(p.groups), first_output = group * outputs + first_channel;
  const int columns = outputs - first_channel;
  const int64_t part = int64_t{block} * p.pixel_tiles + pixel_tile;  // of the statistics, which splits do not take
  const auto keep_statistics = [&](const Statistics& of_channel, int64_t part) {
    if (thread < min(columns, kChannels)) {
      float* kept = p.parts + (first_output + thread) * p.part_count + part;
      const int64_t each = p.out_channels * p.part_count;
      kept[0] = of_channel.count;
      kept[each] = of_channel.mean;
      kept[2 * each] = of_channel.spread;
    }
  };
  const Phase along_w(p, 2, take(p.phases[2])), along_h(p, 1, take(p.phases[1])), along_d(p, 0, take(p.phases[0]));
  const auto split = static_cast<int>(block);
  if (thread == 0) {
    shared.part = p.sums ? split : part;  // for which the main loop has no registers left
  }
  const int image_size = along_d.places * along_h.places * along_w.places;
  const int pixels = static_cast<int>(p.batch) * image_size;
  if (first_pixel >= pixels) {
    if (p.parts) {
      keep_statistics({}, part);
    }
    return;
  }

  for (int row = thread; row < kPixels; row += Tile::kThreads) {
    const auto index = static_cast<uint32_t>(first_pixel + row);
    const uint32_t image = index / image_size, line = index / along_w.places, w = index % along_w.places;
    const uint32_t h = line % along_h.places, d = line / along_h.places % along_d.places;
    const bool exists = first_pixel + row < pixels;
    shared.place[0][row] =
        exists ? static_cast<int>(d) * along_d.source_stride + along_d.shift : INT32_MIN / 2;  // no tap meets that
    shared.place[1][row] = static_cast<int>(h) * along_h.source_stride + along_h.shift;
    shared.place[2][row] = static_cast<int>(w) * along_w.source_stride + along_w.shift;
    shared.source[row] = image * p.input_strides[0] + group * p.padded + shared.place[0][row] * p.input_strides[2] +
                         shared.place[1][row] * p.input_strides[3] + shared.place[2][row] * p.input_strides[4];
    const int64_t target = image * p.out_strides[0] + (along_d.residue + d * p.stride[0]) * p.out_strides[2] +
                           (along_h.residue + h * p.stride[1]) * p.out_strides[3] +
                           (along_w.residue + w * p.stride[2]) * p.out_strides[4];
    shared.target[row] = exists ? target : -1;
  }
  if (thread < min(columns, kChannels)) {
    const int64_t channel = first_output + thread;
    const float factor = p.factor ? p.factor[channel] : 1.0f;
    shared.factor[thread] = factor;
    shared.offset[thread] = (p.bias ? factor * p.bias[channel] : 0.0f) + (p.shift ? p.shift[channel] : 0.0f);
  }
  __syncthreads();

  // Each thread copies 16 bytes of every kRows-th row of pixels, and of the weight.
  const int column = thread % kParts * kCount, first_row = thread / kParts;
  const bool is_direct = kProducts == Products::half && p.weight_is_direct;
  const int depth = static_cast<int>(is_direct ? p.in_channels / p.groups : p.padded);  // of the weight
  const int padded = static_cast<int>(p.padded), slices = (padded + kDepth - 1) / kDepth;
  int steps = along_d.taps * along_h.taps * along_w.taps * slices, tap_d = 0, tap_h = 0, tap_w = 0, slice = 0;
  if (p.splits > 1 && steps > 0) {
    const int each = (steps + static_cast<int>(p.splits) - 1) / static_cast<int>(p.splits);
    const int first = min(split * each, steps), tap = first / slices;
    steps = min(each, steps - first);
    slice = first % slices;
    tap_w = tap % along_w.taps;
    tap_h = tap / along_w.taps % along_h.taps;
    tap_d = tap / along_w.taps / along_h.taps;
  }
  const scalar_t *sources[kPixels / kRows], *weight = nullptr;
  bool inside[kPixels / kRows];
  const auto start_tap = [&] {
    const int shift_d = tap_d * static_cast<int>(p.shift_steps[0]),
              shift_h = tap_h * static_cast<int>(p.shift_steps[1]),
              shift_w = tap_w * static_cast<int>(p.shift_steps[2]);
    const int channel = slice * kDepth;
    const auto* input = static_cast<const scalar_t*>(p.input) + channel + column - shift_d * p.input_strides[2] -
                        shift_h * p.input_strides[3] - shift_w * p.input_strides[4];
#pragma unroll
    for (int i = 0; i < kPixels / kRows; ++i) {
      const int row = first_row + kRows * i;
      const int d = shared.place[0][row] - shift_d, h = shared.place[1][row] - shift_h,
                w = shared.place[2][row] - shift_w;
      inside[i] = 0 <= d && d < p.in_size[0] && 0 <= h && h < p.in_size[1] && 0 <= w && w < p.in_size[2];
      sources[i] = input + shared.source[row];
    }
    const int64_t d = along_d.first + tap_d * p.tap_steps[0], h = along_h.first + tap_h * p.tap_steps[1],
                  w = along_w.first + tap_w * p.tap_steps[2];
    weight = static_cast<const scalar_t*>(p.weight) + group * p.weight_group_stride + d * p.weight_strides[2] +
             h * p.weight_strides[3] + w * p.weight_strides[4];
    if (is_direct) {
      constexpr int kEach = kChannels / kCount;
      weight += (channel + thread / kEach) * p.weight_strides[0] + first_channel + thread % kEach * kCount;
    } else {
      weight += (first_channel + first_row) * p.weight_strides[1] + channel + column;
    }
  };
  const auto request = [&](int step) {
    if (step < steps) {
      if (slice == 0 || step == 0) {
        start_tap();
      }
      char* target = shared.slices[step % kStages];
      const int channel = slice * kDepth + column;
#pragma unroll
      for (int i = 0; i < kPixels / kRows; ++i) {
        copy_async<16>(target + (first_row + i * kRows) * Tile::kRowBytes + thread % kParts * 16, sources[i],
                       inside[i] && channel < padded);
        sources[i] += kDepth;
      }
      target += kPixels * Tile::kRowBytes;
      if (is_direct) {
        constexpr int kEach = kChannels / kCount, kStep = Tile::kThreads / kEach;
        const int row = thread / kEach, output = thread % kEach * kCount;
#pragma unroll
        for (int i = 0; i < kDepth; i += kStep) {
          copy_async<16>(target + (row + i) * Tile::kColumnBytes + output * static_cast<int>(sizeof(scalar_t)), weight,
                         slice * kDepth + row + i < depth && output < columns);
          weight += kStep * p.weight_strides[0];
        }
      } else {
        const auto row_stride = static_cast<int>(p.weight_strides[1]);
#pragma unroll
        for (int i = 0; i < kChannels; i += kRows) {
          copy_async<16>(target + (first_row + i) * Tile::kRowBytes + thread % kParts * 16,
                         weight + int64_t{i} * row_stride, channel < depth && first_row + i < columns);
        }
        weight += kDepth;
      }
      if (++slice == slices) {
        slice = 0;
        if (++tap_w == along_w.taps) {
          tap_w = 0;
          if (++tap_h == along_h.taps) {
            tap_h = 0;
            ++tap_d;
          }
        }
      }
    }
    commit_copies();
  };

  const int warp_pixel = warp / 2 * Tile::kWarpPixels, warp_channel = warp % 2 * Tile::kWarpChannels;
  const int channel_bytes = warp_channel * (is_direct ? static_cast<int>(sizeof(scalar_t)) : Tile::kRowBytes);
  WarpSums<Tile> sums = {};
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    request(step);
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();              // everyone's copies are there, and everyone is done with the slice before
    request(step + kStages - 1);  // which is overwritten
    const char* pixel_rows = shared.slices[step % kStages] + warp_pixel * Tile::kRowBytes;
    const char* channel_rows = shared.slices[step % kStages] + kPixels * Tile::kRowBytes + channel_bytes;
    if (is_direct) {
      multiply_slices<Tile, scalar_t, kProducts, kProducts == Products::half>(sums, pixel_rows, channel_rows);
    } else {
      multiply_slices<Tile, scalar_t, kProducts, false>(sums, pixel_rows, channel_rows);
    }
  }

  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kWarpPixels / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kWarpChannels / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        float* pair = &shared.sums[warp_pixel + 16 * i + lane / 4 + k / 2 * 8][warp_channel + 8 * j + lane % 4 * 2];
        *reinterpret_cast<float2*>(pair) = float2{sums[i][j][k], sums[i][j][k + 1]};
      }
    }
  }
  __syncthreads();
  const auto write = [&](auto* out) {
    using number_t = std::remove_pointer_t<decltype(out)>;
    constexpr int kCount = 16 / sizeof(number_t), kEach = kChannels / kCount;
    out += first_output * p.out_strides[1];
    if (p.channels_last && p.out_channels % kCount == 0 && outputs % kCount == 0) {
      const int column = thread % kEach * kCount;
      for (int row = thread / kEach; row < kPixels; row += Tile::kThreads / kEach) {
        if (shared.target[row] >= 0 && column < columns) {
          alignas(16) number_t numbers[kCount];
#pragma unroll
          for (int k = 0; k < kCount; ++k) {
            numbers[k] = static_cast<number_t>(shared.sums[row][column + k]);
          }
          *reinterpret_cast<uint4*>(out + shared.target[row] + column) = *reinterpret_cast<const uint4*>(numbers);
        }
      }
    } else if (const int row = thread % kPixels; shared.target[row] >= 0) {  // neighbours in memory are pixels, mostly
      for (int column = thread / kPixels; column < min(columns, kChannels); column += Tile::kThreads / kPixels) {
        out[shared.target[row] + column * p.out_strides[1]] = static_cast<number_t>(shared.sums[row][column]);
      }
    }
  };
  if (p.sums) {
    return write(p.sums + shared.part * p.numel);
  }
  const int channel = thread % kChannels;
  if (channel < columns) {  // in place, so that the code of each activation is short
    const float factor = shared.factor[channel], offset = shared.offset[channel];
    ACTIVATION_SWITCH(p.activation, kActivation, [&] {
      for (int row = thread / kChannels; row < kPixels; row += Tile::kThreads / kChannels) {
        float& sum = shared.sums[row][channel];
        sum = activate<kActivation>(sum * factor + offset, p.negative_slope);
      }
    });
  }
  __syncthreads();
  write(static_cast<scalar_t*>(p.out));
  if (p.parts) {  // of what was written, which no activation has changed
    const auto number = [&](int row) { return static_cast<float>(static_cast<scalar_t>(shared.sums[row][channel])); };
    int row = thread / kChannels;
    float count = 0.0f;
    DifferenceSums differences{};
    if (channel < columns) {
      differences.first = number(row);
      for (; row < kPixels && shared.target[row] >= 0; row += Tile::kThreads / kChannels) {
        differences.add(number(row));
        count += 1.0f;
      }
    }
    const Statistics mine = differences.statistics(count);
    keep_statistics(merge_threads(shared.shares, mine, kChannels,
                                  [](const Statistics& a, const Statistics& b) { return merge(a, b); }),
                    shared.part);
  }
}

// Parts of the output's statistics, where they are asked for and there are no splits, are fresh tensors in `parts`, as
// MergeLaunch in block_sums.cuh has them.
template <typename scalar_t, Products kProducts, typename Tile>
void launch_tile(const Device& device, ConvTransposeLaunch& p, const torch::stable::Tensor& out,
                 torch::stable::Tensor* parts) {
  static_assert(sizeof(ConvTransposeShared<Tile>) <= std::min<size_t>(Tile::kSharedBytes, kMostSharedBytes));
  using torch::headeronly::ScalarType;
  const int64_t phases = p.phases[0] * p.phases[1] * p.phases[2];
  p.pixel_tiles = ceil_div(p.pixels, Tile::kPixels);
  p.channel_tiles = ceil_div(p.out_channels / p.groups, Tile::kChannels);
  torch::stable::Tensor sums;
  if (p.splits > 1) {
    p.numel = out.numel();
    sums = device.fresh(torch::stable::new_empty(out, {p.splits * p.numel}, ScalarType::Float));
    p.sums = sums.mutable_data_ptr<float>();
  } else if (parts) {
    p.part_count = p.pixel_tiles * phases;
    *parts = device.fresh(torch::stable::new_empty(out, {3, p.out_channels, p.part_count}, ScalarType::Float));
    p.parts = parts->mutable_data_ptr<float>();
  }
  device.launch(conv_transpose_kernel<scalar_t, kProducts, Tile>,
                p.pixel_tiles * p.channel_tiles * p.groups * phases * p.splits, Tile::kThreads,
                sizeof(ConvTransposeShared<Tile>), p);
  if (p.splits > 1) {
    sum_parts(device, {p.sums, p.out, out.scalar_type(), p.splits, 1, p.numel, p.bias, p.factor, p.shift,
                       p.out_channels, elements_between_channels(out), p.activation, p.negative_slope});
  }
}

template <typename scalar_t, Products kProducts>
void launch_products(const Device& device, ConvTransposeLaunch& p, const torch::stable::Tensor& out,
                     torch::stable::Tensor* parts) {
  ConvTransposeSize size{p.batch, 1, p.out_channels / p.groups, p.groups, 1, p.padded * int64_t{sizeof(scalar_t)}};
  for (int axis = 0; axis < 3; ++axis) {
    p.phases[axis] = std::min(p.stride[axis], p.out_size[axis]);
    size.phases *= p.phases[axis];
    size.pixels *= ceil_div(p.out_size[axis], p.stride[axis]);
    size.taps *= ceil_div(p.kernel[axis], p.tap_steps[axis]);
  }
  const ConvTransposePlan plan = plan_conv_transpose(size, kProducts, {device.processors(), device.shared_bytes()});
  p.pixels = size.pixels;
  p.splits = plan.splits;
  switch (plan.tile) {
    case TileChoice::narrow: return launch_tile<scalar_t, kProducts, NarrowTile>(device, p, out, parts);
    case TileChoice::small: return launch_tile<scalar_t, kProducts, SmallTile>(device, p, out, parts);
    case TileChoice::medium:
      if constexpr (kProducts != Products::ieee) {
        launch_tile<scalar_t, kProducts, MediumTile>(device, p, out, parts);
      }
      break;
    case TileChoice::large:
      if constexpr (kProducts != Products::ieee) {
        launch_tile<scalar_t, kProducts, LargeTile>(device, p, out, parts);
      }
  }
}

inline void launch_conv_transpose(const Device& device, ConvTransposeLaunch& p, bool tf32,
                                  const torch::stable::Tensor& out, torch::stable::Tensor* parts) {
  DTYPE_SWITCH(out.scalar_type(), "input", scalar_t, [&] {
    if constexpr (sizeof(scalar_t) == 2) {
      launch_products<scalar_t, Products::half>(device, p, out, parts);
    } else if (tf32) {
      launch_products<scalar_t, Products::tf32>(device, p, out, parts);
    } else {
      launch_products<scalar_t, Products::ieee>(device, p, out, parts);
    }
  });
}

}  // namespace gpt4fast
