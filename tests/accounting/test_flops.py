"""FLOPs by hand on small networks, against torch's counter on real ones."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from torch_dimap import (
    count_flops,
    global_module_aware_unstructured,
    group_parameters,
    remove_all,
)


class Call(nn.Module):
    """A network with one weight, and any function of it for a forward."""

    def __init__(self, forward, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))
        self.call = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.weight, *inputs)


def of_call(forward, shape: tuple[int, ...], *inputs: tuple[int, ...]) -> tuple[int, int]:
    """Return the FLOPs in all and those credited to the weight."""
    model = Call(forward, *shape)
    count = count_flops(model, tuple(map(torch.ones, inputs)), [(model, "weight")])
    return count.dense, count.layers["weight"].dense


def weights_of(model: nn.Module) -> dict[str, list]:
    """Put every matrix of the blocks into one group, whatever the family."""
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)

    def rule(qualified_name: str, module: nn.Module, name: str) -> str | None:
        inside = any(part in qualified_name for part in ("blocks", "stages", "features"))
        is_matrix = name in ("weight", "in_proj_weight") and isinstance(module, kinds)
        return "all" if inside and is_matrix else None

    return group_parameters(model, rule=rule)


def two_layers() -> tuple[nn.Sequential, dict[str, list]]:
    """8 -> 4 -> 2, of which 24 of 32 and 2 of 8 weights stay."""
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer, gone in ((model[0], 8), (model[2], 6)):
        nn.init.ones_(layer.weight)
        mask = torch.ones(layer.weight.numel())
        mask[:gone] = 0
        prune.custom_from_mask(layer, "weight", mask.view_as(layer.weight))
    return model, {"both": [(model[0], "weight"), (model[2], "weight")]}


@pytest.fixture(scope="module")
def swin():
    return timm.create_model("swin_tiny_patch4_window7_224")


IMAGE = torch.zeros(1, 3, 224, 224)


def test_count_flops_counts_a_multiply_add_once_and_no_bias():
    model = nn.Linear(5, 7)
    count = count_flops(model, torch.zeros(2, 3, 5), [(model, "weight")])
    assert count.dense == count.masked == count.uniform == 2 * 3 * 5 * 7
    assert count.layers == {"weight": (210, 210, 210)} and count.groups == {"all": (210, 210, 210)}


def test_count_flops_counts_norms_like_fvcore():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    count = count_flops(model, torch.zeros(3, 4), [(model[0], "weight")])
    assert count.dense == 3 * 4 * 6 + 5 * 3 * 6
    assert count.layers["0.weight"].dense == 3 * 4 * 6


def test_count_flops_weights_each_layer_by_its_own_density():
    model, groups = two_layers()
    count = count_flops(model, torch.zeros(10, 8), groups)
    assert count.layers["0.weight"][:2] == (320, 240)
    assert count.layers["2.weight"][:2] == (80, 20)
    assert count.groups["both"][:2] == (400, 260)
    assert (count.dense, count.masked) == (400, 260)


def test_count_flops_weights_a_group_by_its_density_for_the_uniform_convention():
    model, groups = two_layers()
    count = count_flops(model, torch.zeros(10, 8), groups)
    # 26 of 40 weights are left.
    assert count.uniform == count.groups["both"].uniform == 400 * 26 // 40
    assert count.layers["0.weight"].uniform == 320 * 26 // 40


def test_count_flops_leaves_layers_outside_of_the_groups_dense():
    model, groups = two_layers()
    count = count_flops(model, torch.zeros(10, 8), {"first": groups["both"][:1]})
    assert (count.dense, count.masked, count.uniform) == (400, 320, 320)
    assert list(count.layers) == ["0.weight"]


def test_count_flops_gives_the_same_for_masked_and_baked():
    model, groups = two_layers()
    masked = count_flops(model, torch.zeros(10, 8), groups)
    assert count_flops(remove_all(model), torch.zeros(10, 8), groups) == masked


@pytest.mark.parametrize(
    "layer, image, flops",
    [
        (nn.Conv2d(6, 4, 1), (2, 6, 5, 5), 2 * 25 * 6 * 4),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1), (1, 6, 8, 8), 16 * 6 * 4 * 9),
        (nn.Conv2d(6, 4, 3, groups=2), (1, 6, 5, 5), 9 * 3 * 4 * 9),
        (nn.Conv2d(6, 4, 3, padding="same"), (1, 6, 5, 5), 25 * 6 * 4 * 9),
        (nn.ConvTranspose2d(6, 4, 2, stride=2), (1, 6, 5, 5), 25 * 6 * 4 * 4),
        (nn.Conv1d(6, 4, 3), (1, 6, 5), 3 * 6 * 4 * 3),
    ],
)
def test_count_flops_of_convolutions(layer, image, flops):
    count = count_flops(layer, torch.zeros(image), [(layer, "weight")])
    assert count.dense == count.layers["weight"].dense == flops


@pytest.mark.parametrize(
    "forward, shape, inputs, flops",
    [
        (lambda w, x: x @ w, (5, 7), [(2, 3, 5)], 210),
        (lambda w, x: x @ w.t(), (7, 5), [(2, 3, 5)], 210),
        (lambda w, x: w @ x, (7, 5), [(2, 5, 3)], 210),  # broadcast over the batch
        (lambda w, x: torch.bmm(x, w.expand(x.size(0), -1, -1)), (5, 7), [(2, 3, 5)], 210),
        (lambda w, x: torch.mv(w, x), (7, 5), [(5,)], 35),
        (lambda w, x: w @ x, (5,), [(5,)], 5),
        (lambda w, x: torch.addmm(x.new_zeros(7), x, w), (5, 7), [(3, 5)], 105),
        (lambda w, x: torch.baddbmm(x.new_zeros(1), x, w), (2, 5, 7), [(2, 3, 5)], 210),
        (lambda w, x: torch.einsum("b...i,oi->b...o", x, w), (7, 5), [(2, 3, 5)], 210),
        (lambda w, x: torch.einsum("bi,oi", x, w), (7, 5), [(2, 5)], 70),
        (lambda w, x: torch.einsum("bij,oi->bo", x, w), (7, 5), [(2, 5, 4)], 70),  # j first
        (lambda w, x: F.linear(x, w.half().float()), (7, 5), [(3, 5)], 105),
        (lambda w, x: F.linear(x, torch.cat([w, w.new_zeros(2, 5)])), (7, 5), [(3, 5)], 135),
        (lambda w, x: F.linear(F.linear(x, w), w.t()), (7, 5), [(3, 5)], 210),
    ],
)
def test_count_flops_credits_a_weight_wherever_it_multiplies(forward, shape, inputs, flops):
    assert of_call(forward, shape, *inputs) == (flops, flops)


def test_count_flops_credits_no_weight_that_only_adds_or_scales():
    assert of_call(lambda w, x: (x * w + w) @ x.t(), (5,), (3, 5)) == (45, 0)
    assert of_call(lambda w, x: torch.einsum("bi,i->bi", x, w), (5,), (3, 5)) == (0, 0)
    assert of_call(lambda w, x: torch.outer(x, w), (5,), (3,)) == (0, 0)


def test_count_flops_shares_a_concatenated_weight_by_size():
    model = nn.ModuleDict({"q": nn.Linear(5, 4), "kv": nn.Linear(5, 8)})
    model.forward = lambda x: F.linear(x, torch.cat([model["q"].weight, model["kv"].weight]))
    count = count_flops(model, torch.zeros(3, 5), [(m, "weight") for m in model.values()])
    assert count.layers["q.weight"].dense == 60 and count.layers["kv.weight"].dense == 120


def test_count_flops_credits_a_weight_but_not_the_network_that_feeds_on_parameters():
    class Bias(nn.Module):
        """As in Swin v2, whose position biases are computed from a table."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(3, 2))
            self.first, self.second = nn.Linear(2, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.first(self.table).relu())

    model = Bias()
    count = count_flops(model, torch.zeros(3, 1), [(model.second, "weight")])
    assert count.dense == 3 * 2 * 8 + 3 * 8 and count.layers["second.weight"].dense == 3 * 8


