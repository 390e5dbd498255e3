"""One training on several processes, as torchrun starts them: each learns from its share of every batch.

Together they do what one process does: the same batches in the same order, the same random starts of attacks, gradients
averaged over the whole batch, statistics of batch norm over the whole batch. So the same seed ends in the same network,
up to the rounding of sums in another order; only dropout draws differently. Gradients travel in one piece after the
backward pass (`sum_gradients`) and not through DistributedDataParallel, whose hooks count on one forward pass for
each backward pass: some objectives make two.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.errors import ToolkitError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Batch norms that do nothing else."""

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class World:
    """The processes of one training, and which of them this is."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def parts(self, count: int, accumulate: int = 1) -> tuple[slice, ...]:
        """This process's share of a batch of `count` images, in `accumulate` parts; all shares, by rank, cover it.

        Raises:
            ToolkitError: there are fewer images than parts.
        """
        pieces = self.size * accumulate
        if count < pieces:
            raise ToolkitError(
                "a batch has fewer images than parts",
                found=f"{count} images, {self.size} process(es), --accumulate {accumulate}",
                fix=f"raise --batch-size to {pieces} or more, or lower --accumulate or the number of processes",
            )
        ends = [count * piece // pieces for piece in range(pieces + 1)]
        # part by part all processes together take a stretch of the batch, as one process does: batch norm sees the same
        return tuple(slice(ends[piece], ends[piece + 1]) for piece in range(self.rank, pieces, self.size))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of all processes, in place.

        The loss of each must be its images' part of the whole batch's mean: its own mean times its share of the batch.
        A parameter without a gradient in one process has none in any.
        """
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for kind in dict.fromkeys((gradient.dtype, gradient.device) for gradient in gradients):
            together = [gradient for gradient in gradients if (gradient.dtype, gradient.device) == kind]
            flat = torch.cat([gradient.reshape(-1) for gradient in together])
            distributed.all_reduce(flat)
            parts = torch.split(flat, [gradient.numel() for gradient in together])
            for gradient, part in zip(together, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def total(self, value: float) -> float:
        """The sum of every process's `value`."""
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=_device())
        distributed.all_reduce(summed)
        return float(summed)

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process; all learn the same answer."""
        return self.total(float(flag)) > 0

    def lead(self, value: Value) -> Value:
        """The first process's `value`, plain data and tensors, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=_device())
        return box[0]


ALONE = World()


def launched() -> bool:
    """Whether torchrun, or something alike, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def follows() -> bool:
    """Whether this process only helps another one, which leads: it trains, and writes and prints nothing."""
    return launched() and int(os.environ.get("RANK", "0")) > 0


def processes_here() -> int:
    """How many processes of the training share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Meet the processes that torchrun started together with this one (NCCL on GPUs, else gloo); alone, it is a world.

    Raises:
        ToolkitError: the others cannot be reached.
    """
    if not launched():
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:  # DistNetworkError and DistStoreError are RuntimeErrors
        raise ToolkitError(
            "the processes of the training cannot meet",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="start them with `torchrun --nproc-per-node N -m toolkit ...`, on several machines with one "
            "--rdzv-endpoint that all can reach",
        ) from error
    try:
        yield World(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def share_statistics(module: nn.Module, world: World) -> None:
    """Let batch norms in training compute their statistics over all processes' images, in place.

    Parameters, buffers and their names stay as they are. torch's own SyncBatchNorm runs on GPUs alone.
    """
    if world.size == 1:
        return
    shared: dict[nn.Module, SharedBatchNorm] = {}
    for name, inner in list(module.named_modules(remove_duplicate=False)):  # one may be called by several names
        if type(inner) in PLAIN and name:
            if inner not in shared:
                shared[inner] = SharedBatchNorm(cast("_BatchNorm", inner))
            module.set_submodule(name, shared[inner])
        elif isinstance(inner, _BatchNorm) and not isinstance(inner, SharedBatchNorm):
            raise ToolkitError(
                "a batch norm of this network cannot share its statistics among processes",
                found=f"'{name}' is a {type(inner).__name__}, which may do more than normalise",
                fix="train in one process, or build the network with nn.BatchNorm2d",
            )


class SharedBatchNorm(_BatchNorm):
    """A batch norm whose statistics in training are those of all processes together (Ioffe and Szegedy 2015).

    Args:
        source: the batch norm whose parameters and buffers it takes over.
    """

    plain_in_evaluation = True
    """For surrogates of attacks, which fold such batch norms into convolutions."""

    def __init__(self, source: _BatchNorm) -> None:
        super().__init__(
            source.num_features,
            source.eps,
            source.momentum,
            source.affine,
            source.track_running_stats,
        )
        self.weight, self.bias = source.weight, source.bias
        self.running_mean, self.running_var = source.running_mean, source.running_var
        self.num_batches_tracked = source.num_batches_tracked
        self.training = source.training

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm of {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        mean, variance, count = _statistics(input.detach())
        self._track(mean, variance, count)
        output: Tensor = _Normalised.apply(input, self.weight, self.bias, mean, variance, count, self.eps)
        return output

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)


def _statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of every channel over all processes, [channels] each, and of how many values.

    Every process tells its own mean and variance, and theirs are joined (Chan, Golub and LeVeque 1983): sums of squares
    would cancel.
    """
    axes = [axis for axis in range(values.dim()) if axis != 1]
    exact = values if values.dtype == torch.float64 else values.float()
    variance, mean = torch.var_mean(exact, axes, correction=0)
    own = torch.cat([mean, variance, mean.new_tensor([values.numel() / values.shape[1]])])
    gathered = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, own)
    means, variances, counts = torch.split(torch.stack(gathered), [len(mean), len(mean), 1], dim=1)
    count = counts.sum()
    shares = counts / count
    joint = (shares * means).sum(0)
    return joint, (shares * (variances + (means - joint).square())).sum(0), count


class _Normalised(torch.autograd.Function):
    """Batch norm by statistics that depend on the images of all processes, and its gradient through them."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(values, weight, mean, variance, count)
        ctx.eps = eps
        return functional.batch_norm(values, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """As Ioffe and Szegedy (2015) have it, with both sums over all processes."""
        (gradient,) = gradients
        values, weight, mean, variance, count = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        axes = [axis for axis in range(values.dim()) if axis != 1]
        shape = [1, -1, *[1] * (values.dim() - 2)]
        exact = gradient if gradient.dtype == torch.float64 else gradient.float()
        own = torch.stack([exact.sum(axes), (exact * (values - mean.view(shape))).sum(axes) * scale])
        joint = own.clone()
        distributed.all_reduce(joint)
        of_bias, of_weight = joint / count
        factor = scale if weight is None else scale * weight
        slope, offset = -factor * scale * of_weight, factor * (scale * of_weight * mean - of_bias)
        result = (values * slope.view(shape)).add_(offset.view(shape)).addcmul_(exact, factor.view(shape))
        mine = (None, None) if weight is None else (own[1].to(weight.dtype), own[0].to(weight.dtype))
        return (result.to(values.dtype), *mine, None, None, None, None)
