// Every operator's schema, once. Each kernel registers itself for its device at the foot of its own file; the fake
// (meta) kernels and the derivatives are registered in gpt4fast/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gpt4fast, m) {
  // What attention_forward and attention_backward are given besides their operands.
#define ATTENTION_SETTINGS                                                                                       \
  "Tensor? attn_mask, float dropout_p, Tensor? dropout_seed, bool is_causal, float scale, SymInt query_offset, " \
  "Tensor? query_offsets, Tensor? kv_lengths, Tensor? kv_starts, SymInt window_left, SymInt window_right, "      \
  "float softcap, Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
  m.def("attention_forward(Tensor query, Tensor key, Tensor value, " ATTENTION_SETTINGS
        ", bool heads_first=False) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, bool needs_mask_grad, " ATTENTION_SETTINGS
      ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)");
  m.def(
      "attention_decode(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor kv_lengths, Tensor? key, "
      "Tensor? value, Tensor? block_table, Tensor? cos, Tensor? sin, bool rotary_interleaved, Tensor(c!)? key_scales, "
      "Tensor(d!)? value_scales, float scale, Tensor? kv_starts, SymInt window_left, SymInt window_right, "
      "float softcap, Tensor? alibi_slopes) -> (Tensor out, Tensor lse)");
  m.def(
      "conv_transpose_forward(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] output_padding, int groups, int[] dilation, Tensor? scale, Tensor? shift, str activation, "
      "float negative_slope, bool channels_last, Tensor? packed=None, bool winograd=False, bool tf32=False) -> "
      "Tensor");
  m.def(
      "conv_transpose_backward(Tensor grad_out, Tensor input, Tensor weight, int[] stride, int[] padding, "
      "int[] output_padding, int groups, int[] dilation, bool channels_last, bool needs_input_grad, "
      "bool needs_weight_grad, bool winograd=False, bool tf32=False) -> (Tensor grad_input, Tensor grad_weight)");
  // What a batch norm behind it needs of its output: mean, 1 / sqrt(variance + eps) and the biased variance.
  m.def(
      "conv_transpose_with_statistics(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] output_padding, int groups, int[] dilation, bool channels_last, float eps, bool tf32) -> "
      "(Tensor out, Tensor mean, Tensor rstd, Tensor variance)");
  m.def("conv_transpose_pack(Tensor weight, int groups, bool winograd=False) -> Tensor");
  m.def(
      "affine_activation(Tensor input, Tensor? bias, Tensor? scale, Tensor? shift, str activation, "
      "float negative_slope) -> Tensor");
  m.def(
      "batch_norm_activation(Tensor input, Tensor weight, Tensor bias, float eps, str activation, "
      "float negative_slope) -> (Tensor out, Tensor mean, Tensor rstd, Tensor variance)");
  m.def("batch_statistics(Tensor input, float eps) -> (Tensor mean, Tensor rstd, Tensor variance)");
  m.def(
      "batch_norm_apply(Tensor input, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, str activation, "
      "float negative_slope) -> Tensor");
  m.def(
      "batch_norm_activation_backward(Tensor grad_out, Tensor input, Tensor weight, Tensor bias, Tensor mean, "
      "Tensor rstd, str activation, float negative_slope) -> (Tensor grad_input, Tensor grad_weight, "
      "Tensor grad_bias)");
  m.def(
      "channel_norm_activation(Tensor input, Tensor weight, Tensor bias, float eps, str activation, "
      "float negative_slope) -> Tensor");
  m.def("issue_rate_loop(bool bfloat16, int steps) -> int");
}