class Bypass(nn.Module):
    """Reads a child's weight and never calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)


def test_count_flops_credits_a_bypassed_layer_rather_than_its_parent():
    model = Bypass()
    count = count_flops(model, torch.zeros(3, 5), [(model.fc, "weight")])
    assert count.layers == {"fc.weight": (105, 105, 105)}


def test_count_flops_credits_a_bypassed_layer_that_is_masked():
    model = Bypass()
    prune.l1_unstructured(model.fc, "weight", amount=14)
    count = count_flops(model, torch.zeros(3, 5), [(model.fc, "weight")])
    assert count.layers["fc.weight"].masked == count.masked == 3 * (35 - 14)


def test_count_flops_credits_a_bypassed_layer_whose_parent_refreshes_it():
    model = Bypass()
    prune.l1_unstructured(model.fc, "weight", amount=14)

    def refresh(parent: Bypass, inputs: tuple) -> None:
        parent.fc.weight = parent.fc.weight_orig * parent.fc.weight_mask

    model.register_forward_pre_hook(refresh)
    count = count_flops(model, torch.zeros(3, 5), [(model.fc, "weight")])
    assert count.layers["fc.weight"] == (105, 63, 63) and count.dense == 105


def test_count_flops_counts_fused_attention_like_the_products_it_fuses():
    def attention(w: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q @ w, k, v)

    # Two images, three heads, 7 queries, 11 keys of 5 channels, values of 4.
    inputs = [(2, 3, 7, 5), (2, 3, 11, 5), (2, 3, 11, 4)]
    products = 2 * 3 * 7 * 11 * 5 + 2 * 3 * 7 * 11 * 4
    assert of_call(attention, (5, 5), *inputs) == (products + 1050, 1050)


@pytest.mark.parametrize("need_weights", [True, False])
def test_count_flops_of_multihead_attention(need_weights):
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=need_weights)[0]

    model = Attend()
    pairs = [(model.attn, "in_proj_weight"), (model.attn.out_proj, "weight")]
    global_module_aware_unstructured(pairs, amount=0.5)
    count = count_flops(model, torch.zeros(3, 5, 8), pairs)
    assert count.layers["attn.in_proj_weight"].dense == 3 * 5 * 8 * 24
    assert count.layers["attn.out_proj.weight"].dense == 3 * 5 * 8 * 8
    assert count.dense == 3 * 5 * 8 * 32 + 2 * 3 * 5 * 5 * 8
    assert count.masked == count.dense - 3 * 5 * 8 * 32 // 2


def test_count_flops_looks_inside_an_encoder_layer_that_torch_would_fuse():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    count = count_flops(model, torch.zeros(3, 5, 8), [(model.linear1, "weight")])
    products = 15 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 2 * 3 * 5 * 5 * 8
    assert count.dense == products + 2 * 5 * 15 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_count_flops_adds_up_the_calls_of_a_shared_layer():
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    count = count_flops(model, torch.zeros(3, 5), [(layer, "weight")])
    assert count.layers == {"0.weight": (150, 150, 150)}


def test_count_flops_of_a_layer_that_does_not_run_is_nothing():
    model = nn.Module()
    model.used, model.unused = nn.Linear(4, 4), nn.Linear(4, 4)
    model.forward = lambda x: model.used(x)
    count = count_flops(model, torch.zeros(1, 4), [(model.unused, "weight")])
    assert count.dense == 16 and count.layers == {"unused.weight": (0, 0, 0)}


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x @ x.t()


@pytest.mark.parametrize(
    "forward, operator",
    [
        (lambda w, x: F.bilinear(x, x, w), "aten::bilinear"),
        (lambda w, x: torch.einsum("ai,bi,ci->abc", x, x, x), "aten::einsum of 3 operands"),
        (lambda w, x: torch.linalg.multi_dot([x, x.t(), x]), "aten::linalg_multi_dot"),
        (lambda w, x: Double.apply(x), "prim::PythonOp.Double"),
    ],
)
def test_count_flops_refuses_products_without_a_formula(forward, operator):
    with pytest.raises(NotImplementedError, match=f"count_flops.*{operator}.*op_handles"):
        of_call(forward, (2, 5, 5), (3, 5))


def test_count_flops_refuses_recurrent_layers():
    model = nn.LSTM(4, 4)
    with pytest.raises(NotImplementedError, match="aten::lstm"):
        count_flops(model, torch.zeros(3, 1, 4), [(model, "weight_ih_l0")])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_count_flops_refuses_scripted_control_flow():
    @torch.jit.script
    def repeat(x: Tensor, times: int) -> Tensor:
        for _ in range(times):
            x = x @ x
        return x

    with pytest.raises(NotImplementedError, match="prim::(Loop|CallFunction)"):
        of_call(lambda w, x: repeat(x, 3), (1,), (3, 3))


def test_count_flops_takes_formulas_for_other_operators():
    model = Call(lambda w, x: F.bilinear(x, x, w), 2, 5, 5)
    pairs = [(model, "weight")]
    handles = {"aten::bilinear": lambda inputs, outputs: 1234}
    assert count_flops(model, torch.ones(3, 5), pairs, op_handles=handles).dense == 1234
    nothing = {"aten::bilinear": None}
    assert count_flops(model, torch.ones(3, 5), pairs, op_handles=nothing).dense == 0


def state_of(model: nn.Module) -> list:
    """Return all that a count could change, by identity where it can be."""
    kept = []
    for module in model.modules():
        tables = (module._forward_pre_hooks, module._forward_hooks)
        kept.append([module.training, *(list(table.values()) for table in tables)])
        kept.append([(key, id(value)) for key, value in vars(module).items()])
        kept.append([(key, id(value)) for key, value in module._buffers.items()])
    return kept


class Fussy(nn.Module):
    """Counts its calls in a buffer, changes its attributes, and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.cache = None
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = x
        if self.fail:
            raise OSError("on demand")
        return self.drop(self.bn(self.fc(x)))


