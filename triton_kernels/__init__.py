"""Triton kernels of adabayes_fused; installed as ``adabayes_fused.triton_kernels``. Importing this needs Triton."""
