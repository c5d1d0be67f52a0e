"""Rows from files and data sets."""

import json

import pytest

from tasks import data

ROWS = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(3)]
COLUMNS = ("question", "answer")


def read(folder, split="train", columns=COLUMNS, name=None):
    return [row for _, row in data.rows(str(folder), split, columns, name)]


def test_rows_come_from_json_lines_and_lists(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)))
    (tmp_path / "test.json").write_text(json.dumps(ROWS))
    assert read(tmp_path) == read(tmp_path, "test") == ROWS


def test_rows_come_from_a_folder_as_the_hub_has_it(tmp_path, monkeypatch):
    """A data set repository: a card that names the files of a configuration, and parquet files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "repository"
    (repository / "main").mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(repository / "main" / "train-00000-of-00001.parquet")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n---\n"
    )
    assert read(repository, name="main") == read(repository, name=None) == ROWS
    (repository / "README.md").unlink()
    assert read(repository, name="main") == ROWS  # without a card there is but one configuration, of another name
    with pytest.raises(ValueError, match=r"it has no test\.jsonl, and is no data set"):
        read(repository, "test", name="main")


def test_a_number_is_read_as_its_text_where_the_column_may_be_one(tmp_path):
    numbers = ["2", "-7", "2.0", "0.5", "1e-05", "12345678901234567890123", "0"]
    (tmp_path / "train.jsonl").write_text("\n".join(f'{{"question": "?", "answer": {each}}}' for each in numbers))
    read = [row["answer"] for _, row in data.rows(str(tmp_path), "train", COLUMNS, numbers=("answer",))]
    assert read == ["2", "-7", "2.0", "0.5", "0.00001", "12345678901234567890123", "0"]
    for other in ("true", "null", "[2]", '{"is": 2}'):
        (tmp_path / "train.jsonl").write_text(f'{{"question": "?", "answer": {other}}}')
        with pytest.raises(ValueError, match="a row needs"):
            list(data.rows(str(tmp_path), "train", COLUMNS, numbers=("answer",)))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"question": "half a pair: \\ud83d", "answer": "1"}', r"train\.jsonl:1: a row needs"),
        ('{"question": "?", "answer": "1"}\n{oops', r"train\.jsonl:2: not JSON"),
        ('{"question": "?"}', r"train\.jsonl:1: a row needs `question` and `answer`, as text"),
        ('{"question": "?", "answer": 1}', r"train\.jsonl:1: a row needs"),
        ('{"question": "?", "answer": " "}', r"train\.jsonl:1: a row needs"),
        ("[1]", r"train\.jsonl:1: a row needs"),
        ("\n", "its train split is empty"),
        ("[" * 100_000, r"train\.jsonl:1: not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, complaint):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(ValueError, match=r"train\.jsonl:1: not JSON"):
        read(tmp_path)


def test_a_missing_split_and_a_missing_data_set_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"it has no train\.jsonl"):
        read(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor to be had from the hub"):
        read("no/such")
