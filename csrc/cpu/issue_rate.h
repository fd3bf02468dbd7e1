#pragma once

#include <cstdint>

namespace gpt4fast::cpu {

// Run so many steps of independent multiply-adds and return the number of operations; of bfloat16 in the type that it
// is multiplied as at this level.
struct IssueRateKernel {
  int64_t (*float32)(int64_t steps);
  int64_t (*bfloat16)(int64_t steps);
};

}  // namespace gpt4fast::cpu
