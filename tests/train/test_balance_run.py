"""The expert bias does its work: it balances a run's experts, which stay unbalanced without it."""

import numpy as np

from scripts.expert_load_figure import CONFIG, RATE, expert_loads


def test_the_busiest_experts_load_falls_with_the_bias_update_and_does_not_without_it():
    quarter = CONFIG.train.steps // 4
    ends = {}
    for rate in (0.0, RATE):
        loads = [record["moe/load_max_over_mean"] for record in expert_loads(rate)]
        assert min(loads) >= 1
        ends[rate] = np.mean(loads[:10]), np.mean(loads[-quarter:])
        print(f"bias_update_rate {rate}: max/mean {ends[rate][0]:.2f} at first, {ends[rate][1]:.2f} at last")
    assert ends[RATE][1] < 0.7 * ends[RATE][0]
    assert ends[RATE][1] < 0.6 * ends[0.0][1]
    assert ends[0.0][1] > 0.9 * ends[0.0][0]
