"""The journal says what is done, through kills and changed settings."""

import json
import time

import pytest

from compressor.checkpoint import Journal
from compressor.checkpoint import journal as journal_module
from compressor.errors import EnvironmentProblem, IntegrityError, RecipeError

KEY = {"recipe": {"seed": 0, "bits": 4}, "threads": 2, "device": "cpu"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "work" / "journal.jsonl"


def test_a_new_process_sees_what_was_written(path):
    """Entries come back in order, by kind and by field."""
    journal = Journal(path, KEY)
    for block in range(3):
        journal.append("block", step="quantize", block=block)
    journal.append("step", step="quantize")
    again = Journal(path, KEY)
    assert [entry["block"] for entry in again.entries("block")] == [0, 1, 2]
    assert again.entries("block", block=1)[0]["step"] == "quantize"
    assert again.last("block")["block"] == 2
    assert again.last("export") is None
    assert len(again.entries()) == 4


def test_a_fresh_journal_is_not_a_resumed_one(path):
    """Only entries make a run a resumed one."""
    assert not Journal(path, KEY).is_resumed
    Journal(path, KEY).append("block", block=0)
    assert Journal(path, KEY).is_resumed


def test_lines_carry_the_time(path):
    """Times are unix seconds."""
    before = time.time()
    entry = Journal(path, KEY).append("block", block=0)
    assert before <= entry["time"] <= time.time()


@pytest.mark.parametrize("torn", [b'{"kind": "block", "ti', b'{"kind": "block"}', b"\0\0\0\0", b"\0\0\0\n"])
def test_a_torn_last_line_is_dropped(path, torn):
    """A kill in the middle of a write costs that line; the next one starts clean."""
    Journal(path, KEY).append("block", block=0)
    with path.open("ab") as file:
        file.write(torn)
    journal = Journal(path, KEY)
    assert [entry["block"] for entry in journal.entries()] == [0]
    journal.append("block", block=1)
    assert [entry["block"] for entry in Journal(path, KEY).entries()] == [0, 1]


def test_a_journal_torn_in_its_first_line_starts_anew(path):
    """Without a key nothing has been done."""
    path.parent.mkdir()
    path.write_bytes(b'{"kind": "ke')
    assert Journal(path, KEY).entries() == []
    assert json.loads(path.read_text())["key"] == KEY


def test_a_broken_line_further_up_is_an_error(path):
    """Damage in the middle is no kill; file and line are named."""
    Journal(path, KEY).append("block", block=0)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "garbage", lines[1]]) + "\n")
    with pytest.raises(IntegrityError, match=r"journal\.jsonl:2: "):
        Journal(path, KEY)


def test_another_key_is_refused_part_by_part(path):
    """The message lists what differs, not what is equal, and the way out."""
    Journal(path, KEY)
    with pytest.raises(RecipeError) as caught:
        Journal(path, {"recipe": {"seed": 1, "bits": 4}, "threads": 8, "device": "cpu"})
    message = str(caught.value)
    assert "recipe.seed: was 0, is 1; threads: was 2, is 8. " in message
    assert "--fresh" in message
    assert "bits" not in message
    assert "device" not in message


def test_keys_are_compared_as_json(path):
    """A tuple in the key equals the list that it becomes in the file."""
    Journal(path, {"texts": ("a", "b")})
    assert Journal(path, {"texts": ["a", "b"]}).entries() == []


def test_entries_survive_only_when_written(path, monkeypatch):
    """A full disk leaves no half line behind, so the journal can go on once there is room."""
    journal = Journal(path, KEY)

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "fsync", fail)
        with pytest.raises(EnvironmentProblem, match="No space left"):
            journal.append("block", block=0)
    journal.append("block", block=1)
    assert [entry["block"] for entry in Journal(path, KEY).entries()] == [1]


def test_reserved_fields_are_refused(path):
    """The time is the journal's own."""
    with pytest.raises(ValueError, match="'time'"):
        Journal(path, KEY).append("block", time=3)
