"""What goes whole? Attention heads and neurons: described, masked, and removed."""

from torch_dimap.units.attaching import mask_units
from torch_dimap.units.checks import check_units
from torch_dimap.units.counts import UnitCount, count_units
from torch_dimap.units.description import Attribute, Part, UnitLayer
from torch_dimap.units.grouping import (
    UnitRule,
    builtin_unit_rule,
    describe_units,
    group_units,
    list_units,
    units_left_out,
)
from torch_dimap.units.masks import (
    KeptUnits,
    UnitPlan,
    global_module_aware_structured,
    plan_units,
)
from torch_dimap.units.removal import cut_units, remove_units
from torch_dimap.units.scores import unit_magnitudes

__all__ = [
    "Attribute",
    "KeptUnits",
    "Part",
    "UnitCount",
    "UnitLayer",
    "UnitPlan",
    "UnitRule",
    "builtin_unit_rule",
    "check_units",
    "count_units",
    "cut_units",
    "describe_units",
    "global_module_aware_structured",
    "group_units",
    "list_units",
    "mask_units",
    "plan_units",
    "remove_units",
    "unit_magnitudes",
    "units_left_out",
]
