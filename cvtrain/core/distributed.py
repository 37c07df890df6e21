"""Several processes that train one model: what they say to each other, and how each hears of another's end.

Every function does nothing, or the obvious thing, in a process by itself. Tensors on the CPU travel by gloo, those on
CUDA by NCCL. A failure is told through the store that torchrun keeps beside the processes, since a process that has
lost a connection does not know why.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from cvtrain import errors
from cvtrain.core import launch
from cvtrain.errors import ConfigError, CvtrainError, Interrupted, WorkerError

T = TypeVar("T")

HANG = timedelta(minutes=30)
"""After this long an exchange that a living process does not come to fails; a slow disk may well take minutes."""
BEAT_S = 1.0
SILENT_S = 5.0
"""Seconds without a sign of life after which a process that has also lost its connections counts as dead."""
PATIENCE_S = 15.0
"""Seconds in which the main thread may end the run once another process has failed; torchrun kills after 30."""
GRACE_S = 20.0
"""Seconds for which the others let process 0 finish: torchrun stops all when one leaves with an error."""


def rank() -> int:
    """Return this process's number among those that train together now, 0 by itself."""
    return _group.rank if _group is not None else 0


def world_size() -> int:
    """Return how many processes train together now."""
    return _group.size if _group is not None else 1


def main() -> bool:
    """Return whether this is the process that writes and speaks."""
    return rank() == 0


def init(device: str, timeout_s: float) -> None:
    """Meet the other processes of the launch; nothing when there are none.

    Args:
        device: As configured; `auto` and `cuda` become the GPU of this process's number on its machine.
        timeout_s: Seconds without a sign of life after which a process counts as dead.

    Raises:
        ConfigError: The device does not serve several processes.
        WorkerError: The others did not come.
    """
    global _group
    if launch.world_size() == 1:
        return
    backend = _backend(device)
    try:
        kept, mine, size = next(iter(rendezvous("env://", timeout=HANG)))
        # Torchrun may keep one store over its restarts, and with it what ended the processes before.
        store = dist.distributed_c10d.PrefixStore(f"cvtrain/{launch.restarts()}", kept)
        dist.init_process_group(backend, store=store, rank=mine, world_size=size, timeout=HANG)
        _group = _Group(mine, size, store.clone(), timeout_s)
        _group.begin(store.clone())
    except (RuntimeError, ValueError) as error:
        raise WorkerError(
            f"the {launch.world_size()} processes did not find each other: {str(error).splitlines()[0]}\n"
            "Check MASTER_ADDR and MASTER_PORT, and that every machine was started."
        ) from error


def _backend(device: str) -> str:
    cuda = torch.cuda.is_available()
    if device.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"device={device} is one GPU for several processes; device=cuda gives each its own.")
    if device == "mps":
        raise ConfigError("device=mps serves one process; start cvtrain without torchrun, or use device=cpu.")
    if device == "cpu" or not cuda:
        return "gloo"
    if launch.local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"process {launch.local_rank()} of this machine has no GPU, there are {torch.cuda.device_count()}. "
            f"Use --nproc-per-node {torch.cuda.device_count()}, or device=cpu."
        )
    torch.cuda.set_device(launch.local_rank())
    return "cpu:gloo,cuda:nccl"


def leave() -> None:
    """Part in peace: every process goes on, or ends, by itself."""
    global _group
    if _group is not None:
        dist.barrier()
        _group.end()
        _group = None
        dist.destroy_process_group()


def abandon() -> None:
    """Give up without waiting for anybody, at the end of a process."""
    global _group
    if _group is not None:
        _group.end()
        _group = None


def largest(values: Tensor) -> Tensor:
    """Replace `values` by the largest of all processes, elementwise, and return them; the device is not waited for."""
    if _group is not None:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def average(tensors: Sequence[Tensor]) -> None:
    """Replace floating-point tensors by their means over the processes, the same bits everywhere."""
    if _group is None or not tensors:
        return
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    with torch.no_grad():
        for same in by_type.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            dist.all_reduce(flat)
            flat /= _group.size
            parts = torch.split(flat, [tensor.numel() for tensor in same])
            torch._foreach_copy_(same, [part.view_as(tensor) for part, tensor in zip(parts, same, strict=True)])