@pytest.mark.parametrize("fail", [False, True])
def test_count_flops_leaves_the_model_untouched(fail):
    model = Fussy().train()
    model.bn.eval()
    prune.l1_unstructured(model.fc, "weight", amount=0.5)
    model.fc.register_forward_hook(lambda *_: None)
    model.fail = fail
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    if fail:
        with pytest.raises(OSError, match="on demand"):
            count_flops(model, torch.zeros(3, 4), [(model.fc, "weight")])
    else:
        count_flops(model, torch.zeros(3, 4), [(model.fc, "weight")])
    assert state_of(model) == before
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.backends.mha.get_fastpath_enabled()


def test_count_flops_does_not_disturb_a_pending_backward():
    model, groups = two_layers()
    loss = model(torch.ones(1, 8)).sum()
    count_flops(model, torch.zeros(1, 8), groups)
    loss.backward()
    assert model[0].weight_orig.grad is not None


@pytest.mark.parametrize(
    "wrap",
    [lambda model: torch.compile(model), nn.DataParallel, lambda model: nn.Sequential(model)],
)
def test_count_flops_looks_through_wrappers(wrap):
    model, groups = two_layers()
    count = count_flops(wrap(model), torch.zeros(10, 8), groups)
    assert (count.dense, count.masked) == (400, 260)


