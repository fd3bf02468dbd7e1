"""Readable pure PyTorch: works everywhere, in every dtype, with every derivative."""
