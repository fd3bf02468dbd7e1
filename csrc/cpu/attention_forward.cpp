// The operator gpt4fast::attention_forward on a CPU.
#include "../attention.h"

#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/empty.h"
#include "attention_arguments.h"
#include "attention_decode.h"
#include "cpu_level.h"
#include "threads.h"

namespace gpt4fast::cpu {

GPT4FAST_KERNEL_OF_LEVELS(AttentionForwardKernel, attention_forward_kernel)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Up to this many rows that share a key/value head, packing the keys costs more than it saves: the decoding kernel
// is 1.3 to 3 times as fast for one row, 1.2 to 1.4 for 16, and even for 32 to 64, in any dtype (Zen 5).
constexpr int64_t kFewRows = 32;

bool suits_decoding(const AttentionForwardParams& p) {
  const int64_t rows = p.query_length * (p.query_heads / p.kv_heads);
  return rows <= kFewRows && p.kv_length > 0 && !p.mask && p.dropout_p == 0 && !p.cu_seqlens_q;
}

void decode(const AttentionForwardParams& p, const Tensor& query) {
  AttentionDecodeParams decoding{};
  static_cast<AttentionForwardParams&>(decoding) = p;
  decoding.cache_dtype = p.dtype;
  decoding.block_size = p.kv_length;
  decoding.blocks_per_row = 1;
  run_attention_decode(decoding, query);
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const Optional& attn_mask, double dropout_p, const Optional& dropout_seed,
                                   bool is_causal, double scale, int64_t query_offset, const Optional& query_offsets,
                                   const Optional& kv_lengths, const Optional& kv_starts, int64_t window_left,
                                   int64_t window_right, double softcap, const Optional& alibi_slopes,
                                   const Optional& cu_seqlens_q, const Optional& cu_seqlens_k, bool heads_first) {
  AttentionForwardParams p{};
  CHECK_CPU(query);
  set_attention_params(query, key, value,
                       {attn_mask, dropout_p, dropout_seed, is_causal, scale, query_offset, query_offsets, kv_lengths,
                        kv_starts, window_left, window_right, softcap, alibi_slopes, cu_seqlens_q, cu_seqlens_k},
                       p);
  const Tensor out = empty_result(query, p.value_dim, heads_first);
  const Tensor lse = torch::stable::new_empty(query, {query.size(0), p.query_heads, p.query_length}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  copy_strides(out, p.out_strides);
  p.lse = lse.mutable_data_ptr<float>();
  if (lse.numel() > 0 && suits_decoding(p)) {
    decode(p, query);
  } else if (lse.numel() > 0) {
    const AttentionForwardKernel& kernel = active_attention_forward_kernel();
    const int64_t threads =
        threads_for(double(lse.numel()) * double(p.kv_length + 1) * double(p.head_dim + p.value_dim + 1));
    const int64_t bytes = kernel.workspace(p);
    const Tensor workspace = empty_on_cpu<2>({threads, bytes}, ScalarType::Byte);
    char* memory = static_cast<char*>(workspace.mutable_data_ptr());
    run_on_threads(threads, [&](int64_t thread) { kernel.run(p, memory + thread * bytes, thread, threads); });
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&forward));
}

}  // namespace gpt4fast::cpu