def test_count_flops_works_under_autocast():
    model, groups = two_layers()
    x = torch.zeros(10, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
        assert [count_flops(model, x, groups).masked for _ in range(2)] == [260, 260]


def test_count_flops_refuses_what_is_not_in_the_model():
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="Linear that is no part of the model"):
        count_flops(model, x, [(nn.Linear(4, 4), "weight")])
    with pytest.raises(ValueError, match="0.gain must be a parameter of its module"):
        count_flops(model, x, [(model[0], "gain")])
    with pytest.raises(ValueError, match="0.weight is the same tensor as 0.weight"):
        count_flops(model, x, [(model[0], "weight")] * 2)
    with pytest.raises(TypeError, match=r"\[0\] must be a .module, name. pair, found Linear"):
        count_flops(model, x, [model[0]])
    with pytest.raises(TypeError, match="parameters must be a mapping.*found int"):
        count_flops(model, x, 3)
    with pytest.raises(TypeError, match="inputs must be a tensor or a tuple.*found list"):
        count_flops(model, [x], [(model[0], "weight")])
    with pytest.raises(TypeError, match="model must be an nn.Module, found list"):
        count_flops([model], x)
    with pytest.raises(ValueError, match="0.weight is on the meta device"):
        count_flops(model.to("meta"), x, [(model[0], "weight")])


