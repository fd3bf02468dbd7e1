#pragma once

// The arguments of gpt4fast::attention_decode, checked and turned into parameters: all but what the values of indices
// decide, which lie on the device.

#include <algorithm>
#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

#include "attention.h"
#include "common/tensors.h"

namespace gpt4fast {

struct AttentionDecodeArguments {
  const torch::stable::Tensor& query;
  const torch::stable::Tensor& key_cache;
  const torch::stable::Tensor& value_cache;
  const torch::stable::Tensor& kv_lengths;
  const std::optional<torch::stable::Tensor>& key;
  const std::optional<torch::stable::Tensor>& value;
  const std::optional<torch::stable::Tensor>& block_table;
  const std::optional<torch::stable::Tensor>& cos;
  const std::optional<torch::stable::Tensor>& sin;
  bool rotary_interleaved;
  const std::optional<torch::stable::Tensor>& key_scales;
  const std::optional<torch::stable::Tensor>& value_scales;
  double scale;
  const std::optional<torch::stable::Tensor>& kv_starts;
  int64_t window_left;
  int64_t window_right;
  double softcap;
  const std::optional<torch::stable::Tensor>& alibi_slopes;
};

// Whether a cache has a scale for each row.
inline bool is_scaled(ElementType cache_dtype) {
  return cache_dtype == ElementType::int8 || cache_dtype == ElementType::float8_e4m3fn;
}

inline void set_caches(const AttentionDecodeArguments& a, AttentionDecodeParams& p) {
  using torch::headeronly::ScalarType;
  const auto &query = a.query, &key_cache = a.key_cache, &value_cache = a.value_cache;
  CHECK_DIM(query, 4);
  CHECK_DIM(key_cache, 4);
  CHECK_DIM(value_cache, 4);
  p.dtype = element_type_of(query, "query");
  STD_TORCH_CHECK(p.dtype != ElementType::int8, "expected query to be float32, bfloat16 or float16, but it is int8");
  p.cache_dtype = key_cache.scalar_type() == ScalarType::Float8_e4m3fn ? ElementType::float8_e4m3fn
                                                                       : element_type_of(key_cache, "key_cache");
  p.batch = query.size(0);
  p.query_heads = query.size(1);
  p.query_length = query.size(2);
  p.head_dim = query.size(3);
  p.kv_heads = key_cache.size(1);
  p.block_size = key_cache.size(2);
  p.value_dim = value_cache.size(3);
  const ScalarType dtype = is_scaled(p.cache_dtype) ? key_cache.scalar_type() : query.scalar_type();
  const int64_t blocks = a.block_table ? key_cache.size(0) : p.batch;
  check_tensor(key_cache, "key_cache", {blocks, p.kv_heads, p.block_size, p.head_dim}, dtype, query);
  check_tensor(value_cache, "value_cache", {blocks, p.kv_heads, p.block_size, p.value_dim}, dtype, query);
  STD_TORCH_CHECK(p.kv_heads > 0 ? p.query_heads > 0 && p.query_heads % p.kv_heads == 0 : p.query_heads == 0,
                  "expected the heads of query to be a multiple of those of key_cache, but they are ", p.query_heads,
                  " and ", p.kv_heads);
  p.blocks_per_row = 1;
  if (a.block_table) {
    const auto& block_table = *a.block_table;
    CHECK_DIM(block_table, 2);
    p.blocks_per_row = block_table.size(1);
    check_tensor(block_table, "block_table", {p.batch, p.blocks_per_row}, ScalarType::Long, query);
    STD_TORCH_CHECK(block_table.is_contiguous(), "expected block_table to be contiguous");
    p.block_table = block_table.const_data_ptr<int64_t>();
  }
  p.kv_length = p.block_size * p.blocks_per_row;
  copy_strides(query, p.query_strides);
  copy_strides(key_cache, p.key_strides);
  copy_strides(value_cache, p.value_strides);
  p.query = query.const_data_ptr();
  p.key = key_cache.const_data_ptr();
  p.value = value_cache.const_data_ptr();
}

inline void set_scales(const AttentionDecodeArguments& a, AttentionDecodeParams& p) {
  const auto set = [&](const std::optional<torch::stable::Tensor>& scales, const char* name, float*& data,
                       int64_t (&strides)[3]) {
    STD_TORCH_CHECK(scales.has_value() == is_scaled(p.cache_dtype), "expected ", name,
                    " with int8 and float8_e4m3fn caches, and only with them");
    if (scales) {
      check_tensor(*scales, name, {a.key_cache.size(0), p.kv_heads, p.block_size}, torch::headeronly::ScalarType::Float,
                   a.query);
      data = static_cast<float*>(scales->mutable_data_ptr());
      copy_strides(*scales, strides);
    }
  };
  set(a.key_scales, "key_scales", p.key_scales, p.key_scale_strides);
  set(a.value_scales, "value_scales", p.value_scales, p.value_scale_strides);
}

inline void set_new_tokens(const AttentionDecodeArguments& a, AttentionDecodeParams& p) {
  STD_TORCH_CHECK(a.key.has_value() == a.value.has_value(), "expected key and value both, or none");
  if (!a.key) {
    return;
  }
  const auto dtype = a.query.scalar_type();
  check_tensor(*a.key, "key", {p.batch, p.kv_heads, p.query_length, p.head_dim}, dtype, a.query);
  check_tensor(*a.value, "value", {p.batch, p.kv_heads, p.query_length, p.value_dim}, dtype, a.query);
  p.appends = true;
  p.new_key = a.key->const_data_ptr();
  p.new_value = a.value->const_data_ptr();
  copy_strides(*a.key, p.new_key_strides);
  copy_strides(*a.value, p.new_value_strides);
  p.key_cache = a.key_cache.mutable_data_ptr();
  p.value_cache = a.value_cache.mutable_data_ptr();
}

inline void set_rotary(const AttentionDecodeArguments& a, AttentionDecodeParams& p) {
  STD_TORCH_CHECK(a.cos.has_value() == a.sin.has_value(), "expected cos and sin both, or none");
  if (!a.cos) {
    return;
  }
  const auto &cos = *a.cos, &sin = *a.sin;
  CHECK_DIM(cos, 2);
  const int64_t positions = cos.size(0), half = cos.size(1);
  STD_TORCH_CHECK(2 * half <= p.head_dim, "expected cos to have at most ", p.head_dim / 2,
                  " columns, but its shape is ", shape_of(cos));
  check_tensor(cos, "cos", {positions, half}, torch::headeronly::ScalarType::Float, a.query);
  check_tensor(sin, "sin", {positions, half}, torch::headeronly::ScalarType::Float, a.query);
  STD_TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous(), "expected cos and sin to be contiguous");
  p.cos = cos.const_data_ptr<float>();
  p.sin = sin.const_data_ptr<float>();
  p.rotary_positions = positions;
  p.rotary_dim = 2 * half;
  p.rotary_interleaved = a.rotary_interleaved;
}

