"""A short run for compute-sanitizer: ``python tests/sanitize.py DEVICE BACKEND ...``; exits with 1 where a weight is wrong.

Odd sizes, addresses that are not aligned, all dtypes, norms read and not, against the same steps on the CPU. ``bench/gpu.sh``
runs it under each tool, torch's cache turned off, so that each tensor ends where its memory does.
"""

import itertools
import math
import sys

import torch

from adabayes_fused import AdaBayes, AdaBayesFP

SIZES = (1, 3, 255, 4097, 8192, 16389, 33000)
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = ((F32, F32), (BF16, BF16), (F64, F64), (F16, F32))  # the parameters', the gradients'


def parameters(device, dtype, grad_dtype):
    """Every other one begins an element after an aligned address."""
    generator, params = torch.Generator().manual_seed(0), []
    for i, n in enumerate(SIZES):
        weight, grad = (torch.randn(n + i % 2, generator=generator).to(d).to(device)[i % 2 :] for d in (dtype, grad_dtype))
        params.append(torch.nn.Parameter(weight))
        params[-1].grad_dtype = grad_dtype
        params[-1].grad = grad
    return params


def weights(device, backend, algorithm, lean, dtypes, **policy):
    params = parameters(device, *dtypes)
    optimizer = algorithm(params, lr=1e-2, batch_size=8, lean=lean, backend=backend, **policy)
    for _ in range(2):
        optimizer.step()
    return [p.detach().cpu() for p in params]


def main(device, *backends):
    wrong = runs = 0
    for case in itertools.product((AdaBayes, AdaBayesFP), (False, True), DTYPES):
        expected = weights("cpu", "cpp", *case)
        for backend, policy in itertools.product(backends, ({}, dict(max_grad_norm=math.inf, skip_nonfinite=True))):
            found = weights(device, backend, *case, **policy)
            same = all(map(torch.equal, expected, found))
            runs, wrong = runs + 1, wrong + (not same)
            if not same:
                print("WRONG:", backend, case, policy)
    print(f"{runs} runs, {wrong} of them wrong")
    return 1 if wrong or not runs else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
