// Transposed convolution as one implicit matrix product for each output phase: outputs whose position leaves the same
// remainder by the stride meet the same taps of the kernel, so that no multiplication is by a zero between pixels. A
// block takes a tile of a phase's pixels x a group's channels through all taps and input channels; slices of both
// operands arrive by asynchronous copies while earlier ones are multiplied, and bias, scale, shift and activation are
// applied before the one write. Inputs whose channels are not neighbours are brought into rows first, and so is the
// weight, at every call: it may have been written to, and reading it takes little beside the convolution. Not yet run
// on a GPU.
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
#include "cuda/conv_transpose_products.cuh"
#include "cuda/launch.h"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// input is (N, D, H, W, G, padded) by input_strides of N, D, H and W in their places, weight (G, taps, Cout / G,
// padded): each group's channels are neighbours, at a multiple of 16 bytes, zeros behind them.
struct ConvTransposeLaunch : ConvTransposeParams {
  const float *bias, *factor, *shift;  // (Cout), or null
  int64_t padded, group_stride;
  int64_t out_strides[5];
  int64_t tap_steps[3];    // taps of one phase are so many apart,
  int64_t shift_steps[3];  // and meet inputs that are so many apart
  int64_t phases[3], pixel_tiles, channel_tiles;
};

// Along one dimension: outputs residue + stride * q meet taps first + step * j at inputs q + shift - j * shift_step.
struct Phase {
  int64_t residue, places, first, taps, shift;

  __device__ __forceinline__ Phase(const ConvTransposeLaunch& p, int axis, int64_t remainder) : residue(remainder) {
    const int64_t stride = p.stride[axis], start = residue + p.padding[axis];
    places = (p.out_size[axis] - residue + stride - 1) / stride;
    first = 0;
    while (first < p.tap_steps[axis] && first < p.kernel[axis] && (start - first * p.dilation[axis]) % stride != 0) {
      ++first;
    }
    const bool any = first < p.tap_steps[axis] && first < p.kernel[axis];
    taps = any ? (p.kernel[axis] - first + p.tap_steps[axis] - 1) / p.tap_steps[axis] : 0;
    shift = any ? (start - first * p.dilation[axis]) / stride : 0;
  }
};

template <typename Tile>
struct alignas(16) ConvTransposeShared {
  union {
    char slices[Tile::kStages][(Tile::kPixels + Tile::kChannels) * Tile::kRowBytes];
    float sums[Tile::kPixels][Tile::kChannels + 1];  // once all slices are multiplied
  };
  int64_t image[Tile::kPixels];     // where a pixel's image begins, or -1 where there is no pixel
  int64_t place[3][Tile::kPixels];  // its indices in the phase
  int64_t target[Tile::kPixels];    // where it lies in the output
};

