from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import entries
from toolkit import bundle
from toolkit.bundle import Finding, open_workspace, verify_files, workspace_of
from toolkit.errors import ToolkitError


def fill(folder: Path, text: str = "new") -> None:
    (folder / bundle.MANIFEST).write_text(json.dumps({"toolkit_version": "0", "files": {}, "text": text}))


def text_in(folder: str) -> str:
    return str(json.loads(Path(folder, bundle.MANIFEST).read_text())["text"])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_a_bundle_appears_whole(folder: Path) -> None:
    with open_workspace(Path("deep/out"), force=False, resume=False) as workspace:
        fill(workspace.files)
        workspace.scratch("original.onnx").write_text("not kept")
        assert not Path("deep/out").exists()
    assert entries(folder / "deep") == ["out"] and entries(folder / "deep/out") == [bundle.MANIFEST]


@pytest.mark.parametrize("error", [ToolkitError("bad", found="x", fix="y"), ValueError("defect"), KeyboardInterrupt()])
def test_after_an_error_nothing_is_there(folder: Path, error: BaseException) -> None:
    with (  # noqa: PT012 - the block is what fails
        pytest.raises(type(error)) as caught,
        open_workspace(Path("deep/er/out"), force=False, resume=False) as workspace,
    ):
        fill(workspace.files)
        raise error
    assert caught.value is error
    assert entries(folder) == []