def gather(part: Tensor | None) -> Tensor:
    """Return the parts of all processes behind each other, `(Σ N, …)`, in the order of their ranks, on the CPU.

    Args:
        part: `(N, …)`, N of each process's own; None where a process has nothing. One has something.
    """
    part = None if part is None else part.cpu().contiguous()
    if _group is None:
        return torch.empty(0) if part is None else part
    forms: list[Any] = [None] * _group.size
    dist.all_gather_object(forms, None if part is None else (len(part), part.shape[1:], part.dtype))
    lengths = [0 if form is None else form[0] for form in forms]
    _, shape, dtype = next(form for form in forms if form is not None)
    padded = torch.zeros((max(lengths), *shape), dtype=dtype)
    if part is not None:
        padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in forms]
    dist.all_gather(parts, padded)
    return torch.cat([each[:length] for each, length in zip(parts, lengths, strict=True)])


def shared(call: Callable[[], T]) -> T:
    """Return what `call` gives process 0, which alone calls it.

    Raises:
        CvtrainError: What it raised there, in every process.
    """
    if _group is None:
        return call()
    answer: list[Any] = [None, None]
    failed: BaseException | None = None
    if _group.rank == 0:
        try:
            answer[0] = call()
        except CvtrainError as error:
            failed, answer[1] = error, _plain(error)
    dist.broadcast_object_list(answer, src=0)
    if failed is not None:
        raise failed
    if answer[1] is not None:
        raise _rebuilt(answer[1])
    value: T = answer[0]
    return value


@contextlib.contextmanager
def first_on_main(name: str) -> Iterator[None]:
    """Let process 0 go through the block before the others, however long it takes: it may fill a cache for them."""
    if _group is not None and _group.rank > 0:
        while not _group.store.check([name]):
            failure = _group.failure()
            if failure is not None:
                raise failure
            time.sleep(0.1)
    yield
    if _group is not None and _group.rank == 0:
        _group.store.set(name, "1")


def explained(error: BaseException) -> BaseException:
    """Return what ended the run when `error` is only a consequence of it in this process, else `error`.

    Another process that failed has said so; one that died has not, and is named.
    """
    group = _group
    if group is None:
        return error
    group.ending = True
    if _lost(error):
        return group.failure_within(PATIENCE_S) or WorkerError(
            f"the connection to another process was lost: {str(error).splitlines()[0]}"
        )
    if isinstance(error, Interrupted | KeyboardInterrupt):
        failure = group.failure_within(0.0)
        return error if failure is None or isinstance(failure, Interrupted) else failure
    return error


def expect_end() -> None:
    """Take note that all processes have agreed to stop: none is to be left because others are quicker."""
    if _group is not None:
        _group.ending = True


def tell(error: CvtrainError) -> None:
    """Let the other processes know why this one ends."""
    if _group is not None:
        _group.tell(error)


def last_words(speak: Callable[[CvtrainError], object]) -> None:
    """Have `speak` called before this process is left because it hangs on another one that has failed."""
    if _group is not None:
        _group.speak = speak


def finish() -> None:
    """Process 0 says that it has written everything; the others wait for that, or for its death."""
    if _group is None:
        return
    with contextlib.suppress(RuntimeError):
        if _group.rank == 0:
            _group.store.set("over", "1")
            return
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until and not _group.store.check(["over"]) and 0 not in _group.dead(SILENT_S):
            time.sleep(0.1)


def speaker() -> bool:
    """Return whether this process has to report how the run ended: process 0, or the first that lives."""
    if _group is None:
        return launch.rank() == 0
    return _group.rank == min(set(range(_group.size)) - _group.found_dead, default=0)


def _lost(error: BaseException) -> bool:
    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    marks = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(m in str(error) for m in marks))


def _plain(error: CvtrainError) -> dict[str, Any]:
    return {"type": type(error).__name__, "text": str(error), "code": error.exit_code, "retryable": error.retryable}


def _rebuilt(plain: dict[str, Any], prefix: str = "") -> CvtrainError:
    kind = getattr(errors, plain["type"], CvtrainError)
    error: CvtrainError = kind(prefix + plain["text"])
    error.exit_code, error.retryable = plain["code"], plain["retryable"]
    return error


