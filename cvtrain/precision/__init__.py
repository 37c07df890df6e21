"""Number formats of the training step; the `precision` group."""

from __future__ import annotations

import copy
import logging
import statistics
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


class Precision:
    """float32 throughout; subclasses change the autocast type and the scaler."""

    dtype: torch.dtype | None = None
    """Type that autocast computes in; None: no autocast."""
    scaled = False
    """Whether gradients are scaled (fp16)."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.skipped_in_a_row = 0

    def setup(self, device: torch.device, model: nn.Module, loss: Loss) -> None:
        """Settle the format for `device`; `model` and `loss` are for a probe and are left as they were."""
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.scaled)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which forward passes run."""
        return torch.autocast(self.device.type, dtype=self.dtype) if self.dtype is not None else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`, scaled where the format needs it."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None) -> Tensor | None:
        """Take the optimizer's step, clipping first; return the gradient norm when clipping measured it.

        Under fp16 the norm may be infinite: the scaler then skips the step and lowers its scale.
        """
        norm = None
        if clip_grad_norm is not None:
            self.scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
        before = self.scaler.get_scale() if self.scaled else 1.0
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.scaled:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.scaler.get_scale() < before else 0
            if self.skipped_in_a_row > MAX_SKIPPED:
                raise DivergedError(
                    f"fp16: {MAX_SKIPPED} steps in a row overflowed and were skipped; the last checkpoint "
                    f"is from before.\n"
                    "Lower optimizer.lr, set clip_grad_norm=1.0, or use precision=bf16 or precision=fp32."
                )
        return norm

    def describe(self) -> str:
        """Return the format in use, as it is stored and shown."""
        return "float32" if self.dtype is None else str(self.dtype).removeprefix("torch.")

    def state(self) -> dict[str, object]:
        """Return what a resume needs: the format a probe chose, and the scaler."""
        return {"format": self.describe(), "scaler": dict(self.scaler.state_dict()) if self.scaled else {}}

    def load_state(self, state: dict[str, object]) -> None:
        """Take back `state`, so that a resumed run computes in the same format."""
        self.dtype = _BY_NAME[str(state["format"])]
        self.scaled = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaled)
        if self.scaled and isinstance(state["scaler"], dict):
            self.scaler.load_state_dict(state["scaler"])


class Fp32(Precision):
    """float32 throughout, without TensorFloat-32."""

    def setup(self, device: torch.device, model: nn.Module, loss: Loss) -> None:
        """Turn TensorFloat-32 off."""
        super().setup(device, model, loss)
        _allow_tf32(False)


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
            if ratio < 1.0:
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

    def _speedup(self, model: nn.Module, loss: Loss, rounds: int = 3) -> float:
        """Return how many times faster than float32 a forward and backward pass is, median of interleaved rounds."""
        trial = copy.deepcopy(model).train()
        times: dict[bool, list[float]] = {False: [], True: []}
        for i in range(rounds + 1):
            for low in (False, True):
                start = time.perf_counter()
                with self.autocast() if low else nullcontext():
                    value = loss(trial)
                value.backward()  # type: ignore[no-untyped-call]
                if i:  # the first round pays for compilation of the kernels
                    times[low].append(time.perf_counter() - start)
            if times[True] and times[True][-1] > 2 * times[False][-1]:
                break  # far slower: no need to suffer more rounds of it
        return statistics.median(times[False]) / statistics.median(times[True])


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
