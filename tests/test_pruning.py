from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.toys import GREY, RGB, wrap
from toolkit.artifacts import Normalization, TorchModel
from toolkit.config import PruneConfig
from toolkit.errors import ToolkitError
from toolkit.models.checkpoint import save_checkpoint
from toolkit.models.loading import assemble, read_model_file
from toolkit.models.networks import cnn8, resnet18
from toolkit.models.registry import build_network
from toolkit.pruning import History, PruningResult, find_classifier, find_groups, prune, replay, rounded_width

SHAPE = (1, 12, 12)


def reference(architecture: str, seed: int = 0) -> TorchModel:
    """A network of ours with trained-like batch norm statistics."""
    torch.manual_seed(seed)
    shape = (1, 12, 12) if architecture == "cnn8" else (3, 16, 16)
    network = with_statistics((cnn8 if architecture == "cnn8" else resnet18)(10, shape))
    return wrap(network, architecture=architecture, shape=shape, normalization=GREY if shape[0] == 1 else RGB)


def with_statistics(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)
            for tensor in (module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.normal_(0, 0.1)
    return network


def from_torchvision(name: str, side: int) -> TorchModel:
    network = build_network(f"torchvision:{name}", 10, (3, side, side))
    return wrap(network, architecture=f"torchvision:{name}", shape=(3, side, side), normalization=RGB)


def images_for(model: TorchModel) -> Tensor:
    return torch.rand(3, *model.spec.input_shape, generator=torch.Generator().manual_seed(0))


def reload(model: TorchModel, path: Path) -> TorchModel:
    save_checkpoint(model, path)
    return assemble(
        read_model_file(path), arch=None, class_names=(), input_shape=SHAPE, normalization=GREY, dataset=None
    )


def check_widths(result: PruningResult) -> None:
    """Every layer lost its share, and the classifier nothing."""
    for layer in result.layers[:-1]:
        assert layer.after == rounded_width(layer.before, 0.5, 8), layer
    assert (result.layers[-1].before, result.layers[-1].after) == (10, 10)
    assert result.parameters_after == sum(p.numel() for p in result.model.module.parameters())
    assert 0.2 < result.parameters_after / result.parameters_before < 0.3


@given(st.integers(1, 600), st.floats(0, 1, exclude_max=True), st.integers(1, 64))
def test_rounded_widths(width: int, ratio: float, round_to: int) -> None:
    kept = rounded_width(width, ratio, round_to)
    wanted = width * (1 - ratio)
    assert 1 <= kept <= width
    if wanted >= round_to:
        assert abs(kept - wanted) <= round_to / 2 + 1e-6
        assert kept % round_to == 0 or kept == width
    else:
        assert abs(kept - wanted) <= max(0.5, wanted / 2) + 1e-6 or kept == 1
    assert rounded_width(width, 0.0, 1) == width


@pytest.mark.parametrize(
    ("width", "ratio", "round_to", "kept"),
    [
        (64, 0.5, 8, 32),
        (64, 0.8, 8, 16),
        (128, 0.8, 8, 24),
        (12, 0.5, 8, 8),
        (12, 0.7, 8, 4),
        (12, 0.5, 1, 6),
        (10, 0.9, 8, 1),
    ],
)
def test_rounded_widths_by_hand(width: int, ratio: float, round_to: int, kept: int) -> None:
    assert rounded_width(width, ratio, round_to) == kept


@pytest.mark.parametrize("architecture", ["cnn8", "resnet18"])
def test_pruned_once_and_twice_comes_back_bit_equal_without_pickle(architecture: str, tmp_path: Path) -> None:
    model = reference(architecture)
    images = images_for(model)
    result = prune(model, PruneConfig(ratio=0.5))
    check_widths(result)
    once = result.model
    again = reload(once, tmp_path / "once.pt")
    assert torch.equal(again.predict(images), once.predict(images))
    twice = prune(again, PruneConfig(ratio=0.5)).model
    assert len(twice.spec.pruning) == 2
    assert torch.equal(reload(twice, tmp_path / "twice.pt").predict(images), twice.predict(images))


def test_the_callers_model_is_unchanged() -> None:
    model = reference("cnn8")
    model.module.requires_grad_(False)
    model.module.train()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    result = prune(model, PruneConfig(ratio=0.5))
    after = model.module.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items()) and len(after) == len(before)
    assert not any(parameter.requires_grad for parameter in model.module.parameters()) and model.module.training
    assert result.parameters_after < result.parameters_before, "frozen parameters are pruned too"
    assert all(parameter.grad is None for parameter in result.model.module.parameters())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_the_filters_of_largest_l1_norm_stay(ratio: float) -> None:
    torch.manual_seed(3)
    filters, last = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(16 * 144, 10)
    model = wrap(nn.Sequential(filters, nn.ReLU(), nn.Flatten(), last), shape=SHAPE)
    weight, bias = filters.state_dict()["weight"], filters.state_dict()["bias"]
    strongest = weight.abs().sum(dim=(1, 2, 3)).topk(int(16 * (1 - ratio))).indices.sort().values
    pruned = prune(model, PruneConfig(ratio=ratio, round_to=1)).model.network
    convolution, classifier = pruned.get_submodule("0"), pruned.get_submodule("3")
    assert torch.equal(convolution.state_dict()["weight"], weight[strongest])
    assert torch.equal(convolution.state_dict()["bias"], bias[strongest])
    columns = last.weight.detach().view(10, 16, 144)[:, strongest].reshape(10, -1)
    assert torch.equal(classifier.state_dict()["weight"], columns)


