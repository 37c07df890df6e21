"""Unstructured pruning: single weights set to zero."""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from cvtrain.compression.steps import artifact_file
from cvtrain.core.artifact import TORCH, Artifact, Compressed, CompressionContext
from cvtrain.core.complexity import count_macs, count_params
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
        importance: Importance = "l1",
        global_pruning: bool = True,
        finetune_epochs: int = 2,
        seed: int = 0,
    ) -> None:
        """Check the settings.

        Args:
            sparsity: Share of the weights to zero, above 0 and below 1.
            importance: `l1` zeroes the smallest magnitudes, `random` any weights.
            global_pruning: Rank the weights of all layers together; otherwise zero the same share of every layer.
            finetune_epochs: Epochs of training with the zeros held; 0 for none.
            seed: Seed of `importance="random"`.

        Raises:
            ConfigError: A value out of range.
        """
        where = "compression.prune_unstructured"
        if not 0.0 < sparsity < 1.0:
            raise ConfigError(f"{where}.sparsity={sparsity}: must be above 0 and below 1, such as 0.5")
        if importance not in _IMPORTANCES:
            raise ConfigError(f"{where}.importance={importance}: {did_you_mean(importance, _IMPORTANCES)}")
        if finetune_epochs < 0:
            raise ConfigError(f"{where}.finetune_epochs={finetune_epochs}: must be 0 or more")
        self.sparsity = sparsity
        self.importance = importance
        self.global_pruning = global_pruning
        self.finetune_epochs = finetune_epochs
        self.seed = seed

    def apply(self, model: nn.Module, name: str, context: CompressionContext) -> Compressed:
        """Prune a copy of `model`, fine-tune it and save its weights.

        Args:
            model: On the CPU; never changed.
            name: Name of the artifact.
            context: Uses `example`, `finetune`, `save_weights` and `folder`.

        Returns:
            The pruned model with plain weights (no masks left), and its `.safetensors`.

        Raises:
            CvtrainError: The model has no layer to prune.
        """
        masked = copy.deepcopy(model)
        layers = prunable_layers(masked)
        if not layers:
            raise CvtrainError("compression.prune_unstructured: the model has no convolution or linear layer to prune")
        self._mask(layers)
        # Masking leaves each `weight` a tensor with a gradient history, which deepcopy (as by an EMA) refuses; one
        # forward pass without gradients replaces them.
        masked.eval()
        with torch.no_grad():
            masked(context.example)
        if self.finetune_epochs:
            context.finetune(masked, self.finetune_epochs)
        for layer in layers:
            prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
        # Into a fresh copy, because removing a mask moves the weight behind the bias in the order of parameters.
        pruned = copy.deepcopy(model).cpu().eval()
        pruned.load_state_dict(masked.state_dict())
        path = context.folder / artifact_file(name, ".safetensors")
        context.save_weights(pruned, path)
        artifact = Artifact(
            name=name,
            path=path,
            runtime=TORCH,
            params=count_params(pruned),
            macs=count_macs(pruned, context.example),
            model=pruned,
            note=f"{100 * sparsity_of(prunable_layers(pruned)):.1f} % of the weights are zero; "
            "same size and speed: unstructured zeros save nothing at run time",
        )
        return Compressed(model=pruned, artifact=artifact)

    def _mask(self, layers: list[nn.Module]) -> None:
        scores: dict[tuple[nn.Module, str], Tensor] = {}
        if self.importance == "random":
            # Random scores ranked like magnitudes leave the global generators untouched, prune.RandomUnstructured
            # would not.
            generator = torch.Generator().manual_seed(self.seed)
            for layer in layers:
                weight: Tensor = layer.weight  # type: ignore[assignment]
                scores[layer, "weight"] = torch.rand(weight.shape, generator=generator)
        if self.global_pruning:
            prune.global_unstructured(
                [(layer, "weight") for layer in layers],
                pruning_method=prune.L1Unstructured,
                importance_scores=scores or None,
                amount=self.sparsity,
            )
            return
        for layer in layers:
            prune.l1_unstructured(  # type: ignore[no-untyped-call]
                layer, "weight", self.sparsity, importance_scores=scores.get((layer, "weight"))
            )


def prunable_layers(model: nn.Module) -> list[nn.Module]:
    """Return the convolutions and linear layers whose weights can be masked, in the order of `model.modules()`.

    Attention's output projection is left out: attention reads its weight without calling the layer, so the hook that
    applies a mask would never run.
    """
    hidden = {
        id(child)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    return [module for module in model.modules() if isinstance(module, _PRUNED_TYPES) and id(module) not in hidden]


def sparsity_of(layers: list[nn.Module]) -> float:
    """Return the share of exact zeros in the weights of `layers`, 0..1."""
    weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
