"""Steps that are begun before anybody has seen what the one before them chose."""

import pytest
import torch
from kvworkers.engine.batch import build_step
from kvworkers.engine.sampling import Sampler, SamplingParams
from kvworkers.engine.sequence import Request, Sequence
from kvworkers.engine.steps import Launched, StepRunner
from kvworkers.engine.work import Work
from kvworkers.models import LoadedModel, load_model
from kvworkers.models.step import Carried

from kvstore.core.names import Root, pack_tokens
from tests.tiny_model import reference_reply, tiny_model

PROMPTS = ([7, 9, 11, 13, 17], list(range(20, 60)))
TOKENS = 12


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(tiny_model(), threads=1)


def sequences() -> list[Sequence]:
    made = []
    for index, prompt in enumerate(PROMPTS):
        request = Request(
            request_id="r",
            tokens=pack_tokens(prompt),
            sampling=SamplingParams(max_tokens=TOKENS, ignore_eos=True),
        )
        run = Sequence(request, Root(b"r" * 32), arrived_ms=0.0)
        run.pages = list(range(5 * index, 5 * index + 5))
        made.append(run)
    return made


def pages_of(model: LoadedModel) -> torch.Tensor:
    return model.page_view(model.new_pool(10))


async def test_a_reply_whose_tokens_the_host_sees_a_step_late_is_the_models(
    loaded: LoadedModel,
) -> None:
    runner = StepRunner(loaded, pages_of(loaded), overlap=True)
    runs = sequences()
    samplers = [Sampler(run.request.sampling) for run in runs]
    assert runner.runs_ahead(samplers)
    before: Launched | None = None
    replies: list[list[int]] = [[], []]
    for turn in range(TOKENS + 1):
        step: Launched | None = None
        if turn < TOKENS:
            starts = [0 if turn == 0 else len(p) + turn - 1 for p in PROMPTS]
            counts = [len(p) if turn == 0 else 1 for p in PROMPTS]
            works = [Work(*each, True) for each in zip(runs, starts, counts, strict=True)]
            step = await runner.launch(works, samplers, before)
        if before is not None:
            for reply, run, sampled in zip(
                replies,
                runs,
                await runner.collect(before, [True] * len(before.samplers)),
                strict=True,
            ):
                assert sampled is not None
                reply.append(sampled.token)
                run.tokens.append(sampled.token)
        before = step
    await runner.close()
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        expected = reference_reply(prompt, TOKENS)
        assert reply[: len(expected)] == expected


def test_only_choices_of_the_device_let_the_next_step_begin(loaded: LoadedModel) -> None:
    pages = pages_of(loaded)
    greedy, drawn = (Sampler(SamplingParams(max_tokens=1, temperature=t)) for t in (0.0, 1.0))
    told = Sampler(SamplingParams(max_tokens=1, logprobs=2))
    ahead = StepRunner(loaded, pages, overlap=True)
    assert ahead.runs_ahead([]) and ahead.runs_ahead([greedy])
    assert not ahead.runs_ahead([greedy, drawn]) and not ahead.runs_ahead([told])
    assert not StepRunner(loaded, pages).runs_ahead([greedy]), "a CPU computes when asked"


def test_inputs_take_unseen_tokens_from_the_step_before() -> None:
    one, two = sequences()
    chosen = torch.tensor([101, 102])
    works = [Work(two, len(PROMPTS[1]), 1, True), Work(one, 0, 5, True)]
    step = build_step(works, {one: 0, two: 1}, chosen)
    assert step.tokens.tolist() == [0, *PROMPTS[0]]
    assert step.carried is not None
    assert step.on(torch.device("cpu")).tokens.tolist() == [102, *PROMPTS[0]]
    assert build_step(works[1:], {one: 0}, chosen).carried is None


def test_carried_tokens_leave_the_known_ones_alone() -> None:
    carried = Carried(torch.tensor([5, 6]), torch.tensor([-1, 1, 0]))
    assert carried.into(torch.tensor([9, 0, 0])).tolist() == [9, 6, 5]
