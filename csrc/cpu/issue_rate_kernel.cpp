// As many multiply-adds as the processor issues, without memory: the ceiling that benchmarks measure kernels against.
// Compiled once per CPU level.
#include "issue_rate.h"

#include "tile_product.h"

namespace gpt4fast::cpu::GPT4FAST_LEVEL {
namespace {

template <typename T>
int64_t loop(int64_t steps) {
  constexpr int kChains = 12;  // enough to hide a latency of six cycles at two instructions a cycle
  T ones[kLanes * Product<T>::kDepth] = {};
  const auto factor = Product<T>::load(ones);
  Vector sums[kChains] = {};
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = Product<T>::add(factor, factor, sums[i]);
#if defined(__x86_64__)
      __asm__ volatile("" : "+v"(sums[i]));  // or the compiler would foresee the result
#else
      __asm__ volatile("" : "+w"(sums[i]));
#endif
    }
  }
  return steps * kChains * kLanes * Product<T>::kDepth * 2;
}

}  // namespace

extern const IssueRateKernel issue_rate_kernel = {
    loop<float>,
    loop<Compute<BFloat16>>,
};

}  // namespace gpt4fast::cpu::GPT4FAST_LEVEL
