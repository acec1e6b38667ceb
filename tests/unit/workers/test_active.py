"""What the engine asks of its requests as a whole."""

from kvworkers.engine.active import Active, Actives
from kvworkers.engine.output import OutputStream
from kvworkers.engine.sampling import Sampler, SamplingParams
from kvworkers.engine.sequence import FinishReason, Request, Sequence
from kvworkers.engine.work import Work

from kvstore.core.errors import Unreachable
from kvstore.core.names import Root, pack_tokens


def active(deadline_ms: int = 0, arrived_ms: float = 0.0) -> Active:
    request = Request(
        request_id="r",
        tokens=pack_tokens(list(range(40))),
        sampling=SamplingParams(max_tokens=4),
        deadline_ms=deadline_ms,
    )
    run = Sequence(request, Root(b"r" * 32), arrived_ms=arrived_ms)
    return Active(run, Sampler(request.sampling), OutputStream())


def of(*some: Active) -> Actives:
    return Actives({one.run: one for one in some})


def test_deadlines_pass_one_by_one() -> None:
    early, late, never = active(50, 10.0), active(100, 10.0), active()
    everyone = of(early, late, never)
    assert everyone.expired(59.9) == [] and everyone.expired(60.0) == [early]
    assert everyone.seconds_to_rest(20.0, None) == 0.04
    assert everyone.seconds_to_rest(20.0, 30.0) == 0.01
    assert everyone.seconds_to_rest(200.0, None) == 0.0
    assert of(never).seconds_to_rest(20.0, None) is None


def test_one_is_alone() -> None:
    assert of(active()).alone and not of().alone and not of(active(), active()).alone


def test_only_those_that_sample_have_samplers() -> None:
    one, other = active(), active()
    works = [Work(one.run, 0, 16, False), Work(other.run, 0, 40, True)]
    assert of(one, other).samplers(works) == [other.sampler]


def test_full_blocks_without_names_are_found() -> None:
    one, other = active(), active()
    everyone = of(one, other)
    assert everyone.unnamed() is None
    other.run.computed = 33
    assert everyone.unnamed() is other
    other.run.published = 2
    assert everyone.unnamed() is None


def test_an_end_is_an_end_whether_good_or_bad() -> None:
    one, other = active(), active()
    assert [one.over, other.over] == [False, False]
    one.run.finish = FinishReason.STOP
    other.error = Unreachable("gone")
    assert [one.over, other.over] == [True, True]


def test_the_time_of_a_first_token_is_told_apart() -> None:
    one = active(arrived_ms=100.0)
    one.run.first_step_ms, one.run.load_ms = 130.0, 25.0
    first = one.first_tokens(150.0)
    assert (first.ttft_ms, first.load_ms, first.queue_ms) == (50.0, 25.0, 5.0)
    one.run.first_step_ms = 110.0  # its step followed the load
    assert one.first_tokens(150.0).queue_ms == 0.0
