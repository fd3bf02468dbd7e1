// The operator gpt4fast::attention_backward on a CPU.
#include "attention_backward.h"

#include <atomic>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../attention_backward_arguments.h"
#include "../common/checks.h"
#include "../common/dtypes.h"
#include "../common/empty.h"
#include "attention_arguments.h"
#include "attention_backward_plan.h"
#include "cpu_level.h"
#include "threads.h"

namespace gpt4fast::cpu {

GPT4FAST_KERNEL_OF_LEVELS(AttentionBackwardKernel, attention_backward_kernel)
GPT4FAST_KERNEL_OF_LEVELS(MaskGradientKernel, mask_gradient_kernel)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

Tensor empty_gradient(const Tensor& of, bool is_covered, void*& data, int64_t (&strides)[4]) {
  Tensor gradient = torch::stable::empty_like(of);
  if (!is_covered) {
    torch::stable::zero_(gradient);
  }
  data = gradient.mutable_data_ptr();
  copy_strides(gradient, strides);
  return gradient;
}

// Calls use(task, the task after it, memory), with scratch memory of so many bytes, for all tasks: each of torch's
// threads takes the next one when it has finished the last.
template <typename Use>
void share(int64_t tasks, int64_t threads, int64_t bytes, Use use) {
  const Tensor workspace = empty_on_cpu<2>({threads, bytes}, ScalarType::Byte);
  char* memory = static_cast<char*>(workspace.mutable_data_ptr());
  std::atomic<int64_t> next{0};
  run_on_threads(threads, [&](int64_t thread) {
    for (int64_t task = next++; task < tasks; task = next++) {
      use(task, next.load(), memory + thread * bytes);
    }
  });
}

void run(const AttentionBackwardParams& p, int64_t threads) {
  const AttentionBackwardKernel& kernel = active_attention_backward_kernel();
  const std::vector<AttentionBackwardTask> tasks = plan_backward(p, threads);
  const auto count = static_cast<int64_t>(tasks.size());
  share(count, threads, kernel.workspace(p), [&](int64_t task, int64_t next, void* workspace) {
    kernel.run(p, tasks[task], next < count ? &tasks[next] : nullptr, workspace);
  });
}

void run_mask(const AttentionBackwardParams& p, const Tensor& grad_mask, int64_t threads) {
  const MaskGradientKernel& kernel = active_mask_gradient_kernel();
  const std::vector<MaskGradientTask> tasks = plan_mask(p, grad_mask.size(0), grad_mask.size(1));
  share(static_cast<int64_t>(tasks.size()), threads, kernel.workspace(p),
        [&](int64_t task, int64_t, void* workspace) { kernel.run(p, tasks[task], workspace); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const Optional& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, bool needs_mask_grad, const Optional& attn_mask, double dropout_p,
    const Optional& dropout_seed, bool is_causal, double scale, int64_t query_offset, const Optional& query_offsets,
    const Optional& kv_lengths, const Optional& kv_starts, int64_t window_left, int64_t window_right, double softcap,
    const Optional& alibi_slopes, const Optional& cu_seqlens_q, const Optional& cu_seqlens_k) {
  AttentionBackwardParams p{};
  CHECK_CPU(query);
  set_attention_params(query, key, value,
                       {attn_mask, dropout_p, dropout_seed, is_causal, scale, query_offset, query_offsets, kv_lengths,
                        kv_starts, window_left, window_right, softcap, alibi_slopes, cu_seqlens_q, cu_seqlens_k},
                       p);
  set_saved_tensors(grad_out, grad_lse, query, out, lse, p);
  // Packed sequences may leave out tokens, which then have no gradient.
  const auto covers = [&](const int64_t* bounds, int64_t length) {
    return !bounds || (bounds[0] == 0 && bounds[p.batch] == length);
  };
  const bool all_queries = covers(p.cu_seqlens_q, p.query_length), all_keys = covers(p.cu_seqlens_k, p.kv_length);
  const Tensor grad_query = empty_gradient(query, all_queries, p.grad_query, p.grad_query_strides);
  const Tensor grad_key = empty_gradient(key, all_keys, p.grad_key, p.grad_key_strides);
  const Tensor grad_value = empty_gradient(value, all_keys, p.grad_value, p.grad_value_strides);

  const Tensor grad_mask =
      torch::stable::new_empty(query, mask_gradient_shape(needs_mask_grad, attn_mask, p), ScalarType::Float);
  const int64_t threads = threads_for(double(lse.numel()) * double(p.kv_length + 1) *
                                      (3.0 * double(p.head_dim) + 2.0 * double(p.value_dim) + 1.0));
  run(p, threads);
  if (needs_mask_grad) {
    p.grad_mask = grad_mask.mutable_data_ptr<float>();
    for (int64_t axis = 0; axis < 4; ++axis) {
      p.grad_mask_strides[axis] = grad_mask.size(axis) == 1 ? 0 : grad_mask.stride(axis);
    }
    run_mask(p, grad_mask, threads);
  }
  return {grad_query, grad_key, grad_value, grad_mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gpt4fast, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace gpt4fast::cpu
