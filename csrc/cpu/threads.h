#pragma once

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace gpt4fast::cpu {

// Threads worth waking for this many multiplications: one for each ten microseconds.
inline int64_t threads_for(double multiplications) {
  const auto worth = static_cast<int64_t>(std::min(multiplications / 65536.0, 1e6));
  return std::clamp<int64_t>(worth, 1, torch::stable::get_num_threads());
}

// Calls use(thread) for each of so many threads, on torch's.
template <typename Use>
void run_on_threads(int64_t threads, const Use& use) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      use(thread);
    }
  });
}

}  // namespace gpt4fast::cpu
