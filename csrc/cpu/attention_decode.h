#pragma once

#include <torch/csrc/stable/tensor.h>

#include "../attention.h"

namespace gpt4fast::cpu {

// Runs the decoding kernel, which is made for few query rows: parameters without mask, dropout and cu_seqlens. Scratch
// memory is allocated like `query`.
void run_attention_decode(const AttentionDecodeParams& p, const torch::stable::Tensor& query);

}  // namespace gpt4fast::cpu
