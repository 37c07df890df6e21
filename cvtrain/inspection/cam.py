"""Where a network looks: Grad-CAM (Selvaraju et al., "Grad-CAM: Visual explanations from deep networks", ICCV 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvtrain.core.modes import evaluating
from cvtrain.errors import ConfigError
from cvtrain.inspection.maps import as_map, check_layer, map_layers, no_map, outputs_kept, shape_of

SMALLEST = 4
"""Places a side that the default layer's map has where there is such a layer; fewer show nothing."""
BATCH = 8
"""Pictures at once: the backward pass keeps all that the forward pass computed."""


def weighted_map(activations: Tensor, gradients: Tensor) -> Tensor:
    """Return Grad-CAM at the layer's own resolution: ReLU(Σₖ αₖ Aᵏ), αₖ being the mean gradient of channel k.

    Args:
        activations: The layer's maps `(B, C, h, w)`.
        gradients: Of the class's logit by them, the same shape.

    Returns:
        `(B, h, w)`, 0 or more.
    """
    return (gradients.mean((2, 3), keepdim=True) * activations).sum(1).relu()


def grad_cam(model: nn.Module, images: Tensor, classes: Tensor, layer: str | None = None) -> Tensor:
    """Return where in each picture lies what speaks for a class.

    The same formula serves networks of tokens, with the tokens of the places for a map.

    Args:
        model: A classifier; it is run in evaluation and stays as it was.
        images: Its input, float32 `(B, C, H, W)`, on its device.
        classes: `(B,)` int64, the class asked about for each picture.
        layer: Path of the module whose map is weighted; None: that of `cam_layer`.

    Returns:
        float32 `(B, H, W)` on the CPU in 0..1, the map enlarged bilinearly, its largest value 1; 0 everywhere where
        nothing speaks for the class.

    Raises:
        ConfigError: There is no such layer, or it has no map.
    """
    if layer is None:
        layer = cam_layer(model, images[:1])
    check_layer(model, layer, "layer")
    parts = []
    for first in range(0, len(images), BATCH):
        found = _maps_and_gradients(model, images[first : first + BATCH], classes[first : first + BATCH], [layer])
        if layer not in found:
            raise no_map(model, layer, "layer")
        parts.append(weighted_map(*found[layer]).cpu())
    size = images.shape[2:]
    heat = F.interpolate(torch.cat(parts)[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)


def cam_layer(model: nn.Module, images: Tensor) -> str:
    """Return the layer that Grad-CAM is made of when nobody names one.

    It is the last feature map before the pooling that all ways to the logits pass and that the logits depend on in
    several places: behind the last convolution of a plain network, the last block of a residual one, and what enters
    the last block of a ViT, from whose result only the class token is read. Maps below 4×4 are passed over where
    there is a larger one.

    Args:
        model: A classifier.
        images: Input as it gets it, one or more pictures float32 `(B, C, H, W)`.

    Raises:
        ConfigError: The model cannot be followed, or has no map.
    """
    paths = map_layers(model, shape_of(images))
    found = _maps_and_gradients(model, images, None, paths)
    places = {path: each.shape[2:].numel() for path, (each, _) in found.items()}
    several = [path for path in places if places[path] > 1]
    # A network whose last layer is still zero has no gradient anywhere.
    read = [path for path in several if int((found[path][1] != 0).any(1).sum()) > len(images)] or several
    if not read:
        raise ConfigError(
            f"{type(model).__name__} has no feature map of several places for pictures of "
            f"{images.shape[2]}×{images.shape[3]} pixels.\nName a layer with layer=PATH."
        )
    enough = min(SMALLEST**2, max(places[path] for path in read))
    return [path for path in read if places[path] >= enough][-1]


def _maps_and_gradients(
    model: nn.Module, images: Tensor, classes: Tensor | None, paths: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each module that has a map what it is and the gradient of the class's logit by it, `(B, C, h, w)`.

    Args:
        model: A classifier.
        images: Its input.
        classes: `(B,)` int64; None: the likeliest.
        paths: Of the modules, in the order in which they run.
    """
    with evaluating(model), torch.enable_grad(), outputs_kept(model, paths) as outputs:
        # The pictures ask for a gradient so that frozen layers have one.
        logits: Tensor = model(images.clone().detach().requires_grad_())
        asked = logits.argmax(1) if classes is None else classes.to(logits.device)
        score = logits.gather(1, asked[:, None]).sum()
        gradients = torch.autograd.grad(score, list(outputs.values()), allow_unused=True)
    found = {}
    for (path, output), gradient in zip(outputs.items(), gradients, strict=True):
        activation = as_map(output.detach(), len(images))
        slope = as_map(torch.zeros_like(output) if gradient is None else gradient, len(images))
        if activation is not None and slope is not None:
            found[path] = (activation.float(), slope.float())
    return found
