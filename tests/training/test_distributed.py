from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from tests.toys import halves, small_network, wrap
from toolkit.artifacts import Int64Array, TorchModel, UInt8Array
from toolkit.attacks.folding import find_pairs
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import TrainConfig
from toolkit.data.images import ArrayImages
from toolkit.errors import ToolkitError
from toolkit.training import distributed
from toolkit.training.distributed import ALONE, SharedBatchNorm, World, joined, share_statistics
from toolkit.training.loop import TrainingResult, train
from toolkit.training.qat import Rounding
from toolkit.training.run import Run

IMAGES = torch.rand(11, 3, 5, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 4, (11,), generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(2)
    norms = nn.BatchNorm2d(6), nn.BatchNorm1d(8)
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norms[0], nn.ReLU(), nn.Flatten(), nn.Linear(54, 8), norms[1], nn.Linear(8, 4)
    )  # fmt: skip


@pytest.mark.parametrize(("count", "size", "accumulate"), [(8, 2, 1), (7, 3, 2), (3, 3, 1), (100, 7, 3), (5, 1, 1)])
def test_parts_of_a_batch_cover_it_in_order_and_differ_by_one_at_most(count: int, size: int, accumulate: int) -> None:
    shares = [World(rank, size).parts(count, accumulate) for rank in range(size)]
    parts = [list(range(count))[rows] for together in zip(*shares, strict=True) for rows in together]
    assert len(parts) == size * accumulate
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_batch_of_fewer_images_than_parts_is_refused() -> None:
    with pytest.raises(ToolkitError, match="fewer images than parts") as raised:
        World(0, 2).parts(3, 2)
    assert "3 images, 2 process(es), --accumulate 2" in raised.value.found


def test_alone_nothing_is_exchanged_and_nothing_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as world:
        assert world == ALONE and world.leads
    made = network()
    share_statistics(made, ALONE)
    assert type(made[1]) is nn.BatchNorm2d
    assert ALONE.total(1.5) == 1.5 and not ALONE.any(False) and ALONE.lead("x") == "x"


def test_processes_that_cannot_meet_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ToolkitError, match="cannot meet") as raised, joined():
        pass
    assert "torchrun" in raised.value.fix


