"""One-bit deltas between fine-tunes and their base, as a property of torch.compile."""

from .compress import Allocation, compress
from .compress.distill import distill
from .delta import Delta
from .explain import explain
from .programs.export import export
from .programs.merge import merge
from .programs.package import package
from .programs.packaged import Package, load_package
from .programs.program import load_program, save_program
from .serve.model import TenantModel, attach
from .serve.reserve import Reserve

load = Delta.load

__all__ = [
    "Allocation",
    "Delta",
    "Package",
    "Reserve",
    "TenantModel",
    "attach",
    "compress",
    "distill",
    "explain",
    "export",
    "load",
    "load_package",
    "load_program",
    "merge",
    "package",
    "save_program",
]
