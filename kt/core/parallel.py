"""One training on several processes, started by torchrun.

    torchrun --standalone --nproc-per-node 2 -m kt.pretext_train ...

Each global batch is dealt out to the processes, gradients are averaged, batch norm takes its
statistics over all of them, and dropout draws for all of them, so the result depends on the number
of processes by rounding alone (layers that draw otherwise, such as stochastic depth, draw alike in
each process). Without torchrun everything here does nothing.
"""

from __future__ import annotations

import datetime
import inspect
import os
from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn

from kt.core import hardware
from kt.core.step import ConfigError

# A lost process ends the others after this, at the latest. Each looks at every byte of its pack
# first, which from a slow disk may take one of them so much longer.
TIMEOUT = datetime.timedelta(minutes=30)


def size() -> int:
    """Gives the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Gives this process's number; 0 writes."""
    return int(os.environ.get("RANK", 0))


def connect() -> None:
    """Joins the processes that torchrun started.

    Raises:
        ConfigError: They are more than the GPUs of this machine.
    """
    if size() == 1 or distributed.is_initialized():
        return
    where = hardware.device()
    if where.type != "cuda":
        distributed.init_process_group("gloo", timeout=TIMEOUT)
        return
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), len(hardware.known_gpus())
    if here > gpus:
        raise ConfigError(f"processes: expected one a GPU at most, found {here} for {gpus} GPUs")
    distributed.init_process_group("nccl", timeout=TIMEOUT, device_id=where)


def deal(order: Tensor, batch: int) -> Tensor:
    """Gives this process's share of each batch of an epoch.

    Args:
        order: (n,) int64 rows, n a multiple of `batch`.
        batch: Of all processes together, a multiple of their number.
    """
    return order.view(-1, batch // size(), size())[:, :, rank()].flatten()


def wrap(network: nn.Module, has_idle: Callable[[], bool]) -> nn.Module:
    """Gives a network whose backward pass averages gradients over the processes.

    Args:
        network: Its batch norms must have been replaced by `synchronise`.
        has_idle: Says whether it has weights that no gradient reaches, for which each step is
            searched: without that the second one fails.
    """
    if size() == 1:
        return network
    where = next(network.parameters()).device
    devices = [where] if where.type == "cuda" else None
    wrapper = nn.parallel.DistributedDataParallel
    known = inspect.signature(wrapper.__init__).parameters  # torch 2.13 gave it another name
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return wrapper(network, devices, find_unused_parameters=has_idle(), **{name: False})


def synchronise(network: nn.Module, images: int) -> None:
    """Lets the batch norms and dropouts of a network see the batch of all processes.

    Args:
        network: On any device.
        images: Of a step, in this process.

    Raises:
        ConfigError: There is one of another kind, which would see its own share alone.
    """
    if size() == 1:
        return
    for name, norm in network.named_modules():
        plain = type(norm) in _synchronised and norm.affine and norm.momentum is not None
        if plain and norm.track_running_stats:
            norm.__class__ = _synchronised[type(norm)]
        elif type(norm) is nn.Dropout:
            norm.__class__, norm.images = _SharedDropout, images
        elif isinstance(norm, nn.modules.batchnorm._BatchNorm) and type(norm) not in _alone:
            raise ConfigError(
                f"processes: {name} is a {type(norm).__name__}; over several processes there are "
                "BatchNorm1d and BatchNorm2d with weights, a momentum and running statistics; "
                "train by one process"
            )


def separate(network: nn.Module) -> None:
    """Takes back what `synchronise` did: what comes after the training one process does alone."""
    for norm in network.modules():
        norm.__class__ = _alone.get(type(norm), type(norm))


class _Total(torch.autograd.Function):
    """The sum over the processes, and the sum of the gradients backwards."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return total(value.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return total(grad.clone())


def standardised(values: Tensor) -> Tensor:
    """Gives rows (B, E) with mean 0 and variance 1 over the batch of all processes, or as zeros.

    Where gradients are switched off, in validation, each process has all rows itself.
    """
    shared = size() if torch.is_grad_enabled() else 1
    if len(values) * shared == 1:  # has no variance
        return torch.zeros_like(values)
    if shared == 1:
        return nn.functional.batch_norm(values, None, None, training=True)
    number = len(values) * shared
    centred = values - _Total.apply(values.sum(0)) / number
    return centred / (_Total.apply(centred.square().sum(0)) / number + 1e-5).sqrt()


class _Synchronised:
    """Batch norm over all processes, also on CPUs, where torch's own has none."""

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training:
            return super().forward(maps)
        values = maps.float()
        dims = [dim for dim in range(maps.ndim) if dim != 1]
        number = values.numel() // values.shape[1] * size()
        shape = [1, -1] + [1] * (maps.ndim - 2)
        mean = _Total.apply(values.sum(dims)) / number
        centred = values - mean.view(shape)
        variance = _Total.apply(centred.square().sum(dims)) / number
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * number / (number - 1), share)
        scale = self.weight / (variance + self.eps).sqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(maps.dtype)


class _Synchronised1d(_Synchronised, nn.BatchNorm1d):
    pass


class _Synchronised2d(_Synchronised, nn.BatchNorm2d):
    pass


class _SharedDropout(nn.Dropout):
    """Drops what one process would: all draw for the whole batch, alike, and take their share."""

    def forward(self, values: Tensor) -> Tensor:
        rows, left = divmod(len(values), self.images)  # of an image
        if not self.training or self.p in (0, 1) or left:
            return super().forward(values)
        last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if last else torch.contiguous_format  # in which one would draw
        shape = (len(values) * size(), *values.shape[1:])
        whole = torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=order)
        kept = whole.bernoulli_(1 - self.p)
        # Image i of this process is image i * size + rank of the batch, see `deal`.
        mine = kept.unflatten(0, (self.images, size(), rows))[:, rank()].flatten(0, 1)
        return values * (mine / (1 - self.p))


_synchronised = {nn.BatchNorm1d: _Synchronised1d, nn.BatchNorm2d: _Synchronised2d}
_alone = {own: plain for plain, own in _synchronised.items()} | {_SharedDropout: nn.Dropout}


def total(value: Tensor) -> Tensor:
    """Gives the sum over the processes, in place."""
    if size() > 1:
        distributed.all_reduce(value)
    return value


def agree(number: int) -> bool:
    """Says whether all processes give the same number, to each the same; waits for all."""
    if size() == 1:
        return True
    numbers = torch.zeros(size(), dtype=torch.int64, device=hardware.device())
    numbers[rank()] = number
    return bool((total(numbers) == number).all())


def wait() -> None:
    """Waits for all processes."""
    if size() > 1:
        distributed.barrier()
