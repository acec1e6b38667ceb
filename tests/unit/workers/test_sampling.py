import math
from typing import Any

import pytest
import torch
from kvworkers.engine.sampling import Sampler, SamplingParams

from kvstore.core.errors import BadInput


def test_greedy_takes_the_lowest_of_equal_maxima() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0])
    assert Sampler(SamplingParams(max_tokens=1)).sample(logits, position=0).token == 1


def test_a_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    logits = torch.linspace(0, 1, 1000)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(max_tokens=1, temperature=1.0, seed=seed))
        return [sampler.sample(logits, position=at).token for at in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert len(set(draw(3))) > 15, "each position draws anew"


def test_another_sampler_goes_on_where_one_was_lost() -> None:
    logits = torch.linspace(0, 1, 1000)
    params = SamplingParams(max_tokens=1, temperature=1.0, seed=3)
    whole = Sampler(params)
    tokens = [whole.sample(logits, position=at).token for at in range(20)]
    rest = Sampler(params)
    assert [rest.sample(logits, position=at).token for at in range(12, 20)] == tokens[12:]


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    top_k = Sampler(SamplingParams(max_tokens=1, temperature=1.0, top_k=2, seed=1))
    assert {top_k.sample(logits, position=at).token for at in range(200)} == {1, 2}
    # 0.5 does not reach 0.6, so the second token is in as well.
    top_p = Sampler(SamplingParams(max_tokens=1, temperature=1.0, top_p=0.6, seed=1))
    assert {top_p.sample(logits, position=at).token for at in range(200)} == {1, 2}
    tiny = Sampler(SamplingParams(max_tokens=1, temperature=1.0, top_p=1e-6, seed=1))
    assert {tiny.sample(logits, position=at).token for at in range(50)} == {1}


def test_draws_follow_the_temperature() -> None:
    logits = torch.log(torch.tensor([0.8, 0.2]))
    sampler = Sampler(SamplingParams(max_tokens=1, temperature=2.0, seed=5))
    share = sum(sampler.sample(logits, position=at).token == 0 for at in range(4000)) / 4000
    expected = math.sqrt(0.8) / (math.sqrt(0.8) + math.sqrt(0.2))
    assert abs(share - expected) < 0.03


def test_logprobs_are_the_models_own_and_name_the_choice_first() -> None:
    logits = torch.log(torch.tensor([0.1, 0.6, 0.3]))
    sampled = Sampler(SamplingParams(max_tokens=1, logprobs=2)).sample(logits, position=0)
    assert sampled.logprobs is not None
    assert sampled.logprobs.token_ids == (1, 1, 2)
    assert sampled.logprobs.values == pytest.approx([math.log(0.6), math.log(0.6), math.log(0.3)])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("logprobs", 21),
    ],
)
def test_senseless_parameters_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(BadInput, match=field):
        SamplingParams(**{"max_tokens": 1, field: value})  # type: ignore[arg-type]


def test_penalties_count_what_was_generated_and_what_another_worker_said() -> None:
    logits = torch.tensor([3.0, 2.5, 2.0])

    def greedy(**how: Any) -> list[int]:
        sampler = Sampler(SamplingParams(max_tokens=9, **how))
        return [sampler.sample(logits, position=at).token for at in range(6)]

    assert greedy() == [0] * 6
    assert greedy(presence_penalty=0.7) == [0, 1, 0, 0, 0, 0], "once for all"
    assert greedy(frequency_penalty=0.4) == [0, 0, 1, 0, 1, 2], "for each time"
    assert greedy(frequency_penalty=0.4, said=(0, 0, 1)) == [0, 1, 2, 0, 1, 2]
    assert greedy(frequency_penalty=-1.0) == [0] * 6
    assert logits.tolist() == [3.0, 2.5, 2.0], "the model's own stay as they are"


def test_biases_move_single_tokens() -> None:
    logits = torch.tensor([3.0, 2.5, 2.0])
    params = SamplingParams(max_tokens=1, logit_bias=((0, -100.0), (2, 1.0)))
    assert not params.only_id
    assert Sampler(params).sample(logits, position=0).token == 2


def test_min_p_leaves_out_what_is_much_less_likely_than_the_likeliest() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    sampler = Sampler(SamplingParams(max_tokens=1, temperature=1.0, min_p=0.5, seed=1))
    assert {sampler.sample(logits, position=at).token for at in range(200)} == {1, 2}
    alone = Sampler(SamplingParams(max_tokens=1, temperature=1.0, min_p=1.0, seed=1))
    assert {alone.sample(logits, position=at).token for at in range(50)} == {1}


@pytest.mark.parametrize(
    "bad",
    [
        {"frequency_penalty": 2.1}, {"presence_penalty": math.nan}, {"min_p": -0.1},
        {"min_p": math.nan}, {"logit_bias": ((1, 101.0),)}, {"logit_bias": ((1, math.nan),)},
        {"logit_bias": tuple((token, 0.0) for token in range(1_025))},
    ],
)  # fmt: skip
def test_what_shapes_logits_is_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(bad))):
        SamplingParams(max_tokens=1, **bad)
