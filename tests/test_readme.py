import re
from pathlib import Path

import pytest

import train

README = (Path(train.__file__).parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("#")[0].split() for line in re.findall(r"python train\.py (?!--help)[^\n`|]*", README)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example):
    exec(example, {})


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_have_flags_that_exist(command):
    train.parse_arguments(command[2:])


def test_paths_exist():
    root = Path(train.__file__).parent
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / path).exists(), path
