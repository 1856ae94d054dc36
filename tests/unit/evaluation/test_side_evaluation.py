"""Evaluations beside training: who waits for whom, and what a loss, a stop and a resume leave."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.conductor import Conductor, Staff
from megatron_prefix.config import (
    DataConfig,
    EvalConfig,
    LogConfig,
    PrefixConfig,
    Recipe,
    TrainConfig,
)
from megatron_prefix.evaluation.evaluate import EvalResult
from megatron_prefix.modes import (
    asks_servers,
    check_own_servers,
    last_evaluation_due,
    needs_servers,
    needs_shared_servers,
)
from megatron_prefix.orders import Order
from megatron_prefix.prefix import Ledger, ModelShape, build_policy
from megatron_prefix.rollout.pool import Roster
from megatron_prefix.rollout.protocol import NoRollouts, ServerUnavailable, SglangError
from megatron_prefix.run_files.jsonl import read_records
from megatron_prefix.run_files.log import RunLog
from megatron_prefix.types import Rollout
from megatron_prefix.validate.data import check_data

SHAPE = ModelShape(2, 64, 4, 4, 16, 2 * 192, 46)
PREFIX = PrefixConfig("fixed", 3, 9)
URL = "http://evaluation:1"
STEPS, INTERVAL = 12, 4


class OneServer:
    """A fleet of one: it takes what :meth:`took` says, and is gone once lost."""

    def __init__(self) -> None:
        self.holds, self.gone, self.hopeless = -1, False, False

    @property
    def members(self) -> list[str]:
        return [] if self.gone else [URL]

    def usable(self) -> list[str]:
        return self.members

    def in_step(self, version: int) -> bool:
        return not self.gone and self.holds == version

    def expect(self) -> None:
        if self.hopeless:
            raise ServerUnavailable("no SGLang server is left")

    def lose(self, url: str, why: SglangError) -> None:
        self.gone, self.holds = True, -1

    def tell_to(self, tell: Callable[[str], None]) -> None:
        pass


class Answers:
    """An evaluator whose answers come when ``come`` is set; or ``fault``, of its server or not."""

    def __init__(self) -> None:
        self.come, self.fault = threading.Event(), None
        self.asked: list[tuple[int, int]] = []

    def __call__(self, step: int, policy_version: int, roster: Roster | None) -> EvalResult:
        assert roster is not None and roster.version(URL) == policy_version
        self.asked.append((step, policy_version))
        assert self.come.wait(30)
        if isinstance(self.fault, SglangError):
            roster.lose(URL, self.fault)
            assert roster.usable() == []
        if self.fault:
            raise self.fault
        return EvalResult(0.5, (0.1, 0.9), 2, 1, 0, 0, 8, 0.1, (), ((4, 5), (4, 3)))


class Sampled:
    def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        return [Rollout((1, 2), (3,), (0.0,), "stop", 0, 0)]

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert not state


class Run:
    """A conductor on a folder; its servers get the weights whenever it orders so."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.answers, self.server = folder, Answers(), OneServer()
        self.stops = False
        log = LogConfig(tensorboard=False)
        recipe = Recipe(
            prefix=PREFIX,
            train=TrainConfig(steps=STEPS),
            log=log,
            eval=EvalConfig(path="held_out", interval=INTERVAL, own_servers=1, stop_wait_s=0.05),
        )
        staff = Staff(
            policy=build_policy(PREFIX, STEPS),
            source=Sampled(),
            ledger=Ledger(SHAPE, SHAPE, 9),
            open_log=lambda step: RunLog(folder, log, STEPS, resume_step=step),
            decode=str,
            evaluate=self.answers,
            probe=None,
            stop_requested=lambda: self.stops,
            evaluation_fleet=self.server,
        )
        self.conductor = Conductor(recipe, staff)

    def told(self, decide: Callable[[int, int], Order], step: int, most: int = 9) -> list[str]:
        """The orders until one lets the trainer go on; the policy version is the step's."""
        kinds: list[str] = []
        while len(kinds) < most and (not kinds or kinds[-1] in ("sync_evaluation", "wait")):
            kinds.append(decide(step, step).kind)
            if kinds[-1] == "sync_evaluation":
                self.server.holds = step
        return kinds

    def entered(self) -> list[int]:
        return [record["step"] for record in read_records(self.folder / "evaluations.jsonl")]

    def events(self, kind: str) -> list[str]:
        events = read_records(self.folder / "events.jsonl")
        return [event["message"] for event in events if event["kind"] == kind]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.answers.come.set()
    run.conductor.close()


