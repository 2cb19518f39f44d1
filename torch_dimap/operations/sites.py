"""Which attentions can be replaced, and what is known of each."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_dimap.masking import pruned_tensors
from torch_dimap.operations.modules import Operation
from torch_dimap.text import name_some

# Class of the model -> of its blocks -> of their attentions.
KNOWN = {
    "timm.models.vision_transformer.VisionTransformer": (
        "timm.models.vision_transformer.Block", "timm.layers.attention.Attention",
    ),
    "timm.models.swin_transformer.SwinTransformer": (
        "timm.models.swin_transformer.SwinTransformerBlock",
        "timm.models.swin_transformer.WindowAttention",
    ),
}  # fmt: skip
# With these an attention is no longer its values mixed and projected.
MIXED = ("norm", "gate")


class Site(NamedTuple):
    """One block's place for an attention, and what it needs to hold anything else."""

    name: str  # of the attention in the model
    block: nn.Module
    attention: Any  # what is there now
    dim: int
    grid: tuple[int, int]  # height and width of the map of tokens
    prefix_tokens: int  # that come before those of the map; 0 where the block is given maps
    window: tuple[int, int] | None  # that the attention sees at once; None: all tokens

    @property
    def operation(self) -> str:
        """What is there now, by name."""
        return getattr(self.attention, "operation", "attention")

    @property
    def heads(self) -> int:
        return self.attention.num_heads

    @property
    def width(self) -> int:
        """How many channels a head has."""
        return self.attention.proj.in_features // self.heads

    def values(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias that make the attention's values."""
        qkv, rows = self.attention.qkv, self.heads * self.width
        return qkv.weight[-rows:], None if qkv.bias is None else qkv.bias[-rows:]


def find_sites(model: nn.Module, caller: str) -> list[Site]:
    """Return where a model's attentions are, or were before they were replaced, in order.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: for models and attentions that are not known.
        RuntimeError: if attentions are pruned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be an nn.Module, found {type(model).__name__}.")
    names = _class_names(model)
    known = next((row for kind, row in KNOWN.items() if kind in names), None)
    if known is None:
        raise ValueError(
            f"{caller}: model must be one of timm's ViTs (vit_*, deit_*) or Swins (swin_*), which "
            f"give their blocks a map of patches, found {type(model).__name__}: pass the model "
            "itself, without wrappers."
        )
    if hasattr(model, "num_prefix_tokens") and _changes_its_map(model):
        raise ValueError(
            f"{caller}: expected a ViT that is always given the same map of patches, found one "
            "with dynamic_img_size, patch_drop_rate, or a network before its patches: build it "
            "for one size of images, without these."
        )
    blocks = {
        name: module for name, module in model.named_modules()
        if isinstance(getattr(module, "attn", None), nn.Module)
        or isinstance(getattr(module, "attns", None), nn.Module)
    }  # fmt: skip
    wrong = [
        f"{name} ({type(module).__name__}{_why(module)})"
        for name, module in blocks.items()
        if known[0] not in _class_names(module) or not _fits(module.attn, known[1])
    ]
    if wrong or not blocks:
        raise ValueError(
            f"{caller}: expected blocks with attentions of {known[1].rpartition('.')[2]} alone, "
            f"found {name_some(wrong) or 'no block'}: such models keep their attentions."
        )
    places = tuple(f"{name}.attn." for name in blocks)
    pruned = [x.label for x in pruned_tensors(model, caller) if x.label.startswith(places)]
    if pruned:
        raise RuntimeError(
            f"{caller}: attentions must have no masks, found some on {name_some(pruned)}: call "
            "remove_all(model) first."
        )
    return [_site(f"{name}.attn", block, model) for name, block in blocks.items()]


def _changes_its_map(model: Any) -> bool:
    """Tell a ViT whose tokens are not always those of the map that it was built for."""
    embedding = model.patch_embed
    fixed = getattr(embedding, "strict_img_size", True)
    return not fixed or hasattr(embedding, "backbone") or bool(getattr(model.patch_drop, "prob", 0))


def _class_names(module: nn.Module) -> list[str]:
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]


def _fits(attention: nn.Module, kind: str) -> bool:
    if isinstance(attention, Operation):
        return True
    return _class_names(attention)[0] == kind and not _mixed(attention)


def _mixed(attention: nn.Module) -> list[str]:
    """Name what an attention has between its values and its projection."""
    found = ((name, getattr(attention, name, None)) for name in MIXED)
    return [name for name, layer in found if not isinstance(layer, (nn.Identity, type(None)))]


def _why(block: nn.Module) -> str:
    attention = getattr(block, "attn", None)
    if attention is None:
        return ""
    mixed = _mixed(attention)
    return f" with {type(attention).__name__}" + (f" and its {', '.join(mixed)}" if mixed else "")


def _site(name: str, block: Any, model: Any) -> Site:
    attention = block.attn
    if hasattr(block, "window_size"):
        grid, prefix, window = block.input_resolution, 0, block.window_size
    else:
        grid, prefix, window = model.patch_embed.grid_size, model.num_prefix_tokens, None
    return Site(name, block, attention, block.norm1.weight.numel(), tuple(grid), prefix, window)
