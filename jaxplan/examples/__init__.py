"""Example programs: plain JAX as a competent user writes it, unaware of any planner.

`programs` gives them all, at a small size that runs in a moment or at one worth planning for. `by_hand`
holds an expert's plans for the decoder, to compare with.
"""

from typing import Literal

from . import conjugate_gradient, decode, decoder, mixture, mlp, resnet, stencil
from .program import Program

__all__ = ["Program", "programs"]


def programs(size: Literal["small", "full"] = "small") -> dict[str, Program]:
    """Every example by name.

    "small" divides over any mesh of up to sixteen devices with axes of two, four or eight, and runs in well
    under a second; "full" is meant to be planned and compiled from its shapes alone. Raises ValueError for
    any other size.
    """
    if size not in ("small", "full"):
        raise ValueError(f"size is {size!r}; it may be 'small' or 'full'")
    which = size.upper()
    found = (
        mlp.mlp_sgd(getattr(mlp, which)),
        decoder.decoder(getattr(decoder, which), "scan"),
        decoder.decoder(getattr(decoder, which), "unrolled"),
        resnet.resnet_momentum(getattr(resnet, which)),
        mixture.moe(getattr(mixture, which)),
        decode.decode_kv(getattr(decode, which)),
        conjugate_gradient.conjugate_gradient(getattr(conjugate_gradient, which)),
        stencil.stencil(getattr(stencil, which)),
    )
    return {program.name: program for program in found}
