"""Kernels in Triton, which needs no compiler on the machine.

To torch.compile they are opaque custom ops with fake kernels, not ``torch.library.triton_op``. That would have torch
trace the code around each launch with tensors that hold no numbers: the tuner could measure nothing, a tensor's
address, on which tensor descriptors depend, would not be known, and the tile of the heuristic would be written into the
graph. What torch finds out about a kernel for it takes an active CUDA driver, so that no machine without a GPU could
test it. And Inductor fuses nothing into a kernel that is not its own: what a trace could save is the Python of the
launch, which CUDA graphs (``mode="reduce-overhead"``) save too.
"""