def _together(rank: int, port: int, folder: str, work: Callable[[World, Path], None]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with joined() as world:
        work(world, Path(folder))


def together(work: Callable[[World, Path], None], folder: Path, port: int) -> None:
    """`work` in two processes that train together."""
    spawn(_together, args=(port, str(folder), work), nprocs=2)  # type: ignore[no-untyped-call]


@pytest.fixture
def port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _one_step(world: World, folder: Path) -> None:
    made = network()
    share_statistics(made, world)
    (rows,) = world.parts(len(IMAGES))
    images = IMAGES[rows].clone().requires_grad_(True)
    loss = functional.cross_entropy(made(images), LABELS[rows]) * (len(images) / len(IMAGES))
    torch.autograd.backward(loss)
    world.sum_gradients(made.parameters())
    assert world.any(world.rank == 1) and not world.any(False)
    assert world.lead({"rank": world.rank}) == {"rank": 0}
    assert world.total(float(world.rank + 1)) == 3.0
    found: dict[str, Tensor | None] = {name: value.grad for name, value in made.named_parameters()}
    buffers = dict(made.named_buffers())
    torch.save({"gradients": found, "buffers": buffers, "image": images.grad}, folder / f"{world.rank}.pt")


def test_two_processes_make_the_step_of_one(tmp_path: Path, port: int) -> None:
    together(_one_step, tmp_path, port)
    made = network().train()
    images = IMAGES.clone().requires_grad_(True)
    torch.autograd.backward(functional.cross_entropy(made(images), LABELS))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for found in ranks:
        assert found["buffers"].keys() == dict(made.named_buffers()).keys()
        for name, value in made.named_buffers():
            torch.testing.assert_close(found["buffers"][name], value, msg=name)
        for name, value in made.named_parameters():
            torch.testing.assert_close(found["gradients"][name], value.grad, rtol=1e-4, atol=1e-6, msg=name)
    # the gradient of the whole batch's loss, which reaches the other process's images through the statistics
    torch.testing.assert_close(torch.cat([found["image"] for found in ranks]), images.grad, rtol=1e-4, atol=1e-7)


def test_shared_norms_keep_names_and_parameters_and_are_plain_in_evaluation() -> None:
    made = network().eval()
    plain = copy.deepcopy(made)
    before = dict(made.named_parameters())
    share_statistics(made, World(0, 2))
    twice = nn.Sequential(plain[1], nn.ReLU(), plain[1])
    share_statistics(twice, World(0, 2))
    assert isinstance(twice[2], SharedBatchNorm) and twice[2] is twice[0], "one batch norm under two names"
    assert isinstance(made[1], SharedBatchNorm) and made.state_dict().keys() == plain.state_dict().keys()
    assert all(value is before[name] for name, value in made.named_parameters())
    torch.testing.assert_close(made(IMAGES), plain(IMAGES))
    assert len(find_pairs(made)) == len(find_pairs(plain)) == 1, "surrogates fold them all the same"
    assert not made[1].training and distributed.launched() is False


class WithActivation(nn.BatchNorm2d):
    """A batch norm that does more."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values).relu()


def test_a_batch_norm_that_does_more_is_refused() -> None:
    made = nn.Sequential(nn.Conv2d(1, 2, 3), WithActivation(2))
    with pytest.raises(ToolkitError, match="cannot share its statistics") as raised:
        share_statistics(made, World(0, 2))
    assert "'1' is a WithActivation" in raised.value.found


TRAIN, VALIDATION = halves(96, seed=1), halves(32, seed=2)
PLAN = PgdPlan("pixel", ThreatModel("linf", 0.1, "pixels", clip=True), 20, 0.0125, random_start=True)
CONFIG = TrainConfig(
    objective="adversarial", epochs=2, batch_size=32, attack_steps=2, learning_rate=0.02, precision="float32", ema=0.9
)


def toy() -> TorchModel:
    torch.manual_seed(0)
    return wrap(nn.Sequential(small_network(batch_norm=True)[:-1], nn.Linear(96, 2)), classes=2, shape=(1, 8, 8))


def run(objective: str = "adversarial", world: World = ALONE, **options: Any) -> TrainingResult:
    config = CONFIG.model_copy(update={"objective": objective, **options.pop("config", {})})
    return train(toy(), TRAIN, VALIDATION, config, PLAN, seed=3, world=world, **options)


TOGETHER = (("adversarial", 1), ("trades", 1), ("standard", 2))
"""Objectives, each with the number of parts of every process's share of a batch."""


def _train(world: World, folder: Path) -> None:
    for objective, accumulate in TOGETHER:
        state = folder / f"{objective}-{world.rank}.state"
        result = run(objective, world, checkpoint=state, config={"accumulate": accumulate})
        torch.save(result.model.network.state_dict(), folder / f"{objective}-{world.rank}.pt")
    assert (folder / "trades-0.state").is_file() and not (folder / "trades-1.state").exists()


def _resume(world: World, folder: Path) -> None:
    """The state that one process left after its first epoch; the second process knows nothing of it."""
    result = run(world=world, checkpoint=folder / "state" if world.leads else None, resume=True)
    torch.save(result.model.network.state_dict(), folder / f"resumed-{world.rank}.pt")


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=2e-3, msg=name)


