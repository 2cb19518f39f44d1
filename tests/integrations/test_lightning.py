"""Lightning: pruned in rounds, stopped, resumed, averaged, baked, with the real Trainer."""

from __future__ import annotations

import pytest
import torch
from conftest import make_swin
from torch import nn

from torch_dimap import (
    DimapUnstructured,
    group_parameters,
    group_units,
    load_pruned,
    prune_like,
    remove_all,
)

pytest.importorskip("lightning.pytorch", reason="needs lightning")
from lightning.pytorch import LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
)

from torch_dimap.integrations.lightning import PruningCallback  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
IMAGES = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 10
PLAN = {"amount": 0.6, "begin": 1, "end": 7, "every": 3}  # rounds at 1, 4, 7


class Classifier(LightningModule):
    """As a user writes it; ``on_load_checkpoint`` is the one line for ours."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_swin()
        self.densities: list[float] = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.densities.append(float(self.trainer.callback_metrics.get("density", -1)))
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def on_load_checkpoint(self, checkpoint):
        prune_like(self, checkpoint["state_dict"])


class Plain(Classifier):
    """The same without a thought of pruning."""

    def on_load_checkpoint(self, checkpoint):
        pass


def batches():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=4)


def fit(folder, *callbacks, steps, resume=None, module=None):
    """Train, by default a new module, up to so many updates; write a checkpoint at the end."""
    torch.manual_seed(0)
    module = module or Plain()
    saving = ModelCheckpoint(folder, every_n_train_steps=steps, filename="{step}")
    trainer = Trainer(
        max_steps=steps, max_epochs=-1, callbacks=[*callbacks, saving], accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    for stage in module.net.modules():  # chance would have to be resumed too
        if type(stage).__name__ == "DropPath":
            stage.drop_prob = 0.0
    trainer.fit(module, batches(), ckpt_path=resume)
    return module, trainer


def masks(module):
    return {k: v for k, v in module.named_buffers() if k.endswith("weight_mask")}


@pytest.mark.parametrize("bake", [False, True])
@pytest.mark.parametrize("parameters", [group_parameters, group_units])
def test_a_run_that_resumes_ends_in_the_same_weights(tmp_path, bake, parameters):
    options = {**PLAN, "bake": bake, "parameters": parameters}
    whole, _ = fit(tmp_path / "whole", PruningCallback(**options), steps=10)
    fit(tmp_path / "half", PruningCallback(**options), steps=4)  # between rounds, after an epoch
    callback = PruningCallback(**options)
    resumed, _ = fit(tmp_path / "half", callback, steps=10, resume=tmp_path / "half/step=4.ckpt")
    assert callback.schedule.rounds_done == 3
    torch.testing.assert_close(masks(resumed), masks(whole), rtol=0, atol=0)
    expected, found = remove_all(whole).state_dict(), remove_all(resumed).state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_density_is_logged_and_later_stages_leave_the_masks(tmp_path):
    callback = PruningCallback(**PLAN)
    module, trainer = fit(tmp_path, callback, steps=8)
    shares = [1 - (2 / 3) ** 3, 1 - (1 / 3) ** 3, 1]
    expected = [1.0, *(1 - 0.6 * share for share in shares for _ in range(3))][:8]
    assert module.densities == pytest.approx(expected, abs=1e-3)
    schedule = callback.schedule
    module.test_step = lambda batch, batch_idx: None
    trainer.test(module, batches(), verbose=False)
    assert callback.schedule is schedule


def test_load_from_checkpoint_with_one_hook(tmp_path):
    module, _ = fit(tmp_path, PruningCallback(**PLAN), steps=8, module=Classifier())
    loaded = Classifier.load_from_checkpoint(tmp_path / "step=8.ckpt", weights_only=True)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)
    inner = load_pruned(make_swin(), tmp_path / "step=8.ckpt", masked=True)  # the network alone
    assert {f"net.{key}" for key in masks(inner)} == set(masks(module))
    with pytest.raises(RuntimeError, match="Missing key"):
        Plain.load_from_checkpoint(tmp_path / "step=8.ckpt", weights_only=True)


def test_baked_checkpoints_load_into_dense_modules(tmp_path):
    module, _ = fit(tmp_path, PruningCallback(**PLAN, bake=True), steps=8)
    assert masks(module)  # the one in training stays masked
    loaded = Plain.load_from_checkpoint(tmp_path / "step=8.ckpt", weights_only=True)
    baked = remove_all(module).state_dict()
    torch.testing.assert_close(loaded.state_dict(), baked, rtol=0, atol=0)


def test_an_average_of_the_weights_has_the_masks(tmp_path):
    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    module, _ = fit(tmp_path, PruningCallback(**PLAN), average, steps=8)
    network = average._average_model.module if average._average_model else module
    torch.testing.assert_close(masks(network), masks(module), rtol=0, atol=0)
    zeros = sum(int((~mask).sum()) for mask in masks(module).values())
    assert zeros == round(0.6 * sum(mask.numel() for mask in masks(module).values()))


def test_bake_is_refused_where_lightning_would_not_do_it(tmp_path):
    weights = ModelCheckpoint(tmp_path, save_weights_only=True)
    with pytest.raises(ValueError, match="found save_weights_only=True"):
        fit(tmp_path, PruningCallback(**PLAN, bake=True), weights, steps=1)


def test_lightnings_own_callback_is_refused_rather_than_plain_magnitude(tmp_path):
    module = Plain()
    pairs = [pair for group in group_parameters(module).values() for pair in group]
    own = ModelPruning(DimapUnstructured, pairs, amount=0.5, use_lottery_ticket_hypothesis=False)
    with pytest.raises(ValueError, match="sizes must tell the layers apart"):
        fit(tmp_path, own, steps=4, module=module)
