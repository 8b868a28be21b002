"""Triton kernels. Importing a module of this folder needs Triton, so ops do it inside the functions that run them.

A program goes over places in memory, so arguments are named after the tensors they point to, and upper case is known
when a kernel is compiled.
"""
