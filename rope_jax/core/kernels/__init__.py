"""Kernels of `rotate` for single kinds of chips, a file for each chip; `primitive` chooses while lowering."""
