"""Which differences count: paired comparisons over seeds, and what is said about them."""

from __future__ import annotations

from collections.abc import Iterator

from came8bit.cli.tradeoff.config import TaskConfig
from came8bit.cli.tradeoff.optimizers import label
from came8bit.cli.tradeoff.stats import Paired, deviation, interval_factor, paired
from came8bit.cli.tradeoff.study import Study

#: Units of the losses, by task kind.
UNITS = {"text": "nat per byte", "vision": "nat per image"}

# Both compute CAME in fp32: what differs is the rounding of single operations.
_SAME_RULE = ("came", "came-pytorch")


def losses_by_seed(study: Study, task: str) -> dict[str, dict[int, float]]:
    """Return optimizer → seed → validation loss."""
    return {
        name: {r.seed: r.loss for r in study.final(task, name) if r.loss is not None}
        for name in study.ran(task)
    }


def comparisons(names: list[str]) -> list[tuple[str, str]]:
    """Return the pairs worth comparing: CAME8bit with everything, and CAME with came-pytorch.

    Without CAME8bit the last optimizer takes its place.
    """
    if len(names) < 2:
        return []
    main = "came8bit" if "came8bit" in names else names[-1]
    pairs = [(main, name) for name in reversed(names) if name != main]
    if main == "came8bit" and set(_SAME_RULE) <= set(names):
        pairs.append(_SAME_RULE)
    return pairs


def in_words(study: Study, task: TaskConfig) -> Iterator[str]:
    """Yield Markdown paragraphs: the method, each comparison, and how much they can be trusted."""
    losses = losses_by_seed(study, task.kind)
    results = [(a, b, paired(losses[a], losses[b])) for a, b in comparisons(list(losses))]
    if not results:
        yield "Only one optimizer has run: there is nothing to compare."
        return
    yield (
        "Every optimizer starts from the same weights and sees the same batches for the same seed, "
        "so losses are compared seed by seed. The noise is the spread of those differences: a "
        "difference counts when the 95 % interval of its mean (Student's t) leaves out zero. Each "
        "interval stands for itself: of comparisons where nothing differs, one in twenty leaves "
        "out zero by chance."
    )
    unit = UNITS[task.kind]
    yield "\n".join(f"* {_sentence(a, b, result, unit)}" for a, b, result in results)
    pairs = [result.pairs for _, _, result in results if result is not None]
    if pairs and 2 <= min(pairs) <= 4:
        yield (
            f"With {min(pairs)} seeds the interval is ± {interval_factor(min(pairs)):.1f} standard "
            f"deviations of the differences: a weak test, which sees only differences that are "
            f"large against their spread. More `--seeds` make it sharper."
        )
    if set(_SAME_RULE) <= set(losses):
        yield (
            "CAME and came-pytorch follow the same rule, so what separates them is rounding, blown "
            "up by training: differences of that size mean nothing, whatever an interval says."
        )
    error = evaluation_error(study, task)
    if error is not None:
        items = f"{study.final(task.kind)[0].eval_items:,}"
        yield (
            f"All runs are evaluated on the same {items} "
            f"{'windows' if task.kind == 'text' else 'images'}. With another choice of them, a "
            f"difference between two runs would change by about {error:.4f} (its standard error)."
        )


def _sentence(first: str, second: str, result: Paired | None, unit: str) -> str:
    text = f"{label(first)} − {label(second)}: "
    if result is None:
        return text + "no common seed, so nothing can be said."
    text += f"{_number(result.difference)} {unit}"
    if result.low is None or result.high is None:
        return text + ". One common seed: no interval, so nothing can be said."
    text += f" [{_number(result.low)}, {_number(result.high)}], {result.pairs} seeds: "
    if result.outside_noise:
        better = first if result.difference < 0 else second
        return text + f"**outside the noise**, {label(better)} is better."
    most = max(abs(result.low), abs(result.high))
    return text + f"**inside the noise**. Not shown to be equal: up to {_number(most)[1:]} apart."


def _number(value: float) -> str:
    """Return the signed number with four decimals, or two digits where those would be zeros."""
    small = 1e-12 < abs(value) < 5e-4
    return f"{value:+.1e}" if small else f"{value:+.4f}"


def evaluation_error(study: Study, task: TaskConfig) -> float | None:
    """Return the largest standard error of a loss difference, over pairs at the first seed.

    From the pieces of the validation split: the spread of the pieces' differences over the root of
    their number. None if fewer than two optimizers have run that seed.
    """
    first_seed = [r for r in study.final(task.kind) if r.seed == study.config.seeds[0]]
    errors = []
    for i, one in enumerate(first_seed):
        for other in first_seed[:i]:
            differences = [a - b for a, b in zip(one.loss_parts, other.loss_parts, strict=True)]
            spread = deviation(differences)
            if spread is not None:
                errors.append(spread / len(differences) ** 0.5)
    return max(errors, default=None)