def test_folders_that_hold_something_else_meanwhile_stay(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_workspace(Path("deep/out"), force=False, resume=False):  # noqa: PT012
        (folder / "deep/other").write_text("somebody else's")
        raise KeyboardInterrupt
    assert entries(folder) == ["deep"] and entries(folder / "deep") == ["other"]


def test_only_a_training_that_can_be_resumed_stays(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_workspace(Path("out"), force=False, resume=False) as workspace:  # noqa: PT012
        fill(workspace.files)
        workspace.scratch("original.onnx").write_text("scratch")
        workspace.scratch("images").mkdir()
        workspace.training_checkpoint.write_text("state")
        raise KeyboardInterrupt
    assert entries(folder) == [".out.partial"] and entries(folder / ".out.partial") == ["training.pt"]
    with open_workspace(Path("out"), force=False, resume=True) as workspace:
        assert workspace.training_checkpoint.read_text() == "state" and entries(workspace.files) == []
        fill(workspace.files)
    assert entries(folder) == ["out"]


def test_a_new_start_forgets_the_interrupted_one(folder: Path) -> None:
    root = workspace_of(Path("out")).root
    root.mkdir()
    (root / "training.pt").write_text("old")
    with (
        pytest.raises(ToolkitError, match="can be resumed"),
        open_workspace(Path("out"), force=False, resume=False),
    ):
        pytest.fail("a mistyped command must not cost a training")
    assert (root / "training.pt").read_text() == "old"
    with open_workspace(Path("out"), force=True, resume=False) as workspace:
        assert not workspace.resumable
    assert entries(folder) == ["out"]


def test_an_error_says_that_the_training_is_kept(folder: Path) -> None:
    def fails() -> None:
        with open_workspace(Path("out"), force=False, resume=False) as workspace:
            workspace.training_checkpoint.write_text("state")
            raise ToolkitError("bad", found="x", fix="y")

    with pytest.raises(ToolkitError) as caught:
        fails()
    assert "--resume" in caught.value.__notes__[0] and entries(folder) == [".out.partial"]


def test_nothing_to_resume(folder: Path) -> None:
    with pytest.raises(ToolkitError, match="nothing to resume"), open_workspace(Path("out"), force=False, resume=True):
        pass
    assert entries(folder) == []


def test_an_existing_output_is_refused_and_stays(folder: Path) -> None:
    Path("out").mkdir()
    fill(folder / "out", "old")
    with pytest.raises(ToolkitError, match="exists") as caught, open_workspace(Path("out"), force=False, resume=False):
        pass
    assert "--force" in caught.value.fix
    assert text_in("out") == "old" and entries(folder) == ["out"]


def test_force_replaces_a_bundle_at_the_very_end(folder: Path) -> None:
    Path("out").mkdir()
    fill(folder / "out", "old")
    with open_workspace(Path("out"), force=True, resume=False) as workspace:
        fill(workspace.files, "new")
        assert text_in("out") == "old"
    assert text_in("out") == "new" and entries(folder) == ["out"]


def test_force_keeps_the_old_bundle_if_the_run_fails(folder: Path) -> None:
    Path("out").mkdir()
    fill(folder / "out", "old")
    with pytest.raises(ValueError, match="defect"), open_workspace(Path("out"), force=True, resume=False) as workspace:  # noqa: PT012
        fill(workspace.files, "new")
        raise ValueError("defect")
    assert text_in("out") == "old" and entries(folder) == ["out"]


def test_force_keeps_the_old_bundle_if_the_last_move_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out").mkdir()
    fill(folder / "out", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "bundle":
            raise OSError(errno.ENOSPC, "no space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ToolkitError, match="disk is full"), open_workspace(Path("out"), force=True, resume=False):
        pass
    assert text_in("out") == "old" and entries(folder) == ["out"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder", "bundle"])
def test_what_appears_at_the_output_during_the_run_is_not_lost(folder: Path, kind: str, force: bool) -> None:
    """With force a bundle is replaced, as it would have been at the start; nothing else ever is."""

    def run() -> None:
        with open_workspace(Path("out"), force=force, resume=False) as workspace:
            fill(workspace.files, "new")
            if kind == "file":
                Path("out").write_text("dear")
            else:
                Path("out").mkdir()
                if kind == "bundle":
                    fill(Path("out"), "dear")
                else:
                    Path("out/dear.txt").write_text("dear")

    if force and kind == "bundle":
        run()
        assert text_in("out") == "new" and entries(folder) == ["out"]
        return
    Path("out.finished").write_text("of an earlier time")
    with pytest.raises(ToolkitError, match="has appeared") as caught:
        run()
    assert "out.finished1" in caught.value.fix and entries(folder) == ["out", "out.finished", "out.finished1"]
    assert text_in("out.finished1") == "new"
    found = text_in("out") if kind == "bundle" else Path("out" if kind == "file" else "out/dear.txt").read_text()
    assert found == "dear"


def test_force_replaces_an_empty_folder_and_no_file(folder: Path) -> None:
    Path("out").write_text("a file")
    Path("empty").mkdir()
    with open_workspace(Path("empty"), force=True, resume=False) as workspace:
        fill(workspace.files)
    assert entries(folder / "empty") == [bundle.MANIFEST]
    with pytest.raises(ToolkitError, match="is a file"), open_workspace(Path("out"), force=True, resume=False):
        pass
    assert entries(folder) == ["empty", "out"] and Path("out").read_text() == "a file"


def test_force_never_removes_what_harden_did_not_write(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "photos/holiday.jpg").write_text("dear")
    for output in (Path("photos"), Path(), Path(".."), folder):
        with (
            pytest.raises(ToolkitError, match="did not write"),
            open_workspace(output, force=True, resume=False),
        ):
            pass
    assert entries(folder) == ["photos"] and (folder / "photos/holiday.jpg").read_text() == "dear"


@pytest.mark.parametrize(
    "content",
    [
        {"manifest.json": '{"name": "my web app"}', "precious.txt": "dear"},
        {"manifest.json": "no JSON", "report.json": "{}"},
        {
            "manifest.json": '{"toolkit_version": "0", "files": {"model.pt": {}}}',
            "model.pt": "",
            "notes/today.txt": "dear",
        },
        {"manifest.json": '["toolkit_version"]'},
    ],
)
def test_a_folder_with_a_file_of_a_bundles_name_is_no_bundle(folder: Path, content: dict[str, str]) -> None:
    """Nor is one into which somebody has put something of his own."""
    for name, text in content.items():
        Path("out", name).parent.mkdir(parents=True, exist_ok=True)
        Path("out", name).write_text(text)
    with pytest.raises(ToolkitError, match="did not write"), open_workspace(Path("out"), force=True, resume=False):
        pass
    assert {name: Path("out", name).read_text() for name in content} == content and entries(folder) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk(folder: Path, number: int) -> None:
    with (
        pytest.raises(ToolkitError, match="disk is full") as caught,
        open_workspace(Path("out"), force=False, resume=False),
    ):
        raise OSError(number, "no room")
    assert "free some space" in caught.value.fix and entries(folder) == []


def test_libraries_words_for_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ForeignError(Exception):
        pass

    with (
        pytest.raises(ToolkitError, match="disk is full"),
        open_workspace(Path("out"), force=False, resume=False),
    ):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534\nand more")
    monkeypatch.setattr(bundle, "_free_bytes", lambda _path: 10)
    with (
        pytest.raises(ToolkitError, match="disk is full"),
        open_workspace(Path("out"), force=False, resume=False),
    ):
        raise ForeignError("system error number 28")
    assert entries(folder) == []


def test_outputs_that_cannot_be_written(folder: Path) -> None:
    Path("file").write_text("a regular file")
    for output in ("file/out", "file/deep/out", "/proc/out"):
        with (
            pytest.raises(ToolkitError, match="cannot be written") as caught,
            open_workspace(Path(output), force=False, resume=False),
        ):
            pass
        assert output in caught.value.found and "--output" in caught.value.fix
    assert entries(folder) == ["file"]


def test_a_missing_file_elsewhere_is_no_fault_of_the_output(folder: Path) -> None:
    with pytest.raises(FileNotFoundError), open_workspace(Path("out"), force=False, resume=False):
        (folder.parent / "elsewhere/lost").read_text()


def write(folder: Path) -> None:
    for name in bundle.REQUIRED:
        (folder / name).write_text(name)
    (folder / "plots").mkdir()
    (folder / "plots/one.svg").write_text("plot")
    bundle.write_manifest(folder, {"seed": 3})


def test_the_manifest_names_every_file(folder: Path) -> None:
    write(folder)
    manifest = json.loads(Path(bundle.MANIFEST).read_text())
    assert set(manifest["files"]) == {*bundle.REQUIRED, "plots/one.svg"} - {bundle.MANIFEST}
    assert manifest["seed"] == 3 and manifest["files"]["plots/one.svg"]["bytes"] == 4
    assert all(finding.passed for finding in verify_files(folder))


@pytest.mark.parametrize(
    ("damage", "file", "detail"),
    [
        (lambda folder: (folder / "model.onnx").write_text("model.onnX"), "model.onnx", "SHA-256 differs"),
        (lambda folder: (folder / "model.pt").unlink(), "model.pt", "missing"),
        (lambda folder: (folder / "extra.bin").write_text(""), "extra.bin", "not in the manifest"),
        (lambda folder: (folder / "plots/one.svg").write_text(""), "plots/one.svg", "SHA-256 differs"),
    ],
)
def test_damage_is_found(folder: Path, damage: Callable[[Path], object], file: str, detail: str) -> None:
    write(folder)
    damage(folder)
    (finding,) = [finding for finding in verify_files(folder) if not finding.passed]
    assert finding.file == file and detail in finding.detail


def test_a_file_that_bundles_must_have_is_missed_though_the_manifest_forgets_it(folder: Path) -> None:
    write(folder)
    manifest = json.loads(Path(bundle.MANIFEST).read_text())
    del manifest["files"]["model.onnx"]
    Path(bundle.MANIFEST).write_text(json.dumps(manifest))
    Path("model.onnx").unlink()
    assert Finding("model.onnx", False, "missing") in verify_files(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": 1}}'])
def test_a_damaged_manifest(folder: Path, text: str) -> None:
    write(folder)
    Path(bundle.MANIFEST).write_text(text)
    for use in (lambda: verify_files(folder), lambda: bundle.replace_summary(folder, "text")):
        with pytest.raises(ToolkitError, match="manifest is damaged"):
            use()
    assert Path(bundle.SUMMARY).read_text() == bundle.SUMMARY


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"schema_version": "9.0"}'])
def test_a_report_that_does_not_fit_its_schema(folder: Path, content: bytes) -> None:
    Path(bundle.REPORT).write_bytes(content)
    with pytest.raises(ToolkitError, match="does not fit its schema"):
        bundle.read_report(folder)


def test_a_folder_that_is_no_bundle(folder: Path) -> None:
    for use in (bundle.read_report, verify_files, lambda place: bundle.replace_summary(place, "text")):
        with pytest.raises(ToolkitError, match="no bundle"):
            use(folder)
    assert entries(folder) == []


def test_a_new_summary_keeps_the_manifest_true(folder: Path) -> None:
    write(folder)
    bundle.replace_summary(folder, "other words")
    assert Path(bundle.SUMMARY).read_text() == "other words"
    assert all(finding.passed for finding in verify_files(folder))


def test_two_runs_to_one_output_keep_out_of_each_others_way(folder: Path) -> None:
    with bundle.open_workspace(folder / "out", force=False, resume=False) as workspace:
        (workspace.files / "mine").write_text("1")
        with (
            pytest.raises(ToolkitError, match="another run is writing to this output"),
            bundle.open_workspace(folder / "out", force=False, resume=False),
        ):
            pytest.fail("the second run must not start")
        assert (workspace.files / "mine").is_file()
    assert (folder / "out/mine").is_file()
