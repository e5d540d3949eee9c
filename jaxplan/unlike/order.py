"""In which order stages work on micro-batches: one forward, one backward, as far as what they wait for allows."""

from __future__ import annotations

from jaxplan.unlike.nouns import BACKWARD, FORWARD

Step = tuple[int, str, int]
"""(stage, phase, micro-batch)."""


def order(stages: int, microbatches: int, backward: bool = True) -> list[Step]:
    """All steps, in an order in which they can be handed to the devices one after another.

    A stage takes stages - s micro-batches forward, then alternates between one backward and one forward: it never keeps what more
    than stages - s of them need.
    """
    if not backward:
        return [(s, FORWARD, j) for j in range(microbatches) for s in range(stages)]
    todo = {s: _own(stages - s, microbatches) for s in range(stages)}
    done: set[Step] = set()
    found: list[Step] = []
    while any(todo.values()):
        for s in range(stages):
            if todo[s]:
                phase, j = todo[s][0]
                before = (s - 1, FORWARD, j) if phase == FORWARD else (s + 1, BACKWARD, j)
                if not 0 <= before[0] < stages or before in done:
                    found.append((s, phase, j))
                    del todo[s][0]
        done.update(found)
    return found


def _own(warm: int, microbatches: int) -> list[tuple[str, int]]:
    """The steps of one stage, in order."""
    ahead = [(FORWARD, j) for j in range(microbatches)]
    back = [(BACKWARD, j) for j in range(microbatches)]
    start = min(warm, microbatches)
    found = ahead[:start]
    for j in range(microbatches):
        found.append(back[j])
        found += ahead[start + j : start + j + 1]
    return found
