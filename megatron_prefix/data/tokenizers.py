"""Tokenizers of Hugging Face folders: loading, comparing, stop ids, and a byte-level one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_SPECIALS = (
    "<pad>",
    "<bos>",
    "<system>",
    "<user>",
    "<assistant>",
    "<end>",
    "<r0>",
    "<r1>",
)
BYTE_CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_NAME_STOP_IDS = ("generation_config.json", "config.json")  # the first that does counts
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "tokenizer_config.json",
)


def load_tokenizer(hf_path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local folder; no code from the folder is ever run.

    Raises ValueError for a missing folder, one without tokenizer files, and unreadable files.
    """
    from transformers import AutoTokenizer

    folder = _folder(hf_path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"{hf_path} holds no tokenizer; it needs {_TOKENIZER_FILES[0]}")
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception for broken files
        reason = " ".join(str(error).split())
        raise ValueError(f"{hf_path} holds a tokenizer that cannot be read: {reason}") from error


def check_same_tokenizer(student_path: str, teacher_path: str, section: str = "teacher") -> None:
    """Raises ValueError where two folders' vocabularies differ.

    The divergence compares the two distributions id by id, so an id must mean one token in both.
    """
    student = _token_of_id(student_path)
    teacher = _token_of_id(teacher_path)
    for place in sorted(student.keys() | teacher.keys()):
        ours, theirs = student.get(place), teacher.get(place)
        if ours != theirs:
            raise ValueError(
                f"tokenizers differ first at id {place}: {_named(ours)} in student.hf_path="
                f"{student_path}, {_named(theirs)} in {section}.hf_path={teacher_path}; "
                f"distillation needs one vocabulary{_elsewhere(ours, teacher, section)}"
                f"{_elsewhere(theirs, student, 'student')}"
            )


def stop_token_ids(hf_path: str) -> tuple[int, ...]:
    """The ids that end a text, ascending: ``eos_token_id`` of generation_config.json, or else of
    config.json. Raises ValueError where neither names one."""
    folder = _folder(hf_path)
    for name in _NAME_STOP_IDS:
        found = _read_json(folder / name).get("eos_token_id")
        if found is not None:
            return _ids(found, folder / name)
    raise ValueError(
        f"{hf_path} names no eos_token_id in generation_config.json or config.json; add it"
    )


def write_byte_tokenizer(folder: str | Path) -> None:
    """Writes a tokenizer of 264 ids: a byte's id is its value, eight specials follow.

    It has a chat template and ends a turn with ``<end>``, its eos; a model that lies in the folder
    already is told so. Text of any language goes through it unchanged, and no vocabulary has to be
    downloaded.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in BYTE_SPECIALS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
        chat_template=BYTE_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))
    end = len(vocab) + BYTE_SPECIALS.index("<end>")
    for file in (Path(folder, name) for name in _NAME_STOP_IDS):
        if file.is_file():
            file.write_text(json.dumps(_read_json(file) | {"eos_token_id": end}, indent=2) + "\n")


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where it is printable Latin-1, else the
    next free code point from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _token_of_id(hf_path: str) -> dict[int, str]:
    return {place: token for token, place in load_tokenizer(hf_path).get_vocab().items()}


def _ids(found: object, path: Path) -> tuple[int, ...]:
    ids = found if isinstance(found, list) else [found]
    if not ids or not all(isinstance(item, int) for item in ids):
        raise ValueError(f"eos_token_id={found!r} in {path} must be an id or a list of ids")
    return tuple(sorted(set(ids)))


def _named(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _elsewhere(token: str | None, vocabulary: dict[int, str], owner: str) -> str:
    """The id that the other tokenizer has for ``token``."""
    places = [place for place, text in vocabulary.items() if text == token]
    return f"; the {owner}'s {token!r} is id {places[0]}" if places else ""


def _folder(hf_path: str) -> Path:
    folder = Path(hf_path).expanduser()
    if not hf_path or not folder.is_dir():
        raise ValueError(f"no such model folder: {hf_path or '(empty)'}; give a local folder")
    return folder


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is broken JSON: {error.msg}, line {error.lineno}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; fetch it again")
    return content
