"""Measures the devices at hand (or eight simulated ones) and prints every sample beside its fit.

    python scripts/calibrate_here.py [--mesh 4x2] [--simulate] [-o machine.json]
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="4x2")
    parser.add_argument("--simulate", action="store_true", help="simulated CPU devices, whatever there is")
    parser.add_argument("-o", "--output", help="machine file to write")
    options = parser.parse_args()
    shape = tuple(map(int, options.mesh.split("x")))
    if options.simulate:
        count = 1
        for size in shape:
            count *= size
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        os.environ["JAX_PLATFORMS"] = "cpu"

    import jax

    import jaxplan

    mesh = jax.make_mesh(shape, tuple("xyzw"[: len(shape)]))
    calibration = jaxplan.calibrate(mesh, f"{jax.devices()[0].device_kind} {options.mesh}")
    print(calibration)
    print("\nquantity        measured     fitted  of what")
    for sample in calibration.samples:
        print(f"{sample.quantity:14s} {sample.seconds:9.2e} {sample.fitted:10.2e}  {sample.what}")
    if options.output:
        print("written to", jaxplan.save_machine(calibration.machine, options.output))


if __name__ == "__main__":
    main()
