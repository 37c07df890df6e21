"""Structured pruning: whole channels removed, so that parameters, arithmetic and time really fall."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from cvtrain.compression.budget import FINEST, LATENCY_FINEST, Chooser, ratio_within, relative_latency
from cvtrain.compression.channels import ChannelGroup, channel_groups, check_removal
from cvtrain.compression.importance import CHANNEL_IMPORTANCES, ChannelImportance, channel_scores
from cvtrain.compression.stages import check_stages, run_stages
from cvtrain.compression.steps import check_finetuning
from cvtrain.core.artifact import Compressed, CompressionContext
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.errors import ConfigError, did_you_mean

WHERE = "compression.prune_structured"
TARGETS = ("pruning_ratio", "target_macs", "target_params", "target_latency")
DEFAULT_TARGET = ("target_macs", 0.45)
"""What holds where no target is given."""
_TAYLOR_BATCHES = 8


@dataclass
class PruneStructured:
    """Remove the channels that matter least, together with all that hangs on them, then fine-tune.

    Source: Fang et al., "DepGraph: towards any structural pruning", CVPR 2023. Of the groups of channels that hang
    together the least important channels go, until a share is gone or a budget is met. The file holds the smaller
    network, which every runtime runs faster.

    Attributes:
        pruning_ratio: Share of the channels to remove, above 0 and below 1.
        target_macs: Share of the multiply-accumulates to leave, above 0 and below 1. Without any target: 0.45.
        target_params: Share of the parameters to leave.
        target_latency: Share of the time for one picture to leave, in eager PyTorch on this machine.
        iterative_steps: Pruning ratios of stages, rising, each followed by fine-tuning.
        importance: What tells which channels matter: see `channel_scores`.
        global_pruning: Rank the channels of all layers together; otherwise every layer loses the same share.
        round_to: Channels left are multiples of it, and no fewer than it.
        finetune_epochs: Epochs of training behind each stage; 0 for none.
        finetune_lr: Share of the run's learning rate that this training begins at, above 0.
        distill: Fine-tune with the answers of the model before as well.
        seed: Of `importance="random"`.

    Raises:
        ConfigError: A value out of range, or two targets at once.
    """

    pruning_ratio: float | None = None
    target_macs: float | None = None
    target_params: float | None = None
    target_latency: float | None = None
    iterative_steps: Sequence[float] | None = None
    importance: ChannelImportance = "magnitude"
    global_pruning: bool = False
    round_to: int = 16
    finetune_epochs: int = 2
    finetune_lr: float = 0.1
    distill: bool = False
    seed: int = 0
    label: ClassVar[str] = "pruned"

    def __post_init__(self) -> None:
        """Check the settings."""
        stages = check_stages(WHERE, self.iterative_steps)
        given = {key: getattr(self, key) for key in TARGETS if getattr(self, key) is not None}
        for key, value in given.items():
            if not 0.0 < value < 1.0:
                raise ConfigError(f"{WHERE}.{key}={value}: must be a share above 0 and below 1, such as 0.5")
        names = [*given, *([] if stages is None else ["iterative_steps"])]
        if len(names) > 1:
            raise ConfigError(
                f"{WHERE}: {' and '.join(names)} each say how much to remove; keep one and set the others to null"
            )
        if self.importance not in CHANNEL_IMPORTANCES:
            hint = did_you_mean(self.importance, CHANNEL_IMPORTANCES)
            raise ConfigError(f"{WHERE}.importance={self.importance}: {hint}")
        if self.round_to < 1:
            raise ConfigError(f"{WHERE}.round_to={self.round_to}: must be 1 or more")
        check_finetuning(WHERE, self.finetune_epochs, self.finetune_lr)
        target, amount = next(iter(given.items()), DEFAULT_TARGET)
        self._target = "pruning_ratio" if stages else target
        self._amounts = stages or (amount,)

    def check(self, model: nn.Module, example: Tensor) -> None:
        """See that this option fits a network before it is trained: a dry run.

        Args:
            model: Any device, mode and weights; never changed.
            example: `(1, C, H, W)` float32 input.

        Raises:
            ConfigError: It does not: channels of such a network cannot be removed, or not as many as asked for.
        """
        copied, images = copy.deepcopy(model).cpu().eval(), example.cpu()
        groups = channel_groups(copied, images)
        check_removal(copied, groups, self.round_to, images)
        if self.importance == "bn_scale" and not any(isinstance(module, _NormBase) for module in copied.modules()):
            raise ConfigError(
                f"{WHERE}.importance=bn_scale: {type(model).__name__} has no batch norm; use importance=magnitude"
            )
        chooser = self._chooser(groups, channel_scores(copied, groups, "random", self.seed), _sizes(groups))
        if self._target == "pruning_ratio" and not any(len(gone) for gone in chooser.doomed(self._amounts[0])):
            raise ConfigError(
                f"{WHERE}: taking {self._amounts[0]:g} of the channels takes none where each layer keeps a multiple of "
                f"round_to={self.round_to}.\nLower round_to, or take more."
            )
        if self._target in ("target_macs", "target_params"):
            least = self._share_left(copied, chooser, images)(1.0)
            if least > self._amounts[0]:
                raise self._unreachable(least)

    def apply(self, model: nn.Module, name: str, context: CompressionContext) -> Compressed:
        """Prune a copy of `model`, fine-tune it and save its weights; in stages if asked for.

        Args:
            model: On the CPU, in eval mode; never changed.
            name: Of the artifact.
            context: Uses `example`, `finetune`, `save_weights` and `folder`; `backward` for `importance="taylor"`,
                `evaluate` for stages.

        Returns:
            The smaller model and its `.safetensors`.

        Raises:
            ConfigError: See `check`.
        """
        dense = _sizes(channel_groups(model, context.example))
        macs, params = count_macs(model, context.example), count_params(model)

        def shrink(current: nn.Module, amount: float) -> nn.Module:
            pruned = self._prune(current, amount, dense, context)
            if self.finetune_epochs:
                context.finetune(pruned, self.finetune_epochs, self.finetune_lr, model if self.distill else None)
            return pruned

        def describe(pruned: nn.Module) -> str:
            left = count_macs(pruned, context.example) / macs, count_params(pruned) / params
            return (
                f"channels removed: {100 * left[0]:.1f} % of the MACs and {100 * left[1]:.1f} % of the parameters left"
            )

        last, artifacts, points = run_stages(
            model,
            name,
            context,
            amounts=self._amounts,
            shrink=shrink,
            describe=describe,
            effective_params=count_params,
            removed=lambda pruned: 1 - sum(_channels(pruned, layer) for layer in dense) / sum(dense.values()),
        )
        return Compressed(artifacts, last, smaller=True, tradeoff=points, layers=tuple(_layer_rows(model, last)))

    def _prune(
        self, model: nn.Module, amount: float, dense: Mapping[str, int], context: CompressionContext
    ) -> nn.Module:
        """Return a copy of `model` without the channels that `amount` of the target, or of a stage, stands for."""
        groups = channel_groups(model, context.example)
        check_removal(model, groups, self.round_to, context.example)
        measured = model
        if self.importance == "taylor":
            # A copy, as gradients of frozen parameters are wanted, too, and batch norm would count the batches.
            measured = copy.deepcopy(model).requires_grad_(True)
            context.backward(measured, _TAYLOR_BATCHES)
        chooser = self._chooser(groups, channel_scores(measured, groups, self.importance, self.seed), dense)
        if self._target == "pruning_ratio":
            return chooser.prune(model, amount)
        share = self._share_left(model, chooser, context.example)
        ratio = ratio_within(share, amount, LATENCY_FINEST if self._target == "target_latency" else FINEST)
        if ratio is None:
            raise self._unreachable(share(1.0))
        return chooser.prune(model, ratio)

    def _chooser(self, groups: Sequence[ChannelGroup], scores: Sequence[Tensor], dense: Mapping[str, int]) -> Chooser:
        return Chooser(groups, scores, dense, self.round_to, self.global_pruning)

    def _share_left(self, model: nn.Module, chooser: Chooser, example: Tensor) -> Callable[[float], float]:
        """Return a function from the pruning ratio to the share of what the target counts that `model` keeps."""
        if self._target == "target_latency":
            return lambda ratio: relative_latency(chooser.prune(model, ratio), model, example)
        # Sizes only: without content, copies cost neither memory nor arithmetic.
        empty = copy.deepcopy(model).to("meta")
        count = count_params if self._target == "target_params" else functools.partial(count_macs, example=example)
        whole = count(empty)
        return lambda ratio: count(chooser.prune(empty, ratio)) / whole

    def _unreachable(self, least: float) -> ConfigError:
        return ConfigError(
            f"{WHERE}.{self._target}={self._amounts[0]} cannot be reached: {least:.3f} are left where no layer keeps "
            f"more than it must (round_to={self.round_to}).\nRaise {self._target}, or lower round_to."
        )


def _sizes(groups: Sequence[ChannelGroup]) -> dict[str, int]:
    return {group.layer: group.channels for group in groups}


def _channels(model: nn.Module, layer: str) -> int:
    weight: Tensor = model.get_submodule(layer).weight  # type: ignore[assignment]
    return weight.shape[0]


def _layer_rows(dense: nn.Module, pruned: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield how many channels and parameters each layer that makes channels had and has."""
    for path, module in dense.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            left = pruned.get_submodule(path)
            yield {
                "layer": path,
                "kind": type(module).__name__,
                "channels": len(module.weight),
                "channels_left": len(left.weight),  # type: ignore[arg-type]
                "params": count_params(module),
                "params_left": count_params(left),
            }
