"""One run on several processes ("ranks"), one per GPU, started by torchrun.

    torchrun --standalone --nproc-per-node 8 -m electra_core pretrain --data DATA --out RUN

Every rank holds the model, computes its share of each step's batch (`pretraining.batches.Batches`, in fine-tuning
`shares` of `finetuning/steps.py`) and ends the step with the same gradients, so that all make the same update. The
losses of a batch's shares *add up* to the whole batch's means (each share knows its weight), so gradients are
summed over ranks, not averaged as is usual: the batch, its masks and its loss are the same for any number of
ranks, and shares of uneven length need no special case. (Fine-tuning draws dropout separately for each share.)

- Eager steps: `Ranks.data_parallel` wraps the model in PyTorch's DistributedDataParallel, which sends gradients
  in buckets while the backward pass still computes others. The parts that a rank computes one after the other
  (`accumulate`) are summed locally; only the last part's backward pass communicates.
- Steps in fixed shapes (`engine.py`): `FlatGradients` sums all gradients in one message after the backward
  pass, because ranks may be running graphs of different shapes. The GPUs wait for it, for `base` half a gigabyte
  per step; but no host work delays a captured backward pass.
- With `--sharding fsdp`, every rank stores only a part of the model (`sharding.py`).
- Values that hosts must agree on (when to stop, where to resume, which rank found an error) go over a second
  channel between the CPUs, gloo, so that no GPU has to wait.

Left out on purpose: tensor and pipeline parallelism (no ELECTRA is that large), and elastic world sizes within a
run (torchrun restarts all ranks, and `--resume` continues the run).
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from threading import Timer
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from electra_core.errors import AnotherRankFailed, UserError, first_line, lost_rank
from electra_core.execution import torchrun
from electra_core.execution.sharding import is_sharded
from electra_core.linear import cast_one_by_one

log = logging.getLogger("electra_core")
T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others before it gives up. torchrun ends a failed run within seconds; this is for
failures that only the network notices. Not short, as others wait while rank 0 counts words or writes models."""
PATIENCE = timedelta(seconds=30)
"""How long rank 0 waits for the others to start before it says so."""
ALIGNMENT = 64
"""Every gradient in `FlatGradients` begins at a multiple of so many bytes. From others torch's kernels for many
tensors load number by number, and behind a bias of 30,522 numbers there would be no multiple of 16 any more."""


_left: list[Any] = []
"""Process groups that were left, kept until the process ends. Dropping the last reference to one (as its DDP
replica does when `pretrain` returns) waits for gloo's threads while holding Python's global lock; a thread that is
still freeing a message's tensors waits for that lock, and both hang (seen with torch 2.13)."""


