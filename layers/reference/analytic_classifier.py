"""Analytic classifier: ridge regression on all data at once. Slow, and the definition of what is right.

    Phi = relu(X W_r),    W = (Phi^T Phi + gamma I)^-1 Phi^T Y,    logits = relu(x W_r) W

Y has a row of zeros and a one for every sample. ACIL (arXiv 2205.14922), G-ACIL (arXiv 2403.15706).
"""

import torch
from torch import Tensor


def joint_ridge(features: Tensor, labels: Tensor, expansion: Tensor, ridge: float, num_classes: int) -> Tensor:
    """Return W (hidden, classes) in float64.

    Args:
        features: Of all samples.
        labels: Of all samples.
        expansion: W_r.
        ridge: gamma.
        num_classes: Columns of W.

    Shape:
        features: (samples, dim). labels: (samples,). expansion: (dim, hidden).
    """
    phi = (features.double() @ expansion.double()).clamp(min=0)
    targets = torch.zeros(len(labels), num_classes, dtype=torch.float64)
    for row, label in enumerate(labels.tolist()):
        targets[row, label] = 1
    gram = phi.T @ phi + ridge * torch.eye(phi.shape[1], dtype=torch.float64)
    weight: Tensor = torch.linalg.inv(gram) @ phi.T @ targets
    return weight
