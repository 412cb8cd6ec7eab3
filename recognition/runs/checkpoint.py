"""Checkpoints: saved whole or not at all, verified before they are read, read at any number of ranks.

    checkpoints/step-00001000/    .metadata and shards (torch.distributed.checkpoint, tensors only), manifest.json
    checkpoints/latest            the name of the newest complete one

A folder is written under a name that ends in `.partial`; its manifest, with the SHA-256 of every file, is written last,
and then the folder gets its name by one rename. So a folder with its final name is complete, and the previous
checkpoint is untouched until then. The manifest guards against damage, not against malice: the metadata that torch
writes is a pickle, so load only checkpoints you trust.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from recognition.config.renamed import to_current
from recognition.distributed import gather_objects
from recognition.errors import UserError
from recognition.files.atomic import sync, write_text
from recognition.runs import faults

logger = logging.getLogger(__name__)
T = TypeVar("T")

MANIFEST = "manifest.json"
_FORMAT = 1
_METADATA_KEY = "facts"  # as format 1 names it in the file
_PARTIAL = ".partial"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(UserError):
    """A checkpoint that could not be written or read; raised alike on all ranks, with the rank and its reason."""


@dataclass(frozen=True)
class Manifest:
    """The record of a checkpoint: its step, its files and all that is not a tensor."""

    step: int
    world_size: int
    """Number of ranks that wrote it."""
    metadata: dict[str, Any]
    """JSON values by name: the settings (`config`), by today's names, the data's fingerprint, the schedule's offset."""
    files: dict[str, tuple[int, str]]
    """Size in bytes and SHA-256 of every other file of the folder."""


