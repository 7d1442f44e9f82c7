"""argparse with what both training scripts want: one line on stderr for what the user typed wrong, exit code 2."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """--help shows the script's docstring; no flag can be abbreviated."""

    def __init__(self, description: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows every flag)\n")


def number(
    kind: type,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Callable[[str], float]:
    """An argparse type: a finite number of `kind` within the bounds."""
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", at_least), ("at most", at_most), ("above", above), ("below", below))
        if math.isfinite(bound)
    ]
    wanted = f"must be a {'whole ' if kind is int else ''}number, {' and '.join(bounds)}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and at_least <= value <= at_most and above < value < below):
            raise argparse.ArgumentTypeError(f"{wanted}, not {text!r}")
        return value

    return parse


def resnet_depth(text: str) -> int:
    """An argparse type: 6n + 2."""
    if not text.isdecimal() or int(text) < 8 or int(text) % 6 != 2:
        raise argparse.ArgumentTypeError(f"must be 6n + 2 (8, 14, 20, ..., 56, ...), not {text!r}")
    return int(text)


def folder_name(text: str) -> str:
    """An argparse type: the name of one folder."""
    if text in ("", ".", "..") or "/" in text or "\\" in text:
        raise argparse.ArgumentTypeError(f"must be one folder's name, without separators, not {text!r}")
    return text


def usable_device(text: str) -> torch.device:
    """An argparse type: a device that a tensor can be put on."""
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({reason})") from None
