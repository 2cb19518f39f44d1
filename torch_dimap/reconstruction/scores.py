"""Scores that weigh a layer's weights by what the layer sees, for ``importance_scores=``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torch_dimap.masking import Pair, Parameters, find_layers_in, refuse_sharded_model
from torch_dimap.reconstruction.batches import read_batches
from torch_dimap.reconstruction.reconstructing import check_damping
from torch_dimap.reconstruction.refitting import Refit, gather
from torch_dimap.reconstruction.solving import inverse_of
from torch_dimap.reconstruction.streams import Stream
from torch_dimap.reconstruction.study import study


def wanda_scores(
    model: nn.Module, batches: Iterable[Any], parameters: Parameters | None = None
) -> dict[Pair, Tensor]:
    """Score each weight by its magnitude times the root mean square of its input.

    Args:
        model: the model, dense or pruned, and then as it is; it comes back as it was.
        batches: images without labels, as :func:`torch_dimap.reconstruct` takes them.
        parameters: ``(module, name)`` pairs, by group or in one list. Default: all groups.

    Returns:
        ``(module, name)`` -> scores of the weight's shape, float32, for the argument
        ``importance_scores`` of :func:`torch_dimap.global_module_aware_unstructured`, which
        ranks them group by group. Wanda itself ranks them row by row.

    Raises:
        TypeError, ValueError: as :func:`torch_dimap.reconstruct`.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    2023, arXiv 2306.11695.

    Example:
        >>> net = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 10))
        >>> pairs = [(net[0], "weight"), (net[2], "weight")]
        >>> scores = wanda_scores(net, [torch.randn(64, 20)], pairs)
        >>> [tuple(score.shape) for score in scores.values()]
        [(10, 20), (10, 10)]
    """

    def factors(moments: Tensor) -> Tensor:
        return moments.diagonal().sqrt()

    return _scores(model, batches, parameters, factors, "wanda_scores()")


def sparsegpt_scores(
    model: nn.Module,
    batches: Iterable[Any],
    parameters: Parameters | None = None,
    *,
    damping: float = 0.01,
) -> dict[Pair, Tensor]:
    """Score each weight by what its loss costs once the columns after it make up for it.

    That is SparseGPT's choice of a mask, taken from the dense weights; SparseGPT looks again
    after every 128 columns, when these have moved. The squares of the scores are the rises of
    the output's squared error.

    Args:
        model: as in :func:`wanda_scores`.
        batches: as there.
        parameters: as there.
        damping: added to the inputs' second moments, as a part of their mean.

    Returns:
        As :func:`wanda_scores`.

    Raises:
        TypeError, ValueError: as :func:`torch_dimap.reconstruct`.

    Source: Frantar and Alistarh, "SparseGPT", 2023, arXiv 2301.00774, Sec. 3.3.
    """

    def factors(moments: Tensor) -> Tensor:
        ridge = damping * moments.diagonal().mean().expand(len(moments))
        upper = torch.linalg.cholesky(inverse_of(moments + torch.diag(ridge)), upper=True)
        return 1 / upper.diagonal()

    check_damping(damping, "sparsegpt_scores()")
    return _scores(model, batches, parameters, factors, "sparsegpt_scores()")


def _scores(
    model: nn.Module,
    batches: Iterable[Any],
    parameters: Parameters | None,
    factors: Callable[[Tensor], Tensor],
    caller: str,
) -> dict[Pair, Tensor]:
    """Multiply the weights' magnitudes by a factor for each input, made of x x^T on average."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(model, nn.Module):
        refuse_sharded_model(model, caller)
    layers = [x for group in find_layers_in(model, parameters, caller).values() for x in group]
    calls = read_batches(model, batches, caller)
    scores: dict[Pair, Tensor] = {}
    with torch.inference_mode(False), study(model, calls, layers, [[]], caller) as (found, call):
        stream = Stream(call, len(calls), found.steps, [])
        for step in found.steps:
            refits = [Refit(layer, biased=False) for layer in sum(step.levels, [])]
            gather(refits, stream, None, found)
            for refit in refits:
                score = refit.masked.abs()
                for (first, last), sums in refit.sums.items():
                    sums.check(f"{caller}: the inputs of {refit.layer.label}")
                    score[first:last] *= factors(sums.inputs / sums.tokens).float()
                pair = refit.layer.module, refit.layer.name
                scores[pair] = score.view_as(refit.layer.parameter)
            stream.advance(found.uses)
    return scores
