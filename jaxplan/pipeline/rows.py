"""One micro-batch, as the equations of a program are replayed for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxplan.layout import Spec
from jaxplan.pipeline.nouns import Path, PipelineError
from jaxplan.pipeline.rowwise import Edit, told
from jaxplan.pipeline.staged import edited


@dataclass(frozen=True)
class Rows:
    """The micro-batch that a replay computes. `edits`: what it changes, by path; `row`: its number."""

    edits: Mapping[Path, Edit]
    row: Any
    microbatches: int

    def edited(self, values: Sequence[Any], path: Path) -> list[Any]:
        """Operands (or the outputs of a body) as this micro-batch needs them."""
        found = self.edits.get(path)
        operands = found.operands if found is not None else {}
        return [edited(v, operands[k], self.row, self.microbatches) if k in operands else v for k, v in enumerate(values)]

    def params(self, path: Path) -> Mapping[str, Any]:
        """The parameters that an equation has for a micro-batch instead of its own."""
        found = self.edits.get(path)
        return {} if found is None else found.params

    def checked(self, equation: Any, outs: list[Any], path: Path) -> list[Any]:
        """The results of an equation. Raises PipelineError if they are not those of a micro-batch."""
        found = self.edits.get(path)
        shapes = tuple(out.shape for out in outs)
        if found is not None and found.shapes and shapes != found.shapes:
            raise PipelineError(
                f"{told(equation)} gives {shapes} for a micro-batch, where its rule leads to {found.shapes}: its parameters hold "
                "extents, so that it cannot run on a part of the batch"
            )
        return outs

    def fitting(self, spec: Spec, shape: Sequence[int], stage: int, sizes: Sequence[int]) -> Spec:
        """A spec without the stage axis, and without axes that do not divide what a micro-batch has of a dimension. `sizes`: of
        all axes."""
        fits = []
        for axes, extent in zip(spec, shape, strict=True):
            left = tuple(a for a in axes if a != stage)
            fits.append(left if extent % math.prod(sizes[a] for a in left) == 0 else ())
        return tuple(fits)
