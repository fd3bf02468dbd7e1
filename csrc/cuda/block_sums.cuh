#pragma once

// Sums over a block's threads and over parts that blocks left in memory, always in one order: the same bits each time.
// Statistics are counts, means and sums of squared deviations from them ("spreads"), which unlike sums of squares do
// not cancel out far from zero.

#include <tuple>

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

inline constexpr int kMergeThreads = 128;

struct MergeLaunch {
  const float* parts;             // (3, channels, number): counts, means and spreads
  float *mean, *rstd, *variance;  // (channels)
  int64_t channels, number;
  float eps;
};

// A block for each channel.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) merge_statistics_kernel(const MergeLaunch p) {
  struct Shared {
    Statistics rows[kThreads];
  };
  Shared& shared = shared_memory<Shared>();
  const int64_t channel = blockIdx.x, each = p.channels * p.number;
  Statistics all{};
#pragma unroll 1  // more divisions at once than that spill a register
  for (int64_t part = threadIdx.x; part < p.number; part += kThreads) {
    const float* numbers = p.parts + channel * p.number + part;
    all = merge(all, {numbers[0], numbers[each], numbers[2 * each]});
  }
  const auto pair = [](const Statistics& a, const Statistics& b) { return merge(a, b); };
  all = merge_threads(shared.rows, all, 1, pair);
  if (threadIdx.x == 0) {
    const float variance = all.spread / all.count;
    p.mean[channel] = all.mean;
    p.variance[channel] = variance;
    p.rstd[channel] = 1.0f / sqrtf(variance + p.eps);
  }
}

// Mean, 1 / sqrt(variance + eps) and biased variance of the numbers whose parts (3, channels, number) these are.
inline std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> merge_statistics(
    const Device& device, const torch::stable::Tensor& parts, double eps) {
  const int64_t channels = parts.size(1);
  const auto vector = [&] { return device.fresh(torch::stable::new_empty(parts, {channels})); };
  const torch::stable::Tensor mean = vector(), rstd = vector(), variance = vector();
  const MergeLaunch p{parts.const_data_ptr<float>(),
                      mean.mutable_data_ptr<float>(),
                      rstd.mutable_data_ptr<float>(),
                      variance.mutable_data_ptr<float>(),
                      channels,
                      parts.size(2),
                      static_cast<float>(eps)};
  device.launch(merge_statistics_kernel<kMergeThreads>, channels, kMergeThreads, kMergeThreads * sizeof(Statistics), p);
  return {mean, rstd, variance};
}

struct SumLaunch {
  const float* parts;  // (number, columns, rows)
  void* out;           // (rows, columns)
  int64_t number, rows, columns;
};

inline constexpr int kSumThreads = 256, kSumLanes = 32;

// A block for 32 sums: 8 threads each, so that as many parts are on their way.
template <typename scalar_t>
__global__ void __launch_bounds__(kSumThreads) sum_parts_kernel(const SumLaunch p) {
  struct Shared {
    float rows[kSumThreads];
  };
  Shared& shared = shared_memory<Shared>();
  const int64_t count = p.rows * p.columns, index = blockIdx.x * int64_t{kSumLanes} + threadIdx.x % kSumLanes;
  float sum = 0.0f;
  if (index < count) {
#pragma unroll 8
    for (int64_t part = threadIdx.x / kSumLanes; part < p.number; part += kSumThreads / kSumLanes) {
      sum += p.parts[part * count + index];
    }
  }
  sum = merge_threads(shared.rows, sum, kSumLanes, [](float a, float b) { return a + b; });
  if (threadIdx.x < kSumLanes && index < count) {
    static_cast<scalar_t*>(p.out)[index % p.rows * p.columns + index / p.rows] = static_cast<scalar_t>(sum);
  }
}

template <typename scalar_t>
void sum_parts(const Device& device, const SumLaunch& p) {
  device.launch(sum_parts_kernel<scalar_t>, ceil_div(p.rows * p.columns, kSumLanes), kSumThreads,
                kSumThreads * sizeof(float), p);
}

}  // namespace gpt4fast
