"""All methods side by side, on a small ViT and scikit-learn's digits."""

import csv

import side_by_side
import timm
import torch
from safetensors.torch import save_file


def test_every_method_gets_a_row_and_no_run_is_done_twice(tmp_path):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    words = [
        "--checkpoints", tmp_path / "dense.safetensors", "--targets", 0.6, "--epochs", 3,
        "--lr", 1e-3, "--gate-lr", 0.3, "--narrow", "0.6:embed_dim=12", "--scratch-epochs", 2,
        "--rounds", 2, "--output", tmp_path / "runs", "--results", tmp_path, "--name", "all", "--",
        "vit_tiny_patch16_224", "--model-kwargs", *(f"{k}={v}" for k, v in shape.items()),
        "--data", "digits", "--data-kwargs", "crop_pct=1.0", "--augmentation", "none",
        "--batch-size", 256, "--workers", 0, "--amp", "none", "--device", "cpu",
    ]  # fmt: skip
    side_by_side.main(list(map(str, words)))
    with open(tmp_path / "all.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(side_by_side.METHODS)
    assert {row["epochs"] for row in list(rows.values())[1:5]} == {"3"}
    dense = int(rows["dense"]["counted"])
    assert int(rows["DIMAP, zeros"]["counted"]) == dense
    assert int(rows["DIMAP, zeros"]["theoretical"]) <= 0.6 * dense
    assert int(rows["units, data-free score"]["counted"]) <= 0.6 * dense
    assert int(rows["narrower, from scratch"]["counted"]) < dense
    assert (tmp_path / "all.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/*/*.safetensors")}
    side_by_side.main(list(map(str, words)))
    assert len(before) >= 6
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
