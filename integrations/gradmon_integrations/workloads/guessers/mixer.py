"""LocalMixer: a mixer whose blocks learn from losses of their own (Ren et al., arXiv 2210.03310)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradmon._errors import ArgumentError


class LocalMixer(nn.Module):
    """Blocks over patches of an image, with a stopped gradient between two blocks and a classifier behind each.

    As in the authors' code: an image is cut into patches; the first block mixes channels, the others first mix tokens
    (a
    P x P matrix shared by the channels), then channels; a block ends with a linear layer in groups of channels. Every
    linear layer is followed by a normalisation over the channels without weights of its own and a ReLU; from the second
    block on, the block's input is added before the last one. Behind each block a classifier, zero at first, reads
    the mean over the patches of the normalised output.

    Simplified: the paper replicates each block's loss over patches and groups of channels, so that each of them
    has a directional derivative of its own; here a block has one loss. ``estimate_gradient(..., per_layer=True)``
    gives each layer its own derivative. The paper's separate classifier for the final read-out is the last block's.

    Args:
        shape: Of an image, (channels, height, width).
        classes: How many classes there are.
        patches: Patches along height and width.
        channels: The width of the blocks; a multiple of `groups`.
        blocks: How many blocks there are.
        groups: Groups of channels.

    Raises:
        ArgumentError: The sizes do not fit.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        *,
        patches: int = 4,
        channels: int = 64,
        blocks: int = 3,
        groups: int = 4,
    ) -> None:
        super().__init__()
        depth, height, width = shape
        if height % patches or width % patches:
            raise ArgumentError("patches", f"divide height and width {(height, width)}", patches)
        if channels % groups:
            raise ArgumentError("groups", f"divide the {channels} channels", groups)
        if blocks < 1:
            raise ArgumentError("blocks", "be at least 1", blocks)
        self.patches = patches
        inside = depth * (height // patches) * (width // patches)
        self.blocks = nn.ModuleList(
            _Block(inside if number == 0 else channels, channels, patches**2 if number else None, groups)
            for number in range(blocks)
        )
        self.heads = nn.ModuleList(nn.Linear(channels, classes) for _ in range(blocks))
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def predictions(self, images: Tensor) -> list[Tensor]:
        """The logits behind each block: images (B, channels, height, width) -> (B, classes) each."""
        size = images.shape[2] // self.patches, images.shape[3] // self.patches
        x = F.unfold(images, size, stride=size)  # (B, inside, P)
        found: list[Tensor] = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x)
            found.append(head(_normalized(x).mean(-1)))
            x = x.detach()
        return found

    def forward(self, images: Tensor) -> Tensor:
        """The logits behind the last block, (B, classes)."""
        return self.predictions(images)[-1]


def local_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The sum over the blocks of each example's cross-entropy, (B,).

    Raises:
        ArgumentError: `model` is no LocalMixer.
    """
    if not isinstance(model, LocalMixer):
        raise ArgumentError("model", "be a LocalMixer", type(model).__name__)
    images, labels = batch
    losses = [F.cross_entropy(logits, labels, reduction="none") for logits in model.predictions(images)]
    return torch.stack(losses).sum(0)


class _Block(nn.Module):
    def __init__(self, inside: int, channels: int, tokens: int | None, groups: int) -> None:
        super().__init__()
        self.tokens = None if tokens is None else nn.Linear(tokens, tokens)
        self.channels = nn.Conv1d(inside, channels, 1)
        self.groups = nn.Conv1d(channels, channels, 1, groups=groups)
        for layer in (self.tokens, self.channels, self.groups):
            if layer is not None:
                nn.init.normal_(layer.weight, std=min(2 / layer.weight[0].numel() ** 0.5, 0.1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, P) -> (B, channels, P)."""
        mixed = x if self.tokens is None else F.relu(_normalized(self.tokens(x)))
        mixed = F.relu(_normalized(self.channels(mixed)))
        mixed = _normalized(self.groups(mixed))
        return F.relu(mixed if self.tokens is None else mixed + x)


def _normalized(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the channels of each patch, (B, channels, P)."""
    return F.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2)
