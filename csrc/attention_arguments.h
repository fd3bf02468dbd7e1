#pragma once

// The arguments of the attention operators, checked and turned into parameters for a kernel, on any device: the values
// of indices where they are on the CPU.

#include <algorithm>
#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "attention.h"
#include "common/checks.h"
#include "common/tensors.h"

namespace gpt4fast {

inline constexpr int64_t kFarthest = int64_t{1} << 60;  // sums of two positions stay below 2^63

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

// A contiguous int64 tensor (rows), or null.
inline const int64_t* index_data(const std::optional<torch::stable::Tensor>& index, const char* name, int64_t rows,
                                 const torch::stable::Tensor& beside) {
  if (!index) {
    return nullptr;
  }
  STD_TORCH_CHECK(index->device() == beside.device(), "expected ", name, " to be on the device of query");
  STD_TORCH_CHECK(index->scalar_type() == torch::headeronly::ScalarType::Long, "expected ", name,
                  " to be int64, but its dtype is ", name_of(index->scalar_type()));
  STD_TORCH_CHECK(index->dim() == 1 && index->size(0) == rows && index->is_contiguous(), "expected ", name,
                  " to be contiguous of shape (", rows, "), but its shape is ", shape_of(*index));
  return index->const_data_ptr<int64_t>();
}

inline MaskKind mask_kind_of(const std::optional<torch::stable::Tensor>& mask) {
  if (!mask) {
    return MaskKind::none;
  }
  switch (mask->scalar_type()) {
    case torch::headeronly::ScalarType::Bool: return MaskKind::boolean;
    case torch::headeronly::ScalarType::Float: return MaskKind::float32;
    case torch::headeronly::ScalarType::BFloat16: return MaskKind::bfloat16;
    case torch::headeronly::ScalarType::Half: return MaskKind::float16;
    default:
      STD_TORCH_CHECK(false, "expected attn_mask to be bool, float32, bfloat16 or float16, but its dtype is ",
                      name_of(mask->scalar_type()));
  }
}

inline void set_mask(const std::optional<torch::stable::Tensor>& mask, const torch::stable::Tensor& query,
                     AttentionParams& p) {
  p.mask_kind = mask_kind_of(mask);
  if (!mask) {
    return;
  }
  STD_TORCH_CHECK(mask->device() == query.device(), "expected attn_mask to be on the device of query");
  STD_TORCH_CHECK(!p.cu_seqlens_q, "expected no attn_mask with cu_seqlens");
  const int64_t full[4] = {p.batch, p.query_heads, p.query_length, p.kv_length};
  bool fits = mask->dim() == 4;
  for (int64_t axis = 0; fits && axis < 4; ++axis) {
    fits = mask->size(axis) == full[axis] || mask->size(axis) == 1;
    p.mask_strides[axis] = mask->size(axis) == 1 ? 0 : mask->stride(axis);
  }
  STD_TORCH_CHECK(fits, "expected attn_mask to have shape (", full[0], ", ", full[1], ", ", full[2], ", ", full[3],
                  ") or 1 in places, but its shape is ", shape_of(*mask));
  p.mask = mask->const_data_ptr();
}

inline void set_sequences(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                          const AttentionSettings& settings, AttentionParams& p) {
  p.batch = query.size(0);
  STD_TORCH_CHECK(settings.cu_seqlens_q.has_value() == settings.cu_seqlens_k.has_value(),
                  "expected cu_seqlens_q and cu_seqlens_k both, or none");
  if (!settings.cu_seqlens_q) {
    return;
  }
  CHECK_SIZE(query, 0, 1);
  const int64_t points = settings.cu_seqlens_q->numel();
  STD_TORCH_CHECK(points > 0, "expected cu_seqlens_q to have at least one element");
  p.batch = points - 1;
  p.cu_seqlens_q = index_data(settings.cu_seqlens_q, "cu_seqlens_q", points, query);
  p.cu_seqlens_k = index_data(settings.cu_seqlens_k, "cu_seqlens_k", points, query);
  const auto check = [&](const int64_t* bounds, const char* name, int64_t total) {
    bool ordered = bounds[0] >= 0 && bounds[points - 1] <= total;
    for (int64_t i = 1; i < points; ++i) {
      ordered = ordered && bounds[i - 1] <= bounds[i];
    }
    STD_TORCH_CHECK(ordered, "expected ", name, " never to decrease and to lie in [0, ", total, "]");
  };
  if (!query.is_cpu()) {
    return;  // the values are on the device
  }
  check(p.cu_seqlens_q, "cu_seqlens_q", query.size(2));
  check(p.cu_seqlens_k, "cu_seqlens_k", key.size(2));
}

inline void check_positions(const int64_t* positions, const char* name, int64_t rows) {
  for (int64_t i = 0; positions && i < rows; ++i) {
    STD_TORCH_CHECK(-kFarthest <= positions[i] && positions[i] <= kFarthest, "expected ", name,
                    " to be at most 2^60, but it is ", positions[i]);
  }
}

// Throws std::runtime_error where an argument would make a kernel leave its memory.
inline void set_attention_params(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                                 const torch::stable::Tensor& value, const AttentionSettings& settings,
                                 AttentionParams& p) {
  for (const torch::stable::Tensor* tensor : {&key, &value}) {
    STD_TORCH_CHECK(tensor->device() == query.device(), "expected key and value to be on the device of query");
  }
  CHECK_DIM(query, 4);
  CHECK_DIM(key, 4);
  CHECK_DIM(value, 4);
  CHECK_DTYPE(key, query.scalar_type());
  CHECK_DTYPE(value, query.scalar_type());
  STD_TORCH_CHECK(query.scalar_type() != torch::headeronly::ScalarType::Char,
                  "expected query to be float32, bfloat16 or float16, but its dtype is int8");
  p.dtype = element_type_of(query, "query");
  p.query_heads = query.size(1);
  p.query_length = query.size(2);
  p.head_dim = query.size(3);
  p.kv_heads = key.size(1);
  p.kv_length = key.size(2);
  p.value_dim = value.size(3);
  CHECK_SIZE(key, 0, query.size(0));
  CHECK_SIZE(key, 3, p.head_dim);
  CHECK_SIZE(value, 0, query.size(0));
  CHECK_SIZE(value, 1, p.kv_heads);
  CHECK_SIZE(value, 2, p.kv_length);
  STD_TORCH_CHECK(p.kv_heads > 0 ? p.query_heads % p.kv_heads == 0 : p.query_heads == 0,
                  "expected the heads of query to be a multiple of those of key, but they are ", p.query_heads, " and ",
                  p.kv_heads);
  STD_TORCH_CHECK(p.head_dim < kFarthest >> 20 && p.value_dim < kFarthest >> 20,
                  "expected the last dimension of query and value to be less than 2^40, but their shapes are ",
                  shape_of(query), " and ", shape_of(value));
  set_sequences(query, key, settings, p);
  set_mask(settings.attn_mask, query, p);

  STD_TORCH_CHECK(-kFarthest <= settings.query_offset && settings.query_offset <= kFarthest,
                  "expected query_offset to be at most 2^60, but it is ", settings.query_offset);
  STD_TORCH_CHECK(settings.window_left >= -1, "expected window_left to be at least -1, but it is ",
                  settings.window_left);
  STD_TORCH_CHECK(settings.window_right >= -1, "expected window_right to be at least -1, but it is ",
                  settings.window_right);
  p.query_offsets = index_data(settings.query_offsets, "query_offsets", p.batch, query);
  if (query.is_cpu()) {
    check_positions(p.query_offsets, "query_offsets", p.batch);
  }
  p.kv_lengths = index_data(settings.kv_lengths, "kv_lengths", p.batch, query);
  p.kv_starts = index_data(settings.kv_starts, "kv_starts", p.batch, query);
  if (settings.alibi_slopes) {
    const torch::stable::Tensor& alibi_slopes = *settings.alibi_slopes;
    STD_TORCH_CHECK(alibi_slopes.device() == query.device(), "expected alibi_slopes to be on the device of query");
    CHECK_DTYPE(alibi_slopes, torch::headeronly::ScalarType::Float);
    STD_TORCH_CHECK(alibi_slopes.dim() == 2 && alibi_slopes.size(0) == p.batch && alibi_slopes.size(1) == p.query_heads,
                    "expected alibi_slopes to be expanded to shape (", p.batch, ", ", p.query_heads,
                    "), but its shape is ", shape_of(alibi_slopes));
    p.alibi_slopes = alibi_slopes.const_data_ptr<float>();
    copy_strides(alibi_slopes, p.alibi_strides);
  }
  STD_TORCH_CHECK(settings.dropout_p >= 0 && settings.dropout_p <= 1, "expected dropout_p in [0, 1], but it is ",
                  settings.dropout_p);
  p.dropout_p = settings.dropout_p;
  if (settings.dropout_p > 0 && query.is_cpu()) {
    STD_TORCH_CHECK(settings.dropout_seed.has_value(), "expected dropout_seed with dropout_p");
    p.dropout_seed = static_cast<uint64_t>(*index_data(settings.dropout_seed, "dropout_seed", 1, query));
  }
  copy_strides(query, p.query_strides);
  copy_strides(key, p.key_strides);
  copy_strides(value, p.value_strides);
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.is_causal = settings.is_causal;
  p.scale = static_cast<float>(settings.scale);
  p.softcap = static_cast<float>(settings.softcap);
  p.query_offset = settings.query_offset;
  p.window_left = std::min(settings.window_left, 2 * kFarthest);
  p.window_right = std::min(settings.window_right, 2 * kFarthest);
}

}  // namespace gpt4fast
