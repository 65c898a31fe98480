"""Everything that can be swapped. Importing this package makes every class here known by its short name."""

from blocks import (
    attention,
    base,
    cvt,
    gates,
    heads,
    kernels,
    mlp,
    nextvit,
    norms,
    positions,
    pvt,
    residual,
    stems,
    structure,
    tnt,
    transformer,
)

__all__ = [
    "attention",
    "base",
    "cvt",
    "gates",
    "heads",
    "kernels",
    "mlp",
    "nextvit",
    "norms",
    "positions",
    "pvt",
    "residual",
    "stems",
    "structure",
    "tnt",
    "transformer",
]