class Checkpoints:
    """The checkpoints of one run. All methods are called by all ranks; the folder is one that all of them see.

    `find` and `metadata` work without a process group too.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._verified: set[Path] = set()
        self._damaged: set[Path] = set()

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
        """Write a checkpoint of `tensors` and `metadata`, JSON values by name, and return its folder.

        A DTensor is written by the ranks that hold its shards; a plain tensor is taken to be equal on all ranks and
        written once. A valid checkpoint of the same step is left as it is. Of the older ones the `keep` newest stay,
        this one counted.
        Raises CheckpointError on all ranks when any of them fails; the previous checkpoints are untouched then.
        """
        final = self.folder / f"step-{step:08d}"
        failure = f"checkpoint {final} could not be saved"
        if self._damage(final):
            self._write(final, step, tensors, dict(metadata), failure)
        self._damaged.discard(final)
        self._verified.add(final)
        _on_main(lambda: self._publish(final, step), failure)
        return final

    def find(self) -> Path | None:
        """Return, on all ranks, the newest checkpoint whose files match the hashes in its manifest; None without any.

        Damaged ones are passed over with a warning that names the folder and the damage. The ranks share the hashing.
        """
        for folder in _on_main(lambda: step_folders(self.folder), f"{self.folder} could not be read"):
            damage = self._damage(folder)
            if not damage:
                self._verified.add(folder)
                return folder
            self._damaged.add(folder)
            if _rank_and_world()[0] == 0:
                logger.warning("checkpoint %s is damaged and passed over: %s", folder, damage)
        return None

    def metadata(self, folder: Path) -> dict[str, Any]:
        """Read the metadata saved with the tensors. Raises CheckpointError when the manifest cannot be read."""
        return read_manifest(folder).metadata

    def load(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place, at any number of ranks, and return the metadata saved with them.

        The hashes are checked first, unless `find` or `save` of this object did so.
        Raises CheckpointError when the folder is damaged, and UserError when names, shapes or types are not those of
        `tensors`, which are untouched then.
        """
        if folder not in self._verified:
            if damage := self._damage(folder):
                raise CheckpointError(f"checkpoint {folder} is damaged: {damage}")
            self._verified.add(folder)
        failure = f"checkpoint {folder} could not be read"
        mismatches = [text for text in _on_all_ranks(lambda: _shape_mismatch(folder, tensors), failure) if text]
        if mismatches:
            raise UserError(f"checkpoint {folder} does not fit this run: {mismatches[0]}")
        _on_all_ranks(lambda: _read_into(folder, dict(tensors)), failure)
        return self.metadata(folder)

    def _damage(self, folder: Path) -> str:
        """Describe the damage of a checkpoint, empty if there is none; each rank looks at its share of the files."""
        rank, world = _rank_and_world()
        reasons = gather_objects(_damage(folder, part=rank, parts=world))
        return next((reason for reason in reasons if reason), "")

    def _write(
        self, final: Path, step: int, tensors: Mapping[str, Tensor], metadata: dict[str, Any], failure: str
    ) -> None:
        rank, world = _rank_and_world()
        partial = final.with_name(final.name + _PARTIAL)
        _on_main(lambda: self._clear(partial), failure)
        try:
            faults.reach("checkpoint shards", step=step, folder=partial)
            _save_shards(partial, tensors, failure)
            faults.reach("checkpoint hashes", step=step, folder=partial)
            hashes = _on_all_ranks(lambda: _hash_files(partial, f"__{rank}_"), failure)
            shards = {name: entry for own in hashes for name, entry in own.items()}
            _on_main(lambda: self._complete(partial, final, Manifest(step, world, metadata, shards)), failure)
        except CheckpointError:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _clear(self, partial: Path) -> None:
        """Make an empty folder to write to, and remove those that earlier runs left behind when they died."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(f"step-*{_PARTIAL}"):
            shutil.rmtree(stale)
        partial.mkdir()

    def _complete(self, partial: Path, final: Path, manifest: Manifest) -> None:
        """Write the manifest, once all files are there, and give the folder its final name."""
        faults.reach("checkpoint manifest", step=manifest.step, folder=partial)
        manifest = replace(manifest, files=manifest.files | _hash_files(partial, ".metadata"))
        for name, (size, _) in manifest.files.items():
            if not (partial / name).is_file() or (partial / name).stat().st_size != size:
                raise FileNotFoundError(
                    f"rank 0 does not see {partial / name} as another rank wrote it: "
                    "the run's folder has to be on a file system that all nodes share"
                )
        write_text(partial / MANIFEST, _encode(manifest), on_disk=True)
        faults.reach("checkpoint name", step=manifest.step, folder=partial)
        if final.exists():
            _discard(final)  # it must be damaged, as a valid one would have been kept
        partial.rename(final)
        sync(self.folder)

    def _publish(self, newest: Path, step: int) -> None:
        """Point at a complete checkpoint, then remove those that are not among the newest.

        Damaged ones do not count, and stay to be looked at.
        """
        faults.reach("checkpoint latest", step=step, folder=newest)
        write_text(self.folder / "latest", newest.name + "\n", on_disk=True)
        faults.reach("checkpoint retention", step=step, folder=newest)
        sound = [folder for folder in step_folders(self.folder) if folder not in self._damaged]
        for folder in set(sound[self.keep :]) - {newest}:
            try:
                _discard(folder)
            except OSError as error:
                logger.warning("checkpoint %s could not be removed: %s", folder, error)


def step_folders(folder: Path) -> list[Path]:
    """List the checkpoints in `folder` that have their final name, whether valid or not, the newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint, its settings by today's names.

    Raises CheckpointError when it is missing or has changed since it was written.
    """
    try:
        tree = json.loads((folder / MANIFEST).read_text())
        digest = tree.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from error
    if digest != _digest_of(tree):
        raise CheckpointError(f"{MANIFEST} is not as it was written")
    if tree["format"] != _FORMAT:
        raise CheckpointError(f"{MANIFEST} has format {tree['format']}; this program reads {_FORMAT}")
    files = {name: (size, digest) for name, (size, digest) in tree["files"].items()}
    metadata = tree[_METADATA_KEY]
    if "config" in metadata:
        metadata["config"] = to_current(metadata["config"])
    return Manifest(tree["step"], tree["world_size"], metadata, files)


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors whose names start with `prefix`, whole and onto the CPU, by this process alone.

    Needs no process group. Raises CheckpointError when the checkpoint is damaged, UserError when no name fits.
    """
    if damage := _damage(folder):
        raise CheckpointError(f"checkpoint {folder} is damaged: {damage}")
    saved = _saved_tensors(folder)
    tensors = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in saved.items()
        if name.startswith(prefix)
    }
    if not tensors:
        raise UserError(f"checkpoint {folder} has no tensor whose name starts with {prefix!r}: {_format_names(saved)}")
    _read_into(folder, tensors)
    return tensors


