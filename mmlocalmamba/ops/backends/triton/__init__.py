"""Fused Triton kernels for CUDA tensors: no permuted copy, channels-last, deterministic. host.py launches kernels.py.

A program owns a block of channels of one sequence (batch, direction). It follows the table and keeps the state in
registers. If there are too few such programs to fill the device, sequences are cut into segments and there are three
kernels: the first computes what each segment adds to the state, the second carries states along the segments, and the
third scans each segment from its start state.

The backward pass recomputes states from those that are saved every :data:`library.CHUNK` steps. Several programs
contribute to some gradients (of B and C: blocks of channels; of A, D and the bias: the batch; of u: directions). Each
writes to its own place of a buffer, which is summed afterwards in a fixed order, without atomics.

Inputs are float32, bfloat16 or float16, each tensor in its own dtype. States, A, D, the bias and all arithmetic are
float32. With TRITON_INTERPRET=1 the kernels also run on CPU tensors, for tests: slowly, and only if the backend is
named.
"""
from mmlocalmamba.ops.backends.triton.host import BACKEND

__all__ = ['BACKEND']