def test_two_processes_train_the_network_of_one(tmp_path: Path, port: int) -> None:
    together(_train, tmp_path, port)
    for objective, accumulate in TOGETHER:
        first, second = (torch.load(tmp_path / f"{objective}-{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        alone = run(objective, config={"accumulate": accumulate}).model.network.state_dict()
        close(first, alone)
        if objective == "standard":  # no attack, whose signs rounding may turn
            torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-6)


class Unlike(World):
    """Two processes, of which the first differs from this one."""

    def lead(self, value: Any) -> Any:
        return {**value, **UNLIKE}

    def any(self, flag: bool) -> bool:
        return flag


UNLIKE = {"start weights": "of another network", "training images and their order": "others"}


def test_processes_that_would_train_different_things_are_refused() -> None:
    model = wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), classes=2, shape=(1, 8, 8))
    with pytest.raises(ToolkitError, match="do not train the same") as error:
        train(model, TRAIN, VALIDATION, CONFIG, PLAN, seed=3, world=Unlike(1, 2))
    assert error.value.found == "not the same in all of them: training images and their order, start weights"


def test_a_training_of_one_process_is_continued_by_two(tmp_path: Path, port: int) -> None:
    finish = Run.finish_epoch

    def after_one_epoch(self: Run) -> None:
        if self.step > self.steps_per_epoch:
            raise KeyboardInterrupt
        finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish_epoch", after_one_epoch)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=tmp_path / "state")
    together(_resume, tmp_path, port)
    first, second = (torch.load(tmp_path / f"resumed-{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    close(first, run().model.network.state_dict())


@pytest.mark.parametrize("objective", ["standard", "adversarial"])
def test_accumulated_gradients_are_those_of_the_whole_batch(objective: str) -> None:
    """Without batch norm, whose statistics are those of a part."""

    def trained(accumulate: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(small_network()[:-1], nn.Linear(96, 2))
        config = CONFIG.model_copy(update={"objective": objective, "accumulate": accumulate})
        model = wrap(network, classes=2, shape=(1, 8, 8))
        return train(model, TRAIN, VALIDATION, config, PLAN, seed=3).model.network.state_dict()

    close(trained(3), trained(1))


def test_a_process_reads_its_own_images_alone_and_changes_them_as_one_process_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = CONFIG.model_copy(update={"objective": "standard", "augment": True})
    read: list[int] = []
    pixels = ArrayImages.pixels

    def watched(self: ArrayImages, indices: Int64Array) -> UInt8Array:
        read.extend(indices.tolist())
        return pixels(self, indices)

    def batch(world: World) -> tuple[Tensor, Tensor]:
        read.clear()
        model = wrap(small_network(), classes=2, shape=(1, 8, 8))
        training = Run(model, TRAIN, VALIDATION, config, None, 3, None, None, world, None)
        read.clear()
        parts = list(training._batch(0, 1))
        return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])

    monkeypatch.setattr(ArrayImages, "pixels", watched)
    whole = batch(ALONE)
    assert len(read) == config.batch_size
    everything = list(read)
    shares, rows = [], []
    for rank in range(3):
        shares.append(batch(World(rank, 3)))
        rows.append(list(read))
    assert [row for share in rows for row in share] == everything and max(map(len, rows)) == 11
    for position in range(2):
        assert torch.equal(torch.cat([share[position] for share in shares]), whole[position])


def test_more_parts_than_images_are_refused() -> None:
    with pytest.raises(ToolkitError, match="fewer images than parts"):
        run(config={"accumulate": 33})


def test_training_with_rounding_stays_in_one_process() -> None:
    with pytest.raises(ToolkitError, match="--qat trains in one process") as raised:
        run(world=World(0, 2), rounding=Rounding())
    assert raised.value.found == "2 processes"


def test_rounding_begins_once_whatever_the_parts() -> None:
    whole, parted = (run("standard", rounding=Rounding(), config={"accumulate": parts}) for parts in (1, 2))
    assert whole.learnt is not None and parted.learnt is not None
    assert whole.learnt.ends.keys() == parted.learnt.ends.keys()


def test_torchrun_trains_one_network_and_one_process_speaks(tmp_path: Path) -> None:
    output = tmp_path / "model.pt"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "toolkit"]
    how = ["--data", "sample", "--objective", "standard", "--epochs", "1", "--threads", "1", "--output", str(output)]
    done = subprocess.run(
        [*launcher, "train", "cnn8", *how, "--json"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (record,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert record["output"] == str(output) and output.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
