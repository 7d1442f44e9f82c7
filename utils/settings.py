"""Which settings make a run what it is."""

# Those that may differ when a run goes on: where it runs, and how fast. config.json says all that there were.
PLACES = (
    *("device", "threads", "amp", "compile", "workers", "save_minutes"),
    *("data_root", "data", "skip_corrupt", "output", "name"),
)


def fixed_settings(settings: dict[str, object]) -> dict[str, object]:
    return {flag: value for flag, value in settings.items() if flag not in PLACES}


def changed_settings(before: dict[str, object], settings: dict[str, object], defaults: dict[str, object]) -> list[str]:
    """'flag: old -> new' for each fixed setting that differs. A flag that is younger than what was `before` had its
    default."""
    had = defaults | before
    return [
        f"{flag}: {had.get(flag)} -> {value}"
        for flag, value in fixed_settings(settings).items()
        if had.get(flag) != value
    ]
