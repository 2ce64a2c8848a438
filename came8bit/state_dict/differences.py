"""What is not as it was saved after a state has been loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import listed


@dataclass(frozen=True, kw_only=True)
class Differences:
    """What is not as it was saved after loading.

    Attributes:
        matched_by: ``"name"`` or ``"position"``.
        converted: ``{"32 to 8 bits": names}`` of the parameters whose momentum was converted.
        moved: names of parameters whose position is not the saved one.
        wrappers: what wrappers had put into the names of one side, ``module.`` or ``_orig_mod.``,
            and was left out to compare them.
        unsure: parameters that have a name in the file and the shape of another, so that only the
            order told them apart: the optimizer has no names.
        renamed: parameters of a state dict that have other names there, so that the order decided.
        missing: parameters without usable saved state, which start from zero (``allow_missing``).
        unused: what was saved and belongs to no parameter (``allow_unused=True``).
        not_finite: parameters whose state has NaN or infinity, under ``nonfinite="propagate"``.
    """

    matched_by: str
    converted: Mapping[str, Sequence[str]] = field(default_factory=dict)
    moved: Sequence[str] = ()
    wrappers: Sequence[str] = ()
    unsure: Sequence[str] = ()
    renamed: Sequence[str] = ()
    missing: Sequence[str] = ()
    unused: Sequence[str] = ()
    not_finite: Sequence[str] = ()

    def remarks(self) -> list[str]:
        """Return a sentence for each difference that changes what training does."""
        remarks = [
            f"momentum of {len(names)} parameters converted from {what}"
            for what, names in self.converted.items()
        ]
        if self.moved:
            remarks.append(
                f"{len(self.moved)} parameters are at another position than they were, so "
                "stochastic rounding draws other bits for them"
            )
        if self.unsure:
            remarks.append(
                f"the saved state has names, the optimizer no unique ones: {len(self.unsure)} "
                f"parameters have the shape of another one ({listed(self.unsure)}) and were told "
                "apart by their order; make the optimizer over model.named_parameters() to have "
                "the names compared"
            )
        if self.renamed:
            remarks.append(
                f"{len(self.renamed)} parameters were told apart by their order, because they have "
                f"other names in the saved state ({listed(self.renamed)})"
            )
        if self.missing:
            remarks.append(
                f"{len(self.missing)} parameters start without state ({listed(self.missing)})"
            )
        if self.unused:
            remarks.append(f"{len(self.unused)} saved ones were left out ({listed(self.unused)})")
        if self.not_finite:
            remarks.append(f"the state of {listed(self.not_finite)} is not finite")
        return remarks