def test_pruning_is_removing_channels_that_are_set_to_zero() -> None:
    model = reference("cnn8")
    result = prune(model, PruneConfig(ratio=0.5))
    masked = model.copy()
    layers = dict(masked.network.named_modules())
    names_before = [layer.name for layer in result.layers]
    for name, outputs, indices in result.model.spec.pruning[0]["history"]:
        assert outputs and name in names_before
        with torch.no_grad():
            for parameter in layers[name].parameters():
                parameter[indices] = 0
    images = images_for(model)
    assert torch.allclose(masked.predict(images), result.model.predict(images), atol=1e-5)


def test_global_ranking_takes_the_filters_weakest_for_their_layer() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
    network = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(4096, 10))
    even, uneven = first.weight, second.weight
    with torch.no_grad():
        even.fill_(0.3)  # all alike: the global ranking takes none before the weak ones of the other layer
        uneven[:40] *= 0.1
    result = prune(wrap(network, shape=SHAPE), PruneConfig(ratio=40 / 96, scope="global", round_to=1))
    assert [layer.after for layer in result.layers] == [32, 24, 10]
    assert torch.equal(result.model.network.get_submodule("2").state_dict()["weight"], uneven[40:])


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
def test_global_ranking_meets_its_share_and_empties_no_layer(ratio: float) -> None:
    result = prune(reference("cnn8"), PruneConfig(ratio=ratio, scope="global", round_to=1))
    layers = result.layers[:-1]
    assert all(layer.after < layer.before for layer in layers) and result.layers[-1].after == 10
    share = sum(layer.after for layer in layers) / sum(layer.before for layer in layers)
    assert abs(share - (1 - ratio)) < 0.05
    rounded = prune(reference("cnn8"), PruneConfig(ratio=ratio, scope="global"))
    assert all(layer.after in (1, 2, 4) or layer.after % 8 == 0 for layer in rounded.layers[:-1])


def test_a_layer_narrower_than_the_multiple_is_pruned_all_the_same() -> None:
    network = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1200, 10))
    for scope in ("layer", "global"):
        config = PruneConfig.model_validate({"ratio": 0.7, "scope": scope})
        assert prune(wrap(network, shape=SHAPE), config).layers[0].after == 4, scope


def test_nothing_to_remove() -> None:
    model = reference("cnn8")
    whole = prune(model, PruneConfig(ratio=0))
    assert whole.parameters_after == whole.parameters_before and whole.model.spec.pruning == ()
    assert whole.model.module is not model.module
    with pytest.raises(ToolkitError, match="pruning removed nothing") as caught:
        prune(model, PruneConfig(ratio=0.05, round_to=32))
    assert "--round-to 32" in caught.value.found and "--prune" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "side"),
    [("mobilenet_v3_small", 32), ("efficientnet_b0", 32)],
)
def test_torchvision_families(name: str, side: int, tmp_path: Path) -> None:
    model = from_torchvision(name, side)
    result = prune(model, PruneConfig(ratio=0.5))
    assert result.parameters_after < 0.5 * result.parameters_before
    images = images_for(model)
    assert torch.equal(reload(result.model, tmp_path / "a.pt").predict(images), result.model.predict(images))


def dense() -> nn.Module:
    network: nn.Module = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10)
    return network


def grouped() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    network: nn.Module = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=16)
    return network


def with_silence(model: TorchModel, build: Callable[[], nn.Module], history: History) -> TorchModel:
    """The unpruned `model` with zeros for whatever `history` removes.

    What that is, a network tells whose parameters hold their own positions when it is pruned in the same way.
    """
    tracer = build()
    for parameter in tracer.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
    replay(tracer, history, model.spec.input_shape)
    silenced = model.copy()
    for (name, parameter), (traced, positions) in zip(
        silenced.network.named_parameters(), tracer.named_parameters(), strict=True
    ):
        assert name == traced
        left = torch.zeros(parameter.numel())
        left[positions.detach().flatten().long()] = 1
        parameter.data *= left.reshape(parameter.shape)
    return silenced