def test_count_flops_of_swin_tiny(swin):
    count = count_flops(swin, IMAGE)
    assert count.dense == 4_509_194_496
    groups = {group: flops.dense for group, flops in count.groups.items()}
    assert groups == {"qkv": 1_040_449_536, "proj": 346_816_512, "mlp": 2_774_532_096}


def test_count_flops_masked_is_the_sum_of_density_times_layer(swin):
    model = copy.deepcopy(swin)
    global_module_aware_unstructured(group_parameters(model), amount=0.35)
    count = count_flops(model, IMAGE)
    saved: list[int] = []

    def note(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        tokens = inputs[0].numel() // layer.in_features
        saved.append(tokens * int((layer.weight == 0).sum()))

    for pairs in group_parameters(model).values():
        for module, _ in pairs:
            module.register_forward_hook(note)
    with torch.no_grad():
        model(IMAGE)
    assert count.dense == 4_509_194_496 and len(saved) == 48
    assert count.masked == count.dense - sum(saved)
    assert count_flops(remove_all(model), IMAGE) == count


@pytest.mark.parametrize(
    "name, flops",
    [
        ("deit_tiny_patch16_224", 1_258_411_200),
        ("pvt_v2_b0", 572_024_064),
        ("hiera_tiny_224", 4_914_193_920),
    ],
)
def test_count_flops_is_the_same_with_and_without_fused_attention(name, flops):
    try:
        for fused in (True, False):
            timm.layers.set_fused_attn(fused)
            model = timm.create_model(name)
            assert count_flops(model, IMAGE, weights_of(model)).dense == flops
    finally:
        timm.layers.set_fused_attn(True)


def test_count_flops_of_torchvision_swin_equals_timm_but_for_pooling(swin):
    model = torchvision.models.swin_t()
    groups = weights_of(model)
    count = count_flops(model, IMAGE, groups)
    # torchvision averages the last 7 x 7 x 768 map in an operator that fvcore counts.
    assert count.dense == 4_509_194_496 + 7 * 7 * 768
    assert count.layers["features.1.0.attn.qkv.weight"].dense == 86_704_128
    global_module_aware_unstructured(groups, amount=0.5)
    assert min(f.dense - f.masked for f in count_flops(model, IMAGE, groups).layers.values()) > 0


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "deit_tiny_patch16_224", "pvt_v2_b0", "mvitv2_tiny"]
)
def test_count_flops_agrees_with_torch_flop_counter(name):
    model = timm.create_model(name).eval()
    norms: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):  # not counted by torch; five per entry here
            module.register_forward_hook(lambda m, i, output: norms.append(5 * output.numel()))
    counter = FlopCounterMode(display=False)
    # In some releases (2.4, 2.14) torch's counter leaves out the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(IMAGE)
    products, of_norms = counter.get_total_flops(), sum(norms)  # two per multiply-add
    count = count_flops(model, IMAGE, weights_of(model))
    assert 2 * (count.dense - of_norms) == products


@pytest.mark.parametrize(
    "name, settings",
    [
        ("swinv2_tiny_window8_256", {"img_size": 64, "embed_dim": 24, "depths": (2, 2)}),
        ("beit_base_patch16_224", {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 4}),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}),
        ("davit_tiny", {"depths": (1, 1), "embed_dims": (24, 48), "num_heads": (3, 3)}),
        ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
        ("hiera_tiny_224", {"stages": (1, 1, 1, 1)}),
    ],
)
def test_count_flops_credits_every_layer_of_other_families(name, settings):
    model = timm.create_model(name, **settings)
    groups = weights_of(model)
    global_module_aware_unstructured(groups, amount=0.3)
    size = settings.get("img_size", 224)
    count = count_flops(model, torch.zeros(1, 3, size, size), groups)
    assert all(flops.dense > flops.masked > 0 for flops in count.layers.values())


def test_count_flops_shows_a_bar_where_it_is_asked_for_and_leaves_no_hook(capsys):
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    parameters, inputs = [(net[0], "weight")], torch.zeros(1, 8)
    silent = count_flops(net, inputs, parameters)
    assert "modules" not in capsys.readouterr().err
    assert count_flops(net, inputs, parameters, progress=True) == silent
    assert "modules" in capsys.readouterr().err
    assert not any(module._forward_hooks for module in net.modules())
