"""Which settings make a run what it is."""

# Those that may differ when a run goes on.
PLACES = ("device", "threads", "data_root", "data", "workers", "skip_corrupt", "save_minutes", "output", "name")


def fixed_settings(settings: dict[str, object]) -> dict[str, object]:
    return {flag: value for flag, value in settings.items() if flag not in PLACES}


def changed_settings(before: dict[str, object], settings: dict[str, object]) -> list[str]:
    """'flag: old -> new' for each fixed setting that differs."""
    return [
        f"{flag}: {before.get(flag)} -> {value}"
        for flag, value in fixed_settings(settings).items()
        if before.get(flag) != value
    ]
