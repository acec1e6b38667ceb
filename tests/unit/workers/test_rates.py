import pytest
from kvworkers.engine.rates import LoadFit, RateFit, Rates

from kvstore.directory.events import LoadRate, TierKind


def test_what_depth_costs_is_a_share_of_the_first_block() -> None:
    rates = Rates(prefill_linear_s=8e-5, prefill_quadratic_s=1e-6)
    first, second = rates.prefill_ms(16, 0), rates.prefill_ms(16, 16)
    assert rates.depth_cost == pytest.approx(second / first - 1)
    assert Rates().depth_cost == 0.0
    assert Rates(prefill_quadratic_s=1e-6).depth_cost == pytest.approx(2.0)


def test_the_fit_finds_both_coefficients() -> None:
    fit = RateFit()
    for tokens, position in [(512, 0), (512, 512), (476, 1024), (16, 1500), (128, 4000)] * 3:
        seconds = 2e-3 * tokens + 3e-7 * tokens * (position + tokens / 2)
        fit.prefill(tokens, position, seconds)
    rates = fit.rates()
    assert rates.prefill_linear_s == pytest.approx(2e-3, rel=1e-6)
    assert rates.prefill_quadratic_s == pytest.approx(3e-7, rel=1e-6)


def test_steps_all_alike_are_charged_to_the_tokens() -> None:
    fit = RateFit()
    for _ in range(5):
        fit.prefill(100, 0, 0.2)
    rates = fit.rates()
    assert rates.prefill_linear_s == pytest.approx(2e-3)
    assert rates.prefill_quadratic_s == 0
    assert rates.prefill_tokens_per_s == pytest.approx(500)


def test_noise_never_gives_a_negative_coefficient() -> None:
    fit = RateFit()
    fit.prefill(100, 0, 0.2)
    fit.prefill(100, 1000, 0.1)
    rates = fit.rates()
    assert rates.prefill_linear_s > 0 and rates.prefill_quadratic_s == 0


def test_the_fit_follows_a_slower_machine() -> None:
    fit = RateFit()
    for _ in range(300):
        fit.prefill(64, 0, 0.064)
    for _ in range(300):
        fit.prefill(64, 0, 0.128)
    assert fit.rates().prefill_linear_s == pytest.approx(2e-3, rel=0.05)


def test_decode_rate_counts_tokens_of_all_sequences() -> None:
    fit = RateFit()
    fit.decode(4, 0.1)
    assert fit.rates().decode_tokens_per_s == pytest.approx(40)
    fit.decode(4, 0.05)
    assert 40 < fit.rates().decode_tokens_per_s < 80
    fit.decode(1, 0.0)
    assert fit.rates().decode_tokens_per_s < 80


def test_what_loading_a_token_takes_is_told_by_tier() -> None:
    fit = LoadFit()
    assert fit.rates() == ()
    fit.load({TierKind.NVME: 1_000}, 0.5)
    fit.load({TierKind.DRAM: 1_000, TierKind.NVME: 0}, 0.1)
    assert fit.rates() == (LoadRate(TierKind.DRAM, 1e-4), LoadRate(TierKind.NVME, 5e-4))
    fit.load({TierKind.DRAM: 16}, 0.01)
    assert fit.rates()[0].s_per_token == pytest.approx(0.1 / 916), "short ones count for less"
    for _ in range(60):
        fit.load({TierKind.DRAM: 1_000}, 0.2)
    assert fit.rates()[0].s_per_token == pytest.approx(2e-4, rel=0.01), "old ones fade"


def test_loads_that_tell_nothing_are_left_out() -> None:
    fit = LoadFit()
    fit.load({}, 0.1)
    fit.load({TierKind.DRAM: 16, TierKind.NVME: 16}, 0.1)
    fit.load({TierKind.DRAM: 16}, 0.0)
    assert fit.rates() == ()