// All fields but query_offsets, kv_lengths, out and lse.
inline AttentionDecodeParams attention_decode_params(const AttentionDecodeArguments& a) {
  using torch::headeronly::ScalarType;
  AttentionDecodeParams p{};
  set_caches(a, p);
  set_scales(a, p);
  set_new_tokens(a, p);
  set_rotary(a, p);
  const auto check_index = [&](const torch::stable::Tensor& index, const char* name) {
    check_tensor(index, name, {p.batch}, ScalarType::Long, a.query);
    STD_TORCH_CHECK(index.is_contiguous(), "expected ", name, " to be contiguous");
  };
  check_index(a.kv_lengths, "kv_lengths");
  if (a.kv_starts) {
    check_index(*a.kv_starts, "kv_starts");
    p.kv_starts = a.kv_starts->const_data_ptr<int64_t>();
  }
  STD_TORCH_CHECK(a.window_left >= -1, "expected window_left to be at least -1, but it is ", a.window_left);
  STD_TORCH_CHECK(a.window_right >= -1, "expected window_right to be at least -1, but it is ", a.window_right);
  p.window_left = std::min(a.window_left, p.kv_length);
  p.window_right = std::min(a.window_right, p.kv_length);
  if (a.alibi_slopes) {
    check_tensor(*a.alibi_slopes, "alibi_slopes", {p.batch, p.query_heads}, ScalarType::Float, a.query);
    p.alibi_slopes = a.alibi_slopes->const_data_ptr<float>();
    copy_strides(*a.alibi_slopes, p.alibi_strides);
  }
  p.is_causal = true;
  p.scale = static_cast<float>(a.scale);
  p.softcap = static_cast<float>(a.softcap);
  return p;
}

}  // namespace gpt4fast
