#pragma once

// Transposed convolution by phases: the outputs whose positions are equal modulo the stride take the same taps of the
// kernel from neighbouring inputs, so each phase is an ordinary small convolution and no product with an inserted zero
// is ever formed. This header has the taps of an output position and the inner loops over channels.

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "simd/simd.h"

namespace gpt4fast::cpu {

// The taps that reach one output position along one dimension: tap + m * tap_step reads input index - m * index_step.
struct Taps {
  int64_t tap, count, tap_step;
  int64_t index, index_step;
};

inline Taps taps_of(int64_t out, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation);
  Taps taps{0, 0, stride / common, 0, dilation / common};
  for (int64_t tap = 0; tap < std::min(kernel, taps.tap_step); ++tap) {
    const int64_t offset = out + padding - tap * dilation;
    if (offset % stride == 0) {
      taps.tap = tap;
      taps.count = (kernel - tap + taps.tap_step - 1) / taps.tap_step;
      taps.index = offset / stride;
      break;
    }
  }
  return taps;
}

inline constexpr int64_t kPositions = 4;  // output positions of one phase that the inner loops keep in registers
// Terms added up in one run before the run is added to the total. One long run's error grows with its length: without
// runs, 128 channels x 8 taps erred 2.5 times as much as oneDNN (root mean square), and largest errors 4 times as much.
inline constexpr int64_t kRun = 32;
inline constexpr int64_t kChannelBlock = 2 * simd::kLanes;  // and output channels

// How the inner loop fills its vectors. Each method adds one tap at kCount positions; position r reads x + r * step.
//   sums: (kPositions, kWidth) floats     depth: input channels of the group     x: (depth) floats at each position

// Vectors of output channels. weight: (depth, kChannelBlock).
struct ManyOutputs {
  static constexpr int64_t kWidth = kChannelBlock;
  static constexpr int64_t kChannels = kChannelBlock;

  template <int kCount>
  static void add(float* sums, const float* x, int64_t step, const float* weight, int64_t depth) {
    using namespace simd;
    for (int64_t begin = 0; begin < depth; begin += kRun) {
      Vector sum_of[kCount][2] = {};
      for (int64_t c = begin; c < std::min(begin + kRun, depth); ++c) {
        const Vector left = load(weight + c * kWidth);
        const Vector right = load(weight + c * kWidth + kLanes);
        for (int r = 0; r < kCount; ++r) {
          const Vector value = broadcast(x[r * step + c]);
          sum_of[r][0] = multiply_add(value, left, sum_of[r][0]);
          sum_of[r][1] = multiply_add(value, right, sum_of[r][1]);
        }
      }
      for (int r = 0; r < kCount; ++r) {
        for (int half = 0; half < 2; ++half) {
          float* sum = sums + r * kWidth + half * kLanes;
          store(sum, load(sum) + sum_of[r][half]);
        }
      }
    }
  }

  static void finish(const float* sums, float* line) { std::copy_n(sums, kWidth, line); }
};

// One to three output channels: vectors of input channels, summed at the end. depth is a multiple of kLanes.
// weight: (kOutputs, depth).
template <int kOutputs>
struct FewOutputs {
  static constexpr int64_t kWidth = kOutputs * simd::kLanes;
  static constexpr int64_t kChannels = kOutputs;

  template <int kCount>
  static void add(float* sums, const float* x, int64_t step, const float* weight, int64_t depth) {
    using namespace simd;
    Vector sum_of[kCount][kOutputs];
    for (int r = 0; r < kCount; ++r) {
      for (int out = 0; out < kOutputs; ++out) {
        sum_of[r][out] = load(sums + r * kWidth + out * kLanes);
      }
    }
    for (int64_t c = 0; c < depth; c += kLanes) {
      Vector weights[kOutputs];
      for (int out = 0; out < kOutputs; ++out) {
        weights[out] = load(weight + out * depth + c);
      }
      for (int r = 0; r < kCount; ++r) {
        const Vector value = load(x + r * step + c);
        for (int out = 0; out < kOutputs; ++out) {
          sum_of[r][out] = multiply_add(value, weights[out], sum_of[r][out]);
        }
      }
    }
    for (int r = 0; r < kCount; ++r) {
      for (int out = 0; out < kOutputs; ++out) {
        store(sums + r * kWidth + out * kLanes, sum_of[r][out]);
      }
    }
  }

