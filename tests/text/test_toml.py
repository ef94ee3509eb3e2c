"""A text in TOML is read back as it was."""

import tomllib

import pytest

from fastsiu.text.toml import string


@pytest.mark.parametrize(
    "text", ["", 'Zo "Q" \\', "\x7f\x00\n\t", "\u202e\u00dc \U0001f47e", "C:\\Users"]
)
def test_a_string_is_read_back(text):
    written = string(text)
    assert tomllib.loads(f"a = {written}") == {"a": text} and "\n" not in written
