"""Which figures are drawn of which results, that they show the results' numbers, and their files."""

from __future__ import annotations

import os
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from flows.experiments.figures import draw_figures
from flows.experiments.figures.candidates import tallies
from flows.experiments.figures.drawing import sketches
from flows.experiments.figures.sketches import Sketch
from flows.runs.paths import Places
from pipeline.store import Store, StoreError, use_store
from stages.evaluation import EvaluationConfig, evaluate
from stages.reward import AccuracyConfig, RewardConfig, count_votes
from stages.tables import Rollouts
from tests.flows.experiments.figures.made_up import MadeUp, Metrics, accuracy, curves, experiment, scored, voted

FIG5 = {"rft": [[0.4, 0.5, 0.55], [0.4, 0.52, 0.56], [0.4, 0.51, 0.57]], "grpo": [[0.4, 0.6, 0.8]] * 3}


def drawn(root: Path, runs: list[MadeUp]) -> dict[str, Sketch]:
    return {sketch.name: sketch for sketch in sketches(*experiment(root, runs))}


def line(sketch: Sketch, label: str, panel: int = 0) -> tuple[list[float], list[float]]:
    (found,) = [line for line in sketch.canvas.axes[panel].get_lines() if line.get_label() == label]
    return [float(x) for x in found.get_xdata()], [float(y) for y in found.get_ydata()]


# ------------------------------------------------------------------------------------------------ curves


def test_a_curve_is_the_mean_over_seeds_at_every_evaluation(tmp_path: Path) -> None:
    steps, means = line(drawn(tmp_path, curves(FIG5))["curves"], "rft")
    assert steps == [0, 2, 4]
    assert means == pytest.approx([0.4, 0.51, 0.56])


def test_the_band_reaches_from_the_lowest_to_the_highest_seed(tmp_path: Path) -> None:
    sketch = drawn(tmp_path, curves(FIG5))["curves"]
    band = sketch.canvas.axes[0].collections[0]
    ends = {float(y) for x, y in band.get_paths()[0].vertices if x == 4}
    assert ends == {0.55, 0.57}
    assert "Lines: mean of 3 seeds. Bands: lowest to highest seed." in sketch.caption


def test_with_one_seed_the_band_is_the_interval_over_questions(tmp_path: Path) -> None:
    sketch = drawn(tmp_path, curves({"grpo": [[0.4, 0.5, 0.6]]}))["curves"]
    band = sketch.canvas.axes[0].collections[0]
    assert sorted({float(y) for x, y in band.get_paths()[0].vertices if x == 4}) == pytest.approx([0.55, 0.65])
    assert "mean of 1 seed. Bands: 95 % intervals over questions" in sketch.caption


def test_the_caption_says_that_online_is_better_only_of_numbers_that_say_so(tmp_path: Path) -> None:
    better = drawn(tmp_path / "better", curves({"offline": [[0.4, 0.5, 0.6]] * 3, "online": [[0.4, 0.6, 0.8]] * 3}))
    assert "online is above offline (+0.200" in better["curves"].caption
    worse = drawn(tmp_path / "worse", curves({"offline": [[0.4, 0.5, 0.8]] * 3, "online": [[0.4, 0.6, 0.6]] * 3}))
    assert "online is below offline (-0.200" in worse["curves"].caption
    apart = [[0.4, 0.5, 0.3], [0.4, 0.5, 0.6], [0.4, 0.5, 0.9]]
    open_ = drawn(tmp_path / "open", curves({"offline": [[0.4, 0.5, 0.6]] * 3, "online": apart}))
    assert "online and offline are not separated" in open_["curves"].caption


def test_an_arm_keeps_its_colour_in_every_figure(tmp_path: Path) -> None:
    from matplotlib.colors import to_hex

    found = drawn(tmp_path, curves(FIG5))
    lines = {one.get_label(): one.get_color().lower() for one in found["curves"].canvas.axes[0].get_lines()}
    bars = [to_hex(bar.get_facecolor()) for bar in found["bars"].canvas.axes[0].patches[:2]]
    assert [lines["rft"], lines["grpo"]] == bars
    assert lines["rft"] != lines["grpo"]


