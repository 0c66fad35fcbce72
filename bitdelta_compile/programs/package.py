"""`bdc.package`: a program compiled by AOTInductor into one file, and the way to load it with its tenants.

The file needs torch and nothing of this package:

    model = torch._inductor.aoti_load_package("tenants.pt2")
    outputs = model(*args, **kwargs, tenant=torch.tensor([0, -1, 1], dtype=torch.int32))

one entry per row of the batch, a slot or -1 for the base; any other number is the base too. A process without this
package replaces a tenant by handing over its stacked tensors, `bitdelta.<parameter>.<field>`, all slots of each:

    model.load_constants({name: stacked, ...}, check_full_update=False, user_managed=True)

`packaged.load_package` adds tenants by name, their replacement one slot at a time, and a check of the CPU, without
which code for another one dies of an illegal instruction.
"""

from __future__ import annotations

import json
import platform
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..errors import BitDeltaError, UnsupportedError
from ..lowering.cache import graph_passes
from ..lowering.inductor import register_lowerings
from ..quantized import is_quantized
from .program import About, base_parameters, is_weightless, replacing, versions

FORMAT_VERSION = "1"
# What a compiler uses unasked when it compiles for this machine.
_VECTOR_FEATURES = ("avx", "amx", "fma", "f16c", "bmi", "lzcnt", "popcnt", "sve", "neon")


def package(program: ExportedProgram, path: str | Path, *, options: Mapping[str, Any] | None = None) -> None:
    """Compile a program into a package, atomically: after any failure the old file, if there was one, is still there.

    Args:
        program: from `export` or `merge`, with its weights.
        path: ends in `.pt2`.
        options: of Inductor. The package runs on CPUs that have what this one has; for others
            `{"cpp.march": "x86-64-v3", "cpp.simdlen": 256}` compiles for any with AVX2.

    Metadata inside, all strings, which `model.get_metadata()` reads:

        bitdelta.format                 of this metadata
        bitdelta.tenants                JSON: names by slot, null for a free one; null for one fine-tune, without index
        bitdelta.encodings, .tied       JSON: what a slot holds of each parameter; names that mean the same parameter
        bitdelta.base, .base_digest     where the base came from, if known; SHA-256 of its sampled values
        bitdelta.quantized              JSON: sampled values of the parameters that the package holds quantized
        bitdelta.torch, .version        of torch and of this package
        bitdelta.cpu                    CPU features that the code may use, separated by spaces
        bitdelta.extra.<name>           what the program's maker added

    and AOTInductor's own, `AOTI_CPU_ISA` among them.

    Raises:
        UnsupportedError: a program without weights, or not of this package.
        BitDeltaError: the file cannot be written.
    """
    about = About.of(program)
    if is_weightless(program):
        raise UnsupportedError("the program has no weights: fill them in with load_program(path, base=...)")
    register_lowerings()
    configured = dict(options or {})
    patches = {
        **configured,
        # Small tensors would be inlined into the code, folded ones lost: both could not be replaced.
        "always_keep_tensor_constants": True,
        "aot_inductor.use_runtime_constant_folding": False,
        "freezing": False,
        "aot_inductor.metadata": _metadata(program, about, configured),
    }
    patches |= graph_passes(patches)
    with replacing(Path(path)) as temporary, torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec", FutureWarning)  # torch's own
        torch._inductor.aoti_compile_and_package(program, package_path=str(temporary), inductor_configs=patches)


def _metadata(program: ExportedProgram, about: About, options: Mapping[str, Any]) -> dict[str, str]:
    native = options.get("cpp.march") in (None, "native")
    found = versions()
    quantized = [name for name, tensor in base_parameters(program).items() if is_quantized(tensor)]
    return {
        "bitdelta.format": FORMAT_VERSION,
        "bitdelta.tenants": json.dumps(about.tenants),
        "bitdelta.encodings": json.dumps(about.encodings),
        "bitdelta.tied": json.dumps(about.tied),
        "bitdelta.base": about.base or "",
        "bitdelta.base_digest": about.fingerprint.digest,
        "bitdelta.quantized": json.dumps(
            {name: about.fingerprint.sample(name).tolist() for name in quantized if name in about.fingerprint.names}
        ),
        "bitdelta.torch": found["torch"],
        "bitdelta.version": found["bitdelta_compile"],
        "bitdelta.cpu": " ".join(sorted(cpu_features())) if native else "",
        **{f"bitdelta.extra.{name}": value for name, value in about.extra.items()},
    }


def cpu_features() -> set[str]:
    """Instruction sets of this CPU, as torch names them: "avx2", "avx512_f", "fma3"."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return {f"capability:{torch.backends.cpu.get_cpu_capability()}"}
    return {name for name, there in capabilities().items() if there is True and name.startswith(_VECTOR_FEATURES)}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a package, without loading its code.

    Raises:
        BitDeltaError: it cannot be read, or is not a package of this version's format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".wrapper_metadata.json")]
            found = json.loads(archive.read(names[0])) if names else {}
    except OSError as error:
        raise BitDeltaError(f"{path} cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, ValueError) as error:
        raise BitDeltaError(f"{path} is not a readable package: {error}") from None
    version = found.get("bitdelta.format")
    if version is None:
        raise UnsupportedError(f"{path} is not a package that bdc.package wrote: package a program first")
    if version != FORMAT_VERSION:
        raise UnsupportedError(
            f"{path} has format version {version} and this package reads {FORMAT_VERSION}: "
            "install the bitdelta_compile that wrote it, or package the program again"
        )
    return found


def check_cpu(metadata: Mapping[str, str], path: str | Path) -> None:
    """UnsupportedError unless this machine can run what was compiled."""
    there, here = metadata.get("AOTI_MACHINE"), platform.machine()
    missing = sorted(set(metadata["bitdelta.cpu"].split()) - cpu_features())
    if there != here or missing:
        lack = f"is {here}" if there != here else f"lacks {', '.join(missing)}"
        raise UnsupportedError(
            f"{path} was compiled for {there} with {metadata.get('AOTI_CPU_ISA')} and this CPU {lack}: package the "
            'program on such a machine, or for older ones with options={"cpp.march": "x86-64-v3", "cpp.simdlen": 256}'
        )
