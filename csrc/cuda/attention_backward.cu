// The gradients of attention (FlashAttention-2; Dao, 2023). Weights are computed again from the saved logarithm of the
// sum of exponentials, so scores are never stored. One kernel takes tiles of queries past the keys that they see, for
// the gradient of queries; with it comes what all of a query's keys have in common, sum(grad_out * out) - grad_lse. The
// next takes tiles of keys past the queries that see them, for the gradients of keys and values. Each sum is one
// block's, in a fixed order and without atomics. Both compute Q K^T and dO V^T, seven products where five would do, but
// in either the weights of a warp's own rows are in its registers as the next product wants them, and never in shared
// memory. In heads of more than 128 numbers a warp has room for the sums of keys, or of values: eight products. Not yet
// run on a GPU.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "attention_backward_arguments.h"
#include "common/dtypes.h"
#include "cuda/attention_key_gradient.cuh"
#include "cuda/attention_query_gradient.cuh"

namespace gpt4fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

template <typename scalar_t, int kWidth>
void run(const Device& device, BackwardLaunch& p) {
  using OfQuery = QueryGradientConfig<scalar_t, kWidth>;
  using OfKey = KeyGradientConfig<scalar_t, kWidth>;
  // Each packed sequence may end with a tile that is not full.
  const int64_t sequences = p.cu_seqlens_q ? 1 : p.batch, unfilled = p.cu_seqlens_q ? p.batch : 0;
  p.query_tiles = ceil_div(p.query_length, OfQuery::kRows) + unfilled;
  p.key_tiles = ceil_div(p.kv_length, OfKey::kRows) + unfilled;
  constexpr size_t kQueryBytes = sizeof(BackwardShared<scalar_t, kWidth, OfQuery>),
                   kKeyBytes = sizeof(BackwardShared<scalar_t, kWidth, OfKey>);
  static_assert(std::max(kQueryBytes, kKeyBytes) <= kMostSharedBytes);
  device.launch(attention_query_gradient_kernel<scalar_t, kWidth>, sequences * p.query_tiles * p.query_heads,
                OfQuery::kThreads, kQueryBytes, p);
  device.launch(attention_key_gradient_kernel<scalar_t, kWidth>, sequences * p.key_tiles * p.kv_heads, OfKey::kThreads,
                kKeyBytes, p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Optional& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, bool needs_mask_grad, const Optional& attn_mask, double dropout_p,
    const Optional& dropout_seed, bool is_causal, double scale, int64_t query_offset, const Optional& query_offsets,
    const Optional& kv_lengths, const Optional& kv_starts, int64_t window_left, int64_t window_right, double softcap,
    const Optional& alibi_slopes, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k) {
  CHECK_CUDA(query);
  const Device device(query);
  const AttentionSettings settings = {attn_mask,    dropout_p,     dropout_seed, is_causal,    scale,
                                      query_offset, query_offsets, kv_lengths,   kv_starts,    window_left,
                                      window_right, softcap,       alibi_slopes, cu_seqlens_q, cu_seqlens_k};
  BackwardLaunch p{};
  set_attention_params(query, key, value, settings, p);
  set_saved_tensors(grad_out, grad_lse, query, out, lse, p);
  p.dropout = Dropout(settings, query);
  const int64_t width = checked_width(p, 256);
  const bool is_empty = lse.numel() == 0 || p.kv_length == 0;

  const auto gradient_of = [&](const Tensor& tensor, void*& data, int64_t (&strides)[4], bool& is_wide) {
    Tensor gradient = device.fresh(torch::stable::empty_like(tensor));
    if (is_empty || cu_seqlens_q) {  // packed sequences may leave out tokens, which then have no gradient
      torch::stable::zero_(gradient);
    }
    data = gradient.mutable_data_ptr();
    copy_strides(gradient, strides);
    is_wide = has_wide_rows(gradient);
    return gradient;
  };
  const Tensor grad_query = gradient_of(query, p.grad_query, p.grad_query_strides, p.grad_query_is_wide);
  const Tensor grad_key = gradient_of(key, p.grad_key, p.grad_key_strides, p.grad_key_is_wide);
  const Tensor grad_value = gradient_of(value, p.grad_value, p.grad_value_strides, p.grad_value_is_wide);
  // As large as the scores, whatever the mask's size: its dimensions of 1 are summed afterwards.
  const std::vector<int64_t> mask_shape = mask_gradient_shape(needs_mask_grad, attn_mask, p);
  Tensor grad_mask = torch::stable::new_zeros(query, mask_shape, ScalarType::Float);
  if (needs_mask_grad) {
    grad_mask =
        torch::stable::new_zeros(query, {p.batch, p.query_heads, p.query_length, p.kv_length}, ScalarType::Float);
    p.grad_scores = grad_mask.mutable_data_ptr<float>();
    allow_access(grad_mask, true);
  }
  const Tensor deltas = device.fresh(torch::stable::empty_like(lse));
  p.deltas = deltas.mutable_data_ptr<float>();
  p.query_is_wide = has_wide_rows(query);
  p.key_is_wide = has_wide_rows(key);
  p.value_is_wide = has_wide_rows(value);
  p.grad_out_is_wide = has_wide_rows(grad_out);
  p.out_is_wide = has_wide_rows(out);
  allow_attention(query, key, value, settings);
  for (const Tensor* tensor : {&grad_out, &out, &lse}) {
    allow_access(*tensor, false);
  }
  if (grad_lse) {
    allow_access(*grad_lse, false);
  }
  if (!is_empty) {
    DTYPE_SWITCH(query.scalar_type(), "query", scalar_t, [&] {
      // Products of float32 without tensor cores are slow enough not to need a kernel of their own for narrow heads.
      constexpr int kNarrowest = sizeof(scalar_t) == 2 ? 64 : 128;
      const auto run_width = width <= 64    ? run<scalar_t, kNarrowest>
                             : width <= 128 ? run<scalar_t, 128>
                                            : run<scalar_t, 256>;
      run_width(device, p);
    });
  }
  for (int64_t axis = 0; needs_mask_grad && axis < 4; ++axis) {
    if (mask_shape[axis] != grad_mask.size(axis)) {
      const int64_t axes[1] = {axis};
      grad_mask = torch::stable::sum(grad_mask, torch::headeronly::IntHeaderOnlyArrayRef(axes, 1), true);
    }
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace
}  // namespace gpt4fast

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, GPT4FAST_CUDA_KEY, m) {
  m.impl("attention_backward", TORCH_BOX(&gpt4fast::backward));
}
