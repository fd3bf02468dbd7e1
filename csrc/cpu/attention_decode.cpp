// The operator gpt4fast::attention_decode on a CPU.
#include "attention_decode.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/checks.h"
#include "../common/empty.h"
#include "attention_arguments.h"
#include "cpu_level.h"
#include "threads.h"

namespace gpt4fast::cpu {

GPT4FAST_KERNEL_OF_LEVELS(AttentionDecodeKernel, attention_decode_kernel)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) {
    fits = fits && tensor.size(axis++) == size;
  }
  if (!fits) {
    std::ostringstream expected;
    for (const int64_t size : shape) {
      expected << (expected.tellp() > 0 ? ", " : "") << size;
    }
    STD_TORCH_CHECK(false, "expected ", name, " to have shape (", expected.str(), "), but its shape is ",
                    shape_of(tensor));
  }
  STD_TORCH_CHECK(tensor.is_cpu(), "expected ", name, " to be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "expected ", name, " to be ", name_of(dtype), ", but its dtype is ",
                  name_of(tensor.scalar_type()));
}

void set_caches(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Optional& block_table,
                AttentionDecodeParams& p) {
  CHECK_CPU(query);
  CHECK_DIM(query, 4);
  CHECK_DIM(key_cache, 4);
  CHECK_DIM(value_cache, 4);
  p.dtype = element_type_of(query, "query");
  STD_TORCH_CHECK(p.dtype != ElementType::int8, "expected query to be float32, bfloat16 or float16, but it is int8");
  p.cache_dtype = element_type_of(key_cache, "key_cache");
  p.batch = query.size(0);
  p.query_heads = query.size(1);
  p.query_length = query.size(2);
  p.head_dim = query.size(3);
  p.kv_heads = key_cache.size(1);
  p.block_size = key_cache.size(2);
  p.value_dim = value_cache.size(3);
  const ScalarType dtype = p.cache_dtype == ElementType::int8 ? ScalarType::Char : query.scalar_type();
  const int64_t blocks = block_table ? key_cache.size(0) : p.batch;
  check_shape(key_cache, "key_cache", {blocks, p.kv_heads, p.block_size, p.head_dim}, dtype);
  check_shape(value_cache, "value_cache", {blocks, p.kv_heads, p.block_size, p.value_dim}, dtype);
  STD_TORCH_CHECK(p.kv_heads > 0 ? p.query_heads > 0 && p.query_heads % p.kv_heads == 0 : p.query_heads == 0,
                  "expected the heads of query to be a multiple of those of key_cache, but they are ", p.query_heads,
                  " and ", p.kv_heads);
  p.blocks_per_row = 1;
  if (block_table) {
    CHECK_DIM(*block_table, 2);
    p.blocks_per_row = block_table->size(1);
    check_shape(*block_table, "block_table", {p.batch, p.blocks_per_row}, ScalarType::Long);
    STD_TORCH_CHECK(block_table->is_contiguous(), "expected block_table to be contiguous");
    p.block_table = block_table->const_data_ptr<int64_t>();
  }
  p.kv_length = p.block_size * p.blocks_per_row;
  copy_strides(query, p.query_strides);
  copy_strides(key_cache, p.key_strides);
  copy_strides(value_cache, p.value_strides);
  p.query = query.const_data_ptr();
  p.key = key_cache.const_data_ptr();
  p.value = value_cache.const_data_ptr();
}

void set_scales(const Optional& key_scales, const Optional& value_scales, const Tensor& key_cache,
                AttentionDecodeParams& p) {
  const auto set = [&](const Optional& scales, const char* name, float*& data, int64_t (&strides)[3]) {
    STD_TORCH_CHECK(scales.has_value() == (p.cache_dtype == ElementType::int8), "expected ", name,
                    " with int8 caches, and only with them");
    if (scales) {
      check_shape(*scales, name, {key_cache.size(0), p.kv_heads, p.block_size}, ScalarType::Float);
      data = static_cast<float*>(scales->mutable_data_ptr());
      copy_strides(*scales, strides);
    }
  };
  set(key_scales, "key_scales", p.key_scales, p.key_scale_strides);
  set(value_scales, "value_scales", p.value_scales, p.value_scale_strides);
}

void set_new_tokens(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Optional& key,
                    const Optional& value, AttentionDecodeParams& p) {
  STD_TORCH_CHECK(key.has_value() == value.has_value(), "expected key and value both, or none");
  if (!key) {
    return;
  }
  check_shape(*key, "key", {p.batch, p.kv_heads, p.query_length, p.head_dim}, query.scalar_type());
  check_shape(*value, "value", {p.batch, p.kv_heads, p.query_length, p.value_dim}, query.scalar_type());
  p.appends = true;
  p.new_key = key->const_data_ptr();
  p.new_value = value->const_data_ptr();
  copy_strides(*key, p.new_key_strides);
  copy_strides(*value, p.new_value_strides);
  p.key_cache = key_cache.mutable_data_ptr();
  p.value_cache = value_cache.mutable_data_ptr();
}

