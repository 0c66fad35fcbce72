"""One-bit deltas between fine-tunes and their base, as a property of torch.compile."""

from .compress import compress
from .delta import Delta
from .explain import explain
from .serve.model import TenantModel, attach
from .serve.reserve import Reserve

load = Delta.load

__all__ = ["Delta", "Reserve", "TenantModel", "attach", "compress", "explain", "load"]
