"""Number formats of the training step; the `precision` group."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from cvtrain.errors import ConfigError, DivergedError

log = logging.getLogger("cvtrain")

Loss = Callable[[nn.Module], Tensor]
"""Runs the model on one real batch and returns the scalar loss: what a probe times."""


MAX_SKIPPED = 20
"""fp16 steps in a row that the scaler may skip; it never gives up by itself."""


PROBE_ROUNDS = 12
"""Rounds of a probe at most: the first does not count."""
PROBE_SECONDS = 1.0
"""After this long a probe ends, but not before its second round unless the first took five times as long."""
WORTHWHILE = 1.05
"""How many times the speed of float32 a format needs to be chosen; less is noise."""


class Precision:
    """float32 throughout; subclasses change the autocast type and the scaler."""

    dtype: torch.dtype | None = None
    """Type that autocast computes in; None: no autocast."""
    scaled = False
    """Whether gradients are scaled (fp16)."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self._skipped = torch.zeros(())
        self._skipped_in_a_row = torch.zeros(())
        self._told = 0

    def setup(self, device: torch.device, model: nn.Module, loss: Loss) -> None:
        """Settle the format for `device`; `model` and `loss` are for a probe and are left as they were."""
        self.device = device
        _allow_tf32(False)  # also after another job of a sweep
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.scaled)
        self._skipped = torch.zeros((), device=device)
        self._skipped_in_a_row = torch.zeros((), device=device)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        return torch.autocast(self.device.type, dtype=self.dtype) if self.dtype is not None else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`, scaled where the format needs it."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def clip(self, optimizer: torch.optim.Optimizer, norm: float | None, value: float | None) -> list[Tensor]:
        """Make the gradients ready for the step, clipped first by value, then by norm.

        Args:
            optimizer: Its parameters' gradients are accumulated.
            norm: Largest L2 norm over all parameters; None: any.
            value: Largest magnitude of one number; None: any.

        Returns:
            L2 norms of the gradient's parts, or of the whole, before it was clipped by norm: float32 scalars on the
            device. An overflow of fp16 counts as 0: the scaler skips that step and lowers its scale.
        """
        if self.scaled:
            self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if value is not None:
            nn.utils.clip_grad_value_(parameters, value)
        norms = list(torch._foreach_norm([p.grad for p in parameters]))
        if norm is None and not self.scaled:
            return norms  # added up when they are read: a step of a tiny model has no time for it
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, norm, total)
        return [total.nan_to_num(0.0, 0.0) if self.scaled else total]

    def step(self, optimizer: torch.optim.Optimizer, halt: Tensor) -> None:
        """Take the optimizer's step, unless `halt` is 1.

        Fused optimizers see for themselves on the device; for the others the flag is copied to the host.

        Args:
            optimizer: Its gradients are ready.
            halt: float32 scalar on the device.
        """
        _begin_momentum(optimizer)
        if self.scaled:
            before = self._scale().clone()
            # The scaler knows of gradients only; a loss that is not finite must hold this step and later ones back too.
            for found in self.scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                found.copy_(torch.maximum(found, halt))
            self.scaler.step(optimizer)
            self.scaler.update()
            skipped = (self._scale() < before).float()
            self._skipped_in_a_row = (self._skipped_in_a_row + skipped) * skipped
            self._skipped = self._skipped + skipped
        elif _has_plain_fused_step(optimizer):
            _fused_sgd_step(optimizer, halt)
        elif getattr(optimizer, "_step_supports_amp_scaling", False):
            vars(optimizer).update(found_inf=halt, grad_scale=None)
            optimizer.step()
        elif not bool(halt):
            optimizer.step()

    def _scale(self) -> Tensor:
        scale = self.scaler._get_scale_async()
        return scale if isinstance(scale, Tensor) else torch.ones((), device=self.device)

    def check(self) -> None:
        """See whether the scaler still finds a scale, and tell what it skipped; waits for the device.

        Raises:
            DivergedError: More than 20 steps in a row overflowed.
        """
        if not self.scaled:
            return
        if self.skipped > self._told:
            self._told = self.skipped
            log.info(
                "precision: fp16 has skipped %d steps whose gradients overflowed, and tries smaller scales", self._told
            )
        if int(self._skipped_in_a_row) > MAX_SKIPPED:
            raise DivergedError(
                f"fp16: more than {MAX_SKIPPED} steps in a row overflowed and were skipped; the last checkpoint "
                f"is from before.\n"
                "Lower optimizer.lr, set clip_grad_norm=1.0, or use precision=bf16 or precision=fp32."
            )

    @property
    def skipped(self) -> int:
        """Return how many steps the scaler has skipped; waits for the device."""
        return int(self._skipped)

    def describe(self) -> str:
        """Return the format in use, as it is stored and shown."""
        return "float32" if self.dtype is None else str(self.dtype).removeprefix("torch.")

    def state(self) -> dict[str, object]:
        """Return what a resume needs: the format a probe chose, and the scaler."""
        if not self.scaled:
            return {"format": self.describe(), "scaler": {}}
        skipped = [self.skipped, int(self._skipped_in_a_row)]
        return {"format": self.describe(), "scaler": dict(self.scaler.state_dict()), "skipped": skipped}

    def load_state(self, state: dict[str, object]) -> None:
        """Take back `state`, so that a resumed run computes in the same format."""
        self.dtype = _BY_NAME[str(state["format"])]
        self.scaled = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaled)
        if self.scaled and isinstance(state["scaler"], dict):
            self.scaler.load_state_dict(state["scaler"])
        skipped = state.get("skipped")
        if isinstance(skipped, list):
            total, in_a_row = skipped
            self._skipped = torch.tensor(float(total), device=self.device)
            self._skipped_in_a_row = torch.tensor(float(in_a_row), device=self.device)
            self._told = int(total)


class Fp32(Precision):
    """float32 throughout, without TensorFloat-32."""


class Tf32(Precision):
    """float32 storage, TensorFloat-32 matrix products and convolutions (NVIDIA, compute capability 8.0 and above)."""

    def setup(self, device: torch.device, model: nn.Module, loss: Loss) -> None:
        """Turn TensorFloat-32 on; say so where the device has none."""
        super().setup(device, model, loss)
        _allow_tf32(True)
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            log.info("precision: tf32 needs an NVIDIA GPU of capability 8.0; this run computes in float32")


class Bf16(Precision):
    """bfloat16 autocast over float32 weights."""

    dtype = torch.bfloat16


class Fp16(Precision):
    """float16 autocast over float32 weights, gradients scaled against underflow (Micikevicius et al., ICLR 2018)."""

    dtype = torch.float16
    scaled = True

    def setup(self, device: torch.device, model: nn.Module, loss: Loss) -> None:
        """Refuse a CPU, which computes float16 by emulation.

        Raises:
            ConfigError: The device is a CPU.
        """
        if device.type == "cpu":
            raise ConfigError(
                "precision=fp16 with device=cpu: a CPU has no fast float16. Use precision=amp or precision=fp32."
            )
        super().setup(device, model, loss)


class Amp(Precision):
    """bf16 or fp16, whichever the device computes natively; float32 where a probe of this model finds that faster.

    Args:
        probe: Whether to time a few steps of this model on a CPU first; the answer is stored for a resume.
    """

    def __init__(self, probe: bool = True) -> None:
        super().__init__()
        self.probe = probe

    def setup(self, device: torch.device, model: nn.Module, loss: Loss) -> None:
        """Choose and say which, in one line."""
        self.dtype, reason = native_dtype(device)
        self.scaled = self.dtype is torch.float16
        super().setup(device, model, loss)
        if self.dtype is None:
            log.info("precision: amp stays with float32: %s", reason)
        elif self.probe and device.type == "cpu":
            ratio = self._speedup(model, loss)
            _return_freed_memory()
            if ratio < WORTHWHILE:
                log.info(
                    "precision: amp stays with float32: %s (%s) runs this model at %.2f× its speed",
                    self.describe(),
                    reason,
                    ratio,
                )
                self.dtype = None
            else:
                log.info(
                    "precision: amp uses %s (%s), %.2f× the speed of float32 in a short probe",
                    self.describe(),
                    reason,
                    ratio,
                )
        else:
            log.info(
                "precision: amp uses %s (%s)%s",
                self.describe(),
                reason,
                " with a gradient scaler" if self.scaled else "",
            )

    def _speedup(self, model: nn.Module, loss: Loss) -> float:
        """Return how many times faster than float32 a forward and backward pass is.

        Compared are the fastest of interleaved rounds: other work on the machine only ever adds time.
        """
        trial = copy.deepcopy(model).train()
        fastest = {False: math.inf, True: math.inf}
        began = time.perf_counter()
        for i in range(PROBE_ROUNDS):
            for low in (False, True):
                start = time.perf_counter()
                with self.autocast() if low else nullcontext():
                    value = loss(trial)
                value.backward()  # type: ignore[no-untyped-call]
                seconds = time.perf_counter() - start
                # The first round pays for the making of kernels, which only steps that take long hide.
                fastest[low] = seconds if i < 2 else min(fastest[low], seconds)
            elapsed = time.perf_counter() - began
            if elapsed > PROBE_SECONDS * (1 if i else 5):
                break
        return fastest[False] / fastest[True]


def _return_freed_memory() -> None:
    """Give the system back what a probe has freed; glibc would keep it, hundreds of MB, in pieces that fit nothing."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD zeros to begin with: its fused step, told to skip the first update, goes on with unwritten memory."""
    groups = optimizer.param_groups
    if not isinstance(optimizer, torch.optim.SGD) or len(optimizer.state) == sum(len(g["params"]) for g in groups):
        return
    for group in groups:
        if group["fused"] and group["momentum"] and not group["dampening"]:  # which halves of nothing would not equal
            for p in group["params"]:
                if p.grad is not None and "momentum_buffer" not in optimizer.state[p]:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _has_plain_fused_step(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step is no more than torch's fused kernel of SGD with momentum, group by group."""
    if (
        type(optimizer) is not torch.optim.SGD
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
    ):
        return False
    return all(group["fused"] and group["momentum"] and not group["dampening"] for group in optimizer.param_groups)


@torch.no_grad()
def _fused_sgd_step(optimizer: torch.optim.Optimizer, halt: Tensor) -> None:
    """Call the kernel; what `Optimizer.step` does around it is a sixth of a tiny model's step."""
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        torch._fused_sgd_(
            parameters,
            [p.grad for p in parameters],
            [optimizer.state[p]["momentum_buffer"] for p in parameters],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=False,
            grad_scale=None,
            found_inf=halt,
        )


_BY_NAME: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def native_dtype(device: torch.device) -> tuple[torch.dtype | None, str]:
    """Return the 16-bit type that `device` computes natively, or None, and why."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 0):
            return torch.bfloat16, f"compute capability {major}.{minor}"
        if (major, minor) >= (7, 0):
            return torch.float16, f"compute capability {major}.{minor} has no native bf16"
        return None, f"compute capability {major}.{minor} has no tensor cores"
    if device.type == "cpu":
        capabilities = cpu_features()
        named = [
            label
            for flag, label in (("avx512_bf16", "AVX512-BF16"), ("amx_bf16", "AMX"), ("bf16", "Arm BF16"))
            if flag in capabilities
        ]
        if named and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return torch.bfloat16, "CPU with " + " and ".join(named)
        return None, "this CPU has no native bf16"
    return None, f"{device.type} is used in float32"


def cpu_features() -> set[str]:
    """Return the CPU's instruction-set flags as Linux names them; empty elsewhere."""
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123 - not a path of the user's
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return set()
    return set(lines[0].split(":", 1)[1].split()) if lines else set()


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
