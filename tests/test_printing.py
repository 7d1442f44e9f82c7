"""A terminal that is gone, a pipe that nobody reads, a locale without the characters: what cannot be printed."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import train

SCRIPT = Path(train.__file__)
ENDS = 60  # seconds, on a busy machine


@pytest.fixture
def flags(tmp_path):
    return ["--dataset", "digits", "--depth", "8", "--threads", "1", "--output", str(tmp_path), "--name", "run"]


def test_a_terminal_that_goes_away_ends_no_training(flags, tmp_path):
    """Its bar fails, too. The process is in no session of the terminal, so that no SIGHUP comes."""
    ours, theirs = pty.openpty()
    command = [sys.executable, SCRIPT, *flags, "--epochs", "3"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""
    while b"epoch 1/3  lr" not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    assert process.wait(ENDS) == 0
    assert (tmp_path / "run/summary.json").exists()


def test_a_pipe_that_nobody_reads_ends_no_training_but_an_evaluation(flags, tmp_path):
    command = [sys.executable, SCRIPT, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--epochs", "3"], **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(ENDS) == 0
        assert process.stderr.read() == ""
    assert (tmp_path / "run/summary.json").exists()

    with subprocess.Popen([*command, "--evaluate", tmp_path / "run/best.pt"], **pipes) as process:
        process.stdout.close()
        assert process.wait(ENDS) == 1
        assert process.stderr.read() == "train.py: [Errno 32] Broken pipe\n"


def test_a_stop_that_cannot_be_said_keeps_its_exit_code(flags):
    """Both are gone when the connection is: the signal is SIGHUP."""
    command = [sys.executable, SCRIPT, *flags, "--epochs", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        process.stderr.close()
        process.terminate()
        assert process.wait(ENDS) == 143


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def output_of():
    """Runs a script, with variables of the environment; what it prints."""

    def run_script(script, *argv, **environment):
        command = [sys.executable, SCRIPT.parent / script, *argv]
        return subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True).stdout

    return run_script


def test_a_name_that_the_locale_lacks_is_printed_all_the_same(flags, tmp_path, output_of):
    flags = [*flags, "--epochs", "1", "--train_size", "16", "--output", str(tmp_path / "café")]
    for again in ((), ("--resume",)):
        assert rb"caf\xe9/run" in output_of("train.py", *flags, *again, PYTHONIOENCODING="ascii")


def test_files_are_utf_8_in_any_locale(flags, tmp_path, output_of):
    small = [*flags, "--epochs", "1", "--train_size", "16", "--output", str(tmp_path / "study")]
    output_of("train.py", *small, **ASCII)
    output_of("scripts/make_tables.py", tmp_path, **ASCII)
    assert "± is the standard deviation" in (tmp_path / "tables.md").read_text(encoding="utf-8")
