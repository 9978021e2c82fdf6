"""The answer of a grid for one setting: the method nearest to the oracle, and what follows from the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from delfast.experiments.grid.definition import EVERYTHING, ORACLE, ORIGINAL
from delfast.experiments.grid.summary import KEYS, Mean, Row, mean, means

GAPS = ("delta_forget", "delta_mia", "delta_test")
COLUMNS = ("method", "seeds", "largest gap", "Δ forget", "Δ MIA", "Δ test", "time / retraining", "against the nearest")
READING = """Largest gap: the largest of the sizes of the gaps to the oracle in forget accuracy, in membership inference
and in test accuracy, in points; 0 is a network retrained without the forget set. Each method stands with the mask that
came nearest; other masks are in the tables below. ± is half of a 95 % interval over seeds. Methods are compared with
the nearest seed by seed: a tie is a difference whose interval includes 0. Times are wall-clock and include other work
on the machine; a dash where, for one of the seeds, another machine retrained."""
NEAREST, TIE, FARTHER, ONE_SEED = "nearest", "tie", "farther", "one seed"
NEARER = "nearer on common seeds"  # the nearest has the smaller mean only over other seeds
TIES = (TIE, NEARER)
MAX_NAMED = 4  # tied masks that a sentence names


@dataclass(frozen=True)
class Standing:
    """One method with the mask that came nearest: its means, its largest gap, and how it stands to the nearest.

    difference: largest gap minus that of the nearest, seed by seed; None for the nearest itself, and where fewer than
        two seeds are common.
    tied_masks: for the nearest, other masks of the methods that are in a tie with it too.
    """

    label: str
    row: Row
    gap: Mean
    verdict: str
    difference: Mean | None = None
    tied_masks: tuple[str, ...] = ()

    @property
    def is_best(self) -> bool:
        """Whether no other method was measured to be nearer."""
        return self.verdict in (NEAREST, *TIES)

    @property
    def is_original(self) -> bool:
        """Whether it is the network before unlearning."""
        return bool(self.row["method"] == ORIGINAL)

    def cells(self) -> list[str]:
        """The row of the table: ``COLUMNS``."""
        against = self.verdict if self.difference is None else f"{self.verdict}, {self.difference.signed}"
        gaps = [str(self.row[name]) for name in GAPS]
        time = "-" if self.relative_time is None else str(self.relative_time)
        return [self.label, str(self.gap.seeds), str(self.gap), *gaps, time, against]

    @property
    def relative_time(self) -> Mean | None:
        """The time relative to retraining; None where, for one of the seeds, another machine retrained."""
        found: Mean | None = self.row.get("relative_time")
        return found

    @property
    def is_timed(self) -> bool:
        """Whether there is a relative time whose interval is narrower than the value."""
        time = self.relative_time
        return time is not None and not 2 * time.half >= time.value  # one seed has no interval: NaN


def labelled(row: Row) -> str:
    """The method's name, and the strategy of its mask if it has one."""
    return str(row["method"]) + ("" if row["strategy"] == EVERYTHING else f" ({row['strategy']} mask)")


def _with_mask(standing: Standing) -> str:
    """The label, which also names that there is no mask."""
    return f"{standing.label} (no mask)" if standing.row["strategy"] == EVERYTHING else standing.label


def standings(rows: Sequence[Row], budget: float) -> list[Standing]:
    """Rank the methods of one setting at the grid's budget by their largest gap, with the nearest first.

    A method with two seeds or more comes before those with one, whose gap has no interval.
    """
    variants = sorted(_variants(rows, budget), key=_order)
    first = next((found for found in variants if found[0]["method"] != ORIGINAL), None)
    ranked = [_standing(found, first) for found in variants]
    chosen: dict[str, Standing] = {}
    for standing in ranked:
        chosen.setdefault(standing.row["method"], standing)
    masks = tuple(
        _with_mask(each) for each in ranked if each.verdict in TIES and each is not chosen[each.row["method"]]
    )
    return [replace(each, tied_masks=masks) if each.verdict == NEAREST else each for each in chosen.values()]


def sentences(ranked: Sequence[Standing]) -> list[str]:
    """Three paragraphs: the nearest method and its ties, its cost, and the limits of the comparison.

    The first begins with the method's label: see ``name``.
    """
    nearest = next((each for each in ranked if each.verdict == NEAREST), None)
    if nearest is None:
        return []
    return [_first(nearest, ranked), _second(nearest, ranked), _third(nearest, ranked)]


def name(ranked: Sequence[Standing]) -> str:
    """The label of the method that came nearest; "" if no method has a result."""
    return next((each.label for each in ranked if each.verdict == NEAREST), "")


def short(ranked: Sequence[Standing]) -> str:
    """A few words on which method came nearest."""
    nearest = next((each for each in ranked if each.verdict == NEAREST), None)
    if nearest is None:
        return "no method has a result"
    ties = sum(each.verdict in TIES for each in ranked)
    lower = _lower_with_one_seed(nearest, ranked)
    return (
        f"{nearest.label}, largest gap {nearest.gap} points"
        + (f", in a tie with {ties} more" if ties else "")
        + (f"; smaller with one seed: {_listed(lower)}" if lower else "")
    )


