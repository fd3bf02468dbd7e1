#pragma once

// The arguments of gpt4fast::attention_backward that attention_forward has not, checked and turned into parameters, on
// any device.

#include <optional>
#include <vector>

#include "attention_arguments.h"

namespace gpt4fast {

inline void set_saved_tensors(const torch::stable::Tensor& grad_out,
                              const std::optional<torch::stable::Tensor>& grad_lse, const torch::stable::Tensor& query,
                              const torch::stable::Tensor& out, const torch::stable::Tensor& lse,
                              AttentionBackwardParams& p) {
  using torch::headeronly::ScalarType;
  const auto check = [&](const torch::stable::Tensor& tensor, const char* name, ScalarType dtype,
                         std::vector<int64_t> shape) {
    STD_TORCH_CHECK(tensor.device() == query.device(), "expected ", name, " to be on the device of query");
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, "expected ", name, " to be ", name_of(dtype), ", but its dtype is ",
                    name_of(tensor.scalar_type()));
    bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
    for (size_t axis = 0; fits && axis < shape.size(); ++axis) {
      fits = tensor.size(static_cast<int64_t>(axis)) == shape[axis];
    }
    STD_TORCH_CHECK(fits, "expected ", name, " to have shape (", query.size(0), ", ", p.query_heads, ", ",
                    p.query_length, shape.size() == 4 ? message(", ", p.value_dim) : "", "), but its shape is ",
                    shape_of(tensor));
  };
  const std::vector<int64_t> of_rows = {query.size(0), p.query_heads, p.query_length};
  const std::vector<int64_t> of_values = {query.size(0), p.query_heads, p.query_length, p.value_dim};
  check(grad_out, "grad_out", query.scalar_type(), of_values);
  check(out, "out", query.scalar_type(), of_values);
  check(lse, "lse", ScalarType::Float, of_rows);
  CHECK_CONTIGUOUS(lse);
  p.grad_out = grad_out.const_data_ptr();
  copy_strides(grad_out, p.grad_out_strides);
  p.out = out.const_data_ptr();
  copy_strides(out, p.out_strides);
  p.lse = lse.const_data_ptr<float>();
  if (grad_lse) {
    check(*grad_lse, "grad_lse", ScalarType::Float, of_rows);
    p.grad_lse = grad_lse->const_data_ptr<float>();
    copy_strides(*grad_lse, p.grad_lse_strides);
  }
}

// Of the gradient of a float mask.
inline std::vector<int64_t> mask_gradient_shape(bool needs_mask_grad,
                                                const std::optional<torch::stable::Tensor>& attn_mask,
                                                const AttentionParams& p) {
  if (!needs_mask_grad) {
    return {0};
  }
  STD_TORCH_CHECK(attn_mask && p.mask_kind != MaskKind::boolean, "expected a float attn_mask with needs_mask_grad");
  return {attn_mask->size(0), attn_mask->size(1), attn_mask->size(2), attn_mask->size(3)};
}

}  // namespace gpt4fast