def test_an_arm_that_goes_on_from_another_is_drawn_from_there_on(tmp_path: Path) -> None:
    short = [
        MadeUp("first", 0, {"in_domain": {n: accuracy(0.1 * n, 0.1) for n in range(3)}}, policies=["a" * 64, "b" * 64])
    ]
    long = {n: accuracy(0.1 * n, 0.1) for n in range(5)}
    runs = [*short, MadeUp("second", 0, {"in_domain": long}, policies=[letter * 64 for letter in "abcd"])]
    sketch = drawn(tmp_path, runs)["curves"]
    assert line(sketch, "first")[0] == [0, 1, 2]
    assert line(sketch, "second")[0] == [2, 3, 4]
    assert "second goes on from first" in sketch.caption
    assert "Fig. 6" in sketch.title


def test_arms_with_other_policies_are_whole_lines(tmp_path: Path) -> None:
    sketch = drawn(tmp_path, curves(FIG5))["curves"]
    assert line(sketch, "grpo")[0] == [0, 2, 4]
    assert "Fig. 5" in sketch.title


# ------------------------------------------------------------------------------------------------ which figures


def test_evaluations_before_and_after_only_are_bars_and_no_curve(tmp_path: Path) -> None:
    assert list(drawn(tmp_path, curves({"grpo": [[0.4, 0.6]]}))) == ["bars"]


def test_an_experiment_of_which_no_run_finished_has_no_figures(tmp_path: Path) -> None:
    result, places = experiment(tmp_path, curves(FIG5))
    runs = tuple(run.override({"status": "failed"}) for run in result.runs)
    assert draw_figures(result.model_copy(update={"runs": runs}), places, tmp_path / "figures") == []


def test_an_arm_of_which_a_seed_is_missing_is_drawn_with_those_there_are(tmp_path: Path) -> None:
    result, places = experiment(tmp_path, curves(FIG5))
    runs = (result.runs[0].override({"status": "failed"}), *result.runs[1:])
    (sketch, _) = sketches(result.model_copy(update={"runs": runs}), places)
    assert line(sketch, "rft")[1] == pytest.approx([0.4, 0.515, 0.565])
    assert "mean of 2 to 3 seeds" in sketch.caption


def test_bars_are_final_means_and_compared_with_before_and_baseline(tmp_path: Path) -> None:
    sketch = drawn(tmp_path, curves(FIG5))["bars"]
    assert [bar.get_height() for bar in sketch.canvas.axes[0].patches[:2]] == pytest.approx([0.56, 0.8])
    labels = [text.get_text() for text in sketch.canvas.axes[0].get_xticklabels()]
    assert labels == ["rft\n0.560", "grpo\n0.800"]
    assert sketch.caption.endswith("In domain: rft and grpo are above the policy before RL; grpo is above rft.")


def test_every_held_out_set_has_a_panel(tmp_path: Path) -> None:
    points = {0: accuracy(0.1, 0.01), 1: accuracy(0.5, 0.01)}
    other = {0: accuracy(0.1, 0.01), 1: accuracy(0.1, 0.01)}
    sketch = drawn(tmp_path, [MadeUp("grpo", 0, {"in_domain": points, "out_of_domain": other})])["bars"]
    assert [axes.get_title() for axes in sketch.canvas.axes] == ["in domain", "out of domain"]
    assert "In domain: grpo is above the policy before RL." in sketch.caption
    assert "Out of domain: grpo is not separated from the policy before RL." in sketch.caption


