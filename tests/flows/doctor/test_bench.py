from __future__ import annotations

import pytest

from flows.doctor.bench import _SMALL, _TINY, _decoding_work, _training_work, calibrated
from flows.planning.machine import PRESETS
from flows.planning.work import seconds_of


def test_calibration_makes_the_formulas_give_what_the_trials_took() -> None:
    profile = calibrated(PRESETS["cpu"], _SMALL, "fp32", [0.01, 2.0], [0.02, 3.0])
    assert seconds_of(_training_work(_SMALL, "fp32"), profile, 256, "fp32") == pytest.approx(2.0)
    assert seconds_of(_decoding_work(_SMALL, "fp32"), profile, 256, "fp32", sampling=True) == pytest.approx(3.0)
    assert profile.layer_seconds == pytest.approx(0.01 / (3 * 4))  # forward and backward of four layers, in one batch
    assert profile.token_seconds == pytest.approx(0.02 / (_TINY.shape.layers * (_TINY.output + 1)))
