#pragma once

#include "../attention_arguments.h"
#include "../common/empty.h"

namespace gpt4fast::cpu {

// An uninitialised result of attention, (batch, heads, queries, value_dim): heads_first in memory, or queries first, so
// that a model needs no copy to merge its heads.
inline torch::stable::Tensor empty_result(const torch::stable::Tensor& query, int64_t value_dim, bool heads_first) {
  const std::array<int64_t, 4> sizes = {query.size(0), query.size(1), query.size(2), value_dim};
  return heads_first ? empty_on_cpu(sizes, query.scalar_type())
                     : empty_on_cpu(sizes, query.scalar_type(), {0, 2, 1, 3});
}

}  // namespace gpt4fast::cpu
