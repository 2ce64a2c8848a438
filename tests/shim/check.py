"""Compares a build with the reference: ``python check.py LIBRARY [options]``.

For processes of their own: under a sanitizer, or with a library that has a mistake in it. The
status is 3 where a result is wrong. What each case does to stderr is divided by ``== NAME ==``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(sys.path[0]) / "support"))

from problems import near_code_edges
from shim import large
from shim.cases import CASES, OF_PASSES, check_codec, check_codec_of
from shim.control import Control
from shim.library import load
from shim.mutants import DIFFERENT


def check_cases(control: Control, arguments: argparse.Namespace) -> None:
    for order in arguments.order:
        control.configure(workers=arguments.workers, order=order, l2_bytes=40_000)
        for small in arguments.small:
            os.environ["CAME8BIT_CUDA_SMALL_ELEMENTS"] = str(small)
            for case in CASES:
                if not arguments.case or case.name in arguments.case:
                    print(f"== {case.name}, {order}, small {small} ==", file=sys.stderr, flush=True)
                    case.check(arguments.steps)
                    if case.name in OF_PASSES and small == arguments.small[0]:
                        case.check_passes(arguments.steps)
        for shape in [(5,), (3, 300), (2, 256)]:
            check_codec(shape)
        check_codec_of(near_code_edges())


def check_large(control: Control) -> None:
    for name, check in large.CHECKS.items():
        print(f"== {name} ==", file=sys.stderr, flush=True)
        check(control)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--large", action="store_true", help="more than 2**32 elements instead")
    parser.add_argument("--case", nargs="+", help="only cases of these names")
    parser.add_argument("--workers", type=int, default=2, help="blocks at a time")
    parser.add_argument("--order", nargs="+", default=["forward"])
    parser.add_argument("--small", nargs="+", type=int, default=[0, 1 << 16])
    parser.add_argument("--steps", type=int, help="instead of those of the case")
    arguments = parser.parse_args()
    control = load(arguments.library)
    try:
        if arguments.large:
            check_large(control)
        else:
            check_cases(control, arguments)
    except (AssertionError, RuntimeError) as error:
        print(repr(error))
        return DIFFERENT
    return 0


if __name__ == "__main__":
    sys.exit(main())
