"""Unstructured pruning: single weights set to zero."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from cvtrain.compression.stages import check_stages, run_stages
from cvtrain.compression.steps import check_finetuning
from cvtrain.core.artifact import Compressed, CompressionContext
from cvtrain.core.complexity import count_params
from cvtrain.errors import ConfigError, CvtrainError, did_you_mean

Importance = Literal["l1", "random"]
_IMPORTANCES: tuple[Importance, ...] = get_args(Importance)
_PRUNED_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


class PruneUnstructured:
    """Zero the least important weights of convolutions and linear layers, then fine-tune with the zeros held.

    Magnitude pruning as in Han et al., "Learning both weights and connections for efficient neural networks",
    NeurIPS 2015. The file stays as large and the model as slow as before; the value lies in what it tells about the
    model, and in runtimes with sparse kernels.
    """

    label = "pruned"

    def __init__(
        self,
        sparsity: float = 0.5,
        iterative_steps: Sequence[float] | None = None,
        importance: Importance = "l1",
        global_pruning: bool = True,
        finetune_epochs: int = 2,
        finetune_lr: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Check the settings.

        Args:
            sparsity: Share of the weights to zero, above 0 and below 1.
            iterative_steps: Sparsities of stages, rising up to `sparsity`, each followed by fine-tuning.
            importance: `l1` zeroes the smallest magnitudes, `random` any weights.
            global_pruning: Rank the weights of all layers together; otherwise zero the same share of every layer.
            finetune_epochs: Epochs of training with the zeros held, behind each stage; 0 for none.
            finetune_lr: Share of the run's learning rate that this training begins at, above 0.
            seed: Seed of `importance="random"`.

        Raises:
            ConfigError: A value out of range.
        """
        where = "compression.prune_unstructured"
        if not 0.0 < sparsity < 1.0:
            raise ConfigError(f"{where}.sparsity={sparsity}: must be above 0 and below 1, such as 0.5")
        stages = check_stages(where, iterative_steps) or (sparsity,)
        if stages[-1] != sparsity:
            raise ConfigError(
                f"{where}.iterative_steps={list(stages)} ends at {stages[-1]}, not at sparsity={sparsity}: "
                f"set {where}.sparsity={stages[-1]}"
            )
        if importance not in _IMPORTANCES:
            raise ConfigError(f"{where}.importance={importance}: {did_you_mean(importance, _IMPORTANCES)}")
        check_finetuning(where, finetune_epochs, finetune_lr)
        self.stages = stages
        self.importance = importance
        self.global_pruning = global_pruning
        self.finetune_epochs = finetune_epochs
        self.finetune_lr = finetune_lr
        self.seed = seed

    def apply(self, model: nn.Module, name: str, context: CompressionContext) -> Compressed:
        """Prune a copy of `model`, fine-tune it and save its weights; in stages if asked for.

        Args:
            model: On the CPU; never changed.
            name: Name of the artifact.
            context: Uses `example`, `finetune`, `save_weights` and `folder`, and for stages `evaluate`.

        Returns:
            The pruned model with plain weights (no masks left), its `.safetensors`, and each layer's sparsity.

        Raises:
            CvtrainError: The model has no layer to prune.
        """
        if not prunable_layers(model):
            raise CvtrainError("compression.prune_unstructured: the model has no convolution or linear layer to prune")
        last, artifacts, points = run_stages(
            model,
            name,
            context,
            amounts=self.stages,
            shrink=lambda current, sparsity: self._shrink(current, sparsity, context),
            describe=_note,
            effective_params=lambda pruned: count_params(pruned) - _zeros(pruned),
            removed=_sparsity,
        )
        return Compressed(artifacts, last, tradeoff=points, layers=tuple(_layer_rows(last)))

    def _shrink(self, model: nn.Module, sparsity: float, context: CompressionContext) -> nn.Module:
        masked = copy.deepcopy(model)
        layers = list(prunable_layers(masked).values())
        self._mask(layers, sparsity)
        # Masking leaves each `weight` a tensor with a gradient history, which deepcopy (as by an EMA) refuses; one
        # forward pass without gradients replaces them.
        masked.eval()
        with torch.no_grad():
            masked(context.example)
        if self.finetune_epochs:
            context.finetune(masked, self.finetune_epochs, self.finetune_lr, None)
        for layer in layers:
            prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
        # Into a fresh copy, because removing a mask moves the weight behind the bias in the order of parameters.
        pruned = copy.deepcopy(model).cpu().eval()
        pruned.load_state_dict(masked.state_dict())
        return pruned

    def _mask(self, layers: Sequence[nn.Module], sparsity: float) -> None:
        scores: dict[tuple[nn.Module, str], Tensor] = {}
        if self.importance == "random":
            # Random scores ranked like magnitudes leave the global generators untouched, prune.RandomUnstructured
            # would not; the same ones at every stage, so that what is zero stays zero.
            generator = torch.Generator().manual_seed(self.seed)
            for layer in layers:
                weight: Tensor = layer.weight  # type: ignore[assignment]
                scores[layer, "weight"] = torch.rand(weight.shape, generator=generator)
        if self.global_pruning:
            prune.global_unstructured(
                [(layer, "weight") for layer in layers],
                pruning_method=prune.L1Unstructured,
                importance_scores=scores or None,
                amount=sparsity,
            )
            return
        for layer in layers:
            prune.l1_unstructured(  # type: ignore[no-untyped-call]
                layer, "weight", sparsity, importance_scores=scores.get((layer, "weight"))
            )


def prunable_layers(model: nn.Module) -> Mapping[str, nn.Module]:
    """Return the convolutions and linear layers whose weights can be masked by path, in the order of the modules.

    Attention's output projection is left out: attention reads its weight without calling the layer, so the hook that
    applies a mask would never run.
    """
    hidden = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _PRUNED_TYPES) and id(module) not in hidden
    }


def _layer_rows(model: nn.Module) -> Iterator[dict[str, Any]]:
    for path, layer in prunable_layers(model).items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        zeros = int((weight == 0).sum())
        shape = "x".join(str(size) for size in weight.shape)
        yield {
            "layer": path,
            "shape": shape,
            "weights": weight.numel(),
            "zeros": zeros,
            "sparsity": zeros / weight.numel(),
        }


def _zeros(model: nn.Module) -> int:
    return sum(int(row["zeros"]) for row in _layer_rows(model))


def _sparsity(model: nn.Module) -> float:
    return _zeros(model) / sum(int(row["weights"]) for row in _layer_rows(model))


def _note(model: nn.Module) -> str:
    zeros = f"{100 * _sparsity(model):.1f} % of the weights are zero"
    return f"{zeros}; same size and speed: unstructured zeros save nothing at run time"
