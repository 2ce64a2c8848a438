"""Where pages go and how much room they get: the options of a paged optimizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

_CPU_WINDOW = 64 << 20
_DEVICE_RING = 256 << 20


@dataclass(frozen=True)
class Placement:
    """The user's options for pages.

    Attributes:
        directory: of the page file; None: no file for CUDA, an unnamed one for the CPU.
        budget: bytes on each device that pages may take, or None for :func:`default_budget`.
    """

    directory: Path | None = None
    budget: int | None = None


def default_budget(device_type: str, sizes: Sequence[int]) -> int:
    """Return the bytes for pages of ``sizes`` by default.

    On a device 256 MiB, or three of the largest page, so that copies overlap. In CPU memory a
    sixteenth of all pages, 64 MiB at most and one page at least.
    """
    largest, total = max(sizes), sum(sizes)
    if device_type == "cpu":
        return max(largest, min(_CPU_WINDOW, total // 16))
    return min(total, max(3 * largest, _DEVICE_RING))


def check_paging(is_paged: object, page_dir: object, page_budget: object) -> Placement | None:
    """Return where pages go, or ``None`` if state is not paged; these are not options of groups.

    Raises:
        ValueError: one of the three is wrong, or has no effect.
    """
    if not isinstance(is_paged, bool):
        raise ValueError(f"got is_paged {is_paged!r}, expected True or False")
    if not is_paged:
        if page_dir is not None or page_budget is not None:
            raise ValueError(
                f"got page_dir {page_dir!r} and page_budget {page_budget!r} without is_paged=True"
            )
        return None
    directory = None
    if page_dir is not None:
        if not isinstance(page_dir, (str, os.PathLike)):
            raise ValueError(f"got page_dir {page_dir!r}, expected the path of a directory")
        directory = Path(page_dir).expanduser().absolute()
        if not directory.is_dir():
            raise ValueError(f"got page_dir {str(page_dir)!r}, which is not an existing directory")
    if page_budget is not None:
        if isinstance(page_budget, bool) or not isinstance(page_budget, Integral):
            raise ValueError(f"got page_budget {page_budget!r}, expected a number of bytes")
        if page_budget <= 0:
            raise ValueError(f"got page_budget {page_budget}, expected a number of bytes > 0")
        page_budget = int(page_budget)
    return Placement(directory, page_budget)
