"""Rollouts of a step: prompts over the servers, stragglers aborted, a deterministic order.

Legend: W rollouts wanted, L the prefix length (``max_new_tokens``).
"""

import asyncio
import itertools
import secrets
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from megatron_prefix.config import RolloutConfig
from megatron_prefix.prefix import CutOffRule
from megatron_prefix.rollout.async_client import AsyncGenerator
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.discarded import Discarded
from megatron_prefix.rollout.pool import Everyone, Pool, Roster, all_or_none, cancel
from megatron_prefix.rollout.protocol import Generation, NoRollouts, Sampling
from megatron_prefix.types import Prompt, Rollout

_ABORT_AGAIN_S = 1.0  # a request that the server had not read yet misses an abort


@dataclass(frozen=True)
class _Job:
    """One rollout to be: a prompt and the server that is asked first."""

    prompt: Prompt
    server: AsyncGenerator
    cap: int  # tokens that it may have, at most those of the step


@dataclass
class _Request:
    """A job that can be aborted, by the id of its latest attempt at the server that has it."""

    server: AsyncGenerator
    request_id: str = ""
    task: asyncio.Task[Generation] = field(init=False)


class Collector:
    """Asks the servers for rollouts. Holds connections: close it, or use it as a context."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        rollout: RolloutConfig,
        stop_token_ids: Sequence[int],
        cut_off: CutOffRule | None = None,
        roster: Roster | None = None,
        discarded: Discarded | None = None,
    ) -> None:
        """``cut_off``: each rollout is streamed and ends where this rule says so. ``roster`` None:
        all servers may be asked, and none is restarted. ``discarded`` is told of what was sampled
        and is not returned."""
        assert endpoints, "a collector needs a server"
        self._rollout, self._cut_off = rollout, cut_off
        self._discarded = discarded or Discarded()
        self._stop_token_ids = tuple(stop_token_ids)
        self._runner = asyncio.Runner()
        self._pool = self._runner.run(
            _open(endpoints, roster or Everyone(endpoints), rollout.hang_timeout_s)
        )
        # Of one width: SGLang aborts every request whose id starts with the one that it is given.
        self._request_ids = map(f"{secrets.token_hex(4)}-{{:012d}}".format, itertools.count())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._runner.run(self._pool.close())
        self._runner.close()

    def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        policy_version: int,
        wanted: int = 0,
        cap: Callable[[Sequence[int], int], int] | None = None,
    ) -> list[Rollout]:
        """``rollout.samples_per_prompt`` prefixes of each prompt, of at most L tokens, by prompt,
        then by sample.

        With ``wanted`` (0: all) below that many, the rest is aborted when W have finished, and
        the first W usable ones in prompt order are returned: those that finished, and aborted
        ones of at least ``rollout.keep_aborted_above`` x L tokens. Taking them in prompt order
        rather than by arrival keeps short rollouts from being preferred among those that made it.
        ``cap(prompt_ids, L)``: fewer tokens for some prompts; rollouts that meet that are "cut".
        Fewer come back only where someone else aborts requests.

        A server that does not answer, hangs, answers nonsense or samples with other weights than
        it was given is reported to the roster, and its prompts go to the others.

        Raises NoRollouts where no rollout is usable, RequestRefused at once, and the last server's
        ServerUnavailable or UnexpectedAnswer where none is left.
        """
        sampling = Sampling(max_new_tokens, self._rollout.temperature, self._stop_token_ids)
        jobs = self._assign(prompts, max_new_tokens, cap)
        wanted = wanted or len(jobs)
        assert 0 < wanted <= len(jobs), f"{wanted} rollouts wanted of {len(jobs)} started"
        one_by_one = wanted < len(jobs) or self._cut_off is not None
        asked = (
            self._with_quorum(jobs, sampling, wanted)
            if one_by_one
            else self._batched(jobs, sampling)
        )
        generations = self._runner.run(self._watched(asked, policy_version))
        least = self._rollout.keep_aborted_above * max_new_tokens
        usable = [n for n, generation in enumerate(generations) if _usable(generation, least)]
        kept = usable[:wanted]
        gone = sorted(set(range(len(jobs))).difference(kept))
        self._discarded.add((len(jobs[n].prompt.input_ids), generations[n].sampled) for n in gone)
        if not kept:
            raise NoRollouts(
                f"none of {len(jobs)} rollouts is usable: all were aborted or empty; does another "
                "job abort requests on these servers?"
            )
        return [_rollout(jobs[n], generations[n], max_new_tokens) for n in kept]

    def _assign(
        self,
        prompts: Sequence[Prompt],
        length: int,
        cap: Callable[[Sequence[int], int], int] | None,
    ) -> list[_Job]:
        """Neighbouring prompts to one server, the samples of a prompt together: the server's
        prefix cache then computes a prompt once."""
        servers, count = self._pool.usable(), len(prompts)
        return [
            _Job(
                prompt,
                servers[place * len(servers) // count],
                cap(prompt.input_ids, length) if cap else length,
            )
            for place, prompt in enumerate(prompts)
            for _ in range(self._rollout.samples_per_prompt)
        ]

    async def _watched(
        self, asked: Coroutine[None, None, list[Generation]], policy_version: int
    ) -> list[Generation]:
        async with self._pool.watching(policy_version):
            return await asked

    async def _batched(self, jobs: Sequence[_Job], sampling: Sampling) -> list[Generation]:
        """One request a server. Jobs are sorted by server, so the answers join in their order."""
        batches = [
            (server, list(group))
            for server, group in itertools.groupby(jobs, key=lambda job: job.server)
        ]

        async def ask(server: AsyncGenerator, jobs: Sequence[_Job]) -> list[Generation]:
            return await server.generate(
                [job.prompt.input_ids for job in jobs],
                [replace(sampling, max_new_tokens=job.cap) for job in jobs],
            )

        tasks = [
            asyncio.create_task(self._pool.generate(server, group, ask))
            for server, group in batches
        ]
        answers = await all_or_none(tasks)
        return [generation for answer in answers for generation in answer]

    async def _with_quorum(
        self, jobs: Sequence[_Job], sampling: Sampling, wanted: int
    ) -> list[Generation]:
        """One request a rollout, so that each can be aborted once ``wanted`` have finished."""
        requests = [_Request(job.server) for job in jobs]
        for job, request in zip(jobs, requests, strict=True):
            request.task = asyncio.create_task(self._ask(job, request, sampling))
        tasks = [request.task for request in requests]
        try:
            await _wait_for_quorum(tasks, wanted)
            while stragglers := [request for request in requests if not request.task.done()]:
                # A server that cannot be told is on its way out of the roster.
                aborting = (each.server.abort(each.request_id) for each in stragglers)
                await asyncio.gather(*aborting, return_exceptions=True)
                await asyncio.wait([each.task for each in stragglers], timeout=_ABORT_AGAIN_S)
        except BaseException:
            await cancel(tasks)
            raise
        return await all_or_none(tasks)

    async def _ask(self, job: _Job, request: _Request, sampling: Sampling) -> Generation:
        prompt = job.prompt.input_ids

        async def ask(server: AsyncGenerator, _: Sequence[_Job]) -> list[Generation]:
            def fresh_id() -> str:
                request.server, request.request_id = server, next(self._request_ids)
                return request.request_id

            one = [replace(sampling, max_new_tokens=job.cap)]
            if self._cut_off is None:
                return await server.generate([prompt], one, lambda: [fresh_id()])
            return [await server.stream(prompt, one[0], self._cut_off, fresh_id)]

        answers = await self._pool.generate(job.server, [job], ask)
        return answers[0]


async def _open(endpoints: Sequence[Endpoint], roster: Roster, hang_timeout_s: float) -> Pool:
    return Pool(endpoints, roster, hang_timeout_s)


async def _wait_for_quorum(tasks: Sequence[asyncio.Task[Generation]], wanted: int) -> None:
    """Return when ``wanted`` generations have finished by themselves, or no task is left."""
    finished, pending = 0, set(tasks)
    while pending and finished < wanted:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        finished += sum(_finished(task.result()) for task in done)


def _finished(generation: Generation) -> bool:
    return generation.finish_reason != "abort" and len(generation.token_ids) > 0


def _usable(generation: Generation, least: float) -> bool:
    """Whether it may be trained on: finished, or aborted with ``least`` tokens and not without."""
    tokens = len(generation.token_ids)
    return _finished(generation) or (tokens > 0 and tokens >= least)


def _rollout(job: _Job, generation: Generation, length: int) -> Rollout:
    return Rollout(
        prompt_ids=job.prompt.input_ids,
        prefix_ids=generation.token_ids,
        rollout_logprobs=generation.logprobs,
        finish_reason="cut" if _met_its_cap(job, generation, length) else generation.finish_reason,
        policy_version=generation.policy_version,
        prompt_index=job.prompt.index,
        teacher_prompt_ids=job.prompt.teacher_ids,
        domain=job.prompt.domain,
        discarded=generation.discarded,
    )


def _met_its_cap(job: _Job, generation: Generation, length: int) -> bool:
    return generation.finish_reason == "length" and job.cap < length
