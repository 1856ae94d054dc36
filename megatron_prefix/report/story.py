"""A run folder as the report needs it, whatever is missing, half written or still being written."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_prefix.recipe import RECORD_NAME
from megatron_prefix.run_files import jsonl
from megatron_prefix.run_files.account import Account, read_account
from megatron_prefix.run_files.history import RunHistory, load_run

_ALARMS = ("skipped", "empty", "alarm", "lost", "failed", "warning")


@dataclass(frozen=True)
class Answers:
    """Every answer of one evaluation during training, by row of the data set."""

    step: int
    by_row: Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class RunStory:
    """One run. Records are dictionaries as their JSON lines hold them."""

    label: str  # unique within a report
    folder: Path
    history: RunHistory
    settings: Mapping[str, Any]  # the recipe's record by dotted key; empty where there is none
    probes: tuple[Mapping[str, Any], ...]
    events: tuple[Mapping[str, Any], ...]
    samples: tuple[Mapping[str, Any], ...]  # rollouts of training steps, as text
    answers: tuple[Answers, ...]  # of the first and the last evaluation; one where they are one
    offline: tuple[Mapping[str, Any], ...]  # summaries of `megatron-prefix eval`
    account: Account
    notes: tuple[str, ...]  # what is missing, and what that means

    @property
    def steps(self) -> int:
        return int(self.history.step[-1])

    @property
    def total_steps(self) -> int:
        """The recipe's; 0 where that is not known."""
        return int(self.settings.get("train.steps") or 0)

    @property
    def is_whole(self) -> bool:
        return self.steps >= self.total_steps > 0

    @property
    def alarms(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(event for event in self.events if is_alarm(event))


def is_alarm(event: Mapping[str, Any]) -> bool:
    kind = str(event.get("kind", "")).lower()
    return any(kind.startswith(word) for word in _ALARMS)


def load_stories(folders: Sequence[Path]) -> tuple[RunStory, ...]:
    """A story a folder, in their order, with labels that tell them apart.

    Raises ValueError for a folder that holds no step, one that is named twice, or a broken line.
    """
    if not folders:
        raise ValueError("no run was named: give one or several run folders")
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        refuse_no_run(str(folder))
        if resolved.count(folder.resolve()) > 1:
            raise ValueError(f"{folder} is named twice: name each run once")
    return tuple(
        _story(folder, label) for folder, label in zip(folders, _labels(resolved), strict=True)
    )


def refuse_no_run(text: str) -> Path:
    """The folder of a run that has taken a step; ValueError where it is none."""
    folder = Path(text)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name the folder of a run, like runs/quickstart")
    if next(iter(jsonl.read_records(folder / jsonl.METRICS)), None) is None:
        raise ValueError(f"{folder} holds no step in {jsonl.METRICS}: name the folder of a run")
    return folder


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as tell them apart."""
    depth = 1
    while True:
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            return labels
        depth += 1


def _story(folder: Path, label: str) -> RunStory:
    history = load_run(folder)
    story = RunStory(
        label=label,
        folder=folder,
        history=history,
        settings=_settings(folder / RECORD_NAME),
        probes=tuple(jsonl.read_records(folder / jsonl.PROBES)),
        events=tuple(jsonl.read_records(folder / jsonl.EVENTS)),
        samples=tuple(jsonl.read_records(folder / jsonl.SAMPLES)),
        answers=tuple(_answers(folder / jsonl.EVALUATION_FOLDER)),
        offline=tuple(_offline(folder / "evals")),
        account=read_account(folder),
        notes=(),
    )
    return RunStory(**{**vars(story), "notes": tuple(_notes(story))})


def _settings(path: Path) -> dict[str, Any]:
    """By dotted key. Read as it is, for the record may be of another version than this one."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8") as file:
        content = yaml.load(file, yaml.SafeLoader)
    return dict(flatten(content)) if isinstance(content, dict) else {}


def flatten(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _answers(folder: Path) -> Iterator[Answers]:
    files = sorted(folder.glob("step_*.jsonl"))
    for path in dict.fromkeys([*files[:1], *files[-1:]]):
        records = jsonl.read_records(path)
        step = int(path.stem.removeprefix("step_"))
        yield Answers(step, {record["row"]: record for record in records})


def _offline(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*/summary.json")):
        yield {"name": path.parent.name, **json.loads(path.read_text(encoding="utf-8"))}


def _notes(story: RunStory) -> Iterable[str]:
    if not story.settings:
        yield f"There is no {RECORD_NAME}: how long the run was meant to be is not known."
    elif not story.is_whole:
        yield f"{story.steps} of {story.total_steps} steps: still going, or stopped early."
    if not story.history.evaluations:
        yield "No evaluation: eval.path is not set, or the first one is not done."
    if not story.probes:
        yield "No probes (log.probe_interval=0): the KL beyond the prefix was not watched."
    if story.steps > len(story.history.step):
        missing = story.steps - len(story.history.step)
        yield f"{missing} steps have no line in {jsonl.METRICS}; sums leave them out."
    for name in (jsonl.METRICS, jsonl.EVALUATIONS, jsonl.PROBES, jsonl.EVENTS, jsonl.SAMPLES):
        if jsonl.is_cut(story.folder / name):
            yield f"The last line of {name} is half written and was left out."
