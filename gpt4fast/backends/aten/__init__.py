"""Torch's own kernels, with what they lack composed around them."""
