"""Room `plots`: pictures for papers and slides, by matplotlib (`pip install 'jaxplan[plots]'`)."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxplan.files import write_bytes
from jaxplan.plan import Plan

KINDS = ("png", "svg", "pdf")
GIB = 2.0**30


def _figure(path: str | os.PathLike[str], width: float, height: float) -> tuple[Any, str]:
    """An empty figure, drawn without a display, and the kind of file. ModuleNotFoundError without matplotlib, saying what to
    install; ValueError for a name that ends otherwise."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        told = "plots are drawn by matplotlib, which is not installed: pip install 'jaxplan[plots]'"
        raise ModuleNotFoundError(told, name=error.name) from None
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in KINDS:
        raise ValueError(f"{os.fspath(path)!r} must end in .{', .'.join(KINDS[:-1])} or .{KINDS[-1]}")
    return Figure(figsize=(width, height), layout="constrained"), kind


def _write(figure: Any, kind: str, path: str | os.PathLike[str]) -> None:
    held = io.BytesIO()
    figure.savefig(held, format=kind, dpi=150)
    write_bytes(held.getvalue(), path)


def plot_memory(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Bytes per device over one call, to a file: what lives throughout, what lives besides, and the peak."""
    figure, kind = _figure(path, 8.0, 3.2)
    held = plan.memory
    fixed = (held.arguments + held.outputs) / GIB
    over = fixed + held.over / GIB
    axes = figure.subplots()
    places = range(len(over))
    axes.fill_between(places, 0, fixed, step="post", alpha=0.3, label="held throughout")
    axes.fill_between(places, fixed, over, step="post", alpha=0.3, label="besides")
    axes.axhline(plan.peak_bytes / GIB, linewidth=1, color="black", label="peak")
    axes.set(xlabel="operators, in the order in which they run", ylabel="GiB per device", xlim=(0, max(1, len(over) - 1)))
    axes.set_ylim(bottom=0)
    axes.set_title(f"Memory of {plan.traced.name}, modelled", loc="left")
    axes.legend(loc="upper right", frameon=False)
    _write(figure, kind, path)


def plot_points(points: Sequence[Mapping[str, Any]], title: str, path: str | os.PathLike[str]) -> None:
    """Modelled time, efficiency and peak memory over the points of a sweep, one line per combination of sizes and link speed, to
    a file. Each point: {"devices", "sizes", "link_speed", "seconds", "efficiency", "peak_bytes", "plan", "best"}."""
    figure, kind = _figure(path, 11.0, 3.6)
    chosen = [point for point in points if point["best"]] or list(points)
    along, across = _axis(chosen)
    panels = (("seconds", "seconds a call", 1.0), ("efficiency", "efficiency", 1.0), ("peak_bytes", "peak, GiB a device", GIB))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in chosen:
        told = [f"{name} = {value:g}" for name, value in across(point).items()]
        groups.setdefault(", ".join(told), []).append(point)
    for axes, (key, label, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        for told, group in groups.items():
            group = sorted(group, key=lambda point: along[1](point))
            xs, ys = [along[1](point) for point in group], [point[key] / unit for point in group]
            axes.plot(xs, ys, marker="o", label=told or None)
            if key == "seconds":
                for x, y, point in zip(xs, ys, group, strict=True):
                    axes.annotate(point["plan"], (x, y), textcoords="offset points", xytext=(0, 6), fontsize=8)
        axes.set_xscale("log", base=2)
        if key == "seconds":
            axes.set_yscale("log")
        axes.set(xlabel=along[0], ylabel=label)
    if any(groups):
        figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left")
    _write(figure, kind, path)


def _axis(points: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, Any], Any]:
    """What goes along the horizontal axis (the quantity with most values), and what tells the lines apart."""
    getters: dict[str, Any] = {"devices": lambda p: p["devices"], "link speed": lambda p: p["link_speed"]}
    for name in points[0]["sizes"]:
        getters[name] = lambda p, name=name: p["sizes"][name]
    counts = {name: len({get(p) for p in points}) for name, get in getters.items()}
    most = max(counts, key=lambda name: counts[name])
    varied = {name: get for name, get in getters.items() if name != most and counts[name] > 1}
    return (most, getters[most]), lambda point: {name: get(point) for name, get in varied.items()}
