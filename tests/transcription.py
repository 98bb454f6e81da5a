"""Algorithms 1 and 2 once more, straight from the paper, in NumPy float64 and the paper's units.

Shares nothing with the package: the tests hold every backend and the slow path against it.
"""

import math

import numpy as np


class Weight:
    """One parameter under Algorithm 1 (``fixed_point=False``) or 2; ``options`` as the optimizers' arguments."""

    def __init__(
        self,
        w,
        *,
        fixed_point,
        lr,
        sgd_lr=0.1,
        batch_size=1,
        betas=(0.9, 0.999),
        eps=0.0,
        weight_decay=0.05,
        transition="paper",
        variance_follows_lr=True,
        maximize=False,
    ):
        self.w = np.array(w, dtype=np.float64)
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)
        self.r, self.batch_size, self.sign = sgd_lr / lr, batch_size, -1.0 if maximize else 1.0
        self.sigma_sq = sgd_lr / batch_size
        self.prior = np.full_like(self.w, self.sigma_sq)
        self.post = self.prior.copy()
        self.t, self.betas, self.eps, self.weight_decay = 0, betas, eps, weight_decay
        self.fixed_point, self.transition, self.follows = fixed_point, transition, variance_follows_lr

    def step(self, grad, lr):
        B, (b1, b2) = self.batch_size, self.betas
        g = self.sign * B * np.asarray(grad, dtype=np.float64)  # gradient of the summed loss
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        m_hat, v_hat = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        if lr == 0:
            return
        sigma_sq = lr * self.r / B
        if self.fixed_point:
            self.sigma_sq = sigma_sq
            root = np.sqrt(1 / (4 * sigma_sq**2) + v_hat / lr**2)
            self.post = 1 / (1 / (2 * sigma_sq) + root + self.eps * B / lr)
        else:
            if self.follows:
                self.prior = self.prior * (sigma_sq / self.sigma_sq)
            self.sigma_sq = sigma_sq
            self.post = 1 / (1 / self.prior + g**2)
            if self.transition == "paper":
                self.prior = (1 - lr**2 / (2 * sigma_sq)) ** 2 * self.post + lr**2
            else:
                decay = math.exp(-(lr**2) / sigma_sq)
                self.prior = decay * self.post + sigma_sq * -math.expm1(-(lr**2) / sigma_sq)
        self.w = (1 - lr * self.weight_decay) * self.w - self.post * m_hat


def fixed_point(grad, lr, sigma_sq):
    """Eq. 20: sigma^2_post for gradients of the summed loss of size ``grad``."""
    return 1 / (1 / (2 * sigma_sq) * (1 + np.sqrt(1 + 4 * (sigma_sq * grad / lr) ** 2)))
