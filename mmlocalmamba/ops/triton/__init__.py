"""Fused Triton kernels for CUDA tensors: no permuted copy, channels-last, deterministic. host.py launches kernels.py.

A program owns a block of channels of one sequence (batch, direction), goes along the table and keeps the state in
registers. Where there are too few such programs to fill the device, sequences are cut into segments, in three kernels:
what each segment adds to the state, a carry along the segments, and the scan itself from the right states.

The backward pass recomputes states from those saved every :data:`library.CHUNK` steps. Gradients that several programs
share (those of B and C over blocks of channels; of A, D and the bias over the batch; of u over directions) go to a
buffer with one place for each, which is summed afterwards, in the same order every time: no atomics.

float32, bfloat16 and float16 inputs, each tensor in its own; states, A, D, bias and all arithmetic are float32.
With TRITON_INTERPRET=1 the kernels run on CPU tensors as well, slowly and only if the backend is named: for tests.
"""
from mmlocalmamba.ops.triton.host import BACKEND

__all__ = ['BACKEND']
