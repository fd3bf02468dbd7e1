// Batch norm with the batch's statistics and the activation behind it: the statistics of a tensor whose convolution did
// not take them, and backward the two sums of a channel and the gradient of the input. Forward, the pass that
// normalises is affine_activation.cu's. Memory is the limit throughout: a thread takes 16 bytes at once where it can,
// and one kernel serves both half types.
#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "cuda/batch_statistics.h"

#include "affine_activation.h"
#include "common/strings.h"
#include "common/tensors.h"
#include "cuda/block_sums.cuh"
#include "cuda/channels.cuh"
#include "cuda/launch.h"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensors (N, C, *spatial) have one layout, contiguous or channels last. A block takes a part of the pixels of one
// channel, or of lanes * width of them where they are neighbours; its threads go through rows, width elements each.
struct BatchNormLaunch {
  const void *input, *grad_out;
  void* grad_input;
  const float *weight, *bias, *mean, *rstd;  // (C)
  const float *grad_bias, *grad_weight;      // (C)
  float* parts;                              // statistics (3, C, number), gradients (2, number, C)
  int64_t numel, channels, pixels, inner;    // pixels of all images; as AffineActivationParams has inner
  int64_t width, lanes;
  int64_t image_rows, rows, rows_of_part, number, tiles;  // number of parts, and of blocks along channels
  Activation activation;
  float negative_slope;
  HalfType half;
};

struct Channel {
  float mean, rstd, factor, bias;
};

__device__ __forceinline__ Channel channel_of(const BatchNormLaunch& p, int64_t channel) {
  const float rstd = p.rstd[channel];
  return {p.mean[channel], rstd, p.weight[channel] * rstd, p.bias[channel]};
}

// Where a thread of a reduction works.
struct Place {
  int64_t part, channel, first_row, last_row;  // its first channel, perhaps behind the last
  int step;                                    // rows from one of its own to the next
  bool channels_last;

  __device__ __forceinline__ explicit Place(const BatchNormLaunch& p) : channels_last(p.inner == 1) {
    const auto lanes = static_cast<int>(p.lanes), thread = static_cast<int>(threadIdx.x);
    part = blockIdx.x % p.number;
    channel = blockIdx.x / p.number * (channels_last ? lanes * p.width : 1) + thread % lanes * p.width;
    step = kVectorThreads / lanes;
    first_row = part * p.rows_of_part + thread / lanes;
    last_row = channel < p.channels ? min((part + 1) * p.rows_of_part, p.rows) : 0;
  }

  __device__ __forceinline__ int64_t offset(const BatchNormLaunch& p, int64_t row) const {
    if (channels_last) {
      return row * p.channels + channel;
    }
    const int64_t image = row / p.image_rows;
    return (image * p.channels + channel) * p.inner + (row - image * p.image_rows) * p.width;
  }

  // How many rows the thread has.
  __device__ __forceinline__ int64_t count() const {
    return last_row > first_row ? (last_row - first_row + step - 1) / step : 0;
  }
};

template <typename element_t>
__device__ __forceinline__ void load_row(float (&numbers)[Vector<element_t>::kSize], const BatchNormLaunch& p,
                                         const void* from, int64_t offset) {
  const auto* source = static_cast<const element_t*>(from) + offset;
  Vector<element_t> values{};
  if (p.width > 1) {
    values = *reinterpret_cast<const Vector<element_t>*>(source);
  } else {
    values.elements[0] = source[0];
  }
  values.get(numbers, p.half);
}

template <typename element_t>
__global__ void __launch_bounds__(kVectorThreads) batch_statistics_kernel(const BatchNormLaunch p) {
  constexpr int kSize = Vector<element_t>::kSize;
  struct Shared {
    Statistics rows[kVectorThreads];
  };
  Shared& shared = shared_memory<Shared>();
  const Place place(p);
  float numbers[kSize] = {};
  if (place.first_row < place.last_row) {
    load_row<element_t>(numbers, p, p.input, place.offset(p, place.first_row));
  }
  DifferenceSums sums[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    sums[k] = {numbers[k], 0.0f, 0.0f};
  }
#pragma unroll 4
  for (int64_t row = place.first_row; row < place.last_row; row += place.step) {
    load_row<element_t>(numbers, p, p.input, place.offset(p, row));
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      sums[k].add(numbers[k]);
    }
  }
  const auto count = static_cast<float>(place.count());
  const auto pair = [](const Statistics& a, const Statistics& b) { return merge(a, b); };
  const auto finish = [&](const Statistics& mine, int64_t channel) {
    const Statistics all = merge_threads(shared.rows, mine, static_cast<int>(p.lanes), pair);
    if (threadIdx.x < p.lanes && channel < p.channels) {
      float* part = p.parts + channel * p.number + place.part;
      const int64_t each = p.channels * p.number;
      part[0] = all.count;
      part[each] = all.mean;
      part[2 * each] = all.spread;
    }
  };
  Statistics mine{};
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    if (k < p.width) {
      const Statistics element = sums[k].statistics(count);
      if (place.channels_last) {
        finish(element, place.channel + k);
      } else {
        mine = merge(mine, element);
      }
    }
  }
  if (!place.channels_last) {
    finish(mine, place.channel);
  }
}

