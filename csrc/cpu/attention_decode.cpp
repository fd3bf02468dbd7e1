// The operator gpt4fast::attention_decode on a CPU.
#include "attention_decode.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../attention_decode_arguments.h"
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

void check_rotary(const int64_t* starts, const AttentionDecodeParams& p) {
  for (int64_t b = 0; p.cos && b < p.batch; ++b) {
    STD_TORCH_CHECK(starts[b] >= 0 && starts[b] + p.query_length <= p.rotary_positions,
                    "expected kv_lengths to place the queries in the ", p.rotary_positions,
                    " positions of cos, but they are [", starts[b], ", ", starts[b] + p.query_length, ")");
  }
}

std::tuple<Tensor, Tensor> decode(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                                  const Tensor& kv_lengths, const Optional& key, const Optional& value,
                                  const Optional& block_table, const Optional& cos, const Optional& sin,
                                  bool rotary_interleaved, const Optional& key_scales, const Optional& value_scales,
                                  double scale, const Optional& kv_starts, int64_t window_left, int64_t window_right,
                                  double softcap, const Optional& alibi_slopes) {
  CHECK_CPU(query);
  AttentionDecodeParams p = attention_decode_params({query, key_cache, value_cache, kv_lengths, key, value, block_table,
                                                     cos, sin, rotary_interleaved, key_scales, value_scales, scale,
                                                     kv_starts, window_left, window_right, softcap, alibi_slopes});
  STD_TORCH_CHECK(p.cache_dtype != ElementType::float8_e4m3fn,
                  "expected key_cache on a CPU to be in query's dtype or int8, but its dtype is float8_e4m3fn");
  const std::vector<int64_t> positions = positions_of(kv_lengths.const_data_ptr<int64_t>(), p);
  p.query_offsets = positions.data();
  p.kv_lengths = positions.data() + p.batch;
  check_block_table(p.kv_lengths, key_cache.size(0), p);
  check_rotary(p.query_offsets, p);
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