class Ranks:
    """This process among those that train one model together; by default the only one."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size
        self._replica: nn.parallel.DistributedDataParallel | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs, writes and saves."""
        return self.rank == 0

    def summed(self, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each scalar summed over all ranks, on its device, in one message; nothing waits for it."""
        if self.size == 1:
            return scalars
        values = torch.stack([value.double() for value in scalars.values()])
        dist.all_reduce(values)
        return dict(zip(scalars, values.unbind()))

    def later_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Starts summing `values`, on the host, over all ranks; the returned function waits for the result."""
        work = dist.all_reduce(values, async_op=True)

        def finished() -> Tensor:
            work.wait()
            return values

        return finished

    def joined(self, values: Tensor) -> Tensor:
        """Concatenates 1-D tensors of any length, one from each rank, in the order of the ranks; on the host."""
        if self.size == 1:
            return values.cpu()
        numbers = values.cpu().to(torch.uint8) if values.dtype == torch.bool else values.cpu()  # gloo has no bool
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(numbers)]))
        padded = numbers.new_zeros(int(max(lengths)))
        padded[: len(numbers)] = numbers
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded)
        return torch.cat([row[: int(length)] for row, length in zip(rows, lengths)]).to(values.dtype)

    def merged(self, found: list[np.ndarray]) -> list[np.ndarray]:
        """From lists of equal length, one per rank, the non-empty array at each index; on rank 0, else []."""
        if self.size == 1:
            return found
        lists: Any = [None] * self.size if self.first else None
        dist.gather_object(found, lists)
        return [next((a for a in arrays if a.size), arrays[0]) for arrays in zip(*lists)] if self.first else []

    def share(self, model: nn.Module) -> None:
        """Copies rank 0's parameters and buffers to all ranks, in place."""
        if self.size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)
            self.share_buffers(model)

    def share_buffers(self, model: nn.Module) -> None:
        """Copies rank 0's buffers to all ranks, in place: a forward pass may write them, on each rank its own."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer.data, src=0)

    def data_parallel(self, model: nn.Module) -> nn.Module:
        """The module to call in training, so that backward leaves the gradients summed over all ranks.

        Args:
            model: the same on all ranks (`share`), on its device; or sharded (`shard`).
        """
        if self.size == 1 or any(is_sharded(parameter) for parameter in model.parameters()):
            return model
        # find_unused_parameters: a generator that draws uniformly has no gradients. It also keeps the buckets
        # fixed. Otherwise DDP rearranges them after the first backward pass, which changes the order of sums, and
        # a resumed run would differ from an uninterrupted one in the last bits.
        self._replica = nn.parallel.DistributedDataParallel(
            model, init_sync=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )
        self._replica.register_comm_hook(None, _summed_bucket)
        cast_one_by_one(model)
        return self._replica

    def locally(self) -> AbstractContextManager[Any]:
        """Context of a backward pass whose gradients stay local, to be added to the next part's."""
        return nullcontext() if self._replica is None else self._replica.no_sync()

    def decided_by_first(self, decide: Callable[[], T]) -> T:
        """Returns on every rank what `decide` returns on rank 0 (a JSON value); its error ends all of them."""
        if self.size == 1:
            return decide()
        return json.loads(self._text_of_first(self.together(lambda: json.dumps(decide()) if self.first else "")))

    def check_alike(self, value: Any, what: str) -> None:
        """Ends all ranks if on one of them `value` (JSON), named `what` in the error, differs from rank 0's.

        Raises:
            UserError, AnotherRankFailed: see `together`.
        """
        firsts = self.decided_by_first(lambda: value)

        def check() -> None:
            if json.loads(json.dumps(value)) != json.loads(json.dumps(firsts)):
                raise UserError(f"{socket.gethostname()}: {what} differ from those of rank 0")

        self.together(check)

    def only_first(self, make: Callable[[], Any]) -> Any:
        """Returns `make()` on rank 0, for which all wait, and a `Silent` stand-in on the others."""
        return self.together(lambda: make() if self.first else Silent())

    def together(self, do: Callable[[], T]) -> T:
        """Runs `do()`, which must not communicate, on every rank. An error on any of them (a user's mistake, a
        full disk, memory that one GPU lacks) ends all, and one reports it: none waits for a rank that has left.

        Raises:
            Exception: on the lowest rank on which `do` raised one.
            AnotherRankFailed: on all others.
        """
        result, error = None, None
        try:
            result = do()
        except Exception as raised:
            error = raised
        lowest = torch.tensor(self.size if error is None else self.rank)
        if self.size > 1:
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
        try:
            if int(lowest) == self.rank and error is not None:
                raise error
            if int(lowest) < self.size:
                raise AnotherRankFailed(f"rank {int(lowest)} has an error") from None
        finally:
            del error  # with this frame it would form a cycle, and keep what its own frames hold on the GPU
        return result  # type: ignore[return-value]

    def leave(self) -> None:
        """Waits for the other ranks and leaves their group. Not to be called after an error: the others are then
        in the middle of something else, and torchrun ends them."""
        if self.size > 1:
            # Not an all-reduce: gloo's thread may free its tensor, which needs Python, while Python ends. That is
            # the likely cause of an abort seen once ("terminate called without an active exception", torch 2.13).
            dist.barrier()
            _abandon()

    def _text_of_first(self, text: str) -> str:
        content = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
        length = torch.tensor(len(content))
        dist.broadcast(length, src=0)
        received = content if self.first else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(received, src=0)
        return received.numpy().tobytes().decode()


