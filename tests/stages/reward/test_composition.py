"""The metrics of rewards: the same for any chunks."""

from __future__ import annotations

from stages.reward.composition import ComponentScore, StepLabels, Tally

RIGHT, WRONG, SILENT = (
    ComponentScore(1.0, "ok"),
    ComponentScore(0.0, "wrong", screened=True),
    ComponentScore(None, "timeout"),
)


def test_means_are_of_what_has_a_number_and_shares_of_all_outputs() -> None:
    tally = Tally(["accuracy"])
    tally.take([1.0, 0.0, None], ["ok", "wrong", "timeout"], {"accuracy": [RIGHT, WRONG, SILENT]})
    tally.take([1.0], ["ok"], {"accuracy": [RIGHT]})
    metrics = tally.metrics()
    assert metrics["reward/mean"] == metrics["reward/accuracy"] == 2 / 3
    assert (metrics["reward/status_ok"], metrics["reward/status_wrong"]) == (0.5, 0.25)
    assert (metrics["reward/missing"], metrics["reward/screened"], metrics["reward/faults"]) == (0.25, 0.25, 0.25)


def test_a_component_that_cuts_into_steps_has_the_mean_of_all_its_steps() -> None:
    def cut(*rewards: float) -> ComponentScore:
        return ComponentScore(
            sum(rewards) / len(rewards), "ok", steps=StepLabels(list(rewards), [*range(len(rewards))], True)
        )

    tally = Tally(["steps"])
    tally.take([1.0], ["ok"], {"steps": [ComponentScore(None, "truncated")]})  # a chunk without any steps
    tally.take([1.0, 0.0], ["ok", "ok"], {"steps": [cut(1.0, 1.0, 0.0), cut(0.0)]})
    assert tally.metrics()["reward/steps"] == 2 / 4


def test_the_sum_of_a_mean_is_exact_whatever_the_chunks() -> None:
    numbers = [1e16, 1.0, -1e16, 1.0]
    for size in (1, 2, 4):
        tally = Tally(["x"])
        for start in range(0, 4, size):
            part = numbers[start : start + size]
            tally.take(part, ["ok"] * len(part), {"x": [ComponentScore(number) for number in part]})
        assert tally.metrics()["reward/mean"] == 0.5


def test_no_outputs_have_no_means() -> None:
    metrics = Tally(["accuracy"]).metrics()
    assert "reward/mean" not in metrics
    assert metrics["reward/missing"] == 0.0
