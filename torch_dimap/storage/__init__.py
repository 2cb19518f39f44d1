"""How do weights and masks lie on disk? Read block by block, and written whole or not at all."""

from torch_dimap.storage.entries import (
    Entry,
    count_kept,
    entry_of,
    fill,
    masked,
    read_mask,
    read_values,
)
from torch_dimap.storage.folders import copied_folder
from torch_dimap.storage.headers import NAMES
from torch_dimap.storage.packing import bits_of
from torch_dimap.storage.quantised import refuse_quantised
from torch_dimap.storage.records import Operations, Pruned, Record
from torch_dimap.storage.replacing import check_target
from torch_dimap.storage.stored import (
    Checkpoint,
    Weights,
    holds_masks_alone,
    name_of,
    open_weights,
    refuse_masks_alone,
)
from torch_dimap.storage.writing import write_weights

__all__ = [
    "NAMES",
    "Checkpoint",
    "Entry",
    "Operations",
    "Pruned",
    "Record",
    "Weights",
    "bits_of",
    "check_target",
    "copied_folder",
    "count_kept",
    "entry_of",
    "fill",
    "holds_masks_alone",
    "masked",
    "name_of",
    "open_weights",
    "read_mask",
    "read_values",
    "refuse_masks_alone",
    "refuse_quantised",
    "write_weights",
]
