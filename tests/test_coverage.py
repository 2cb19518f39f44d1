"""The checked-in table of coverage is what the code does."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
from packaging.version import Version

SCRIPT = Path(__file__).parents[1] / "docs" / "make_coverage.py"
spec = importlib.util.spec_from_file_location("make_coverage", SCRIPT)
make_coverage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_coverage)
TABLE = make_coverage.read()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["model"])
def test_the_table_of_coverage_agrees_with_the_code(row):
    if row["library"] == "transformers":
        pytest.importorskip("transformers")
    if row["library"] == "timm" and not timm.is_model(row["model"]):
        pytest.skip(f"this timm has no {row['model']}")
    if Version(version(row["library"])) < Version(row["version"]):
        pytest.skip(f"the table is of {row['library']} {row['version']}, which names layers anew")
    again = make_coverage.row(row["library"], row["family"], row["model"])
    assert {**again, "version": row["version"]} == row


def test_the_page_shows_the_table():
    assert make_coverage.PAGE.read_text() == make_coverage.page(TABLE)


@pytest.mark.parametrize(
    "family",
    "swin swin_s3 swinv2 swinv2_cr pvt_v2 twins mvitv2 hiera maxvit coatnet mobilevit "
    "mobilevitv2 levit nest pit xcit cait convit crossvit volo efficientformer vit deit deit3 "
    "beit eva02 swin_t swin_v2_t vit_b_16 SwinModel Swinv2Model ViTModel PvtV2Model".split(),
)
def test_the_table_has_three_groups_for(family):
    [row] = [row for row in TABLE if row["family"] == family]
    assert all(int(row[group]) for group in make_coverage.GROUPS)
    assert not row["warns"]
