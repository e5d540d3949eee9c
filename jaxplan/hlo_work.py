"""What one instruction of an HLO program computes and moves through memory: FLOPs and bytes.

FLOPs count a multiply and an add as two, of dots and convolutions only. Memory traffic follows XLA's own cost analysis: a kernel
(one instruction of a computation that is not fused) reads its operands and writes its result once; of what is only sliced or
gathered, the slice counts, and of what is updated in place, the update.
"""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from .hlo_text import Instruction, Module, leaves, numbers, type_bytes

_FREE = frozenset((
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "opt-barrier",
    "copy-done", "domain", "add-dependency",
))  # fmt: skip
_CUDNN = {
    "__cudnn$convForward": (0, 1, 2),
    "__cudnn$convBiasActivationForward": (0, 1, 2),
    "__cudnn$convBackwardInput": (2, 1, 0),
    "__cudnn$convBackwardFilter": (0, 2, 1),
}
"""Which of (operand 0, operand 1, result) are image, kernel and output of the forward convolution whose window is printed."""
_SLICING = ("dynamic-slice", "slice", "gather")


@functools.cache
def _window_places(
    base: int, out: int, size: int, stride: int, low: int, high: int, dilate: int, spread: int
) -> int:
    """(output, kernel) pairs along one dimension.

    Places without data in a dilated or fully padded base are free, as the TPU writes batch dots that way;
    ordinary padding counts, as it does in 2 * outputs * kernel * features.
    """
    full = (size - 1) * spread
    if dilate == 1 and not (size > 1 and low >= full and high >= full):
        return out * size
    if out * size > 1 << 28:
        raise ValueError(f"a window of {size} at {out} places is damage")
    starts = np.arange(out) * stride - low
    places = 0
    for k in range(size):
        at = starts + k * spread
        places += int(((at >= 0) & (at <= (base - 1) * dilate) & (at % dilate == 0)).sum())
    return places


def _convolution_flops(
    lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...], attributes: str
) -> float | None:
    labels = re.search(r"dim_labels=(\w+?)_(\w+)->(\w+)", attributes)
    if not labels or tuple(map(len, labels.groups())) != (len(lhs), len(rhs), len(out)):
        return None
    of_lhs, of_rhs, of_out = labels.groups()
    window = dict(re.findall(r"(\w+)=(\S+)", (re.search(r"window=\{([^}]*)\}", attributes) or [""] * 2)[1]))
    flops = 2.0 * rhs[of_rhs.index("i")] * out[of_out.index("b")] * out[of_out.index("f")]
    for d in range(len(lhs) - 2):
        option = {key: text.split("x")[d] for key, text in window.items()}
        low, high = map(int, option.get("pad", "0_0").split("_"))
        flops *= _window_places(
            lhs[of_lhs.index(str(d))],
            out[of_out.index(str(d))],
            int(option.get("size", 1)),
            int(option.get("stride", 1)),
            low,
            high,
            int(option.get("lhs_dilate", 1)),
            int(option.get("rhs_dilate", 1)),
        )
    return flops


def flops_of(instruction: Instruction, operands: list[str]) -> float | None:
    """FLOPs of a dot, a convolution or a library call for one; 0 for all else, None if unreadable."""
    opcode, attributes = instruction.opcode, instruction.attributes
    target = (instruction.attribute(r'custom_call_target="([^"]*)"') or "") if opcode == "custom-call" else ""
    matmul = re.search(r"\$(matmul|gemm)", target)
    library = _CUDNN.get(target)
    if opcode not in ("dot", "convolution") and not matmul and not library:
        return None if re.search(r"gemm|matmul|conv(?!ert)|fmha|attention", target, re.I) else 0.0
    shapes = [leaves(kind)[0][1] for kind in operands if leaves(kind)]
    if len(shapes) < 2 or not leaves(instruction.type):
        return None
    out = leaves(instruction.type)[0][1]
    if opcode == "convolution" or library:
        lhs, rhs, result = ((shapes[0], shapes[1], out)[i] for i in library or (0, 1, 2))
        try:
            return _convolution_flops(lhs, rhs, result, attributes)
        except (ValueError, IndexError, ZeroDivisionError):  # damaged labels or window
            return None
    contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions\\?":\[)([^\]}]*)', attributes)
    if contracted is None and "$matmul" not in target:
        return None if matmul else 2.0 * math.prod(out)
    dims = numbers(contracted.group(1)) if contracted else [len(shapes[0]) - 1]
    return (
        2.0 * math.prod(out) * math.prod(shapes[0][d] for d in dims)
        if max(dims, default=0) < len(shapes[0])
        else None
    )


def traffic_of(module: Module, computation: str, instruction: Instruction) -> float:
    """Bytes that a kernel reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE:
        return 0.0
    written, operands = type_bytes(instruction.type), [_bytes_of(module, computation, name) for name in instruction.operands]
    if opcode in _SLICING:
        return 2 * written
    if opcode == "dynamic-update-slice" and len(operands) > 1:
        return 2 * operands[1]
    if opcode == "scatter" and len(operands) > 2:
        return 2 * operands[-1] + operands[1]
    callees = instruction.callees()
    if opcode != "fusion" or len(callees) != 1 or callees[0] not in module.computations:
        return written + sum(operands)
    return _fusion_traffic(module, callees[0], operands, written)


def _fusion_traffic(module: Module, name: str, operands: list[float], written: float) -> float:
    """Of a fusion: what is only sliced counts by its slices, what is updated in place by its updates."""
    fused = module.computations[name]
    total = 0.0
    for number, whole in enumerate(operands):
        users = _users(module, name, fused.parameters.get(number, ""))
        if users and all(user.opcode in _SLICING and user.operands[0] == read for read, user in users):
            total += sum(type_bytes(user.type) for _, user in users)
        elif not (users and all(user.opcode == "dynamic-update-slice" and user.operands[0] == read for read, user in users)):
            total += whole
    root = fused.instructions.get(fused.root)
    while root is not None and root.opcode == "bitcast" and root.operands:
        root = fused.instructions.get(root.operands[0])
    if root is not None and root.opcode == "dynamic-update-slice" and len(root.operands) > 1:
        return total + _bytes_of(module, name, root.operands[1])
    return total + written


def _users(module: Module, computation: str, name: str) -> list[tuple[str, Instruction]]:
    """(value read, instruction) of everything that reads a value, bitcasts seen through."""
    found = []
    for user in module.computations[computation].users.get(name, []):
        found += _users(module, computation, user.name) if user.opcode == "bitcast" else [(name, user)]
    return found


def _bytes_of(module: Module, computation: str, name: str) -> float:
    instruction = module.find(computation, name)
    return type_bytes(instruction.type) if instruction else 0.0
