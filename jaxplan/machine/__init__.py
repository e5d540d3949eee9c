"""Room `machine`: the numbers of the BSP model, and nothing else about a device enters a plan.

    nouns.py    Machine, Link, and which link a mesh axis uses
    presets.py  machines that everybody knows
    files.py    machines of the user's own, as files
    find.py     which machine is meant
"""

from jaxplan.machine.files import load_machine, machine_json, named, save_machine
from jaxplan.machine.find import machine, platform_of
from jaxplan.machine.nouns import Link, Machine, apart_from_links, axis_links
from jaxplan.machine.presets import DEFAULT, PRESETS

__all__ = ["DEFAULT", "PRESETS", "Link", "Machine", "apart_from_links", "axis_links", "load_machine", "machine", "machine_json",
           "named", "platform_of", "save_machine"]  # fmt: skip
