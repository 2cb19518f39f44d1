"""Where a state dict lies in what a training script saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torch_dimap.text import name_some

# The keys under which training scripts save a state dict. Averaged weights come first, as in
# timm: they are what such a script evaluates.
_HOLDERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "params_ema", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "params", "net"),
)
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")  # torch.compile, DDP, in either order


def find_state_dict(saved: Any, where: str) -> dict[str, Tensor]:
    """Return the tensors of the state dict in what was saved, without wrappers' prefixes.

    Args:
        saved: a state dict, or a dict that holds one, at any depth.
        where: what it was read from, for messages.

    Raises:
        ValueError: if there is none; the message names the keys that are there.
    """
    tensors = _tensors_in(saved, depth=3)
    if not tensors:
        keys = [str(key)[:40] for key in saved] if isinstance(saved, Mapping) else []
        listed = f"the keys {name_some(keys)}" if keys else f"a {type(saved).__name__}"
        raise ValueError(
            f"{where} must hold a state dict, found no tensor in it, but {listed}: a state dict is "
            f"looked for under keys such as {', '.join(_HOLDERS[6:9])}; pass the one you mean."
        )
    return {_unwrapped(name): tensor for name, tensor in tensors.items()}


def _tensors_in(saved: Any, depth: int) -> dict[str, Tensor]:
    """Return the first tensors found under the holders' keys, else those of this very dict."""
    if not isinstance(saved, Mapping):
        return {}
    inner = (_tensors_in(saved.get(key), depth - 1) for key in _HOLDERS if depth)
    found = next(filter(None, inner), None)
    return found or {
        k: v for k, v in saved.items() if isinstance(k, str) and isinstance(v, Tensor)
    }


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