def residual() -> nn.Module:
    return build_network("resnet18", 10, (3, 32, 32))


@pytest.mark.parametrize("build", [residual, dense, grouped])
def test_what_is_removed_is_what_is_silenced(build: Callable[[], nn.Module]) -> None:
    """Through sums, concatenations and groups: the right inputs go with every output, and statistics with both."""
    torch.manual_seed(0)
    model = wrap(with_statistics(build()), shape=(3, 32, 32), normalization=RGB)
    pruned = prune(model, PruneConfig(ratio=0.5)).model
    silenced = with_silence(model, build, pruned.spec.pruning[0]["history"])
    images = images_for(model)
    expected = silenced.predict(images)
    assert torch.allclose(pruned.predict(images), expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(model.predict(images), expected, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("build", [dense, grouped])
def test_concatenations_and_grouped_convolutions(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    result = prune(wrap(build(), shape=(3, 32, 32), normalization=RGB), PruneConfig(ratio=0.5))
    assert result.parameters_after < 0.5 * result.parameters_before
    fresh = wrap(replay(build(), result.model.spec.pruning[0]["history"], (3, 32, 32)), normalization=RGB)
    fresh.network.load_state_dict(result.model.network.state_dict())
    images = images_for(result.model)
    assert torch.equal(fresh.predict(images), result.model.predict(images))


def a_transformer() -> nn.Module:
    network: nn.Module = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    return network


def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    model = wrap(a_transformer(), shape=(3, 32, 32), normalization=RGB)
    nn.init.normal_(model.network.get_submodule("heads.head").weight)  # type: ignore[arg-type]
    result = prune(model, PruneConfig(ratio=0.5))
    assert result.parameters_after < 0.9 * result.parameters_before
    fresh = wrap(replay(a_transformer(), result.model.spec.pruning[0]["history"], (3, 32, 32)), normalization=RGB)
    fresh.network.load_state_dict(result.model.network.state_dict())
    images = images_for(model)
    assert torch.equal(fresh.predict(images), result.model.predict(images))


def test_layers_that_cannot_be_followed_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    # torch-pruning takes the windows of Swin's attention for flattened features: for minutes, if nothing stops it
    torch.manual_seed(0)
    network = torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [2, 2], num_classes=10)
    model = wrap(network, shape=(3, 32, 32), normalization=RGB)
    began = time.monotonic()
    result = prune(model, PruneConfig(ratio=0.5))
    assert time.monotonic() - began < 30
    assert "stay whole: features." in capsys.readouterr().err
    after = {layer.name: (layer.before, layer.after) for layer in result.layers}
    assert after["features.1.0.mlp.0"] == (64, 32) and after["features.0.0"] == (16, 16)
    assert result.model.predict(images_for(model)).shape == (3, 10)


class Shuffled(nn.Module):
    """Channels that change places; torch-pruning cannot follow them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3)
        self.scale = nn.Parameter(torch.ones(3, 3))
        self.last = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.first(image)
        mixed = (hidden.flatten(2) @ hidden.flatten(2).transpose(1, 2)).sum(dim=2)
        logits: Tensor = self.last(mixed[:, torch.arange(16).flip(0)] * self.scale.sum())
        return logits


def test_a_network_that_cannot_be_followed_at_all() -> None:
    began = time.monotonic()
    with pytest.raises(ToolkitError, match="cannot follow this network") as caught:
        prune(from_torchvision("shufflenet_v2_x0_5", 32), PruneConfig(ratio=0.5))
    assert time.monotonic() - began < 30
    assert "ShuffleNetV2: ZeroDivisionError" in caught.value.found and "--prune 0" in caught.value.fix


def test_the_error_names_modules_with_parameters_of_their_own() -> None:
    with pytest.raises(ToolkitError) as caught:
        prune(wrap(Shuffled(), shape=SHAPE), PruneConfig(ratio=0.5))
    assert "Shuffled" in caught.value.found


def test_the_classifier_is_the_last_layer_executed_with_an_output_per_class() -> None:
    network = nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Conv2d(10, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = wrap(network, shape=SHAPE)
    assert find_classifier(model) is network[2]
    result = prune(model, PruneConfig(ratio=0.5, round_to=1))
    assert [layer.after for layer in result.layers] == [5, 10]
    with pytest.raises(ToolkitError, match="classifier was not found") as caught:
        find_classifier(wrap(network, classes=11, shape=SHAPE))
    assert "11 outputs" in caught.value.found


def test_a_history_of_another_network_is_refused() -> None:
    history = prune(reference("cnn8"), PruneConfig(ratio=0.5)).model.spec.pruning[0]["history"]
    with pytest.raises(ToolkitError, match="pruning history does not fit") as caught:
        replay(resnet18(10, (3, 16, 16)), history, (3, 16, 16))
    assert "--arch" in caught.value.fix


@pytest.mark.parametrize("importance", ["l1", "l2", "geometric-median"])
def test_each_importance_keeps_the_filters_that_it_ranks_highest(importance: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Flatten(), nn.Linear(4 * 64, 10))
    # l1 norms 4, 2.2, 3, 2.1; l2 norms alike in order 4, 1.6, 3, 2.1; the geometric median keeps what is far from all
    layer = nn.Conv2d(2, 4, 1, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[4.0, 0.0], [1.1, 1.1], [0.0, 3.0], [2.1, 0.0]]).view(4, 2, 1, 1))
    network[0] = layer
    model = wrap(network, shape=(2, 8, 8), normalization=Normalization((0.5, 0.5), (0.5, 0.5)))
    config = PruneConfig.model_validate({"ratio": 0.5, "round_to": 1, "importance": importance})
    result = prune(model, config)
    rows = layer.weight.detach().flatten(1)
    scores = {
        "l1": rows.abs().sum(1),
        "l2": rows.square().sum(1).sqrt(),
        "geometric-median": torch.cdist(rows, rows).sum(1),
    }[importance]
    kept = sorted(scores.argsort(descending=True)[:2].tolist())
    pruned = result.model.network[0].weight.detach().flatten(1)  # type: ignore[index]
    assert torch.equal(pruned, rows[kept])
    assert result.model.spec.pruning[0]["importance"] == importance


def test_groups_have_ratios_of_their_own() -> None:
    model = reference("resnet18")
    groups = find_groups(model)
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names)) and "fc" not in names
    together = next(group for group in groups if len(group) > 1)
    result = prune(model, PruneConfig(ratio=0.5, ratios={together[1]: 0.25}))
    share = {layer.name: layer.after / layer.before for layer in result.layers}
    assert all(share[name] == 0.75 for name in together), "layers that go together follow the one named"
    assert {share[name] for name in names if name not in together} == {0.5}


def test_a_ratio_of_one_layer_alone_prunes_that_layer_alone() -> None:
    model = reference("cnn8")
    (first, *others) = [group[0] for group in find_groups(model)]
    result = prune(model, PruneConfig(ratio=0, ratios={first: 0.5}))
    share = {layer.name: layer.after / layer.before for layer in result.layers}
    assert share[first] == 0.5 and {share[name] for name in others} == {1.0}


def test_a_ratio_for_no_layer() -> None:
    with pytest.raises(ToolkitError, match="unknown layer"):
        prune(reference("cnn8"), PruneConfig(ratios={"nowhere": 0.5}))


def summed() -> TorchModel:
    """Two convolutions whose outputs are added, and one of a width that no multiple of 8 is."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(1, 16, 3, padding=1)
            self.odd, self.last = nn.Conv2d(16, 18, 3), nn.Linear(18 * 100, 10)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.odd(self.a(x) + self.b(x))
            logits: Tensor = self.last(hidden.flatten(1))
            return logits

    torch.manual_seed(0)
    return wrap(Summed(), shape=SHAPE)


def test_a_layer_whose_share_is_nothing_stays_whole_whatever_the_rounding() -> None:
    widths = {layer.name: layer.after for layer in prune(summed(), PruneConfig(ratio=0.5, ratios={"odd": 0.0})).layers}
    assert widths["odd"] == 18 and widths["a"] == widths["b"] == 8
    widths = {layer.name: layer.after for layer in prune(summed(), PruneConfig(ratio=0, ratios={"a": 0.5})).layers}
    assert widths["odd"] == 18 and widths["a"] == widths["b"] == 8


def test_shares_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(ToolkitError, match="different shares") as caught:
        prune(summed(), PruneConfig(ratios={"a": 0.0, "b": 0.75}))
    assert caught.value.found == "a: 0, b: 0.75"
    with pytest.raises(ToolkitError, match="cannot lose filters") as caught:
        prune(summed(), PruneConfig(ratios={"last": 0.5}))
    assert "last: 0.5" in caught.value.found
    prune(summed(), PruneConfig(ratios={"a": 0.5, "b": 0.5, "last": 0.0}))