def test_training_goes_on_while_answers_come_and_a_second_evaluation_waits(run: Run) -> None:
    conductor = run.conductor
    assert run.told(conductor.evaluate, 0) == ["sync_evaluation", "nothing"]
    assert [run.told(conductor.order, step) for step in range(4)] == [["train"]] * 4
    assert run.told(conductor.evaluate, 4, most=2) == ["wait", "wait"]
    assert run.entered() == [] and run.answers.asked == [(0, 0)] and run.server.holds == 0
    run.answers.come.set()
    assert run.told(conductor.evaluate, 4)[-2:] == ["sync_evaluation", "nothing"]
    assert run.told(conductor.finish_evaluations, 12)[-1] == "nothing"
    assert run.entered() == [0, 4] and run.answers.asked == [(0, 0), (4, 4)]
    assert run.told(conductor.evaluate, 4) == ["nothing"]  # once a step
    cost = Ledger(SHAPE, SHAPE, 9).measure_answers([(4, 5), (4, 3)]).total
    lines = list(read_records(run.folder / "evaluations.jsonl"))
    assert [line["flops"] for line in lines] == [cost] * 2


def test_a_lost_server_costs_its_evaluation_which_is_made_of_the_weights_there_are(
    run: Run,
) -> None:
    conductor = run.conductor
    run.answers.fault = ServerUnavailable("it hangs")
    run.told(conductor.evaluate, 4)
    run.answers.come.set()
    while not run.server.gone:
        assert run.told(conductor.order, 5) == ["train"]
    assert "after step 4 is lost" in run.events("evaluation")[0]
    assert "it hangs" in run.events("evaluation")[0]
    assert run.told(conductor.order, 6) == ["train"]  # training does not wait for the server
    run.server.gone, run.answers.fault = False, None
    assert run.told(conductor.order, 7) == ["sync_evaluation", "train"]
    assert run.told(conductor.finish_evaluations, 12)[-1] == "nothing"
    assert run.entered() == [7] and run.answers.asked == [(4, 4), (7, 7)]


def test_a_run_whose_evaluations_are_lost_again_and_again_ends_all_the_same(run: Run) -> None:
    run.answers.fault = NoRollouts("12 answers were asked for and 0 came")
    run.answers.come.set()
    run.told(run.conductor.evaluate, 12)
    kinds = []
    while not kinds or kinds[-1] != "nothing":
        run.server.gone = False
        kinds += run.told(run.conductor.finish_evaluations, 12, most=1)
        run.server.holds = 12
    assert len(run.answers.asked) == 4 and run.entered() == []
    told = run.events("evaluation")
    assert ["another is made" in words for words in told] == [True] * 3 + [False]
    assert "no other is made in its place: 12 answers" in told[-1]


def test_the_last_evaluation_waits_for_its_server_to_be_back(run: Run) -> None:
    run.server.gone = True
    assert run.told(run.conductor.evaluate, 12) == ["nothing"]
    assert run.told(run.conductor.finish_evaluations, 12, most=1) == ["wait"]
    run.server.gone = False
    run.answers.come.set()
    assert run.told(run.conductor.finish_evaluations, 12)[-1] == "nothing"
    assert run.entered() == [12]


def test_without_hope_for_a_server_the_run_ends_and_says_so(run: Run) -> None:
    run.server.gone = run.server.hopeless = True
    assert run.told(run.conductor.evaluate, 12) == ["nothing"]
    assert run.told(run.conductor.finish_evaluations, 12) == ["nothing"]
    assert run.events("evaluation") == ["no evaluation of step 12: no SGLang server is left"]


