"""What should the kept weights be, so that each layer gives what it gave?"""

from torch_dimap.reconstruction.reconstructing import reconstruct
from torch_dimap.reconstruction.refitting import Misfit

__all__ = ["Misfit", "reconstruct"]