def _save_shards(folder: Path, tensors: Mapping[str, Tensor], failure: str) -> None:
    writer = FileSystemWriter(folder, overwrite=False)
    try:
        save_tensors(dict(tensors), storage_writer=writer, planner=DefaultSavePlanner(flatten_state_dict=False))
    except CheckpointException as error:
        reasons = [f"rank {rank}: {_reason(cause)}" for rank, (cause, _) in sorted(error.failures.items())]
        free = shutil.disk_usage(folder.parent).free / 1e9
        raise CheckpointError(f"{failure} ({free:.1f} GB are free there): {'; '.join(reasons)}") from error


def _read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read this rank's shards of `tensors`, without the communication between ranks that DCP's own `load` needs."""
    reader, planner = FileSystemReader(folder), DefaultLoadPlanner(flatten_state_dict=False)
    metadata = reader.read_metadata()
    with torch.no_grad():
        planner.set_up_planner(tensors, metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        plan = planner.finish_plan(planner.create_local_plan())
        reader.read_data(reader.prepare_local_plan(plan), planner).wait()


def _saved_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: about for name, about in entries.items() if isinstance(about, TensorStorageMetadata)}


def _shape_mismatch(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Describe how the saved tensors differ from those wanted in name, shape or type; empty if they do not."""
    saved = _saved_tensors(folder)
    differences = []
    if missing := tensors.keys() - saved.keys():
        differences.append(f"it lacks {_format_names(missing)}")
    if unexpected := saved.keys() - tensors.keys():
        differences.append(f"only it has {_format_names(unexpected)}")
    for name in sorted(tensors.keys() & saved.keys()):
        there = (tuple(saved[name].size), saved[name].properties.dtype)
        here = (tuple(tensors[name].shape), tensors[name].dtype)
        if there != here:
            differences.append(f"{name} is {there[1]} {list(there[0])} in it and {here[1]} {list(here[0])} here")
    return "; ".join(differences[:10]) + ("; and more" if len(differences) > 10 else "")


def _damage(folder: Path, part: int = 0, parts: int = 1) -> str:
    """Describe the damage of a part of a checkpoint's files, empty if there is none."""
    try:
        manifest = read_manifest(folder)
        for name, (size, digest) in sorted(manifest.files.items())[part::parts]:
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (actual := (folder / name).stat().st_size) != size:
                return f"{name} has {actual} bytes instead of {size}"
            if _digest(folder / name) != digest:
                return f"{name} has changed since it was written"
    except (CheckpointError, OSError) as error:
        return str(error)
    return ""


def _hash_files(folder: Path, prefix: str) -> dict[str, tuple[int, str]]:
    names = sorted(path.name for path in folder.iterdir() if path.name.startswith(prefix))
    return {name: ((folder / name).stat().st_size, _digest(folder / name)) for name in names}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _encode(manifest: Manifest) -> str:
    fields = {_METADATA_KEY if name == "metadata" else name: value for name, value in asdict(manifest).items()}
    tree = {"format": _FORMAT, **json.loads(json.dumps(fields, allow_nan=False))}
    return json.dumps({**tree, "sha256": _digest_of(tree)}, indent=2, allow_nan=False) + "\n"


def _discard(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a half-removed one is never taken for a complete one."""
    doomed = folder.with_name(f"{folder.name}.old{_PARTIAL}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _on_all_ranks(work: Callable[[], T], failure: str) -> list[T]:
    """Do `work` on every rank and return all results in rank order; CheckpointError on all ranks if it fails on any."""
    result, reason = None, ""
    try:
        result = work()
    except Exception as error:
        logger.debug("%s", failure, exc_info=True)
        reason = _reason(error)
    outcomes = gather_objects((result, reason))
    reasons = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(outcomes) if reason]
    if reasons:
        raise CheckpointError(f"{failure}: {'; '.join(reasons)}")
    return [result for result, _ in outcomes]  # type: ignore[misc]


def _on_main(work: Callable[[], T], failure: str) -> T:
    """Do `work` on rank 0 and return its result on all ranks; CheckpointError on all if it fails."""
    rank, _ = _rank_and_world()
    return _on_all_ranks(lambda: work() if rank == 0 else None, failure)[0]  # type: ignore[return-value]


def _rank_and_world() -> tuple[int, int]:
    """Return this rank and the number of ranks; a process without a group is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _format_names(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