  static void finish(const float* sums, float* line) {
    for (int out = 0; out < kOutputs; ++out) {
      line[out] = simd::sum(simd::load(sums + out * simd::kLanes));
    }
  }
};

// One input and one output channel to a group: vectors of groups. weight: (kChannelBlock); depth is not used.
struct Depthwise {
  static constexpr int64_t kWidth = kChannelBlock;
  static constexpr int64_t kChannels = kChannelBlock;

  template <int kCount>
  static void add(float* sums, const float* x, int64_t step, const float* weight, int64_t) {
    using namespace simd;
    for (int64_t v = 0; v < kWidth; v += kLanes) {
      const Vector weights = load(weight + v);
      for (int r = 0; r < kCount; ++r) {
        float* target = sums + r * kWidth + v;
        store(target, multiply_add(load(x + r * step + v), weights, load(target)));
      }
    }
  }

  static void finish(const float* sums, float* line) { std::copy_n(sums, kWidth, line); }
};

template <typename Loop>
void add_tap(int64_t count, float* sums, const float* x, int64_t step, const float* weight, int64_t depth) {
  switch (count) {
    case 1: return Loop::template add<1>(sums, x, step, weight, depth);
    case 2: return Loop::template add<2>(sums, x, step, weight, depth);
    case 3: return Loop::template add<3>(sums, x, step, weight, depth);
    case 4: return Loop::template add<4>(sums, x, step, weight, depth);
  }
}

// One line of outputs along the last dimension, for one image and one block of output channels.
struct Line {
  const float* x;  // the image's channels of the block's group: (D, H, W, depth), strides below, channels adjacent
  int64_t x_strides[3];  // D, H, W
  const float* weight;   // (kernel D, H, W, weight_step)
  int64_t weight_step;   // floats of one tap
  int64_t depth;
  int64_t out[3];  // position of the first output: D, H, W
  int64_t length;  // outputs along W
};

// line: (length, Loop::kChannels). shape: a ConvTransposeForwardParams.
template <typename Loop, typename Shape>
void compute_line(const Shape& shape, const Line& task, float* line) {
  const auto taps_along = [&](int axis, int64_t out) {
    return taps_of(out, shape.kernel[axis], shape.stride[axis], shape.padding[axis], shape.dilation[axis]);
  };
  const int64_t stride = shape.stride[2];
  const Taps depths = taps_along(0, task.out[0]);
  const Taps rows = taps_along(1, task.out[1]);
  for (int64_t phase = 0; phase < std::min(stride, task.length); ++phase) {
    const int64_t outputs = (task.length - phase + stride - 1) / stride;
    const Taps columns = taps_along(2, task.out[2] + phase);
    for (int64_t at = 0; at < outputs; at += kPositions) {
      const int64_t positions = std::min(kPositions, outputs - at);
      float sums[kPositions * Loop::kWidth] = {};
      for (int64_t i = 0; i < depths.count; ++i) {
        const int64_t d = depths.index - i * depths.index_step;
        if (d < 0 || d >= shape.in_size[0]) {
          continue;
        }
        for (int64_t j = 0; j < rows.count; ++j) {
          const int64_t h = rows.index - j * rows.index_step;
          if (h < 0 || h >= shape.in_size[1]) {
            continue;
          }
          const int64_t plane = (depths.tap + i * depths.tap_step) * shape.kernel[1] + rows.tap + j * rows.tap_step;
          const float* weight = task.weight + plane * shape.kernel[2] * task.weight_step;
          const float* x = task.x + d * task.x_strides[0] + h * task.x_strides[1];
          for (int64_t k = 0; k < columns.count; ++k) {
            const int64_t w = columns.index - k * columns.index_step + at;  // input of the first position
            const int64_t first = std::max<int64_t>(0, -w);
            const int64_t last = std::min(positions, shape.in_size[2] - w);
            if (first < last) {
              add_tap<Loop>(last - first, sums + first * Loop::kWidth, x + (w + first) * task.x_strides[2],
                            task.x_strides[2], weight + (columns.tap + k * columns.tap_step) * task.weight_step,
                            task.depth);
            }
          }
        }
      }
      for (int64_t r = 0; r < positions; ++r) {
        Loop::finish(sums + r * Loop::kWidth, line + (phase + (at + r) * stride) * Loop::kChannels);
      }
    }
  }
}

}  // namespace gpt4fast::cpu
