"""What does a unit do for each class? One learned factor per class and unit."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_dimap.learning.attached import Attached
from torch_dimap.learning.gates import Units, gated, layers_of, refuse_idle
from torch_dimap.learning.labels import check_classes, check_labels
from torch_dimap.learning.penalties import PENALTIES
from torch_dimap.units import UnitLayer


class ClassMasks(Attached):
    """Learn what every head and neuron contributes to predicting each class.

    X-Pruner-style (Yu and Xiang, CVPR 2023, whose authors published no code;
    ``docs/xpruner.md`` says what is known from where). A unit layer gets a matrix of classes x
    units. In training, the units of an image are multiplied by its own class's row; how large
    an entry stays, while a penalty makes all of them small, is the unit's value for the class.

    Nothing of the model is replaced: its layers get forward pre-hooks, and the masks are
    parameters of this module alone. The model's weights are frozen until :meth:`remove`. Call
    ``model.eval()`` first: a batch norm in training mode would go on counting.

    The masks know the right class of an image, so **what they make the model predict is no
    prediction**: they carry the label into it. They are a score of units, nothing else.

    They take ``4 * num_classes * units`` bytes: 71 MB for Swin-T and 1000 classes, as much
    again for their gradients, and twice as much for Adam.

    Works with ``torch.compile``, autocast, gradient checkpointing (with the backward inside
    :meth:`labels` too, since it runs the forward again) and, in a :class:`Joined`, under
    ``DistributedDataParallel``.

    Args:
        model: the model that the units are of. Its first tensor argument holds the batch.
        units: group -> unit layers, as :func:`torch_dimap.group_units` returns them; or unit
            layers alone.
        num_classes: how many classes the labels tell apart.
        initial: what every entry is at first. With 1 the model's outputs are what they were,
            to the last bit.
        freeze: whether the model's own parameters get no gradients meanwhile.

    Raises:
        TypeError, ValueError: for arguments of a wrong type or out of range, units of another
            model, or layers that a model reads without calling them.

    Example:
        >>> import timm, torch, torch_dimap
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10).eval()
        >>> images, labels = torch.randn(4, 3, 224, 224), torch.tensor([3, 1, 4, 1])
        >>> with ClassMasks(vit, torch_dimap.group_units(vit), num_classes=10) as masks:
        ...     optimizer = torch.optim.AdamW(masks.parameters(), lr=0.01)
        ...     with masks.labels(labels):
        ...         loss = torch.nn.functional.cross_entropy(vit(images), labels)
        ...         (loss + 1e-4 * masks.penalty("squares")).backward()
        ...     optimizer.step()
        >>> done = torch_dimap.global_module_aware_structured(
        ...     torch_dimap.group_units(vit), amount=0.5, importance_scores=masks.scores()
        ... )
    """

    layers: tuple[UnitLayer, ...]
    masks: nn.ParameterList
    num_classes: int
    _applied: set[UnitLayer]

    def __init__(
        self,
        model: nn.Module,
        units: Units,
        num_classes: int,
        initial: float = 1.0,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        caller = "ClassMasks()"
        self.layers = layers_of(model, units, caller)
        if isinstance(num_classes, bool) or not isinstance(num_classes, numbers.Integral):
            raise TypeError(
                f"{caller}: num_classes must be an int, found {type(num_classes).__name__}."
            )
        if num_classes < 1:
            raise ValueError(f"{caller}: num_classes must be 1 or more, found {num_classes}.")
        if isinstance(initial, bool) or not isinstance(initial, numbers.Real):
            raise TypeError(f"{caller}: initial must be a number, found {type(initial).__name__}.")
        if not math.isfinite(initial):
            raise ValueError(f"{caller}: initial must be finite, found {initial}.")
        self.num_classes = int(num_classes)
        self.masks = nn.ParameterList(
            torch.full((self.num_classes, x.units), float(initial), device=x.read.tensor.device)
            for x in self.layers
        )
        self._labels: Tensor | None = None
        with contextlib.ExitStack() as undo:
            gates = {layer: self._rows_of(i) for i, layer in enumerate(self.layers)}
            self._applied = undo.enter_context(gated(gates, caller))
            check = model.register_forward_pre_hook(self._batch_check(), with_kwargs=True)
            undo.callback(check.remove)
            if freeze:
                undo.enter_context(_frozen(model))
            self._undo = undo.pop_all()

    @contextlib.contextmanager
    def labels(self, labels: Tensor) -> Iterator[None]:
        """Tell, for the forwards inside the ``with`` block, the classes of their images.

        Args:
            labels: a class for each image of the batch, ``(images,)``, integers; or its
                shares, ``(images, num_classes)``, as mixup makes them: the image then gets
                that mixture of its classes' rows.

        Raises:
            TypeError, ValueError: for labels that are none of these.
            RuntimeError: after :meth:`remove`; or, at the end, if the model ran and passed by
                some of the layers that read the units, without calling them.
        """
        caller = "ClassMasks.labels()"
        if self._undo is None:
            raise RuntimeError(f"{caller}: the masks are removed from the model: make new ones.")
        check_labels(labels, self.num_classes, caller)
        if not labels.is_floating_point():
            labels = labels.long()  # data sets keep classes in bytes, too
        before, self._labels = self._labels, labels.to(self.masks[0].device)
        try:
            yield
            refuse_idle(self.layers, self._applied, caller)
        finally:
            self._labels = before

    def penalty(self, name: str = "squares") -> Tensor:
        """Return a penalty on all masks, to be weighed and added to the loss.

        Args:
            name: ``"squares"``, their sum over all entries; ``"norms"``, the sum of the layers'
                norms; ``"unit_laplacian"`` and ``"class_difference"``, absolute differences
                between neighbouring units or classes; ``"class_mean"``, squared distances of
                the classes from their mean.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PENALTIES:
            raise ValueError(
                f"ClassMasks.penalty(): name must be one of {', '.join(PENALTIES)}, found {name!r}."
            )
        return PENALTIES[name](list(self.masks))

    def scores(
        self, classes: Iterable[int] | None = None, signed: bool = False
    ) -> dict[UnitLayer, Tensor]:
        """Return how much each unit gives to the classes, for the calls that prune units.

        Args:
            classes: those that count, as for a deployment that meets no others. Default: all.
            signed: add the entries up with their signs and take the magnitude of the sum,
                so that what a unit does for one class and against another cancels. Default:
                add up their magnitudes.

        Returns:
            Unit layer -> float64 tensor of one number per unit: what
            :func:`torch_dimap.global_module_aware_structured` and
            :func:`torch_dimap.prune_units_to_flops` take as ``importance_scores``.

        Raises:
            TypeError, ValueError: for classes that are not among those of the masks, listed
                twice, or none at all.
        """
        rows = range(self.num_classes) if classes is None else check_classes(
            classes, self.num_classes, "ClassMasks.scores()"
        )  # fmt: skip
        found = {}
        for layer, mask in zip(self.layers, self.masks):
            values = mask.detach()[list(rows)].double()
            found[layer] = values.sum(0).abs() if signed else values.abs().sum(0)
        return found

    def _rows_of(self, i: int) -> Callable[[], Tensor]:
        """Return what gives a layer's gates: for each image of the batch its row."""

        def rows() -> Tensor:
            mask, labels = self.masks[i], _present(self._labels)
            return labels.to(mask.dtype) @ mask if labels.dim() == 2 else F.embedding(labels, mask)

        return rows

    def _batch_check(self) -> Callable[..., None]:
        """Return a hook for the model: are there labels, and one for each of its images?"""

        def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            labels = _present(self._labels)
            batch = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if batch is not None and len(batch) != len(labels):
                raise ValueError(
                    f"ClassMasks.labels(): expected a label for each image of the batch, found "
                    f"{len(labels)} labels for {len(batch)} images."
                )

        return check


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of the model ask for a gradient inside the ``with`` block."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _present(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise RuntimeError(
            "ClassMasks: the model runs with class masks, and no labels say whose: call it inside "
            "`with masks.labels(labels)`, backward too where activations are checkpointed; or "
            "masks.remove() first."
        )
    return labels
