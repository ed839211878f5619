"""Several processes as one: each takes its share of every joint batch, and gradients are averaged before the step.

A term of the loss is formed so that its mean over processes is the term of the joint batch. Then the averaged
gradient is that of one process with the joint batch, and all processes make the same step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn


class Processes:
    """What a process knows of the others; with a single one, every call returns at once.

    Parameters
    ----------
    fabric
        Launched; says how many processes there are and which this one is.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.size, self.rank = fabric, fabric.world_size, fabric.global_rank

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def share(self, n: int) -> range:
        """This process's positions of n things: every `size`-th."""
        return range(self.rank, n, self.size)

    def weighted(self, terms: dict[str, Tensor], mine: int, n: int) -> dict[str, Tensor]:
        """Means over `mine` of n things, scaled so that their mean over processes is the mean over all n."""
        if self.size == 1:
            return terms
        return {name: term * (mine * self.size / n) for name, term in terms.items()}

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put the mean over processes into ``grad``, in one message; None stays where no process used a parameter."""
        if self.size == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trained]
        used = parts[0].new_tensor([p.grad is not None for p in trained])
        *means, used = self.average(torch.cat([*parts, used])).split([*map(len, parts), len(trained)])
        for parameter, mean, known in zip(trained, means, used.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter).clone() if known else None

    def average(self, value: Tensor) -> Tensor:
        """The mean over processes."""
        return value if self.size == 1 else cast("Tensor", self.fabric.all_reduce(value, reduce_op="mean"))

    def any(self, flag: bool) -> bool:
        """Whether it holds in one of the processes at least; all hear the same answer."""
        if self.size == 1:
            return flag
        told = torch.tensor(float(flag), device=self.fabric.device)
        total = self.fabric.all_reduce(told, reduce_op="sum")
        return bool(torch.as_tensor(total) > 0)
