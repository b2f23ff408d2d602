"""What is read from outside: one line whatever is in it."""

import os

import pytest

from lora_dist.boundary import boundary, one_line, read_json, read_text, read_yaml_settings
from lora_dist.errors import RunFailed, UserError
from lora_dist.files import remove_ours


@pytest.mark.parametrize("error", [ZeroDivisionError("a\nb"), RecursionError(), MemoryError(), KeyError("x")])
def test_whatever_is_raised_becomes_one_line(error):
    with pytest.raises(UserError) as raised, boundary("--thing x", "use y"):
        raise error
    line = str(raised.value)
    assert line.startswith("--thing x: ") and line.endswith("; use y") and type(error).__name__ in line
    assert "\n" not in line


def test_our_own_one_liners_pass_through():
    with pytest.raises(RunFailed, match="^as it is$"), boundary("--thing x"):
        raise RunFailed("as it is")


def test_one_line_has_no_control_characters_and_an_end():
    line = one_line(ValueError("\x1b[31mred\n" + "long " * 1000))
    assert line.isprintable() and len(line) < 330


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"caf\xe9: 1", "UnicodeDecodeError"),
        (b"a: 1\na: 2", "line 2: a is given twice"),
        (b"a: &x [1]\nb: *x", "aliases"),
        (b"- a", "not a list"),
        (b'a: "\\ud800"', "surrogates not allowed"),
        (b'"\\U0000d800": 1', "surrogates not allowed"),
        (b"1: 2", "not a dict"),
        (b"a: [", "ParserError"),
        (b"[" * 100_000, "nested more than 20 deep"),
        (b"a: !!python/object/apply:os.system ['true']", "ConstructorError"),
        (b"? [a, b]\n: c", "unhashable"),
    ],
)
def test_yaml_that_is_refused(tmp_path, content, says):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"^--config c: .*{says}") as raised:
        read_yaml_settings(tmp_path / "c.yaml", "--config c")
    assert "\n" not in str(raised.value)


def test_yaml_that_is_read(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: [x, y]\r\n")
    assert read_yaml_settings(tmp_path / "c.yaml", "--config") == {"a": 1, "b": ["x", "y"]}
    (tmp_path / "empty.yaml").touch()
    assert read_yaml_settings(tmp_path / "empty.yaml", "--config") == {}


def test_a_pipe_a_folder_and_a_device_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            read_text(path, "--x")
    with pytest.raises(UserError, match="No such file or directory"):
        read_text(tmp_path / "none", "--x")


def test_json_of_another_kind_or_too_deep(tmp_path):
    for content, says in (
        ("[]", "holds a list"),
        ("[" * 100_000, "RecursionError"),
        ("nope", "JSONDecodeError"),
        ('{"a": "\\udc00"}', "surrogates"),
        ('{"a": 1, "a": 2}', "a is given twice"),
    ):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(UserError, match=says):
            read_json(tmp_path / "s.json", "state.json")


def test_only_our_files_are_deleted_and_no_link_is_followed(tmp_path):
    users, ours = tmp_path / "users", tmp_path / "step-00000001"
    for path in (users / "kept.txt", ours / "adapter/a.safetensors", ours / "b.json", ours / "sub/notes.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (ours / "adapter/link").symlink_to(users)
    (ours / "other").symlink_to(users)
    left = remove_ours(ours, ["adapter/*", "b.json"])
    assert sorted(path.name for path in left) == ["notes.txt", "other"]
    assert sorted(path.name for path in ours.iterdir()) == ["other", "sub"] and (users / "kept.txt").exists()
    (tmp_path / "as_link").symlink_to(users)
    assert remove_ours(tmp_path / "as_link", ["*"]) == [tmp_path / "as_link"] and (users / "kept.txt").exists()
    assert remove_ours(tmp_path / "absent", ["*"]) == []
    assert remove_ours(ours, ["*"]) == [] and not ours.exists()
