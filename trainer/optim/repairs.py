"""Corrections of library optimizers whose arithmetic is not their paper's, each with what was found where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def dadapt_adan(base: Any) -> Any:
    """`base` with Adan's second moment: pytorch-optimizer 4.1.0 squares twice and divides by squared gradients.

    Xie et al. 2022 (arXiv 2208.06677), algorithm 1, with 1 - β for its β: n = β₃ n + (1 - β₃) (g + β₂ (g - g'))².
    """

    class DAdaptAdan(base):  # type: ignore[misc]  # the library has no types
        """D-Adaptation of Adan; the step size and the update are the library's."""

        def _can_use_foreach(self, group: Mapping[str, Any]) -> bool:
            # The library's other path has the same fault, so every group takes the corrected one.
            return any(p.grad is not None for p in group["params"])

        def _step_foreach(
            self,
            group: Mapping[str, Any],
            params: list[Tensor],
            grads: list[Tensor],
            state: Mapping[str, list[Tensor]],
            d_lr: float,
            statistics: tuple[Tensor, Tensor, Tensor],
        ) -> None:
            beta1, beta2, beta3 = group["betas"]
            squared_grads, weighted_sum, sum_l1 = statistics
            for i, grad in enumerate(grads):
                if self.maximize:
                    grad = -grad
                change = grad + state["previous_grad"][i]  # kept negated by the library
                update = grad + beta2 * change
                state["exp_avg"][i].mul_(beta1).add_(grad, alpha=d_lr * (1 - beta1))
                state["exp_avg_diff"][i].mul_(beta2).add_(change, alpha=d_lr * (1 - beta2))
                state["exp_avg_sq"][i].mul_(beta3).addcmul_(update, update, value=1 - beta3)
                root = state["exp_avg_sq"][i].sqrt().add_(group["eps"])
                s = state["s"][i].mul_(beta3).add_(grad, alpha=d_lr * (1 - beta3))
                squared_grads.add_((grad * grad / root).sum())
                weighted_sum.add_((s * s / root).sum())
                sum_l1.add_(s.abs().sum())
                state["previous_grad"][i].copy_(-grad)

    return DAdaptAdan


REPAIRS: Mapping[tuple[str, str], Callable[[Any], Any]] = {("pytorch_optimizer", "DAdaptAdan"): dadapt_adan}
