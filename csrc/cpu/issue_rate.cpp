// The operator gpt4fast::issue_rate_loop: work for benchmarks to time.
#include "issue_rate.h"

#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu_level.h"
#include "threads.h"

namespace gpt4fast::cpu {

GPT4FAST_KERNEL_OF_LEVELS(IssueRateKernel, issue_rate_kernel)

namespace {

int64_t issue_rate_loop(bool bfloat16, int64_t steps) {
  const IssueRateKernel& kernel = active_issue_rate_kernel();
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  std::vector<int64_t> operations(static_cast<size_t>(threads));
  run_on_threads(threads, [&](int64_t thread) {
    operations[static_cast<size_t>(thread)] = (bfloat16 ? kernel.bfloat16 : kernel.float32)(steps);
  });
  int64_t total = 0;
  for (const int64_t count : operations) {
    total += count;
  }
  return total;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CompositeExplicitAutograd, m) {
  m.impl("issue_rate_loop", TORCH_BOX(&issue_rate_loop));
}

}  // namespace gpt4fast::cpu
