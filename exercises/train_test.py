"""An exercise in train.py. Its test is red until you have changed what it names; the docstring says what, and why one would."""

import pytest

import train


def test_schedule():
    """A schedule that can go on ("MiniCPM", section 4): warm up, stay, and fall only in the last fifth of the steps. Until then a
    run has not decided when it ends. Teach `learning_rate` the name "wsd": after the warm-up `peak`, and in the last 20 % of
    all steps a straight line that would reach 0 at step `total`. (For the command line add the name to TrainConfig, too.)"""
    config = train.TrainConfig(lr_scheduler_type="wsd", warmup_ratio=0.1)
    rates = [train.learning_rate(config, step, 100, 1.0) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:81] == pytest.approx([1.0] * 71)
    assert rates[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
    linear = train.TrainConfig(lr_scheduler_type="linear", warmup_ratio=0.0)
    assert train.learning_rate(linear, 50, 100, 1.0) == pytest.approx(0.5)  # the others are as they were
