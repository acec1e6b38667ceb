import asyncio

import pytest
from kvworkers.engine.output import FirstTokens, OutputStream
from kvworkers.engine.sampling import Logprobs, Sampled
from kvworkers.engine.sequence import CacheUse, FinishReason

from kvstore.core.errors import Unreachable
from kvstore.core.outcomes import MissReason


async def test_what_a_slow_caller_did_not_take_is_gathered() -> None:
    stream = OutputStream()
    first = FirstTokens(CacheUse(5, 0, {}, MissReason.ABSENT), 9.0, 1.0, 0.0)
    stream.begin(first)
    stream.push(Sampled(1))
    stream.push(Sampled(2, Logprobs((2,), (0.0,))))
    taken = await stream.take()
    assert (taken.tokens, taken.first, taken.finish) == ([1, 2], first, None)
    assert len(taken.logprobs) == 1
    stream.push(Sampled(3))
    stream.finish(FinishReason.LENGTH)
    taken = await stream.take()
    assert (taken.tokens, taken.first, taken.finish) == ([3], None, FinishReason.LENGTH)


async def test_taking_waits_for_something() -> None:
    stream = OutputStream()
    taking = asyncio.create_task(stream.take())
    await asyncio.sleep(0)
    assert not taking.done()
    stream.push(Sampled(4))
    assert (await taking).tokens == [4]


async def test_an_error_ends_the_stream() -> None:
    stream = OutputStream()
    stream.fail(Unreachable("gone"))
    with pytest.raises(Unreachable, match="gone"):
        await stream.take()
