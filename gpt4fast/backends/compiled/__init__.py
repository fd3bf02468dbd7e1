"""The compiled kernels (C++ and CUDA): adapters to ``torch.ops.gpt4fast``, their shape rules and gradients."""
