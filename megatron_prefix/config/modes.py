"""The settings of the modes (docs/modes.md); the package holds all others and names these too."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class WrittenConfig:
    """Prefixes that are there before the run, each with its prompt: what a teacher wrote
    (``tools/write_answers.py``) or a person."""

    path: str = ""  # as data.path; empty: the rows of data.path
    name: str = ""  # the hub data set's configuration
    split: str = "train"
    prompt_column: str = "prompt"
    # A column of texts, each ended by the student's stop token, or of token ids, taken as they are.
    answer_column: str = "answer"


@dataclass(frozen=True)
class TeacherPromptConfig:
    """The prompt that the teacher reads before a prefix, where it is another than the student's:
    self-distillation with a system prompt, another language or a worked solution."""

    # Takes the place of the prompt's text. {prompt} is that text, {name} any column of the row:
    # "{prompt} A correct solution: {solution}". Of chat messages it is the last one's text.
    template: str = ""
    system_prompt: str = ""  # in place of data.system_prompt; needs a chat template
    # Whose chat template writes it: the student's folder's or the teacher's.
    chat_template_of: str = "student"  # student | teacher
    max_length: int = 0  # tokens; 0: data.max_prompt_length


@dataclass(frozen=True)
class ModeConfig:
    """Who writes a step's prefixes, and what the student learns from them."""

    # on_policy: the student samples | off_policy: they are written beforehand | mixed: some of each
    # batch are; the divergence to the teacher in all three | sft: written, cross-entropy
    name: str = "on_policy"
    written_share: float = 0.5  # mixed: of the rollouts
    warmup_steps: int = 0  # steps as in sft before the mode begins
    # Steps between two copies of the student into the teacher, which begins as the same folder;
    # 0: the teacher stays as it is.
    refresh_teacher_every: int = 0
    written: WrittenConfig = field(default_factory=WrittenConfig)
    teacher_prompt: TeacherPromptConfig = field(default_factory=TeacherPromptConfig)


@dataclass(frozen=True)
class StopTokensConfig:
    """Which tokens end a turn. Empty: those of the student's folder, and teacher, chat template
    and server must mean the same ones."""

    ids: tuple[int, ...] = ()  # the student's turns end at these, whatever the folders say
    # What the teacher writes in place of each of ids: the two change places in its distribution.
    teacher_ids: tuple[int, ...] = ()
