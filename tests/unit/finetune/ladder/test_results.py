"""The ladder requests its rungs, turns the trials into figures, and draws bars as long as the figures."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from finetune.config import yaml_file
from finetune.config.settings import RunConfig
from finetune.dryrun.command import ROOMY_BYTES
from finetune.dryrun.messages import Trial
from finetune.ladder import command
from finetune.ladder.results import CACHED, PARTS
from pytest_vram.drygpu import find_card
from pytest_vram.drygpu.cards import context_caveat

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30
CARD = find_card("rtx-4080")
CONTEXT = GIB // 2


class Trials:
    """Answers for :func:`finetune.dryrun.command.trials`; a rung needs ``allocated`` and ``cached`` more."""

    def __init__(self, *, allocated: int, cached: int, fits: bool = False) -> None:
        self.asked: list[tuple[RunConfig, list[dict[str, Any]], int | None]] = []
        self.allocated, self.cached, self.fits = allocated, cached, fits

    def __call__(
        self, config: RunConfig, changes: list[dict[str, Any]], card: str, *, total_bytes: int | None = None
    ) -> list[Trial]:
        assert card == CARD.name
        self.asked.append((config, changes, total_bytes))
        trial = Trial(
            fits=self.fits or total_bytes is not None,
            message="",
            phases={},
            categories={"weights": self.allocated},
            peak_allocated=self.allocated,
            peak_reserved=self.allocated + self.cached,
            peak_device=self.allocated + self.cached + CONTEXT,
            context=CONTEXT,
            total=CARD.total_bytes,
            managed=0,
            seconds=1.0,
        )
        return [trial] * len(changes)


def measured(monkeypatch: pytest.MonkeyPatch, trials: Trials) -> command.Ladder:
    monkeypatch.setattr(command, "trials", trials)
    return command.measure(yaml_file.replace(RunConfig(), {"model": "mistral-7b", "device": "cuda"}), CARD)


def test_a_rung_is_what_the_device_held_with_context_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(allocated=4 * GIB, cached=GIB)
    found = measured(monkeypatch, trials)
    assert found.context_caveat == context_caveat(CARD) != ""
    for rung in found.rungs:
        assert rung.fits
        assert rung.needed == 5 * GIB + CONTEXT
        assert (rung.measured["weights"], rung.measured["context"]) == (4 * GIB, CONTEXT)
        assert rung.measured[command.CACHED] == GIB
    assert all(total == ROOMY_BYTES for _, _, total in trials.asked)  # nothing had to be asked twice


def test_every_rung_is_taken_with_its_own_settings_and_each_base_is_loaded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials = Trials(allocated=4 * GIB, cached=GIB)
    measured(monkeypatch, trials)
    bases = [config.model for config, _, _ in trials.asked]
    assert len(bases) == len(set(bases))
    taken = [yaml_file.replace(config, change) for config, changes, _ in trials.asked for change in changes]
    base = yaml_file.replace(RunConfig(), {"model": "mistral-7b", "device": "cuda"})
    wanted = [yaml_file.replace(base, settings) for settings in command.RUNGS.values()]
    assert len(taken) == len(wanted)
    assert all(config in taken for config in wanted)


@pytest.mark.parametrize("fits", [True, False])
def test_where_only_the_cache_is_too_much_the_card_itself_is_asked(monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    trials = Trials(allocated=CARD.total_bytes - GIB, cached=2 * GIB, fits=fits)
    found = measured(monkeypatch, trials)
    assert {rung.fits for rung in found.rungs} == {fits}
    assert [total for _, _, total in trials.asked].count(None) == len(command.RUNGS)


def test_what_is_too_much_without_the_cache_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, Trials(allocated=CARD.total_bytes, cached=0, fits=True))
    assert not any(rung.fits for rung in found.rungs)
    assert f"does not fit: {1 + CONTEXT / CARD.total_bytes:.1f}x the card" in command.render(found)


def bars(axes: Any) -> dict[float, list[tuple[float, float, bool]]]:
    """Left, right and whether it is hatched, of each bar's parts, by the bar's height on the page, from the top."""
    found = defaultdict(list)
    for part in axes.patches:
        box = part.get_bbox()
        found[round(box.y0, 3)].append((box.x0, box.x1, bool(part.get_hatch())))
    return dict(sorted(found.items()))


def test_the_bars_of_the_picture_are_the_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from finetune.ladder.drawing import draw

    sizes = {name: (place + 1) * GIB for place, name in enumerate(PARTS) if name != CACHED}
    rungs = tuple(
        command.Rung(
            name=name,
            arithmetic=sizes,
            measured={part: factor * size for part, size in sizes.items()} | {command.CACHED: GIB},
            managed=0,
            fits=fits,
            seconds=1.0,
        )
        for name, factor, fits in (("one", 3, False), ("two", 2, True))
    )
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    found = command.Ladder(
        model="mistral-7b",
        card=CARD.name,
        total_bytes=CARD.total_bytes,
        seq=512,
        micro_batch=1,
        rank=16,
        context_caveat="",
        rungs=rungs,
    )
    draw(found, tmp_path / "ladder.svg")
    monkeypatch.undo()
    (figure,) = (closed for closed in figures if closed != "all")  # matplotlib 3.9 closes all when it takes a backend
    pyplot.close(figure)
    for axes in figure.axes:
        drawn = bars(axes)
        assert len(drawn) == 4
        for parts, rung, hatched in zip(
            drawn.values(), [rungs[0]] * 2 + [rungs[1]] * 2, [True, False] * 2, strict=True
        ):
            ends = [right for _, right, _ in parts]
            assert [left for left, _, _ in parts] == pytest.approx([0.0, *ends[:-1]])  # one beside the other
            assert ends[-1] == pytest.approx((rung.expected if hatched else rung.needed) / GIB)
            assert {part[2] for part in parts} == {hatched}
        (line,) = axes.lines
        assert list(line.get_xdata()) == [CARD.total_bytes / GIB] * 2
    text = (tmp_path / "ladder.svg").read_text()
    assert f"{rungs[0].needed / GIB:.1f}  does not fit" in text
    assert f"{rungs[1].needed / GIB:.1f}  fits" in text
