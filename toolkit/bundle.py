"""The bundle on disk: whole or absent, with a manifest of every file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolkit.config import HardenConfig, build, read_settings
from toolkit.errors import OutputTakenError, ToolkitError
from toolkit.locks import alone
from toolkit.reports.schema import Report

MANIFEST = "manifest.json"
REPORT = "report.json"
DEPLOYED = "model.onnx"
FLOAT_TWIN = "model.fp32.onnx"
END_TO_END = "model.e2e.onnx"
CHECKPOINT = "model.pt"
CONFIG = "config.yaml"
SUMMARY = "report.md"
REQUIRED = (DEPLOYED, FLOAT_TWIN, CHECKPOINT, CONFIG, REPORT, SUMMARY, MANIFEST)


@dataclass(frozen=True)
class Workspace:
    """The hidden folder beside the output in which a bundle grows."""

    output: Path
    root: Path

    @property
    def files(self) -> Path:
        """Where the bundle's files are written."""
        return self.root / "bundle"

    @property
    def training_checkpoint(self) -> Path:
        """Where the fine-tuning keeps its state."""
        return self.root / "training.pt"

    @property
    def journals(self) -> Path:
        """Where the evaluation keeps what it found so far."""
        return self.root / "journals"

    @property
    def assignment(self) -> Path:
        """Which layers a search left float: another search might end elsewhere, and the journals tell of this one."""
        return self.root / "assignment.json"

    @property
    def rounding(self) -> Path:
        """To which multiple widths are rounded, for the same reason: what is trained has these widths."""
        return self.root / "rounding.json"

    @property
    def kept(self) -> tuple[Path, ...]:
        """What a run that is cut short leaves for the next one."""
        return (self.training_checkpoint, self.journals, self.assignment, self.rounding)

    @property
    def resumable(self) -> bool:
        return self.training_checkpoint.is_file() or any(self.journals.glob("*.sqlite"))

    def scratch(self, name: str) -> Path:
        """A file that the bundle does not keep."""
        return self.root / name


def workspace_of(output: Path) -> Workspace:
    """Where the bundle `output` grows; the folder need not exist."""
    return Workspace(output, output.parent / f".{output.name}.partial")


def check_output(output: Path, *, force: bool, resume: bool) -> Workspace:
    """The workspace of a run to `output`, if such a run may start; nothing is written.

    Raises:
        ToolkitError: `output` exists and `force` is not set, is no bundle, or an interrupted run is or is not there.
    """
    workspace = workspace_of(output)
    if output.exists() and not force:
        raise ToolkitError(
            "the output exists", found=str(output), fix="name another folder with --output, or replace it with --force"
        )
    _refuse_foreign(output)
    if resume and not workspace.resumable:
        raise ToolkitError(
            "there is nothing to resume",
            found=f"no interrupted run beside {output}",
            fix="start without --resume, or name the --output of the interrupted run",
        )
    if workspace.resumable and not (resume or force):
        raise ToolkitError(
            "an interrupted run to this output can be resumed",
            found=str(workspace.root),
            fix="continue it with --resume, or discard it with --force",
        )
    return workspace


@contextlib.contextmanager
def open_workspace(output: Path, *, force: bool, resume: bool) -> Iterator[Workspace]:
    """A workspace that becomes `output` when the block ends without an error.

    After an error or an interrupt `output` is as it was before; the workspace stays only if a training or an evaluation
    can be resumed from it.

    Raises:
        ToolkitError: `output` exists and `force` is not set, cannot be written, or the disk is full.
    """
    workspace = check_output(output, force=force, resume=resume)
    with disk_errors(output), folders_above(output), _alone(workspace):
        for path in workspace.root.iterdir():
            if not (resume and path in workspace.kept):
                _remove(path)
        workspace.files.mkdir()
        try:
            yield workspace
            _move_into_place(workspace, force=force)
        except BaseException as error:
            _clear(workspace)
            if workspace.resumable and isinstance(error, ToolkitError):
                error.add_note(KEPT)
            raise


