"""What should the kept weights be, so that each layer gives what the dense one gave?"""

from torch_dimap.reconstruction.reconstructing import reconstruct
from torch_dimap.reconstruction.refitting import Misfit
from torch_dimap.reconstruction.scores import sparsegpt_scores, wanda_scores
from torch_dimap.reconstruction.solving import solve_exactly, solve_masked

__all__ = [
    "Misfit",
    "reconstruct",
    "solve_exactly",
    "solve_masked",
    "sparsegpt_scores",
    "wanda_scores",
]
