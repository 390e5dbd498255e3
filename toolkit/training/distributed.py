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
        mine = ends[self.rank * accumulate : (self.rank + 1) * accumulate + 1]
        return tuple(map(slice, mine, mine[1:]))

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
    for name, inner in list(module.named_modules()):
        if type(inner) in PLAIN and name:
            module.set_submodule(name, SharedBatchNorm(cast("_BatchNorm", inner)))
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
        values = input.float()
        axes = [axis for axis in range(values.dim()) if axis != 1]
        shape = [1, -1, *[1] * (values.dim() - 2)]
        count = _summed(values.new_tensor(float(values.numel() // values.shape[1])))
        mean = _summed(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = _summed(centred.square().sum(axes)) / count
        self._track(mean.detach(), variance.detach(), count)
        scaled = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), share)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        summed = values.clone()
        distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        summed = gradient.contiguous().clone()
        distributed.all_reduce(summed)
        return summed


def _summed(values: Tensor) -> Tensor:
    result: Tensor = _Sum.apply(values)
    return result