template <typename element_t>
__global__ void __launch_bounds__(kVectorThreads) batch_norm_sums_kernel(const BatchNormLaunch p) {
  constexpr int kSize = Vector<element_t>::kSize;
  struct Shared {
    float2 rows[kVectorThreads];
  };
  Shared& shared = shared_memory<Shared>();
  const Place place(p);
  Channel channels[kSize] = {};
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    if (k < p.width && place.channel < p.channels) {
      channels[k] = channel_of(p, place.channel + (place.channels_last ? k : 0));
    }
  }
  float2 sums[kSize] = {};
  ACTIVATION_SWITCH(p.activation, kActivation, [&] {
    for (int64_t row = place.first_row; row < place.last_row; row += place.step) {
      const int64_t offset = place.offset(p, row);
      float numbers[kSize], grads[kSize];
      load_row<element_t>(numbers, p, p.input, offset);
      load_row<element_t>(grads, p, p.grad_out, offset);
      for (int k = 0; k < kSize; ++k) {
        const Channel& c = channels[k];
        const float centered = numbers[k] - c.mean;
        const float change = activation_gradient<kActivation>(grads[k], c.factor * centered + c.bias, p.negative_slope);
        sums[k].x += change;
        sums[k].y += change * (centered * c.rstd);
      }
    }
  });
  const auto add = [](const float2& a, const float2& b) { return float2{a.x + b.x, a.y + b.y}; };
  const auto finish = [&](const float2& mine, int64_t channel) {
    const float2 all = merge_threads(shared.rows, mine, static_cast<int>(p.lanes), add);
    if (threadIdx.x < p.lanes && channel < p.channels) {
      float* part = p.parts + place.part * p.channels + channel;
      part[0] = all.x;
      part[p.number * p.channels] = all.y;
    }
  };
  float2 mine{};
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    if (k < p.width) {
      if (place.channels_last) {
        finish(sums[k], place.channel + k);
      } else {
        mine = add(mine, sums[k]);
      }
    }
  }
  if (!place.channels_last) {
    finish(mine, place.channel);
  }
}

template <typename element_t>
__global__ void __launch_bounds__(kVectorThreads) batch_norm_input_gradient_kernel(const BatchNormLaunch p) {
  constexpr int kSize = Vector<element_t>::kSize;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kVectorThreads + threadIdx.x) * kSize;
  if (begin >= p.numel) {
    return;
  }
  Vector<element_t> values = load_vector<element_t>(p.input, begin, p.numel);
  float numbers[kSize], grads[kSize], change[kSize];
  values.get(numbers, p.half);
  load_vector<element_t>(p.grad_out, begin, p.numel).get(grads, p.half);
  const auto affine = [&](int64_t channel) { return channel_of(p, channel); };
  for_channels<kSize>(begin, p.numel, p.inner, p.channels, affine,
                      [&](int k, const Channel& c) { change[k] = c.factor * (numbers[k] - c.mean) + c.bias; });
  ACTIVATION_SWITCH(p.activation, kActivation, [&] {
    for (int k = 0; k < kSize; ++k) {
      change[k] = activation_gradient<kActivation>(grads[k], change[k], p.negative_slope);
    }
  });
  struct Means {
    float mean, factor, change, product;  // the last two are those of a channel's changes, and of these x normalised
  };
  const float share = 1.0f / static_cast<float>(p.pixels);
  const auto means = [&](int64_t channel) {
    const Channel c = channel_of(p, channel);
    return Means{c.mean, c.factor, p.grad_bias[channel] * share, p.grad_weight[channel] * share * c.rstd};
  };
  for_channels<kSize>(begin, p.numel, p.inner, p.channels, means, [&](int k, const Means& m) {
    numbers[k] = (change[k] - m.change - (numbers[k] - m.mean) * m.product) * m.factor;
  });
  values.set(numbers, p.half);
  store_vector(p.grad_input, values, begin, p.numel);
}

