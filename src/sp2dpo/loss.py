"""The loss and its geometry. Sec. 2.1, 4.2, D.1 (step 3), D.2. torch tensors in, torch tensors out.

Log-probabilities are sums over completion tokens in nats; all arguments of one call have the same shape (B,).
`margin` is the implicit margin Δ: the log-ratio of the chosen response less that of the rejected one, without β.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "coefficient_difference",
    "dpo_loss",
    "gradient_coefficient",
    "gradient_curvature",
    "gradient_slope",
    "implicit_margin",
    "log_ratio",
    "matching_weight",
    "pair_loss",
    "sp2dpo_loss",
    "weighted_gradient_coefficient",
]


def log_ratio(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """r_θ(x, y) = log π_θ(y|x) − log π_ref(y|x), (B,).

    Eq. 3.
    """
    return logps - ref_logps


def implicit_margin(chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Δ_i, the chosen log-ratio less the rejected one, (B,).

    Eq. 7, 52.
    """
    return log_ratio(chosen_logps, ref_chosen) - log_ratio(rejected_logps, ref_rejected)


def pair_loss(beta: Tensor | float, margin: Tensor) -> Tensor:
    """−log σ(β_i Δ_i) of each pair, (B,).

    Eq. 6.
    """
    return -F.logsigmoid(beta * margin)


def dpo_loss(beta: float, margin: Tensor) -> Tensor:
    """Standard DPO: one β for all pairs, mean over the batch of −log σ(βΔ) = log(1 + exp(−βΔ)), a scalar.

    Eq. 4, 53, 54.
    """
    return pair_loss(beta, margin).mean()


def sp2dpo_loss(beta_i: Tensor, margin: Tensor) -> Tensor:
    """SP²DPO: β_i of each pair, mean over the batch, a scalar.

    Eq. 5.
    """
    return pair_loss(beta_i, margin).mean()


def gradient_coefficient(beta: Tensor | float, margin: Tensor) -> Tensor:
    """∂L_i/∂Δ_i = −σ(−β_i Δ_i)·β_i: saturation times scale, (B,).

    Eq. 8.
    """
    return -torch.sigmoid(-beta * margin) * beta


def weighted_gradient_coefficient(weight: Tensor, beta_bar: float, margin: Tensor) -> Tensor:
    """The same for a weighted loss w_i·L_i(β̄), (B,).

    Eq. 9.
    """
    return weight * gradient_coefficient(beta_bar, margin)


def coefficient_difference(beta: Tensor, weight: Tensor, beta_bar: float, margin: Tensor) -> Tensor:
    """How far per-pair β is from loss weighting at these margins; zero everywhere only if β is constant, (B,).

    Eq. 10, 11.
    """
    return gradient_coefficient(beta, margin) - weighted_gradient_coefficient(weight, beta_bar, margin)


def matching_weight(beta: Tensor, beta_bar: float, margin: Tensor) -> Tensor:
    """The weight that loss weighting would need at this margin to step like β_i; β_i/β̄ at Δ = 0, (B,).

    Eq. 12.
    """
    return beta / beta_bar * torch.exp(F.logsigmoid(-beta * margin) - F.logsigmoid(-beta_bar * margin))


def gradient_slope(beta: Tensor | float, margin: Tensor) -> Tensor:
    """∂g_i/∂Δ_i of g_i = σ(−β_i Δ_i)·β_i, (B,).

    Eq. 55.
    """
    z = beta * margin
    return -(beta**2) * torch.sigmoid(z) * torch.sigmoid(-z)


def gradient_curvature(beta: Tensor | float, margin: Tensor) -> Tensor:
    """∂²g_i/∂Δ_i² of g_i = σ(−β_i Δ_i)·β_i, (B,).

    Differs: the paper prints β³σ(z)σ(−z)(1 − 2σ(z)); the derivative of eq. 55 has the opposite sign.

    Eq. 56.
    """
    z = beta * margin
    s = torch.sigmoid(z)
    return -(beta**3) * s * (1 - s) * (1 - 2 * s)