def test_a_third_set_is_drawn_below_and_leaves_no_empty_frame(tmp_path: Path) -> None:
    points = {0: accuracy(0.1, 0.01), 1: accuracy(0.5, 0.01)}
    sketch = drawn(tmp_path, [MadeUp("grpo", 0, dict.fromkeys(("first", "second", "third"), points))])["bars"]
    first, second, third, spare = sketch.canvas.axes
    assert [axes.get_title() for axes in (first, second, third)] == ["first", "second", "third"]
    assert not spare.get_visible()
    sketch.canvas.draw_without_rendering()
    assert first.get_position().y0 == second.get_position().y0 > third.get_position().y1


def test_calls_are_drawn_of_the_arms_that_made_some(tmp_path: Path) -> None:
    extra = {step: {"tool/used_rate": 0.25 * step, "tool/calls_mean": 2.0, "time/tools": 1.5} for step in (1, 2, 3)}
    extra[3] |= {"tool/ok_rate": 0.5}  # the others made no call
    sets = {"in_domain": {0: accuracy(0.4), 3: accuracy(0.5)}}
    runs = [MadeUp("plain", 0, sets), MadeUp("tools", 0, sets, extra=extra)]
    sketch = drawn(tmp_path, runs)["calls"]
    assert line(sketch, "tools") == ([1, 2, 3], [0.25, 0.5, 0.75])
    assert line(sketch, "tools", panel=2) == ([3], [0.5])
    assert [text.get_text() for text in sketch.canvas.legends[0].get_texts()] == ["tools"]
    assert "calls" not in drawn(tmp_path / "none", curves(FIG5))


def test_reward_models_that_were_measured_over_iterations_are_drawn(tmp_path: Path) -> None:
    def measured(shift: float) -> dict[int, Metrics]:
        old, new = "rm/held_out_auc/old_model_", "rm/held_out_auc/new_model_"
        first = {f"{old}old_policy": 0.9 + shift}
        second = {f"{old}old_policy": 0.9 + shift, f"{old}new_policy": 0.6 + shift, f"{new}new_policy": 0.8 + shift}
        return {0: first, 8: second}

    sets = {"in_domain": {0: accuracy(0.2), 8: accuracy(0.3)}}
    sketch = drawn(tmp_path, [MadeUp("grpo", n, sets, measured(n / 100)) for n in range(3)])["ageing"]
    steps, values = line(sketch, "old model, old policy")
    assert (steps, values) == ([0, 8], pytest.approx([0.91, 0.91]))
    assert "grpo, after step 8: old model, old policy is above old model, new policy (+0.300" in sketch.caption
    assert "new model, new policy is above old model, new policy (+0.200" in sketch.caption


# ------------------------------------------------------------------------------------------------ candidates


@pytest.mark.parametrize(
    ("questions", "said", "bounds"),
    [
        (8, "raises Maj@4; whether Pass@4 is raised is not settled", "[-0.299, +0.299]"),  # u = 3.8415 / (9 + 3.8415)
        (199, "raises Maj@4, not Pass@4", "[-0.019, +0.019]"),  # u = 3.8415 / (200 + 3.8415)
    ],
)
def test_maj_and_pass_are_drawn_by_k_and_the_claim_is_of_the_samples(
    tmp_path: Path, questions: int, said: str, bounds: str
) -> None:
    """Before, two of four samples are right and the other two agree (Maj@4 = 1/2); after, three. Pass@4 was 1.

    Where no question changed, it depends on how many there are whether the quantity is known not to have changed.
    """
    places = Places(tmp_path)
    before = {f"q{n}": ["ok", "ok", "7", "7"] for n in range(questions)} | {"hard": ["7"] * 4}
    after = {f"q{n}": ["ok", "ok", "ok", "7"] for n in range(questions)} | {"hard": ["7"] * 4}
    known = [{f"{kind}_at_{k}": 0.5 for kind in ("maj", "pass") for k in (1, 2, 4)} for _ in range(2)]
    known[1] |= {"maj_at_4": 0.9}
    sets = {"in_domain": {0: accuracy(0.5) | known[0], 3: accuracy(0.75) | known[1]}}
    run = MadeUp("grpo", 0, sets, samples={0: voted(places, before), 3: voted(places, after)})
    sketch = drawn(tmp_path, [run])["candidates"]
    assert line(sketch, "Maj@K, after") == ([1, 2, 4], [0.5, 0.5, 0.9])
    assert sketch.canvas.axes[0].get_xscale() == "log"
    # All questions but one rise by 1/2 in Maj@4.
    assert f"grpo {said} (change of Maj@4 {questions / (questions + 1) / 2:+.3f}" in sketch.caption
    assert f"of Pass@4 +0.000 {bounds})" in sketch.caption
    assert "Fig. 7" in sketch.title