// What follows from the tensors' shape and layout.
BatchNormLaunch set_tensors(const Device& device, const Tensor& input, const Tensor& grad_out) {
  STD_TORCH_CHECK(input.dim() >= 2 && input.numel() > 0,
                  "expected input to have at least 2 dimensions, none of them empty, but its shape is ",
                  shape_of(input));
  BatchNormLaunch p{};
  p.input = input.const_data_ptr();
  p.grad_out = grad_out.const_data_ptr();
  p.half = half_type(input.scalar_type());
  p.numel = input.numel();
  p.channels = input.size(1);
  p.pixels = p.numel / p.channels;
  p.inner = elements_between_channels(input);
  const bool channels_last = p.inner == 1;  // or one pixel to an image, which is the same
  const auto size = static_cast<int64_t>(input.element_size());
  const bool wide = (channels_last ? p.channels : p.inner) * size % 16 == 0 &&
                    (reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.grad_out)) % 16 == 0;
  p.width = wide ? 16 / size : 1;
  p.lanes = 1;
  while (channels_last && p.lanes < 32 && p.lanes * p.width < p.channels) {
    p.lanes *= 2;
  }
  p.tiles = channels_last ? ceil_div(p.channels, p.lanes * p.width) : p.channels;
  p.image_rows = p.inner / p.width;
  p.rows = channels_last ? p.pixels : p.pixels / p.width;
  // Eight blocks on each multiprocessor, and at least four rows to a thread.
  const int64_t together = kVectorThreads / p.lanes, steps = ceil_div(p.rows, together);
  const int64_t parts = std::max<int64_t>(1, std::min(ceil_div(8 * device.processors(), p.tiles), steps / 4));
  p.rows_of_part = ceil_div(steps, parts) * together;
  p.number = ceil_div(p.rows, p.rows_of_part);
  allow_access(input, false);
  allow_access(grad_out, false);
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_statistics(const Tensor& input, double eps) {
  CHECK_CUDA(input);
  const Device device(input);
  BatchNormLaunch p = set_tensors(device, input, input);
  const Tensor parts = device.fresh(torch::stable::new_empty(input, {3, p.channels, p.number}, ScalarType::Float));
  p.parts = parts.mutable_data_ptr<float>();
  ELEMENT_SWITCH(input.scalar_type(), "input", element_t, [&] {
    device.launch(batch_statistics_kernel<element_t>, p.number * p.tiles, kVectorThreads,
                  kVectorThreads * sizeof(Statistics), p);
  });
  return merge_statistics(device, parts, eps);
}

namespace {

// Gradients of input, weight and bias.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& input, const Tensor& weight,
                                            const Tensor& bias, const Tensor& mean, const Tensor& rstd,
                                            StringHandle activation, double negative_slope) {
  const Activation kind = parse_activation(take_string(activation));  // first: a failed check must not lose the string
  CHECK_CUDA(input);
  STD_TORCH_CHECK(grad_out.device() == input.device(), "expected grad_out to be on the device of input");
  CHECK_DTYPE(grad_out, input.scalar_type());
  CHECK_DIM(grad_out, input.dim());
  for (int64_t axis = 0; axis < input.dim(); ++axis) {
    CHECK_SIZE(grad_out, axis, input.size(axis));
  }
  const Device device(input);
  BatchNormLaunch p = set_tensors(device, input, grad_out);
  STD_TORCH_CHECK(p.inner == elements_between_channels(grad_out), "expected grad_out to have the layout of input");
  Tensor storage[4];
  p.weight = channel_parameter(weight, "weight", input, storage[0]);
  p.bias = channel_parameter(bias, "bias", input, storage[1]);
  p.mean = channel_parameter(mean, "mean", input, storage[2]);
  p.rstd = channel_parameter(rstd, "rstd", input, storage[3]);
  for (const float* vector : {p.weight, p.bias, p.mean, p.rstd}) {
    allow_access(vector, p.channels * sizeof(float), false);
  }
  const auto fresh = [&](auto... sizes) {
    return device.fresh(torch::stable::new_empty(input, {sizes...}, ScalarType::Float));
  };
  const Tensor parts = fresh(int64_t{2}, p.number, p.channels);
  const Tensor grad_bias = fresh(p.channels), grad_weight = fresh(p.channels);
  const Tensor grad_input = device.fresh(torch::stable::empty_like(input));
  p.parts = parts.mutable_data_ptr<float>();
  p.grad_bias = grad_bias.const_data_ptr<float>();
  p.grad_weight = grad_weight.const_data_ptr<float>();
  p.grad_input = grad_input.mutable_data_ptr();
  p.activation = kind;
  p.negative_slope = static_cast<float>(negative_slope);
  ELEMENT_SWITCH(input.scalar_type(), "input", element_t, [&] {
    device.launch(batch_norm_sums_kernel<element_t>, p.number * p.tiles, kVectorThreads,
                  kVectorThreads * sizeof(float2), p);
    const auto sum = [&](const float* parts, const Tensor& total) {
      sum_parts(device, {parts, total.mutable_data_ptr(), ScalarType::Float, p.number, p.channels, 1});
    };
    sum(p.parts, grad_bias);
    sum(p.parts + p.number * p.channels, grad_weight);
    device.launch(batch_norm_input_gradient_kernel<element_t>,
                  ceil_div(p.numel, Vector<element_t>::kSize * kVectorThreads), kVectorThreads, 0, p);
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, GPT4FAST_CUDA_KEY, m) {
  m.impl("batch_statistics", TORCH_BOX(&gpt4fast::batch_statistics));
  m.impl("batch_norm_activation_backward", TORCH_BOX(&gpt4fast::backward));
}