def test_what_is_no_fault_of_a_server_ends_the_run(run: Run) -> None:
    run.answers.fault = ValueError("eval.scorer returned 3")
    run.answers.come.set()
    run.told(run.conductor.evaluate, 0)
    with pytest.raises(ValueError, match="returned 3"):
        run.told(run.conductor.finish_evaluations, 0)


def test_a_stop_waits_a_while_and_a_resumed_run_counts_nothing_twice(run: Run) -> None:
    run.told(run.conductor.evaluate, 0)
    run.answers.come.set()
    run.told(run.conductor.finish_evaluations, 0)
    run.answers.come.clear()
    run.told(run.conductor.evaluate, 4)
    run.stops = True
    assert run.told(run.conductor.order, 6) == ["save_and_stop"]
    run.conductor.stop_evaluations()
    assert "eval.stop_wait_s=0.05" in run.events("evaluation")[-1]
    state = run.conductor.state_dict()
    run.conductor.close()
    again = Run(run.folder)
    again.conductor.resume(6, state)
    again.answers.come.set()
    assert again.told(again.conductor.order, 6) == ["sync_evaluation", "train"]
    assert again.told(again.conductor.finish_evaluations, 8)[-1] == "nothing"
    assert again.entered() == [0, 6]
    again.conductor.close()
    third = Run(run.folder)
    third.conductor.resume(7, state)
    assert third.told(third.conductor.order, 7) == ["train"]
    third.conductor.close()


def test_answers_that_come_while_the_run_stops_are_entered(run: Run) -> None:
    run.told(run.conductor.evaluate, 4)
    run.stops = True
    run.answers.come.set()
    run.told(run.conductor.finish_evaluations, 5)
    assert run.entered() == [4] and run.events("evaluation") == []
    assert run.told(run.conductor.evaluate, 8) == ["nothing"]  # a resumed run's
    assert run.answers.asked == [(4, 4)]


def recipe(name: str = "on_policy", own: int = 1) -> Recipe:
    evaluation = EvalConfig(path="held_out", interval=INTERVAL, own_servers=own)
    whole = Recipe(eval=evaluation, train=TrainConfig(steps=STEPS))
    return Recipe(**{**vars(whole), "mode": type(whole.mode)(name=name)})


def test_weights_go_to_the_servers_of_rollouts_for_no_evaluation_that_is_not_theirs() -> None:
    aside, shared = recipe("sft"), recipe("sft", own=0)
    assert needs_servers(aside) and not needs_shared_servers(aside)
    assert [s for s in range(STEPS + 1) if asks_servers(shared, s)] == [0, 4, 8, 12]
    assert not any(asks_servers(aside, step) for step in range(STEPS + 1))
    assert not asks_servers(recipe(), STEPS) and asks_servers(recipe(own=0), STEPS)
    assert [last_evaluation_due(aside, step) for step in (0, 3, 4, 11, 12)] == [0, 0, 4, 8, 12]


def test_servers_that_are_not_there_are_refused() -> None:
    check_own_servers(recipe(), 2)
    check_own_servers(recipe("sft"), 1)
    check_own_servers(recipe(own=0), 1)
    with pytest.raises(ValueError, match=r"own_servers=1 of 1 server\(s\).*needs 2: raise rollout"):
        check_own_servers(recipe(), 1)
    with pytest.raises(ValueError, match=r"own_servers=3 of 2 server"):
        check_own_servers(recipe("sft", own=3), 2)


def test_a_stop_that_waits_longer_than_the_other_ranks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("{}")
    path = str(tmp_path / "prompts.jsonl")

    def waiting(seconds: float, own: int = 1) -> Recipe:
        held_out = EvalConfig(path=path, own_servers=own, stop_wait_s=seconds)
        return replace(Recipe(), data=DataConfig(path=path), eval=held_out)

    check_data(waiting(510.0))
    check_data(waiting(900.0, own=0))
    with pytest.raises(ValueError, match=r"stop_wait_s=900 must be at most 513: .* set it to 513"):
        check_data(waiting(900.0))