def _lower_with_one_seed(nearest: Standing, ranked: Sequence[Standing]) -> list[str]:
    """Return the methods whose one seed has a smaller gap than the nearest that has several, each with its gap."""
    return [
        f"{each.label} {each.gap}"
        for each in ranked
        if not each.is_original and each.gap.seeds < 2 <= nearest.gap.seeds and each.gap.value < nearest.gap.value
    ]


def _variants(rows: Sequence[Row], budget: float) -> list[list[Row]]:
    """Return the rows of each method and mask, of all seeds, at the grid's budget or without one."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row["method"] != ORACLE and row["budget"] in (None, budget) and all(name in row for name in GAPS):
            groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    return list(groups.values())


def _gap(row: Row) -> float:
    return float(max(abs(row[name]) for name in GAPS))


def _order(found: Sequence[Row]) -> tuple[bool, float]:
    return len(found) < 2, mean([_gap(row) for row in found]).value


def _standing(found: Sequence[Row], first: Sequence[Row] | None) -> Standing:
    label, row, gap = labelled(found[0]), means(found)[0], mean([_gap(each) for each in found])
    if found is first:
        return Standing(label, row, gap, NEAREST)
    nearest = {each["seed"]: _gap(each) for each in first or ()}
    differences = [_gap(each) - nearest[each["seed"]] for each in found if each["seed"] in nearest]
    if len(differences) < 2:
        return Standing(label, row, gap, ONE_SEED)
    difference = mean(differences)
    if difference.value - difference.half > 0:
        return Standing(label, row, gap, FARTHER, difference)
    return Standing(label, row, gap, NEARER if difference.value + difference.half < 0 else TIE, difference)


def _first(nearest: Standing, ranked: Sequence[Standing]) -> str:
    gap = f"{nearest.gap} points ({_seeds(nearest.gap.seeds)})"
    if nearest.gap.seeds < 2:
        return (
            f"{nearest.label} has the smallest largest gap, {gap}, but without a second seed no method can be called "
            "nearer to the oracle than another."
        )
    ties = [each.label for each in ranked if each.verdict in TIES]
    farther = sum(each.verdict == FARTHER and not each.is_original for each in ranked)
    others = "The other method is" if farther == 1 else f"All {farther} other methods are"
    among = "among methods with two seeds or more"
    if not ties and not farther:
        found = f"{nearest.label} has a largest gap of {gap}. No other method has two seeds to compare it with."
    elif not ties:
        found = f"{nearest.label} is nearest to the oracle {among}: largest gap {gap}. {others} farther."
    else:
        found = (
            f"{nearest.label} has the smallest mean of the largest gap {among}, {gap}. "
            f"The seeds do not separate {nearest.label} from {_listed(ties)}"
        )
        if farther:
            found += f"; {_count(farther, 'method')} {'is' if farther == 1 else 'are'} farther"
        found += "."
    lower = _lower_with_one_seed(nearest, ranked)
    return found + (f" Smaller, but of one seed and without an interval: {_listed(lower)}." if lower else "")


def _second(nearest: Standing, ranked: Sequence[Standing]) -> str:
    original = next((each for each in ranked if each.is_original), None)
    parts = []
    if original is not None:
        parts.append(f"Without unlearning the largest gap is {original.gap} points.")
    test = nearest.row["delta_test"]
    size = Mean(abs(test.value), test.half, test.seeds)
    side = "below" if test.value >= 0 else "above"
    end = f"{nearest.label} ends {size} points {side} the oracle's test accuracy"
    clock = "seconds are wall-clock and include other work on the machine"
    if nearest.is_timed:
        parts.append(f"{end} and takes {nearest.relative_time} times as long as retraining; {clock}.")
    elif nearest.relative_time is not None:
        parts.append(f"{end}; the time was not measured well enough to compare, since {clock}.")
    else:
        parts.append(f"{end}; the time has no ratio, since another machine retrained for at least one seed.")
    return " ".join(parts)


def _third(nearest: Standing, ranked: Sequence[Standing]) -> str:
    methods = [each for each in ranked if not each.is_original]
    single = sum(each.verdict == ONE_SEED or each.gap.seeds < 2 for each in methods)
    compared = sum(each.difference is not None for each in ranked)
    parts = [
        f"{single} of {_count(len(methods), 'method')} {'has' if single == 1 else 'have'} too few seeds to be compared"
        if single
        else "Every method has two seeds or more"
    ]
    if compared == 1:
        parts.append("the comparison is at 95 %")
    elif compared:
        parts.append(f"the {compared} comparisons are at 95 % each, without a correction for their number")
    if nearest.tied_masks:
        many = len(nearest.tied_masks) > MAX_NAMED
        names = "" if many else f", {_listed(nearest.tied_masks)},"
        s = "s" if len(nearest.tied_masks) == 1 else ""
        parts.append(f"{_count(len(nearest.tied_masks), 'other mask')} of these methods{names} tie{s} with it too")
    parts.append("a method that was tried with more masks had more chances to come near")
    return "; ".join(parts) + "."


def _seeds(count: int) -> str:
    return _count(count, "seed")


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def cost(standing: Standing) -> float:
    """The time relative to retraining, or NaN where there is none that can be compared."""
    return standing.relative_time.value if standing.relative_time and standing.is_timed else math.nan
