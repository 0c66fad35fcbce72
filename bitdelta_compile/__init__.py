"""One-bit deltas between fine-tunes and their base, as a property of torch.compile."""

from .compress import compress
from .delta import Delta
from .explain import explain

load = Delta.load

__all__ = ["Delta", "compress", "explain", "load"]
