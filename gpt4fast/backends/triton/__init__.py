"""Kernels in Triton, which needs no compiler on the machine; never run on a GPU so far (see each file)."""
