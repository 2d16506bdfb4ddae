"""The exception tree: everything that a person can cause and mend."""


class NasaVideoError(Exception):
    """Base of the errors that the command line prints as one message and turns into a non-zero exit status."""


class InputError(NasaVideoError, ValueError):
    """Something that was given cannot be used; the message says the rule, the value and the way out."""


class OutputError(NasaVideoError):
    """The result could not be written; the message says what was kept and where."""


def format_bytes(size: float) -> str:
    """A size as messages and tables say it, in powers of ten."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= factor / 10:
            return f"{size / factor:.1f} {unit}" if abs(size) >= 10 * factor else f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"
