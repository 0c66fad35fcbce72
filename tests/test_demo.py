"""The demo's plot; its models are too large for the suite, `make demo` runs the whole."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from bitdelta_compile import demo
from bitdelta_compile.fidelity import Fidelity


def test_the_plot_is_a_picture_with_something_on_it(tmp_path: Path) -> None:
    scores = [Fidelity("encoder", 0.9, after, 8, "texts") for after in (0.98, 0.999)]
    tenants = [demo.TenantResult(name, *scores, 90_000_000, 3_600_000, 1e-5, 1.5, 20.0) for name in ("sre", "rohan")]
    with Image.open(demo.plot(tenants, tmp_path / "plot.png")) as picture:
        assert picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 50
