// The gradient of a transposed convolution's weight: for each tap and group one matrix product, input^T x grad_out,
// over the pixels of the input, where a pixel's row of grad_out is the one that the tap carries it to. A block takes a
// tile of it and a part of the pixels; parts are added up in a fixed order, so that the same call has the same bits.
#include "cuda/conv_transpose_weight_gradient.h"

#include "cuda/block_sums.cuh"
#include "cuda/conv_transpose_config.h"
#include "cuda/conv_transpose_products.cuh"

#include "common/dtypes.h"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Tile>
struct alignas(16) WeightGradientShared {
  char slices[Tile::kStages][2][Tile::kPixels * Tile::kRowBytes];  // of input and grad_out
  // Where the pixels of a slice lie in both, in turns; -1 where there is none.
  int64_t places[2][2][Tile::kPixels];
};

template <typename scalar_t, Products kProducts, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    conv_transpose_weight_gradient_kernel(const ConvTransposeWeightGradientLaunch p) {
  constexpr int kPixels = Tile::kPixels, kSide = Tile::kSide, kStages = Tile::kStages, kWarpSide = kSide / 2;
  constexpr int kCount = 16 / sizeof(scalar_t), kParts = kSide / kCount, kRows = Tile::kThreads / kParts;
  auto& shared = shared_memory<WeightGradientShared<Tile>>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  uint32_t block = blockIdx.x;
  const auto take = [&](int64_t count) {  // the block's index along a dimension
    const uint32_t index = block % static_cast<uint32_t>(count);
    block /= static_cast<uint32_t>(count);
    return static_cast<int>(index);
  };
  const int first_output = take(p.output_tiles) * kSide, first_channel = take(p.channel_tiles) * kSide;
  const int tap_w = take(p.kernel[2]), tap_h = take(p.kernel[1]), tap_d = take(p.kernel[0]);
  const int64_t group = take(p.groups), part = block;
  const int pixels = static_cast<int>(p.batch * p.in_size[0] * p.in_size[1] * p.in_size[2]);
  const int first_slice = static_cast<int>(part * p.slices_of_part), slices = (pixels + kPixels - 1) / kPixels;
  const int steps = min(static_cast<int>(p.slices_of_part), slices - first_slice);

  const auto locate = [&](int step) {
    if (thread < kPixels) {
      const int index = (first_slice + step) * kPixels + thread;
      const auto size_d = static_cast<uint32_t>(p.in_size[0]), size_h = static_cast<uint32_t>(p.in_size[1]),
                 size_w = static_cast<uint32_t>(p.in_size[2]);
      const uint32_t line = static_cast<uint32_t>(index) / size_w, w = static_cast<uint32_t>(index) % size_w;
      const uint32_t plane = line / size_h, h = line % size_h, image = plane / size_d, d = plane % size_d;
      const int64_t out_d = d * p.stride[0] - p.padding[0] + tap_d * p.dilation[0],
                    out_h = h * p.stride[1] - p.padding[1] + tap_h * p.dilation[1],
                    out_w = w * p.stride[2] - p.padding[2] + tap_w * p.dilation[2];
      const bool exists = index < pixels;
      const bool inside = exists && 0 <= out_d && out_d < p.out_size[0] && 0 <= out_h && out_h < p.out_size[1] &&
                          0 <= out_w && out_w < p.out_size[2];
      const int64_t* from = p.input_strides;
      const int64_t* to = p.grad_strides;
      shared.places[step % 2][0][thread] =
          exists ? image * from[0] + d * from[2] + h * from[3] + w * from[4] : int64_t{-1};
      shared.places[step % 2][1][thread] =
          inside ? image * to[0] + out_d * to[2] + out_h * to[3] + out_w * to[4] : int64_t{-1};
    }
  };

  // Each thread copies 16 bytes of every kRows-th pixel.
  const int column = thread % kParts * kCount, first_row = thread / kParts;
  const auto* input = static_cast<const scalar_t*>(p.input) + group * p.input_padded + first_channel + column;
  const auto* grad_out = static_cast<const scalar_t*>(p.grad_out) + group * p.grad_padded + first_output + column;
  const bool has_channel = first_channel + column < p.input_padded, has_output = first_output + column < p.grad_padded;
  const auto request = [&](int step) {
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < kPixels / kRows; ++i) {
        const int row = first_row + i * kRows, at = row * Tile::kRowBytes + thread % kParts * 16;
        const int64_t from = shared.places[step % 2][0][row], to = shared.places[step % 2][1][row];
        copy_async<16>(shared.slices[step % kStages][0] + at, input + from, from >= 0 && has_channel);
        copy_async<16>(shared.slices[step % kStages][1] + at, grad_out + to, to >= 0 && has_output);
      }
    }
    commit_copies();
  };

  const int warp_channel = warp / 2 * kWarpSide, warp_output = warp % 2 * kWarpSide;
  float sums[kWarpSide / 16][kWarpSide / 8][4] = {};
  locate(0);
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) {
    __syncthreads();
    request(step);
    locate(step + 1);
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();              // everyone's copies are there, and everyone is done with the slice before
    request(step + kStages - 1);  // which is overwritten
    locate(step + kStages);
    const auto& slices = shared.slices[step % kStages];
    multiply_pixels<Tile, scalar_t, kProducts>(sums, slices[0] + warp_channel * static_cast<int>(sizeof(scalar_t)),
                                               slices[1] + warp_output * static_cast<int>(sizeof(scalar_t)));
  }

  const auto channels = static_cast<int>(p.channels), outputs = static_cast<int>(p.outputs);
  const int64_t tap = (part * p.kernel[0] + tap_d) * p.kernel[1] * p.kernel[2] + tap_h * p.kernel[2] + tap_w;
  float* out = p.parts + (tap * p.groups + group) * channels * outputs;