def test_the_estimates_from_samples_are_those_of_the_evaluation(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    config = RewardConfig(components=(AccuracyConfig(verifier="exact"),))
    with use_store(store):
        rewards = scored({"a": ["ok", "3", "3.0", None], "b": ["ok", "ok", "1", "2"]})
        ids = {"prompt_ids": [1], "output_ids": [2], "logprobs": [0.0], "text": "", "text_ends": [0]}
        rest = {"finish_reason": "stop", "temperature": 1.0, "seed": 0}
        outputs = Rollouts.write([key | ids | rest for key in rewards.read(["question_id", "sample"]).to_pylist()])
        votes = count_votes(rewards, config)
        metrics = evaluate(outputs, rewards, votes, EvaluationConfig(ks=(1, 2, 4))).metrics
    found = tallies(store, votes.digest)
    assert found is not None
    assert found["a"].wrong == (2,)  # 3 and 3.0 are one answer
    for kind in ("maj", "pass"):
        for k in (1, 2, 4):
            values = [value for tally in found.values() if (value := tally.at(kind, k)) is not None]
            assert sum(values) / len(found) == pytest.approx(metrics[f"{kind}_at_{k}"])


def test_where_votes_are_not_known_only_pass_at_k_is_drawn(tmp_path: Path) -> None:
    known = {f"pass_at_{k}": 0.5 for k in (1, 2, 4)}
    sets = {"in_domain": {0: accuracy(0.5) | known, 3: accuracy(0.5) | known}}
    sketch = drawn(tmp_path, [MadeUp("grpo", 0, sets)])["candidates"]
    assert [line.get_label() for line in sketch.canvas.axes[0].get_lines()] == ["Pass@K, before", "Pass@K, after"]
    assert "In domain: grpo has no Maj@K" in sketch.caption


def test_a_band_of_one_seed_is_what_the_evaluation_recorded(tmp_path: Path) -> None:
    known = {f"{kind}_at_{k}": 0.5 for kind in ("maj", "pass") for k in (1, 2, 4)}
    ends = {f"maj_at_{k}_ci_{end}": value for k in (1, 2, 4) for end, value in (("low", 0.3), ("high", 0.6))}
    sets = {"in_domain": {0: accuracy(0.5) | known | ends, 3: accuracy(0.5) | known | ends}}
    sketch = drawn(tmp_path, [MadeUp("grpo", 0, sets)])["candidates"]
    band = sketch.canvas.axes[0].collections[0]
    assert {round(float(y), 6) for _, y in band.get_paths()[0].vertices} == {0.3, 0.6}
    assert "95 % intervals over questions" in sketch.caption


def test_without_the_samples_nothing_is_concluded(tmp_path: Path) -> None:
    known = {f"{kind}_at_{k}": 0.5 for kind in ("maj", "pass") for k in (1, 2, 4)}
    run = MadeUp("grpo", 0, {"in_domain": {0: accuracy(0.5) | known, 3: accuracy(0.5) | known}})
    assert "nothing is concluded" in drawn(tmp_path, [run])["candidates"].caption


def test_two_k_are_no_curve(tmp_path: Path) -> None:
    known = {f"{kind}_at_{k}": 0.5 for kind in ("maj", "pass") for k in (4, 8)}
    run = MadeUp("grpo", 0, {"in_domain": {0: accuracy(0.5) | known, 3: accuracy(0.5) | known}})
    assert "candidates" not in drawn(tmp_path, [run])


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.slow
def test_figures_are_png_and_svg_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    result, places = experiment(tmp_path, curves(FIG5))
    first, second = (draw_figures(result, places, tmp_path / name) for name in ("first", "second"))
    assert [figure.name for figure in first] == ["curves", "bars"]
    for one, other in zip(first, second, strict=True):
        assert one.png.read_bytes() == other.png.read_bytes()
        assert one.svg.read_bytes() == other.svg.read_bytes()
        assert one.png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", one.png.read_bytes()[16:24])
        assert width >= 800
        assert height >= 400
        assert ElementTree.parse(one.svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    names = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert names == ["bars.png", "bars.svg", "curves.png", "curves.svg", "figures.json"]


def test_unchanged_results_are_not_drawn_again(tmp_path: Path) -> None:
    result, places = experiment(tmp_path, curves({"grpo": [[0.4, 0.6]]}))
    first = draw_figures(result, places, tmp_path / "figures")
    drawn_at = first[0].png.stat().st_mtime_ns
    assert draw_figures(result, places, tmp_path / "figures") == first
    assert first[0].png.stat().st_mtime_ns == drawn_at


@pytest.mark.parametrize("touched", ["bars.png", "bars.svg", "figures.json"])
def test_a_file_that_was_touched_is_drawn_anew(tmp_path: Path, touched: str) -> None:
    result, places = experiment(tmp_path, curves({"grpo": [[0.4, 0.6]]}))
    first = draw_figures(result, places, tmp_path / "figures")
    good = first[0].png.read_bytes()
    (tmp_path / "figures" / touched).write_bytes(b"{}")
    assert draw_figures(result, places, tmp_path / "figures") == first
    assert first[0].png.read_bytes() == good


def test_other_numbers_are_drawn_over_the_old_ones(tmp_path: Path) -> None:
    (before,) = draw_figures(*experiment(tmp_path / "a", curves({"grpo": [[0.4, 0.6]]})), tmp_path / "figures")
    old = before.png.read_bytes()
    (after,) = draw_figures(*experiment(tmp_path / "b", curves({"grpo": [[0.4, 0.7]]})), tmp_path / "figures")
    assert after.png.read_bytes() != old


def test_a_figure_that_the_results_no_longer_have_does_not_stay(tmp_path: Path) -> None:
    stale = tmp_path / "figures" / "ageing.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    draw_figures(*experiment(tmp_path, curves({"grpo": [[0.4, 0.6]]})), stale.parent)
    assert not stale.exists()


def test_a_folder_that_cannot_be_written_is_named_and_results_are_kept(tmp_path: Path) -> None:
    result, places = experiment(tmp_path, curves({"grpo": [[0.4, 0.6]]}))
    blocked = tmp_path / "figures"
    blocked.write_text("a file where the folder should be")
    kept = (places.runs / "grpo-s0" / "summary.json").read_bytes()
    with pytest.raises(StoreError, match=r"figures: .*figures cannot be written .*results are kept"):
        draw_figures(result, places, blocked)
    assert (places.runs / "grpo-s0" / "summary.json").read_bytes() == kept


def test_drawing_leaves_no_draft_behind_where_a_file_cannot_be_replaced(tmp_path: Path) -> None:
    result, places = experiment(tmp_path, curves({"grpo": [[0.4, 0.6]]}))
    (tmp_path / "figures" / "bars.png").mkdir(parents=True)
    with pytest.raises(StoreError, match=r"bars\.png"):
        draw_figures(result, places, tmp_path / "figures")
    assert os.listdir(tmp_path / "figures") == ["bars.png"]
