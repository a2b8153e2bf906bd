"""Prompt files of every kind, and what is wrong with bad ones."""

import json

import pytest

from diffdiv.data.prompts import PromptFile

PROMPTS = ["a red seven", "a blue one, on white", "ein Löwe 獅子"]


def content(suffix: str) -> str:
    if suffix == ".txt":
        return "\n  \n".join(PROMPTS) + "\n"
    if suffix == ".csv":
        return "id,prompt\n" + "".join(f'{i},"{p}"\n' for i, p in enumerate(PROMPTS))
    rows = [json.dumps({"prompt": PROMPTS[0]}), json.dumps(PROMPTS[1], ensure_ascii=False)]
    return "\n\n".join([*rows, json.dumps({"prompt": PROMPTS[2], "n": 1})])


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_prompts_are_read_in_order(tmp_path, suffix, encoding):
    path = tmp_path / f"prompts{suffix}"
    path.write_text(content(suffix), encoding=encoding)
    assert PromptFile(path).prompts == PROMPTS


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": [*PROMPTS, None]}), tmp_path / "p.parquet")
    assert PromptFile(tmp_path / "p.parquet").prompts == PROMPTS


def test_each_epoch_uses_every_prompt_once_as_a_function_of_seed_and_index(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(20)))
    prompts = PromptFile(path, seed=1)
    epochs = [[prompts.prompt(i) for i in range(20 * e, 20 * e + 20)] for e in range(2)]
    assert set(epochs[0]) == set(epochs[1]) == set(prompts.prompts) and epochs[0] != epochs[1]
    assert PromptFile(path, seed=1).prompt(7) == epochs[0][7]
    assert [PromptFile(path, seed=2).prompt(i) for i in range(20)] != epochs[0]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", b"", "there is no prompt"),
        ("p.txt", b" \n\t\n", "there is no prompt"),
        ("p.txt", b"fine\na \x1b[31m red\n", r"prompt 2 has the control character '\\x1b'"),
        ("p.txt", b"nul \x00", "control character"),
        ("p.txt", b"\xff\xfea", "not UTF-8"),
        ("p.csv", b"id,text\n1,a\n", "no column 'prompt'"),
        ("p.csv", b"", "no column"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ("p.jsonl", b'{"prompt": 3}', "line 1 is no string"),
        ("p.doc", b"a", "one of .txt"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        PromptFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
