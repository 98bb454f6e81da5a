"""What the paper reports: Aitchison, "Bayesian filtering unifies adaptive and non-adaptive neural network optimization methods"
(NeurIPS 2020), Table 1 and Eq. 20.

Each number is the minimum over the epochs of one run, taken on the test set, of the error and of the loss apart.
"""

from __future__ import annotations

from typing import Any

TEST_IMAGES = 10_000  # of CIFAR-10 and of CIFAR-100
PROTOCOL = {
    "epochs": 200,
    "drop": 150,
    "factor": 0.1,
    "batch_size": 128,
    "train_images": 50_000,
    "test_images": 10_000,
    "augmentation": "pad 4, crop, flip",
    "precision": "float32",
    "width": 1.0,
}
STEPS = 200 * 391  # of a run; AdaBound's gamma is meant for so many
DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
NETWORKS = {"resnet34": "ResNet-34", "densenet121": "DenseNet-121"}

_ROWS = {  # error (%) and loss: CIFAR-10 with the ResNet, with the DenseNet, CIFAR-100 with the ResNet, with the DenseNet
    "SGD": (5.170, 0.174, 5.580, 0.177, 22.710, 0.833, 21.290, 0.774),
    "Adam": (7.110, 0.239, 6.690, 0.230, 27.590, 1.049, 26.640, 1.074),
    "AdaGrad": (6.840, 0.307, 7.490, 0.338, 30.350, 1.347, 30.110, 1.319),
    "AMSGrad": (6.720, 0.239, 6.170, 0.234, 27.430, 1.033, 25.850, 1.103),
    "AdaBound": (5.140, 0.220, 4.850, 0.210, 23.060, 1.004, 22.210, 1.050),
    "AMSBound": (4.940, 0.210, 4.960, 0.219, 23.000, 1.003, 22.360, 1.017),
    "AdamW": (5.080, 0.239, 5.190, 0.214, 24.850, 1.142, 23.480, 1.043),
    "AdaBayes-FP": (5.230, 0.187, 4.910, 0.176, 23.120, 0.935, 22.600, 0.934),
    "AdaBayes": (4.840, 0.229, 4.560, 0.222, 22.920, 0.969, 22.090, 1.079),
}
ORDER = tuple(_ROWS)
TABLE_1 = {  # (data, network, optimizer) -> (error in percent, loss)
    (data, network, optimizer): row[at : at + 2]
    for optimizer, row in _ROWS.items()
    for at, (data, network) in zip(range(0, 8, 2), ((data, network) for data in DATA for network in NETWORKS), strict=True)
}


def eq_20(x: Any, sigma_sq: float) -> Any:
    """sigma^2_post where the filter comes to rest, at x = eta / sqrt(<g^2>): a number, a tensor, an array; of x's shape."""
    return 2 * sigma_sq / (1 + (1 + 4 * (sigma_sq / x) ** 2) ** 0.5)