#pragma unroll
  for (int i = 0; i < kWarpSide / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpSide / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int channel = first_channel + warp_channel + 16 * i + lane / 4 + k / 2 * 8;
        const int output = first_output + warp_output + 8 * j + lane % 4 * 2 + k % 2;
        if (channel < channels && output < outputs) {
          out[int64_t{channel} * outputs + output] = sums[i][j][k];
        }
      }
    }
  }
}

template <typename scalar_t, Products kProducts>
Tensor launch(const Device& device, ConvTransposeWeightGradientLaunch& p, const Tensor& weight) {
  using Tile = WeightGradientTile<sizeof(scalar_t)>;
  static_assert(sizeof(WeightGradientShared<Tile>) <= kMostSharedBytes);
  p.channel_tiles = ceil_div(p.channels, Tile::kSide);
  p.output_tiles = ceil_div(p.outputs, Tile::kSide);
  const int64_t taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  const int64_t tiles = p.channel_tiles * p.output_tiles * taps * p.groups;
  const int64_t slices = ceil_div(p.batch * p.in_size[0] * p.in_size[1] * p.in_size[2], Tile::kPixels);
  p.slices_of_part = ceil_div(slices, weight_gradient_parts(tiles, slices, device.processors()));
  p.part_count = ceil_div(slices, p.slices_of_part);
  const int64_t numbers = p.groups * p.channels * p.outputs;
  const Tensor parts =
      device.fresh(torch::stable::new_empty(weight, {p.part_count, taps * numbers}, ScalarType::Float));
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < weight.dim(); ++axis) {
    shape.push_back(weight.size(axis));
  }
  const Tensor out = device.fresh(torch::stable::new_empty(weight, shape));
  p.parts = parts.mutable_data_ptr<float>();
  device.launch(conv_transpose_weight_gradient_kernel<scalar_t, kProducts, Tile>, tiles * p.part_count, Tile::kThreads,
                sizeof(WeightGradientShared<Tile>), p);
  sum_parts(device, {p.parts, out.mutable_data_ptr(), weight.scalar_type(), p.part_count, numbers, taps});
  return out;
}

}  // namespace

Tensor conv_transpose_weight_gradient(const Device& device, ConvTransposeWeightGradientLaunch p, const Tensor& weight,
                                      bool tf32) {
  return DTYPE_SWITCH(weight.scalar_type(), "weight", scalar_t, [&] {
    if constexpr (sizeof(scalar_t) == 2) {
      return launch<scalar_t, Products::half>(device, p, weight);
    } else if (tf32) {
      return launch<scalar_t, Products::tf32>(device, p, weight);
    } else {
      return launch<scalar_t, Products::ieee>(device, p, weight);
    }
  });
}

}  // namespace gpt4fast