template <typename scalar_t, Products kProducts, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) conv_transpose_kernel(const ConvTransposeLaunch p) {
  constexpr int kPixels = Tile::kPixels, kChannels = Tile::kChannels, kStages = Tile::kStages;
  constexpr int kCount = 16 / sizeof(scalar_t), kParts = Tile::kDepthBytes / 16, kDepth = kParts * kCount;
  constexpr int kRows = Tile::kThreads / kParts;  // that are copied at once
  auto& shared = shared_memory<ConvTransposeShared<Tile>>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int64_t block = blockIdx.x;
  const int64_t first_pixel = block % p.pixel_tiles * kPixels;
  block /= p.pixel_tiles;
  const int64_t outputs = p.out_channels / p.groups, first_channel = block % p.channel_tiles * kChannels;
  block /= p.channel_tiles;
  const int64_t group = block % p.groups;
  block /= p.groups;
  const Phase along_w(p, 2, block % p.phases[2]), along_h(p, 1, block / p.phases[2] % p.phases[1]),
      along_d(p, 0, block / (p.phases[2] * p.phases[1]));
  const int64_t image_size = along_d.places * along_h.places * along_w.places;
  if (first_pixel >= p.batch * image_size) {
    return;
  }

  for (int row = thread; row < kPixels; row += Tile::kThreads) {
    int64_t index = first_pixel + row;
    const bool exists = index < p.batch * image_size;
    const int64_t image = index / image_size;
    const int64_t w = index % along_w.places;
    index /= along_w.places;
    const int64_t h = index % along_h.places, d = index / along_h.places % along_d.places;
    shared.image[row] = exists ? image * p.input_strides[0] + group * p.group_stride : -1;
    shared.place[0][row] = d;
    shared.place[1][row] = h;
    shared.place[2][row] = w;
    shared.target[row] = image * p.out_strides[0] + (along_d.residue + d * p.stride[0]) * p.out_strides[2] +
                         (along_h.residue + h * p.stride[1]) * p.out_strides[3] +
                         (along_w.residue + w * p.stride[2]) * p.out_strides[4];
  }
  __syncthreads();

  // Each thread copies 16 bytes of every kRows-th row of both operands.
  const int part = thread % kParts, first_row = thread / kParts;
  const auto slices = static_cast<int>((p.padded + kDepth - 1) / kDepth);
  const int64_t steps = along_d.taps * along_h.taps * along_w.taps * slices;
  const auto* input = static_cast<const scalar_t*>(p.input);
  const auto* weight =
      static_cast<const scalar_t*>(p.weight) + group * p.kernel[0] * p.kernel[1] * p.kernel[2] * outputs * p.padded;
  int64_t tap_d = 0, tap_h = 0, tap_w = 0, sources[kPixels / kRows];
  const scalar_t* tap = weight;
  int slice = 0;
  const auto request = [&](int64_t step) {
    if (step < steps) {
      if (slice == 0) {  // another tap
#pragma unroll
        for (int i = 0; i < kPixels / kRows; ++i) {
          const int row = first_row + kRows * i;
          const int64_t image = shared.image[row];
          const int64_t d = shared.place[0][row] + along_d.shift - tap_d * p.shift_steps[0];
          const int64_t h = shared.place[1][row] + along_h.shift - tap_h * p.shift_steps[1];
          const int64_t w = shared.place[2][row] + along_w.shift - tap_w * p.shift_steps[2];
          const bool inside =
              image >= 0 && 0 <= d && d < p.in_size[0] && 0 <= h && h < p.in_size[1] && 0 <= w && w < p.in_size[2];
          sources[i] = inside ? image + d * p.input_strides[2] + h * p.input_strides[3] + w * p.input_strides[4] : -1;
        }
        const int64_t index =
            ((along_d.first + tap_d * p.tap_steps[0]) * p.kernel[1] + (along_h.first + tap_h * p.tap_steps[1])) *
                p.kernel[2] +
            along_w.first + tap_w * p.tap_steps[2];
        tap = weight + index * outputs * p.padded;
      }
      const int64_t channel = slice * kDepth + part * kCount;
      const bool is_channel = channel < p.padded;
      char* target = shared.slices[step % kStages] + first_row * Tile::kRowBytes + part * 16;
#pragma unroll
      for (int i = 0; i < kPixels / kRows; ++i) {
        const bool valid = is_channel && sources[i] >= 0;
        copy_async<16>(target + i * kRows * Tile::kRowBytes, valid ? input + sources[i] + channel : input, valid);
      }
#pragma unroll
      for (int i = 0; i < kChannels / kRows; ++i) {
        const int64_t output = first_channel + first_row + kRows * i;
        const bool valid = is_channel && output < outputs;
        copy_async<16>(target + (kPixels + i * kRows) * Tile::kRowBytes,
                       valid ? tap + output * p.padded + channel : weight, valid);
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
  WarpSums<Tile> sums = {};
  for (int step = 0; step < kStages - 1; ++step) {
    request(step);
  }
  for (int64_t step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();              // everyone's copies are there, and everyone is done with the slice before
    request(step + kStages - 1);  // which is overwritten
    const char* pixels = shared.slices[step % kStages];
    multiply_slices<Tile, scalar_t, kProducts>(sums, pixels + warp_pixel * Tile::kRowBytes,
                                               pixels + (kPixels + warp_channel) * Tile::kRowBytes);
  }

  __syncthreads();
#pragma unroll
  for (int i = 0; i < Tile::kWarpPixels / 16; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kWarpChannels / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        shared.sums[warp_pixel + 16 * i + lane / 4 + k / 2 * 8][warp_channel + 8 * j + lane % 4 * 2 + k % 2] =
            sums[i][j][k];
      }
    }
  }
  __syncthreads();
  const auto finish = [&](int row, int column) {
    const int64_t channel = group * outputs + first_channel + column;
    const float x =
        (p.factor ? p.factor[channel] : 1.0f) * (shared.sums[row][column] + (p.bias ? p.bias[channel] : 0.0f)) +
        (p.shift ? p.shift[channel] : 0.0f);
    return static_cast<scalar_t>(
        ACTIVATION_SWITCH(p.activation, kActivation, [&] { return activate<kActivation>(x, p.negative_slope); }));
  };
  auto* out = static_cast<scalar_t*>(p.out) + (group * outputs + first_channel) * p.out_strides[1];
  const int64_t columns = outputs - first_channel;
  if (p.channels_last && p.out_channels % kCount == 0 && outputs % kCount == 0) {
    for (int i = thread; i < kPixels * kChannels / kCount; i += Tile::kThreads) {
      const int row = i / (kChannels / kCount), column = i % (kChannels / kCount) * kCount;
      if (shared.image[row] >= 0 && column < columns) {
        alignas(16) scalar_t numbers[kCount];
        for (int k = 0; k < kCount; ++k) {
          numbers[k] = finish(row, column + k);
        }
        *reinterpret_cast<uint4*>(out + shared.target[row] + column) = *reinterpret_cast<const uint4*>(numbers);
      }
    }
  } else {  // neighbours in memory are pixels, mostly
    for (int i = thread; i < kPixels * kChannels; i += Tile::kThreads) {
      const int row = i % kPixels, column = i / kPixels;
      if (shared.image[row] >= 0 && column < columns) {
        out[shared.target[row] + column * p.out_strides[1]] = finish(row, column);
      }
    }
  }
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
  device.launch(conv_transpose_kernel<scalar_t, kProducts, Tile>, p.pixel_tiles * p.channel_tiles * p.groups * phases,
                Tile::kThreads, sizeof(ConvTransposeShared<Tile>), p);
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

Tensor set_weight_rows(const Device& device, const Tensor& weight, ConvTransposeLaunch& p) {
  const int64_t outputs = p.out_channels / p.groups, taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  const int64_t channels = p.in_channels / p.groups, *strides = p.weight_strides;
  const Tensor rows =
      device.fresh(torch::stable::new_empty(weight, {p.groups * taps * outputs * p.padded}, weight.scalar_type()));
  launch_channel_rows(device, static_cast<int64_t>(weight.element_size()),
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
