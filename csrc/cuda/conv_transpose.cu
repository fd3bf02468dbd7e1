// Transposed convolution as one implicit matrix product for each output phase: outputs whose position leaves the same
// remainder by the stride meet the same taps of the kernel, so that no multiplication is by a zero between pixels. A
// block takes a tile of a phase's pixels x a group's channels through all taps and input channels; slices of both
// operands arrive by asynchronous copies while earlier ones are multiplied, and bias, scale, shift and activation are
// applied before the one write. Inputs whose channels are not neighbours are brought into rows first, and so are
// weights, unless they are channels last and of half types: at every call, for they may have been written to.
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "affine_activation.h"
#include "common/strings.h"
#include "conv_transpose_arguments.h"
#include "cuda/conv_transpose_config.h"
#include "cuda/conv_transpose_layout.cuh"
#include "cuda/conv_transpose_phase.cuh"
#include "cuda/conv_transpose_products.cuh"
#include "cuda/launch.h"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
};

template <typename scalar_t, Products kProducts, typename Tile, bool kIsDirect>
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
  const auto first_pixel = static_cast<int>(take(p.pixel_tiles)) * kPixels;
  const int outputs = static_cast<int>(p.out_channels) / static_cast<int>(p.groups);
  const auto first_channel = static_cast<int>(take(p.channel_tiles)) * kChannels;
  const int64_t group = take(p.groups), first_output = group * outputs + first_channel;
  const int columns = outputs - first_channel;
  const Phase along_w(p, 2, take(p.phases[2])), along_h(p, 1, take(p.phases[1])), along_d(p, 0, block);
  const int image_size = along_d.places * along_h.places * along_w.places;
  const int pixels = static_cast<int>(p.batch) * image_size;
  if (first_pixel >= pixels) {
    return;
  }

  for (int row = thread; row < kPixels; row += Tile::kThreads) {
    const auto index = static_cast<uint32_t>(first_pixel + row);
    const uint32_t image = index / image_size, line = index / along_w.places, w = index % along_w.places;
    const uint32_t h = line % along_h.places, d = line / along_h.places % along_d.places;
    const bool exists = first_pixel + row < pixels;
    shared.place[0][row] = exists ? static_cast<int>(d) + along_d.shift : INT32_MIN / 2;  // no tap meets that
    shared.place[1][row] = static_cast<int>(h) + along_h.shift;
    shared.place[2][row] = static_cast<int>(w) + along_w.shift;
    shared.source[row] = image * p.input_strides[0] + group * p.group_stride +
                         shared.place[0][row] * p.input_strides[2] + shared.place[1][row] * p.input_strides[3] +
                         shared.place[2][row] * p.input_strides[4];
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
  const int part = thread % kParts, first_row = thread / kParts;
  const int depth = static_cast<int>(kIsDirect ? p.in_channels / p.groups : p.padded);  // of the weight
  const int padded = static_cast<int>(p.padded), slices = (padded + kDepth - 1) / kDepth;
  const int steps = along_d.taps * along_h.taps * along_w.taps * slices;
  int tap_d = 0, tap_h = 0, tap_w = 0, slice = 0;
  const scalar_t *sources[kPixels / kRows], *weight = nullptr;
  bool inside[kPixels / kRows];
  const auto start_tap = [&] {
    const int shift_d = tap_d * static_cast<int>(p.shift_steps[0]),
              shift_h = tap_h * static_cast<int>(p.shift_steps[1]),
              shift_w = tap_w * static_cast<int>(p.shift_steps[2]);
    const auto* input = static_cast<const scalar_t*>(p.input) + part * kCount - shift_d * p.input_strides[2] -
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
    weight = static_cast<const scalar_t*>(p.weight);
    if constexpr (kIsDirect) {
      constexpr int kEach = kChannels / kCount;
      weight += group * depth * p.weight_strides[0] + d * p.weight_strides[2] + h * p.weight_strides[3] +
                w * p.weight_strides[4] + thread / kEach * p.weight_strides[0] + first_channel +
                thread % kEach * kCount;
    } else {
      const int64_t tap = ((group * p.kernel[0] + d) * p.kernel[1] + h) * p.kernel[2] + w;
      weight += (tap * outputs + first_channel + first_row) * padded + part * kCount;
    }
  };
  const auto request = [&](int step) {
    if (step < steps) {
      if (slice == 0) {
        start_tap();
      }
      char* target = shared.slices[step % kStages];
      const int channel = slice * kDepth + part * kCount;
#pragma unroll
      for (int i = 0; i < kPixels / kRows; ++i) {
        copy_async<16>(target + (first_row + i * kRows) * Tile::kRowBytes + part * 16, sources[i],
                       inside[i] && channel < padded);
        sources[i] += kDepth;
      }
      target += kPixels * Tile::kRowBytes;
      if constexpr (kIsDirect) {
        constexpr int kEach = kChannels / kCount, kStep = Tile::kThreads / kEach;
        const int row = thread / kEach, column = thread % kEach * kCount;
#pragma unroll
        for (int i = 0; i < kDepth; i += kStep) {
          copy_async<16>(target + (row + i) * Tile::kColumnBytes + column * static_cast<int>(sizeof(scalar_t)), weight,
                         slice * kDepth + row + i < depth && column < columns);
          weight += kStep * p.weight_strides[0];
        }
      } else {
#pragma unroll
        for (int i = 0; i < kChannels; i += kRows) {
          copy_async<16>(target + (first_row + i) * Tile::kRowBytes + part * 16, weight + i * padded,
                         channel < depth && first_row + i < columns);
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
  const int channel_bytes = warp_channel * (kIsDirect ? static_cast<int>(sizeof(scalar_t)) : Tile::kRowBytes);
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
    const char* slices = shared.slices[step % kStages];
    multiply_slices<Tile, scalar_t, kProducts, kIsDirect>(sums, slices + warp_pixel * Tile::kRowBytes,
                                                          slices + kPixels * Tile::kRowBytes + channel_bytes);
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
  auto* out = static_cast<scalar_t*>(p.out) + first_output * p.out_strides[1];
  const auto write = [&](auto finish) {
    const auto number = [&](int row, int column) {
      return static_cast<scalar_t>(finish(shared.sums[row][column] * shared.factor[column] + shared.offset[column]));
    };
    constexpr int kEach = kChannels / kCount;
    if (p.channels_last && p.out_channels % kCount == 0 && outputs % kCount == 0) {
      const int column = thread % kEach * kCount;
      for (int row = thread / kEach; row < kPixels; row += Tile::kThreads / kEach) {
        if (shared.target[row] >= 0 && column < columns) {
          alignas(16) scalar_t numbers[kCount];
#pragma unroll
          for (int k = 0; k < kCount; ++k) {
            numbers[k] = number(row, column + k);
          }
          *reinterpret_cast<uint4*>(out + shared.target[row] + column) = *reinterpret_cast<const uint4*>(numbers);
        }
      }
    } else if (const int row = thread % kPixels; shared.target[row] >= 0) {  // neighbours in memory are pixels, mostly
      for (int column = thread / kPixels; column < min(columns, kChannels); column += Tile::kThreads / kPixels) {
        out[shared.target[row] + column * p.out_strides[1]] = number(row, column);
      }
    }
  };
  ACTIVATION_SWITCH(p.activation, kActivation,
                    [&] { write([&](float x) { return activate<kActivation>(x, p.negative_slope); }); });
}

template <typename scalar_t, Products kProducts, typename Tile>
void launch_tile(const Device& device, ConvTransposeLaunch& p) {
  static_assert(sizeof(ConvTransposeShared<Tile>) <= kMostSharedBytes);
  int64_t pixels = p.batch, phases = 1;
  for (int axis = 0; axis < 3; ++axis) {
    p.phases[axis] = std::min(p.stride[axis], p.out_size[axis]);
    pixels *= ceil_div(p.out_size[axis], p.stride[axis]);
    phases *= p.phases[axis];
  }
  p.pixel_tiles = ceil_div(pixels, Tile::kPixels);
  p.channel_tiles = ceil_div(p.out_channels / p.groups, Tile::kChannels);
  const auto launch = [&](auto kernel) {
    device.launch(kernel, p.pixel_tiles * p.channel_tiles * p.groups * phases, Tile::kThreads,
                  sizeof(ConvTransposeShared<Tile>), p);
  };
  if constexpr (kProducts == Products::half) {
    if (p.weight_is_direct) {
      return launch(conv_transpose_kernel<scalar_t, kProducts, Tile, true>);
    }
  }
  launch(conv_transpose_kernel<scalar_t, kProducts, Tile, false>);
}

template <typename scalar_t, Products kProducts>
void launch_products(const Device& device, ConvTransposeLaunch& p) {
  const int64_t pixels = p.batch * p.out_size[0] * p.out_size[1] * p.out_size[2];
  switch (choose_tile(pixels, p.out_channels / p.groups, p.groups, kProducts, device.processors())) {
    case TileChoice::narrow: return launch_tile<scalar_t, kProducts, NarrowTile>(device, p);
    case TileChoice::small: return launch_tile<scalar_t, kProducts, SmallTile>(device, p);
    case TileChoice::large:
      if constexpr (kProducts != Products::ieee) {
        launch_tile<scalar_t, kProducts, LargeTile>(device, p);
      }
  }
}

void check_sizes(const ConvTransposeLaunch& p) {
  constexpr double kMost = 1 << 30;
  double pixels = double(p.batch), taps = double(p.in_channels);
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t reach = p.padding[axis] + p.dilation[axis] * p.kernel[axis];
    STD_TORCH_CHECK(reach < kMost,
                    "expected padding and dilation to reach less than 2^30 elements on a GPU, but it is ", reach);
    pixels *= double(p.out_size[axis]);
    taps *= double(p.kernel[axis]);
  }
  STD_TORCH_CHECK(pixels < kMost && taps < kMost,
                  "expected fewer than 2^30 pixels of the output, and elements of weight for one of its channels, on a "
                  "GPU, but they are ",
                  pixels, " and ", taps);
}

// The input itself where each group's channels are neighbours and whole 16 bytes, else a copy for which that holds.
Tensor set_input_rows(const Device& device, const Tensor& input, ConvTransposeLaunch& p) {
  const int64_t size = static_cast<int64_t>(input.element_size()), channels = p.in_channels / p.groups;
  p.padded = ceil_div(channels * size, 16) * 16 / size;
  bool wide = p.input_strides[1] == 1 && p.padded == channels && reinterpret_cast<uintptr_t>(p.input) % 16 == 0;
  for (const int axis : {0, 2, 3, 4}) {
    wide = wide && p.input_strides[axis] * size % 16 == 0;
  }
  p.group_stride = p.padded;
  if (wide) {
    return input;
  }
  const int64_t pixels = p.in_size[0] * p.in_size[1] * p.in_size[2], width = p.groups * p.padded;
  const Tensor rows = device.fresh(torch::stable::new_empty(input, {p.batch * pixels * width}, input.scalar_type()));
  const int64_t* strides = p.input_strides;
  launch_channel_rows(device, size,
                      {p.input,
                       rows.mutable_data_ptr(),
                       p.batch,
                       p.groups,
                       channels,
                       p.padded,
                       {1, p.in_size[0], p.in_size[1], p.in_size[2]},
                       strides[0],
                       strides[1] * channels,
                       strides[1],
                       {0, strides[2], strides[3], strides[4]}});
  p.input = rows.const_data_ptr();
  const int64_t dense[5] = {pixels * width, 1, p.in_size[1] * p.in_size[2] * width, p.in_size[2] * width, width};
  std::copy_n(dense, 5, p.input_strides);
  return rows;
}

// The weight itself where half types have each group's output channels side by side, whole 16 bytes of them (channels
// last, of two or three dimensions), else a copy in rows of input channels.
Tensor set_weight_rows(const Device& device, const Tensor& weight, ConvTransposeLaunch& p) {
  const auto size = static_cast<int64_t>(weight.element_size());
  p.weight_is_direct = size == 2 && p.weight_strides[1] == 1 && weight.size(1) * size % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
  for (const int axis : {0, 2, 3, 4}) {
    p.weight_is_direct = p.weight_is_direct && p.weight_strides[axis] * size % 16 == 0;
  }
  if (p.weight_is_direct) {
    return weight;
  }
  const int64_t outputs = p.out_channels / p.groups, taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  const int64_t channels = p.in_channels / p.groups, *strides = p.weight_strides;
  const Tensor rows =
      device.fresh(torch::stable::new_empty(weight, {p.groups * taps * outputs * p.padded}, weight.scalar_type()));
  launch_channel_rows(device, size,
                      {p.weight,
                       rows.mutable_data_ptr(),
                       p.groups,
                       1,
                       channels,
                       p.padded,
                       {p.kernel[0], p.kernel[1], p.kernel[2], outputs},
                       strides[0] * channels,
                       0,
                       strides[0],
                       {strides[2], strides[3], strides[4], strides[1]}});
  p.weight = rows.const_data_ptr();
  return rows;
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
               const std::vector<int64_t>& output_padding, int64_t groups, const std::vector<int64_t>& dilation,
               const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, StringHandle activation,
               double negative_slope, bool channels_last, const std::optional<Tensor>& packed, bool winograd,
               bool tf32) {
  ConvTransposeLaunch p{};
  p.activation = parse_activation(take_string(activation));  // first: a failed check must not lose the string
  CHECK_CUDA(input);
  STD_TORCH_CHECK(weight.device() == input.device(), "expected weight to be on the device of input");
  STD_TORCH_CHECK(!packed && !winograd, "expected packed to be None and winograd False on a GPU");
  const Device device(input);
  const std::vector<int64_t> shape =
      set_input(input, weight, groups, {stride, padding, output_padding, dilation}, false, p);
  const Tensor out = device.fresh(empty_images(shape, input, channels_last));
  copy_image_strides(out, p.out_strides);
  p.out = out.mutable_data_ptr();
  p.channels_last = channels_last;
  p.negative_slope = static_cast<float>(negative_slope);
  Tensor storage[3];
  p.bias = channel_parameter(bias, "bias", out, storage[0]);
  p.factor = channel_parameter(scale, "scale", out, storage[1]);
  p.shift = channel_parameter(shift, "shift", out, storage[2]);
  for (const float* values : {p.bias, p.factor, p.shift}) {
    allow_access(values, p.out_channels * sizeof(float), false);
  }
  if (out.numel() == 0) {
    return out;
  }
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t common = std::gcd(p.stride[axis], p.dilation[axis]);
    p.tap_steps[axis] = p.stride[axis] / common;
    p.shift_steps[axis] = p.dilation[axis] / common;
  }
  check_sizes(p);
  allow_access(input, false);
  allow_access(weight, false);
  const Tensor input_rows = set_input_rows(device, input, p), weight_rows = set_weight_rows(device, weight, p);
  DTYPE_SWITCH(input.scalar_type(), "input", scalar_t, [&] {
    if constexpr (sizeof(scalar_t) == 2) {
      launch_products<scalar_t, Products::half>(device, p);
    } else if (tf32) {
      launch_products<scalar_t, Products::tf32>(device, p);
    } else {
      launch_products<scalar_t, Products::ieee>(device, p);
    }
  });
  return out;
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, GPT4FAST_CUDA_KEY, m) {
  m.impl("conv_transpose_forward", TORCH_BOX(&gpt4fast::forward));
}
