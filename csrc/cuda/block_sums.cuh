#pragma once

// Sums over a block's threads and over parts that blocks left in memory, always in one order: the same bits each time.
// Statistics are counts, means and sums of squared deviations from them ("spreads"), which unlike sums of squares do
// not cancel out far from zero.

#include <tuple>

#include "../activation.h"
#include "launch.h"

namespace gpt4fast {

struct Statistics {
  float count, mean, spread;
};

// Those of both groups of numbers (Chan, Golub and LeVeque, 1983).
__device__ __forceinline__ Statistics merge(const Statistics& a, const Statistics& b) {
  const float count = a.count + b.count, share = b.count / fmaxf(count, 1.0f), deviation = b.mean - a.mean;
  return {count, a.mean + deviation * share, a.spread + b.spread + deviation * deviation * a.count * share};
}

// Sums of differences from the first of some numbers, and of their squares: these cancel out no further than the square
// of that number's own deviation, which is part of the spread.
struct DifferenceSums {
  float first, sum, squares;

  __device__ __forceinline__ void add(float x) {
    const float difference = x - first;
    sum += difference;
    squares += difference * difference;
  }

  __device__ __forceinline__ Statistics statistics(float count) const {
    const float mean = sum / fmaxf(count, 1.0f);
    return {count, first + mean, squares - sum * mean};
  }
};

// Of a thread's value and those of the threads a multiple of `lanes` behind: threads before `lanes` get the result.
// Both numbers of threads are powers of two.
template <int kThreads, typename T, typename Merge>
__device__ __forceinline__ T merge_threads(T (&shared)[kThreads], const T& value, int lanes, const Merge& merge) {
  const int thread = threadIdx.x;
  shared[thread] = value;
  __syncthreads();
  for (int step = kThreads / 2; step >= lanes; step /= 2) {
    if (thread < step) {
      shared[thread] = merge(shared[thread], shared[thread + step]);
    }
    __syncthreads();
  }
  return shared[thread];
}

// Mean, 1 / sqrt(variance + eps) and biased variance of the numbers whose parts (3, channels, number) these are:
// counts, means and spreads.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> merge_statistics(
    const Device& device, const torch::stable::Tensor& parts, double eps);

// out = activation(factor * (sum of parts + bias) + shift), element i in the order of parts being one of channel i /
// inner % channels. What is null is 0, or as a factor 1.
struct SumLaunch {
  const float* parts;  // (number, columns, rows)
  void* out;           // (rows, columns), of dtype
  torch::headeronly::ScalarType dtype;
  int64_t number, rows, columns;
  const float *bias = nullptr, *factor = nullptr, *shift = nullptr;  // (channels)
  int64_t channels = 1, inner = 1;
  Activation activation = Activation::none;
  float negative_slope = 0.0f;
};

void sum_parts(const Device& device, const SumLaunch& p);

}  // namespace gpt4fast
