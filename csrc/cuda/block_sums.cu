// Adds up what blocks left in memory.
#include "cuda/block_sums.cuh"

#include "common/activation.h"
#include "common/dtypes.h"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMergeThreads = 128, kSumThreads = 256;

struct MergeLaunch {
  const float* parts;             // (3, channels, number): counts, means and spreads
  float *mean, *rstd, *variance;  // (channels)
  int64_t channels, number;
  float eps;
};

// A block for each channel.
__global__ void __launch_bounds__(kMergeThreads) merge_statistics_kernel(const MergeLaunch p) {
  struct Shared {
    Statistics rows[kMergeThreads];
  };
  Shared& shared = shared_memory<Shared>();
  const int64_t channel = blockIdx.x, each = p.channels * p.number;
  Statistics all{};
#pragma unroll 1  // more divisions at once than that spill a register
  for (int64_t part = threadIdx.x; part < p.number; part += kMergeThreads) {
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

// A block for `lanes` sums: each of its other threads adds up some of their parts.
__global__ void __launch_bounds__(kSumThreads) sum_parts_kernel(const SumLaunch p, int lanes) {
  struct Shared {
    float rows[kSumThreads];
  };
  Shared& shared = shared_memory<Shared>();
  const int thread = threadIdx.x;
  const int64_t count = p.rows * p.columns, index = blockIdx.x * int64_t{lanes} + thread % lanes;
  float sum = 0.0f;
  if (index < count) {
#pragma unroll 8  // so that as many are on their way
    for (int64_t part = thread / lanes; part < p.number; part += kSumThreads / lanes) {
      sum += p.parts[part * count + index];
    }
  }
  sum = merge_threads(shared.rows, sum, lanes, [](float a, float b) { return a + b; });
  if (thread >= lanes || index >= count) {
    return;
  }
  const int64_t channel = index / p.inner % p.channels;
  const float factor = p.factor ? p.factor[channel] : 1.0f;
  const float offset = (p.bias ? factor * p.bias[channel] : 0.0f) + (p.shift ? p.shift[channel] : 0.0f);
  ACTIVATION_SWITCH(p.activation, kActivation,
                    [&] { sum = activate<kActivation>(sum * factor + offset, p.negative_slope); });
  const int64_t place = index % p.rows * p.columns + index / p.rows;
  switch (p.dtype) {  // memory is the limit
    case ScalarType::Half: static_cast<torch::headeronly::Half*>(p.out)[place] = sum; break;
    case ScalarType::BFloat16: static_cast<torch::headeronly::BFloat16*>(p.out)[place] = sum; break;
    default: static_cast<float*>(p.out)[place] = sum;
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> merge_statistics(const Device& device, const Tensor& parts, double eps) {
  const int64_t channels = parts.size(1);
  const auto vector = [&] { return device.fresh(torch::stable::new_empty(parts, {channels})); };
  const Tensor mean = vector(), rstd = vector(), variance = vector();
  const MergeLaunch p{parts.const_data_ptr<float>(),
                      mean.mutable_data_ptr<float>(),
                      rstd.mutable_data_ptr<float>(),
                      variance.mutable_data_ptr<float>(),
                      channels,
                      parts.size(2),
                      static_cast<float>(eps)};
  device.launch(merge_statistics_kernel, channels, kMergeThreads, kMergeThreads * sizeof(Statistics), p);
  return {mean, rstd, variance};
}

void sum_parts(const Device& device, const SumLaunch& p) {
  const int64_t count = p.rows * p.columns;
  int lanes = 32;
  while (lanes < kSumThreads && ceil_div(count, lanes) > 8 * device.processors()) {
    lanes *= 2;  // as many blocks as there is room for, if so many sums are there
  }
  device.launch(sum_parts_kernel, ceil_div(count, lanes), kSumThreads, kSumThreads * sizeof(float), p, lanes);
}

}  // namespace gpt4fast