// Where each row's queries begin, and where its keys end: (2, B).
std::vector<int64_t> positions_of(const int64_t* kv_lengths, const AttentionDecodeParams& p) {
  std::vector<int64_t> positions(static_cast<size_t>(2 * p.batch));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = kv_lengths[b];
    STD_TORCH_CHECK(0 <= length && length <= p.kv_length - (p.appends ? p.query_length : 0), "expected kv_lengths",
                    p.appends ? " and the new tokens" : "", " to fit the cache of ", p.kv_length,
                    " entries, but it is ", length);
    const int64_t end = p.appends ? length + p.query_length : length;
    positions[static_cast<size_t>(b)] = end - p.query_length;
    positions[static_cast<size_t>(p.batch + b)] = end;
  }
  return positions;
}

void check_block_table(const int64_t* ends, int64_t blocks, const AttentionDecodeParams& p) {
  for (int64_t b = 0; p.block_table && b < p.batch; ++b) {
    const int64_t* const row = p.block_table + b * p.blocks_per_row;
    for (int64_t i = 0; i * p.block_size < ends[b]; ++i) {
      STD_TORCH_CHECK(0 <= row[i] && row[i] < blocks, "expected block_table to be in [0, ", blocks, "), but it is ",
                      row[i]);
    }
  }
}

void set_rotary(const Optional& cos, const Optional& sin, bool interleaved, const int64_t* starts,
                AttentionDecodeParams& p) {
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "expected cos and sin both, or none");
  if (!cos) {
    return;
  }
  CHECK_DIM(*cos, 2);
  const int64_t positions = cos->size(0), half = cos->size(1);
  STD_TORCH_CHECK(2 * half <= p.head_dim, "expected cos to have at most ", p.head_dim / 2,
                  " columns, but its shape is ", shape_of(*cos));
  check_shape(*cos, "cos", {positions, half}, ScalarType::Float);
  check_shape(*sin, "sin", {positions, half}, ScalarType::Float);
  STD_TORCH_CHECK(cos->is_contiguous() && sin->is_contiguous(), "expected cos and sin to be contiguous");
  for (int64_t b = 0; b < p.batch; ++b) {
    STD_TORCH_CHECK(starts[b] >= 0 && starts[b] + p.query_length <= positions,
                    "expected kv_lengths to place the queries in the ", positions, " positions of cos, but they are [",
                    starts[b], ", ", starts[b] + p.query_length, ")");
  }
  p.cos = cos->const_data_ptr<float>();
  p.sin = sin->const_data_ptr<float>();
  p.rotary_dim = 2 * half;
  p.rotary_interleaved = interleaved;
}

std::tuple<Tensor, Tensor> decode(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                  const Tensor& kv_lengths, const Optional& key, const Optional& value,
                                  const Optional& block_table, const Optional& cos, const Optional& sin,
                                  bool rotary_interleaved, const Optional& key_scales, const Optional& value_scales,
                                  double scale, const Optional& kv_starts, int64_t window_left, int64_t window_right,
                                  double softcap, const Optional& alibi_slopes) {
  AttentionDecodeParams p{};
  set_caches(query, key_cache, value_cache, block_table, p);
  set_scales(key_scales, value_scales, key_cache, p);
  set_new_tokens(query, key_cache, value_cache, key, value, p);
  const std::vector<int64_t> positions = positions_of(index_data(kv_lengths, "kv_lengths", p.batch), p);
  p.query_offsets = positions.data();
  p.kv_lengths = positions.data() + p.batch;
  check_block_table(p.kv_lengths, key_cache.size(0), p);
  set_rotary(cos, sin, rotary_interleaved, p.query_offsets, p);
  p.kv_starts = index_data(kv_starts, "kv_starts", p.batch);
  STD_TORCH_CHECK(window_left >= -1, "expected window_left to be at least -1, but it is ", window_left);
  STD_TORCH_CHECK(window_right >= -1, "expected window_right to be at least -1, but it is ", window_right);
  p.window_left = std::min(window_left, p.kv_length);
  p.window_right = std::min(window_right, p.kv_length);
  if (alibi_slopes) {
    check_shape(*alibi_slopes, "alibi_slopes", {p.batch, p.query_heads}, ScalarType::Float);
    p.alibi_slopes = alibi_slopes->const_data_ptr<float>();
    copy_strides(*alibi_slopes, p.alibi_strides);
  }
  p.is_causal = true;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);

  const Tensor out = empty_result(query, p.value_dim, false);
  const Tensor lse = empty_on_cpu<3>({p.batch, p.query_heads, p.query_length}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  copy_strides(out, p.out_strides);
  p.lse = lse.mutable_data_ptr<float>();
  run_attention_decode(p, query);
  return {out, lse};
}

}  // namespace

void run_attention_decode(const AttentionDecodeParams& p, const Tensor&) {
  const int64_t rows = p.batch * p.query_heads * p.query_length;
  if (rows == 0) {
    return;
  }
  const AttentionDecodeKernel& kernel = active_attention_decode_kernel();
  const int64_t threads = std::min<int64_t>(kernel.threads(p), torch::stable::get_num_threads());
  const Tensor workspace = empty_on_cpu<1>({kernel.workspace(p, threads)}, ScalarType::Byte);
  std::vector<int64_t> counters(static_cast<size_t>(threads + p.batch * p.kv_heads));
  run_on_threads(
      threads, [&](int64_t thread) { kernel.run(p, workspace.mutable_data_ptr(), counters.data(), thread, threads); });
}

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("attention_decode", TORCH_BOX(&decode));
}

}  // namespace gpt4fast::cpu
