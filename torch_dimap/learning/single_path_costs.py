"""What a choice of operations and neurons costs, as SPViT counts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from torch_dimap.operations import OPERATIONS, Operation, Site, find_sites
from torch_dimap.text import name_some
from torch_dimap.units import UnitLayer, list_units

CALL = "single_path_flops()"
# From the cheapest to the dearest, as the gates nest: none open, one, two, all three.
NESTED = tuple(reversed(OPERATIONS))


class SinglePathCosts(NamedTuple):
    """Multiply-adds of a model for one image: what is fixed, and what can be chosen."""

    fixed: int  # patches, norms, merging, head
    attention: tuple[tuple[int, ...], ...]  # block -> of each operation in NESTED
    neuron: tuple[int, ...]  # block -> of one neuron
    neurons: tuple[int, ...]  # block -> how many there are

    @property
    def dense(self) -> int:
        """Of the whole model."""
        return int(self.total(["attention"] * len(self.neuron), self.neurons))

    def total(self, operations: Sequence[str] | Tensor, neurons: Sequence[int] | Tensor) -> Any:
        """Return the multiply-adds of a choice: see :func:`single_path_flops`."""
        total: Any = self.fixed
        for i, costs in enumerate(self.attention):
            if isinstance(operations, Tensor):
                steps = (dear - cheap for cheap, dear in zip(costs, costs[1:]))
                total = total + costs[0] + sum(g * s for g, s in zip(operations[i], steps))
            else:
                total = total + costs[NESTED.index(operations[i])]
            total = total + self.neuron[i] * neurons[i]
        return total


def single_path_flops(
    model: nn.Module, operations: Sequence[str] | Tensor, neurons: Sequence[int] | Tensor
) -> Any:
    """Count the multiply-adds of a choice of operations and neurons, for one image.

    A function of the model's geometry alone; nothing is run. It counts as the authors of
    SPViT do: patch embedding, norms of blocks, patch merging and head; attentions as all
    products with queries, keys and values in them; and neither the class token in
    convolutions and MLPs, nor biases, activations and batch norms.
    :func:`torch_dimap.count_flops` counts what is computed instead, and differs from this
    by a few in a hundred. Where the authors' formulas say nothing: a neuron of a gated MLP costs
    what makes and reads it; registers count in attentions as a class token does; and so do
    the paddings of a Swin's windows.

    Args:
        model: one of timm's ViTs or Swins, dense.
        operations: what each block has, in order: ``"attention"``, ``"conv3"``,
            ``"conv1"`` or ``"skip"``. Or, to differentiate, a tensor (blocks, 3) of nested
            gates: at least a 1x1 convolution, at least a 3x3 one, an attention.
        neurons: how many neurons each block keeps; or a tensor (blocks,).

    Returns:
        Multiply-adds: an int, or a tensor if one was given.

    Raises:
        TypeError, ValueError: for other models, another number of blocks, unknown
            operations, or more neurons than there are.

    Source: He et al., TPAMI 2024, arXiv 2111.11802; formulas from the authors' code.

    Example:
        >>> import timm
        >>> deit = timm.create_model("deit_tiny_patch16_224")
        >>> single_path_flops(deit, ["attention"] * 12, [768] * 12)
        1251052032
        >>> single_path_flops(deit, ["conv1"] * 2 + ["attention"] * 10, [384] * 12)
        825966336
    """
    costs = single_path_costs(model, CALL)
    blocks = len(costs.neuron)
    for name, given in (("operations", operations), ("neurons", neurons)):
        if isinstance(given, str) or not isinstance(given, (Sequence, Tensor)):
            raise TypeError(
                f"{CALL}: {name} must be a sequence or a tensor, found {type(given).__name__}."
            )
        if len(given) != blocks:
            raise ValueError(f"{CALL}: {name} must be for {blocks} blocks, found {len(given)}.")
    if isinstance(operations, Tensor):
        if operations.shape != (blocks, 3):
            raise ValueError(
                f"{CALL}: gates must have the shape ({blocks}, 3), found {tuple(operations.shape)}."
            )
    else:
        wrong = next((x for x in operations if x not in OPERATIONS), None)
        if wrong is not None:
            raise ValueError(
                f"{CALL}: operations must be among {', '.join(OPERATIONS)}, found {wrong!r}."
            )
    if not isinstance(neurons, Tensor):
        for i, (kept, most) in enumerate(zip(neurons, costs.neurons)):
            if isinstance(kept, bool) or not isinstance(kept, int) or not 0 <= kept <= most:
                raise ValueError(
                    f"{CALL}: neurons[{i}] must be an int between 0 and {most}, found {kept!r}."
                )
    return costs.total(operations, neurons)


def single_path_costs(model: nn.Module, caller: str) -> SinglePathCosts:
    """Read off a dense model what all choices cost."""
    sites = find_sites(model, caller)
    replaced = next((site.name for site in sites if isinstance(site.attention, Operation)), None)
    if replaced is not None:
        raise ValueError(
            f"{caller}: the model must have all its attentions, found {replaced} replaced: pass "
            "the dense model, which the operations are chosen for."
        )
    fixed = sum(2 * site.dim * _tokens(site) for site in sites) + _around_blocks(model)
    mlps = find_mlps(model, sites, caller).values()
    return SinglePathCosts(
        fixed,
        tuple(map(_attention_costs, sites)),
        tuple(_weights_of_one(mlp) * _patches(site) for mlp, site in zip(mlps, sites)),
        tuple(mlp.units for mlp in mlps),
    )


def find_mlps(model: nn.Module, sites: list[Site], caller: str) -> dict[str, UnitLayer]:
    """Return the unit layers of the blocks' MLPs by name, in the order of blocks.

    Raises:
        ValueError: if a block has no MLP whose neurons can go.
        RuntimeError: if MLPs have masks.
    """
    layers = {x.name: x for x in list_units(model, None, caller) if x.kind == "neurons"}
    names = [f"{site.name.rpartition('.')[0]}.mlp" for site in sites]
    wrong = [name for name in names if name not in layers or layers[name].obstacle]
    if wrong:
        raise ValueError(
            f"{caller}: expected an MLP whose neurons can go in every block, found none in "
            f"{name_some(wrong)}."
        )
    masked = [name for name in names if any(part.mask is not None for part in layers[name].parts)]
    if masked:
        raise RuntimeError(
            f"{caller}: MLPs must have no masks, found some in {name_some(masked)}: call "
            "remove_units(model) or remove_all(model) first."
        )
    return {name: layers[name] for name in names}


def _weights_of_one(mlp: UnitLayer) -> int:
    """Count the weights that make and read one neuron."""
    return sum(part.tensor.numel() for part in mlp.parts if part.name == "weight") // mlp.units


def _patches(site: Site) -> int:
    return site.grid[0] * site.grid[1]


def _tokens(site: Site) -> int:
    return _patches(site) + site.prefix_tokens


def _attention_costs(site: Site) -> tuple[int, ...]:
    """Return what each operation in NESTED costs in a block."""
    patches, dim, inner = _patches(site), site.dim, site.heads * site.width
    conv1, conv3 = 2 * dim * site.width * patches, 10 * dim * site.width * patches
    if site.window is None:
        tokens, groups = _tokens(site), 1
    else:
        tokens = site.window[0] * site.window[1]
        groups = -(-site.grid[0] // site.window[0]) * -(-site.grid[1] // site.window[1])
    attention = groups * (4 * tokens * dim * inner + 2 * tokens**2 * inner)
    return 0, conv1, conv3, attention


def _around_blocks(model: Any) -> int:
    """Count the patch embedding, patch merging and the head."""
    embedding = model.patch_embed.proj.weight.numel() * model.patch_embed.num_patches
    heads = [getattr(model, name, None) for name in ("head", "head_dist")]
    heads = [getattr(head, "fc", head) for head in heads]
    head = sum(h.weight.numel() for h in heads if isinstance(h, nn.Linear))
    merging = 0
    for stage in getattr(model, "layers", ()):
        reduction = getattr(stage.downsample, "reduction", None)
        if reduction is not None:
            height, width = stage.blocks[0].input_resolution
            merging += reduction.weight.numel() * height * width
    return embedding + head + merging
