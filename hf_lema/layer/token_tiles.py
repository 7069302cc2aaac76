"""Running the token-wise part of a layer in tiles of tokens, so that its activations are those of a tile.

Responsibility: finding that part by structure, and running it in tiles. Knows nothing of weights or layers' visits.

In a decoder layer most activations belong to the feed-forward part, which treats every token alone, and of the rest
many to the norms, which compute in float32. They are found, not named: a child of the layer that holds several
matrices, or none, is called with one tensor [batch, tokens, hidden] and gives one back, and gives the same for a part
of the tokens as for all. In the recompute each tile is checkpointed: its forward runs once more in exchange for the
memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_lema.layer.swaps import changed

MAX_RELATIVE_ERROR = 2e-2
"""Between some tokens together and apart; see `hf_lema.layer.micro_batch.MAX_RELATIVE_ERROR`."""

_NUM_CHECKED_TOKENS = 32


class TokenTiles:
    """Decides what runs in tiles; shared by all layers of a model.

    Args:
        tile_tokens: Tokens of a tile, all sequences of the batch counted; 0 for no tiles.
        is_verified: Whether what is called as a token-wise part is one; it is then not checked.

    Attributes:
        tile_tokens: As given; may be changed between steps.
    """

    def __init__(self, tile_tokens: int = 0, is_verified: bool = False) -> None:
        self.tile_tokens = tile_tokens
        self._is_verified = is_verified
        self._token_wise: dict[tuple[type[nn.Module], str], bool] = {}
        self._said: set[type[nn.Module]] = set()

    @contextmanager
    def entered(self, layer: nn.Module, hidden: torch.Tensor, tile_tokens: int) -> Iterator[None]:
        """Has the token-wise children of a layer run in tiles inside the block.

        Args:
            layer: The layer, with weights on the device.
            hidden: Its hidden states, [batch, tokens, hidden].
            tile_tokens: Tokens of a tile: what `tile_tokens` was at the visit's forward, also in its recompute.
        """
        if not tile_tokens or hidden.shape[:-1].numel() <= tile_tokens:
            yield
            return
        # A projection of its own, one matrix, keeps no more than its input.
        parts = {name: child for name, child in layer.named_children() if _num_matrices(child) != 1}
        with self.around(type(layer), parts, tile_tokens):
            yield
        kinds = [is_wise for (kind, _), is_wise in self._token_wise.items() if kind is type(layer)]
        if not any(kinds) and type(layer) not in self._said:
            self._said.add(type(layer))
            warnings.warn(
                f"{type(layer).__name__} has no part that treats every token alone; its activations are not cut into "
                "tiles",
                stacklevel=2,
            )

    @contextmanager
    def around(self, kind: type[nn.Module], parts: Mapping[str, nn.Module], tile_tokens: int) -> Iterator[None]:
        """Has modules run in tiles inside the block, those of them that turn out to be token-wise.

        Args:
            kind: Class of the module that they are children of.
            parts: The modules, by their names in it.
            tile_tokens: Tokens of a tile.
        """
        with changed(
            (child.__dict__, "forward", self._tiled((kind, name), child, child.forward, tile_tokens))
            for name, child in parts.items()
        ):
            yield

    def _tiled(
        self, key: tuple[type[nn.Module], str], child: nn.Module, plain: Callable[..., Any], tile_tokens: int
    ) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or args[0].dim() != 3:
                return plain(*args, **kwargs)
            (hidden,) = args
            if key not in self._token_wise:
                self._token_wise[key] = self._is_verified or _is_token_wise(child, plain, hidden.detach())
            if not self._token_wise[key]:
                return plain(hidden)
            # Contiguous, as the whole is: some experts look at it as a list of tokens.
            tiles = [t.contiguous() for t in hidden.split(max(1, tile_tokens // hidden.shape[0]), dim=1)]
            if not torch.is_grad_enabled():
                return torch.cat([plain(tile) for tile in tiles], dim=1)
            return torch.cat([checkpoint(plain, tile, use_reentrant=False) for tile in tiles], dim=1)

        return forward


def _num_matrices(module: nn.Module) -> int:
    return sum(parameter.dim() > 1 for parameter in module.parameters())


def _is_token_wise(child: nn.Module, plain: Callable[..., Any], hidden: torch.Tensor) -> bool:
    """Compares some tokens, together and in two halves, without dropout."""
    training = [(module, module.training) for module in child.modules()]
    few = hidden[:, :_NUM_CHECKED_TOKENS].contiguous()
    half = max(1, few.shape[1] // 2)
    try:
        for module, _ in training:
            module.training = False
        with torch.no_grad():
            together = plain(few)
            if not isinstance(together, torch.Tensor) or together.shape != few.shape:
                return False
            apart = torch.cat([plain(part.contiguous()) for part in few.split(half, dim=1)], dim=1)
    finally:
        for module, was_training in training:
            module.training = was_training
    error = (together.float() - apart.float()).norm()
    return bool(error <= MAX_RELATIVE_ERROR * together.float().norm())
