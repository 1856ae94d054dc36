import json
from pathlib import Path

import pytest

from megatron_prefix.data.tokenizers import (
    check_same_tokenizer,
    load_tokenizer,
    stop_token_ids,
    write_byte_tokenizer,
)
from megatron_prefix.tasks import sort_chain


def byte_folder(folder: Path, eos: object = 261) -> str:
    write_byte_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return str(folder)


def test_a_byte_is_its_own_id_and_text_comes_back_unchanged(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_folder(tmp_path))
    text = "2 + 2 = 4\n\tΣ “quoted” 水 🚀  two  spaces <b>"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    everything = [tokenizer.convert_ids_to_tokens(byte) for byte in range(256)]
    assert len(set(everything)) == 256 and len(tokenizer) == 264


def test_the_byte_tokenizers_chat_template_and_specials(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_folder(tmp_path))
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == [258, ord("a"), 261, 259, ord("b"), 261, 260]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        256,
        257,
        261,
    )
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_folders_with_one_tokenizer_agree(tmp_path: Path) -> None:
    student = byte_folder(tmp_path / "student", eos=[261, 256])
    teacher = byte_folder(tmp_path / "teacher", eos=[256, 261])
    check_same_tokenizer(student, teacher)
    assert stop_token_ids(student) == stop_token_ids(teacher) == (256, 261)


def rename_token(folder: str, old: str, new: str) -> None:
    path = Path(folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab[new] = vocab.pop(old)
    path.write_text(json.dumps(content))


def test_the_first_differing_id_is_named_with_both_tokens(tmp_path: Path) -> None:
    student, teacher = byte_folder(tmp_path / "s"), byte_folder(tmp_path / "t")
    rename_token(teacher, "b", "Zz")
    rename_token(teacher, "a", "Yy")
    with pytest.raises(ValueError, match="first at id 97: 'a' in student.*'Yy' in teacher"):
        check_same_tokenizer(student, teacher)


def test_a_vocabulary_that_goes_on_longer_differs_at_its_first_extra_id(tmp_path: Path) -> None:
    student, teacher = byte_folder(tmp_path / "s"), tmp_path / "t"
    tokenizer = load_tokenizer(student)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(str(teacher))
    with pytest.raises(ValueError, match="first at id 264: no token in student.*'<more>' in"):
        check_same_tokenizer(student, str(teacher))


def test_two_unlike_tokenizers_differ_at_once(tmp_path: Path) -> None:
    student = byte_folder(tmp_path / "s")
    sort_chain.write_tokenizer(tmp_path / "t")
    with pytest.raises(ValueError, match="first at id 0: .* '_' in teacher.hf_path"):
        check_same_tokenizer(student, str(tmp_path / "t"))


def test_a_model_in_the_folder_is_told_what_ends_a_turn(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "vocab_size": 264}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    write_byte_tokenizer(tmp_path)
    assert stop_token_ids(str(tmp_path)) == (261,)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "eos_token_id": 261,
        "vocab_size": 264,
    }


def test_stop_ids_come_from_config_json_where_generation_config_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert stop_token_ids(str(tmp_path)) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 1.0}))
    assert stop_token_ids(str(tmp_path)) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8, 8]}))
    assert stop_token_ids(str(tmp_path)) == (8, 9)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "names no eos_token_id"),
        ({"config.json": "{}"}, "names no eos_token_id"),
        ({"config.json": '{"eos_token_id": null}'}, "names no eos_token_id"),
        ({"config.json": '{"eos_token_id": "</s>"}'}, "eos_token_id='</s>' .* must be an id or a"),
        ({"config.json": "{\n'eos': 1}"}, "config.json is broken JSON: .* line 2"),
        ({"config.json": "[1]"}, "config.json must hold a JSON object"),
    ],
)
def test_a_folder_without_usable_stop_ids_is_refused(
    tmp_path: Path, files: dict[str, str], words: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        stop_token_ids(str(tmp_path))


def test_folders_that_hold_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such model folder: .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no such model folder: .*empty"):
        load_tokenizer("")
    with pytest.raises(ValueError, match="holds no tokenizer; it needs tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version":')
    with pytest.raises(ValueError, match="holds a tokenizer that cannot be read"):
        load_tokenizer(str(tmp_path))


def test_code_in_a_tokenizer_folder_is_never_run(tmp_path: Path) -> None:
    module = "open('ran', 'w').close()\nclass Own:\n    pass\n"
    (tmp_path / "own.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{module}")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()
