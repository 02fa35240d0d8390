"""A setting of malloc that makes PyTorch's large activations cheap on a CPU."""

import ctypes


def keep_freed_memory():
    """Tell glibc's malloc never to hand freed memory back to the system. By default every large activation is mapped
    and unmapped anew, and on a virtual machine those page faults can cost more than the arithmetic. Call before the
    first tensor. Same as GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation by mmap
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
