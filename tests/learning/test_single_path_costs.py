"""SPViT's cost, against the totals that its authors publish."""

import pytest
import timm
import torch
from timm.layers import GluMlp, SwiGLU

import torch_dimap
from torch_dimap import learning

CODES = {"M": "attention", "3": "conv3", "1": "conv1", "0": "skip"}
# The architectures that the authors found (github.com/ziplab/SPViT, ae19b0d), and the
# multiply-adds of them and of the dense models, in thousand millions.
FOUND = [
    ("deit_tiny_patch16_224", "11MMMMMMMMMM",
     "744 758 764 767 766 764 756 659 633 473 179 145", 1.04, 1.25),
    ("deit_small_patch16_224", "1MMMMMMMMMMM",
     "1304 1399 1344 1214 1251 1183 1140 925 742 391 104 103", 3.35, 4.59),
    ("deit_base_patch16_224", "11133MMMMMMM",
     "1118 489 1050 1345 1336 1326 1431 1564 1606 1702 1290 190", 8.39, 17.51),
    ("swin_tiny_patch4_window7_224", "1010MMMMMMMM",
     "186 152 646 504 1350 1319 1289 1249 1234 1082 3041 2994", 3.33, 4.49),
    ("swin_small_patch4_window7_224", "10MMMMMMMMMMMMMM01MM00MM",
     "188 209 748 680 1159 1260 1127 1036 919 916 868 918 903 937 961 1037 1063 996 888 866 741 "
     "509 3064 3051", 6.14, 8.75),
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return timm.create_model("deit_tiny_patch16_224")


@pytest.mark.parametrize("name, codes, neurons, pruned, dense", FOUND)
def test_single_path_flops_gives_the_published_totals(name, codes, neurons, pruned, dense):
    with torch.device("meta"):
        model = timm.create_model(name)
    costs = learning.single_path_costs.single_path_costs(model, "test")
    operations = [CODES[code] for code in codes]
    found = learning.single_path_flops(model, operations, list(map(int, neurons.split())))
    assert type(found) is int
    assert found / 1e9 == pytest.approx(pruned, abs=0.01)
    assert costs.dense / 1e9 == pytest.approx(dense, abs=0.01)


def test_gates_and_soft_counts_give_what_names_and_numbers_give(tiny):
    operations = ["skip", "conv1", "conv3", "attention"] * 3
    gates = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.float64)
    neurons = torch.arange(12.0, dtype=torch.float64).requires_grad_()
    soft = learning.single_path_flops(tiny, gates.repeat(3, 1), neurons)
    assert int(soft) == learning.single_path_flops(tiny, operations, list(range(12)))
    soft.backward()
    assert neurons.grad.unique().tolist() == [2 * 196 * 192]


@pytest.mark.parametrize("operations, neurons, error", [
    (["skip"] * 11, [1] * 12, "operations must be for 12 blocks, found 11"),
    (["skip"] * 12, [1] * 13, "neurons must be for 12 blocks, found 13"),
    (["none"] * 12, [1] * 12, "must be among attention, conv3, conv1, skip, found 'none'"),
    (["skip"] * 12, [769] * 12, r"neurons\[0\] must be an int between 0 and 768, found 769"),
    (torch.ones(12, 2), [1] * 12, r"must have the shape \(12, 3\), found \(12, 2\)"),
])  # fmt: skip
def test_choices_that_do_not_fit_are_refused(tiny, operations, neurons, error):
    with pytest.raises(ValueError, match=error):
        learning.single_path_flops(tiny, operations, neurons)


def test_choices_of_another_type_or_for_replaced_attentions_are_refused(tiny):
    with pytest.raises(TypeError, match="operations must be a sequence or a tensor, found str"):
        learning.single_path_flops(tiny, "skip", [1] * 12)
    small = timm.create_model("vit_tiny_patch16_224", depth=2)
    learning.replace_attentions(small, {"blocks.1.attn": "skip"})
    with pytest.raises(ValueError, match="blocks.1.attn replaced"):
        learning.single_path_flops(small, ["skip"] * 2, [1] * 2)


@pytest.mark.parametrize("more", [
    {"mlp_layer": GluMlp}, {"mlp_layer": SwiGLU}, {"reg_tokens": 4}, {},
], ids=["gated", "SwiGLU", "registers", "plain"])  # fmt: skip
def test_the_count_is_near_to_what_is_computed(more):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, **more).eval()
    neurons = [layer.units for layer in torch_dimap.group_units(model)["neurons"]]
    count = torch_dimap.count_flops(model, torch.zeros(1, 3, 224, 224)).dense
    assert learning.single_path_flops(model, ["attention"] * 2, neurons) == pytest.approx(
        count, rel=0.03
    )