@contextlib.contextmanager
def _alone(workspace: Workspace) -> Iterator[None]:
    """Make the workspace's folder and keep other runs out of it; the system lifts the lock of a run that died.

    Raises:
        ToolkitError: another run is writing to the same output.
    """
    workspace.root.mkdir(exist_ok=True)
    busy = ToolkitError(
        "another run is writing to this output",
        found=str(workspace.output),
        fix="wait for it, or name another folder with --output",
    )
    with alone(workspace.root, busy):
        yield


def _clear(workspace: Workspace) -> None:
    """Remove all but what can be resumed."""
    if workspace.resumable:
        for path in workspace.root.iterdir():
            if path not in workspace.kept:
                _remove(path)
    else:
        shutil.rmtree(workspace.root, ignore_errors=True)


@contextlib.contextmanager
def folders_above(output: Path) -> Iterator[None]:
    """Make the folders above `output`; after an error those that were made and are empty go again."""
    missing = [folder for folder in output.absolute().parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:  # innermost first
            with contextlib.suppress(OSError):  # not empty: somebody else writes there
                folder.rmdir()
        raise


def _refuse_foreign(output: Path) -> None:
    """Replacing removes what was there, so only bundles and empty folders are replaced.

    Raises:
        ToolkitError: `output` is a file, a folder of something else, or the folder that this process works in.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise ToolkitError(
            "the output is a file, and a bundle is a folder",
            found=str(output),
            fix="name another place with --output; --force replaces bundles only",
        )
    foreign = _foreign_in(output)
    if foreign:
        raise ToolkitError(
            "the output is a folder that holds what harden did not write",
            found=f"{output}: {foreign}",
            fix="name another folder with --output; --force replaces bundles only",
        )


def _foreign_in(output: Path) -> str | None:
    """What in a folder no bundle has; None: it is a bundle, or empty, and this process does not work in it."""
    if Path.cwd().is_relative_to(output.resolve()):
        return "the folder that this command works in"
    there = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_symlink() or path.is_file()}
    if not there:
        return None
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        ours = {MANIFEST, *manifest["files"]} if "toolkit_version" in manifest else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    strange = sorted(there - ours)
    return ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "") if strange else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def put(finished: Path, output: Path, *, force: bool) -> None:
    """Move a finished file to `output`.

    Raises:
        OutputTakenError: something stands there, which `force` does not allow to replace; the file is kept beside it.
    """
    if output.exists() and not force:
        raise _kept_beside(finished, output)
    finished.replace(output)


def _kept_beside(finished: Path, output: Path) -> OutputTakenError:
    """Give what is finished another name, for at its own something has appeared since the run began."""
    names = (output.with_name(f"{output.stem}.finished{number or ''}{output.suffix}") for number in itertools.count())
    other = next(name for name in names if not name.exists())
    finished.rename(other)
    return OutputTakenError(
        "something has appeared at the output during the run",
        found=str(output),
        fix=f"nothing is lost: what this run made is whole in {other}",
    )


def _may_replace(output: Path) -> bool:
    return output.is_dir() and _foreign_in(output) is None


def _move_into_place(workspace: Workspace, *, force: bool) -> None:
    if workspace.output.exists() and not (force and _may_replace(workspace.output)):
        error = _kept_beside(workspace.files, workspace.output)
        shutil.rmtree(workspace.root, ignore_errors=True)
        raise error
    old = workspace.output.parent / f".{workspace.output.name}.old"
    if workspace.output.exists():
        if old.exists():
            shutil.rmtree(old)
        workspace.output.rename(old)
    try:
        workspace.files.rename(workspace.output)
    except OSError:
        if old.exists():
            old.rename(workspace.output)
        raise
    shutil.rmtree(workspace.root, ignore_errors=True)
    _remove(old)


KEPT = "what was done so far is kept: the same command with --resume goes on from it"
"""What a run that failed says of its state."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG)
TORCH_WRITER = "inline_container.cc"
"""What torch.save names in every failed write, whatever the system said."""
SMALLEST_FREE = 1 << 20
"""Below so many free bytes a failed write is put down to a full disk, whatever a library says of it."""


@contextlib.contextmanager
def disk_errors(path: Path, flag: str = "--output") -> Iterator[None]:
    """Turn what goes wrong with the disk at `path`, which `flag` names, into a `ToolkitError`; other errors pass."""
    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:  # libraries raise their own kinds where they cannot write
        told = disk_error(error, path, flag)
        if told is not None:
            raise told from error
        raise


def disk_error(error: Exception, path: Path, flag: str = "--output") -> ToolkitError | None:
    """What went wrong with the disk at `path`, in words; None if the error is of something else."""
    number = error.errno if isinstance(error, OSError) else None
    by_torch = TORCH_WRITER in str(error)  # which tells in words alone why it failed
    unopened = by_torch and "open file failed" in str(error) and os.strerror(errno.ENOSPC) not in str(error)
    if unopened or (number in UNWRITABLE and _concerns(error, path)):
        return ToolkitError(
            "the output cannot be written",
            found=f"{path}: {_first_line(error)}",
            fix=f"name a writable folder with {flag}",
        )
    if number in FULL or by_torch or _free_bytes(path) < SMALLEST_FREE:
        return ToolkitError(
            "the disk is full",
            found=f"{path}: {_first_line(error)}",
            fix=f"free some space, or name another disk with {flag}",
        )
    return None


def _concerns(error: Exception, path: Path) -> bool:
    """Whether a failed file operation was on `path` or beside it, and not on a file of ours that is missing."""
    name = getattr(error, "filename", None)
    return name is None or Path(name).absolute().is_relative_to(path.absolute().parent)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _free_bytes(path: Path) -> int:
    existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path())
    return shutil.disk_usage(existing).free


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write manifest.json: SHA-256 and size of every other file in `folder`, and `facts` beside them."""
    files = {
        path.relative_to(folder).as_posix(): _entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({**facts, "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_report(folder: Path) -> Report:
    """The report of the bundle in `folder`.

    Raises:
        ToolkitError: no bundle, or a report that does not fit its schema.
    """
    path = folder / REPORT
    if not path.is_file():
        raise ToolkitError(
            "this is no bundle", found=f"no {REPORT} in {folder}", fix="name a folder that `toolkit harden` wrote"
        )
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ToolkitError(
            "the report does not fit its schema",
            found=f"{path}: {where}: {first['msg']}",
            fix="harden again, or use the version of the toolkit that wrote it",
        ) from error


def read_config(folder: Path) -> HardenConfig:
    """The resolved configuration of the bundle in `folder`."""
    return build(HardenConfig, read_settings(folder / CONFIG))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ToolkitError(
            "this is no bundle", found=f"no {MANIFEST} in {folder}", fix="name a folder that `toolkit harden` wrote"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        for entry in manifest["files"].values():
            entry["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ToolkitError(
            "the manifest is damaged", found=f"{path}: {type(error).__name__}", fix="use another copy of the bundle"
        ) from error
    return manifest


def replace_summary(folder: Path, text: str) -> None:
    """Write report.md anew, and its hash into the manifest."""
    manifest = _read_manifest(folder)
    with disk_errors(folder):
        (folder / SUMMARY).write_text(text, encoding="utf-8")
        manifest["files"][SUMMARY] = _entry(folder / SUMMARY)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Finding:
    """One claim of the manifest, checked."""

    file: str
    passed: bool
    detail: str


def verify_files(folder: Path) -> tuple[Finding, ...]:
    """Check every file of a bundle against its manifest; files that it does not name fail too.

    Raises:
        ToolkitError: no manifest, or one that cannot be read.
    """
    claimed = {str(name): entry["sha256"] for name, entry in _read_manifest(folder)["files"].items()}
    present = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()} - {MANIFEST}
    findings = []
    for name in sorted(present | set(claimed) | (set(REQUIRED) - {MANIFEST})):
        if name not in present:
            findings.append(Finding(name, False, "missing"))
        elif name not in claimed:
            findings.append(Finding(name, False, "not in the manifest"))
        else:
            same = sha256(folder / name) == claimed[name]
            findings.append(Finding(name, same, "SHA-256 agrees" if same else "SHA-256 differs: the file was changed"))
    return tuple(findings)
