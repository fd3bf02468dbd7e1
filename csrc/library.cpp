// Every operator's schema, once. Each kernel registers itself for its device at the foot of its own file; the fake
// (meta) kernels and the derivatives are registered in gpt4fast/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gpt4fast, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float scale, "
      "SymInt query_offset, Tensor? query_offsets, Tensor? kv_lengths, Tensor? kv_starts, SymInt window_left, "
      "SymInt window_right, float softcap, Tensor? alibi_slopes) -> (Tensor, Tensor)");
  m.def(
      "conv_transpose_forward(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] output_padding, int groups, int[] dilation, Tensor? scale, Tensor? shift, str activation, "
      "float negative_slope, bool channels_last) -> Tensor");
  m.def(
      "affine_activation(Tensor input, Tensor? bias, Tensor? scale, Tensor? shift, str activation, "
      "float negative_slope) -> Tensor");
}