def join_ranks(device: torch.device) -> Ranks:
    """Connects the ranks that torchrun started; without torchrun, this process is the only one.

    CPUs communicate over gloo, GPUs over NCCL. If the others do not come, rank 0 says so. After a restart,
    torchrun's store still has the addresses of processes that are gone, and a rank that reads one before it is
    replaced waits for it in vain. So on one machine, where all ranks know the number of the start, each start has
    its own names. (Machines may count differently: docs/scaling.md.)

    Raises:
        UserError: torchrun's variables are incomplete, or only some of the ranks came.
    """
    torchrun.check()
    if torchrun.size() == 1:
        return Ranks()
    if device.type == "cuda" and device.index is not None:  # without LOCAL_RANK, the current GPU is the one
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by a run that ended in an error, which a script caught on all ranks
        _abandon()
    with _impatient():
        try:
            return _met(device)
        except dist.DistError as error:
            if lost_rank(error) is not None:
                raise
            raise UserError(_not_met(first_line(error))) from None


def _met(device: torch.device) -> Ranks:
    """Connects the ranks."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    # Without it and without a LOCAL_RANK, torch 2.15 takes the GPU that has the rank's number.
    own_gpu = device if device.type == "cuda" and device.index is not None else None
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"group {len(_left)}", store)  # a script's earlier runs used names, too
    if torchrun.is_on_one_machine():
        store = dist.PrefixStore(f"start {torchrun.start()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=own_gpu)
    return Ranks(rank, size)


def _not_met(said: str) -> str:
    """What to tell of torch's error, whose first line is `said`."""
    if "EADDRINUSE" in said:
        return f"{torchrun.meeting_point()}: another program uses this port; choose another MASTER_PORT"
    return (
        f"{torchrun.meeting_point()}: only some of {torchrun.size()} processes came within "
        f"{TIMEOUT.total_seconds() / 60:g} minutes; to run alone, unset WORLD_SIZE ({said})"
    )


@contextmanager
def _impatient() -> Iterator[None]:
    """A context in which rank 0 waits for the others, and says so if it takes `PATIENCE`."""
    waiting = (
        f"waiting for {torchrun.size()} processes at {torchrun.meeting_point()}; to run alone, unset WORLD_SIZE"
    )
    timer = Timer(PATIENCE.total_seconds(), log.warning, [waiting])
    timer.daemon = True
    if torchrun.rank() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _abandon() -> None:
    """Leaves the group of the other ranks; see `_left`."""
    _left.append(dist.group.WORLD)
    dist.destroy_process_group()


class FlatGradients:
    """A step's gradients end to end in one tensor, which is summed over all ranks in one message.

    The tensor keeps its address, so `collect` may be captured in CUDA graphs, whose gradients have other addresses
    for every shape; the first call, which allocates it, may not be. Parameters without a gradient in that call
    must never have one.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._parameters = parameters
        self._flat: Tensor | None = None

    def collect(self) -> None:
        """Moves this rank's gradients into the tensor; the parameters have none afterwards."""
        if self._flat is None:
            self._trained = [p for p in self._parameters if p.grad is not None]
            like = self._trained[0]
            least = ALIGNMENT // like.element_size()
            sizes = [-(-p.numel() // least) * least for p in self._trained]
            self._flat = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)  # gaps are summed, too
            pieces = self._flat.split(sizes)
            self._views = [piece[: p.numel()].view_as(p) for piece, p in zip(pieces, self._trained)]
        torch._foreach_copy_(self._views, [p.grad for p in self._trained])  # type: ignore[misc]
        for parameter in self._trained:
            parameter.grad = None

    def add_up(self) -> None:
        """Gives each parameter its gradient summed over all ranks; nothing waits for it."""
        assert self._flat is not None
        dist.all_reduce(self._flat)
        for parameter, view in zip(self._trained, self._views):
            parameter.grad = view


def is_first_to_say(text: str) -> bool:
    """Whether no other rank has printed `text` since torchrun's last start, so that this one should.

    For errors that end a rank before it has joined the others, or after they have stopped listening: most errors
    occur on all ranks, some on only one. The store has to be torchrun's (`torchrun.keeps_the_store`); True if it
    cannot be asked.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=5)))
        return store.add(f"said in start {torchrun.start()}: {text}", 1) == 1
    except (RuntimeError, ValueError):
        return True


class Silent:
    """Stand-in on other ranks for what only rank 0 has: any method may be called, and does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def _summed_bucket(state, bucket):  # DDP rejects annotations that are strings
    """DDP's communication hook: sums over ranks, where DDP itself would average."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda reduced: reduced.value()[0])
