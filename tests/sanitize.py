"""A short run for compute-sanitizer: ``python tests/sanitize.py DEVICE BACKEND ...``; exits with 1 where a weight is wrong.

Odd sizes, addresses that are not aligned, all dtypes and ways of storing, norms read and not, against the same steps on the CPU.
``bench/gpu.sh`` runs it under each tool, torch's cache turned off, so that each tensor ends where its memory does.
"""

import itertools
import math
import sys

import torch

from adabayes_fused import AdaBayes, AdaBayesFP

SIZES = (1, 3, 255, 4097, 8192, 16389, 33000)
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = ((F32, F32), (BF16, BF16), (F64, F64), (F16, F32))  # the parameters', the gradients'
STORED = [  # state, weights, lean
    *(("float32", "nearest", lean) for lean in (False, True)),
    *(("bfloat16", weights, False) for weights in ("nearest", "32bit")),
    *(("8bit", weights, True) for weights in ("nearest", "24bit", "stochastic")),
]


def parameters(device, dtype, grad_dtype):
    """Every other one begins an element after an aligned address."""
    generator, params = torch.Generator().manual_seed(0), []
    for i, n in enumerate(SIZES):
        weight, grad = (torch.randn(n + i % 2, generator=generator).to(d).to(device)[i % 2 :] for d in (dtype, grad_dtype))
        params.append(torch.nn.Parameter(weight))
        params[-1].grad_dtype = grad_dtype
        params[-1].grad = grad
    return params


def weights(device, backend, algorithm, stored, dtypes, **policy):
    state, rounding, lean = stored
    params = parameters(device, *dtypes)
    policy |= dict(state_dtype=state, weight_rounding=rounding, lean=lean)
    optimizer = algorithm(params, lr=1e-2, batch_size=8, backend=backend, **policy)
    for _ in range(2):
        optimizer.step()
    return [p.detach().cpu() for p in params]


def main(device, *backends):
    wrong = runs = 0
    for case in itertools.product((AdaBayes, AdaBayesFP), STORED, DTYPES):
        _, (state, rounding, _), (dtype, _) = case
        if state != "float32" and dtype == F64 or rounding != "nearest" and dtype != BF16:
            continue
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
