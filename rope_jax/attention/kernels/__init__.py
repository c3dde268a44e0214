"""Kernels of attention for single kinds of chips, a file for each kernel."""