@dataclass
class _Group:
    """The processes, and a thread that shows that this one lives and watches the others.

    Attributes:
        rank: This process's.
        size: How many there are.
        store: For the main thread; a store serves one call at a time.
        timeout_s: Seconds without a sign of life after which a process counts as dead.
        ending: Whether the main thread knows that the run ends.
        speak: Called before the process is left.
    """

    rank: int
    size: int
    store: Any
    timeout_s: float
    ending: bool = False
    speak: Callable[[CvtrainError], object] = lambda error: None
    found_dead: set[int] = field(default_factory=set)
    _heard: dict[int, tuple[bytes, float]] = field(default_factory=dict)
    _processes: list[tuple[str, int]] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, store: Any) -> None:  # noqa: ANN401 - torch's store
        """Say who this process is, learn it of the others, and start to watch them with a store of the thread's own."""
        places: list[Any] = [None] * self.size
        self.store.set(f"beat/{self.rank}", "0")
        dist.all_gather_object(places, (socket.gethostname(), os.getpid()))
        self._processes = places
        threading.Thread(target=self._watch, args=(store,), name="watch", daemon=True).start()

    def end(self) -> None:
        """Say goodbye, so that the end of this process is not taken for its death, and stop watching."""
        self._over.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(f"gone/{self.rank}", "1")

    def tell(self, error: CvtrainError) -> None:
        """Publish an error; the first one counts."""
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("failure", "", json.dumps({"rank": self.rank, **_plain(error)}))

    def failure(self, silent_s: float | None = None, store: Any = None) -> CvtrainError | None:  # noqa: ANN401
        """Return why another process has ended, None while all live.

        Args:
            silent_s: Seconds without a sign of life that mean death; None: `timeout_s`.
            store: To ask; None: the main thread's.
        """
        store = store or self.store
        try:
            if store.check(["failure"]):
                told = json.loads(store.get("failure"))
                if told["rank"] != self.rank:
                    return _rebuilt(told, f"rank {told['rank']}: ")
            dead = sorted(self.dead(self.timeout_s if silent_s is None else silent_s, store))
        except RuntimeError:  # the store ended with the machine or process that kept it
            dead = [0]
        if not dead:
            return None
        self.found_dead.update(dead)
        places = {each: "process {1} on {0}".format(*self._processes[each]) for each in dead}
        names = ", ".join(f"rank {each} ({place})" for each, place in places.items())
        return WorkerError(
            f"{names} died; the other processes stop, since training needs all.\n"
            "Often memory; the system's log says so."
        )

    def failure_within(self, seconds: float) -> CvtrainError | None:
        """Return `failure`, waiting for signs of life to fail to come."""
        until = time.monotonic() + seconds
        while True:
            failure = self.failure(SILENT_S if seconds else None)
            if failure is not None or time.monotonic() >= until:
                return failure
            time.sleep(0.1)

    def dead(self, silent_s: float, store: Any = None) -> set[int]:  # noqa: ANN401 - torch's store
        """Return the processes that have ended without a word, or given no sign of life for `silent_s` seconds."""
        store, here, now = store or self.store, socket.gethostname(), time.monotonic()
        others = [each for each in range(self.size) if each != self.rank]
        beats = store.multi_get([f"beat/{each}" for each in others])
        dead = set()
        with self._lock:
            for each, beat in zip(others, beats, strict=True):
                if self._heard.get(each, (b"", 0.0))[0] != beat:
                    self._heard[each] = (beat, now)
                host, process = self._processes[each]
                silent = now - self._heard[each][1] > silent_s
                if (silent or (host == here and not _lives(process))) and not store.check([f"gone/{each}"]):
                    dead.add(each)
        return dead

    def _watch(self, store: Any) -> None:  # noqa: ANN401 - torch's store
        beat, known_for = 0, 0.0
        while not self._over.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(RuntimeError):
                store.set(f"beat/{self.rank}", str(beat))
            failure = self.failure(store=store)
            known_for = known_for + BEAT_S if failure is not None and not self.ending else 0.0
            if failure is not None and known_for > PATIENCE_S:
                self.speak(failure)
                os._exit(failure.exit_code)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


_group: _Group | None = None
