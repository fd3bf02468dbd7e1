#pragma once

// What the attention operators have in common: their arguments, checked and turned into parameters for a kernel.

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "../attention.h"
#include "../common/tensors.h"

namespace gpt4fast::cpu {

// The arguments of attention_forward and attention_backward after the tensors, in the order of the schema.
struct AttentionSettings {
  const std::optional<torch::stable::Tensor>& attn_mask;
  double dropout_p;
  const std::optional<torch::stable::Tensor>& dropout_seed;
  bool is_causal;
  double scale;
  int64_t query_offset;
  const std::optional<torch::stable::Tensor>& query_offsets;
  const std::optional<torch::stable::Tensor>& kv_lengths;
  const std::optional<torch::stable::Tensor>& kv_starts;
  int64_t window_left;
  int64_t window_right;
  double softcap;
  const std::optional<torch::stable::Tensor>& alibi_slopes;
  const std::optional<torch::stable::Tensor>& cu_seqlens_q;
  const std::optional<torch::stable::Tensor>& cu_seqlens_k;
};

// Throws std::runtime_error where an argument would make a kernel leave its memory.
void set_attention_params(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                          const torch::stable::Tensor& value, const AttentionSettings& settings, AttentionParams& p);

// A contiguous int64 tensor (rows), or null.
const int64_t* index_data(const std::optional<torch::stable::Tensor>& index, const char* name, int64_t rows);

// An uninitialised result of attention, (batch, heads, queries, value_dim): heads_first in memory, or queries first, so
// that a model needs no copy to merge its heads.
torch::stable::Tensor empty_result(const torch::stable::Tensor& query, int64_t value_dim, bool heads_first);

}  // namespace gpt4fast::cpu
